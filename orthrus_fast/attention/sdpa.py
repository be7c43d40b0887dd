"""The reference backend: PyTorch's scaled_dot_product_attention with an explicit mask.

On the CPU a causal row's bits are a function of its query, its position and the keys up to there.
PyTorch's kernel chooses its steps by the number of queries and of keys that it is given, so it is
given the same number always: tiles of ``ROW_MULTIPLE`` rows of a block, the last one padded, and
whole multiples of ``KEY_MULTIPLE`` keys. How many of these, and how many tiles at once, changes
nothing: a tile of keys that a row sees none of adds zero to its sums.

Shapes: R sequences, T rows of a block, N tiles of rows, G query heads that share a KV head, S keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, arange

from orthrus_fast.attention import Backend
from orthrus_fast.kernels.plain import ROW_MULTIPLE

KEY_MULTIPLE = 512  # keys that PyTorch's CPU kernel takes at once
MASK_BYTES = 32_000_000  # of one call's mask, beyond which tiles take turns


def backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """This backend; it runs everywhere."""
    return Backend("sdpa", attend, lambda capacity: [], row_invariant=device.type == "cpu")


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    slot: Tensor,
    prefetch: Tensor | None = None,
    *,
    causal: bool,
) -> Tensor:
    """See ``kernels.interface.Attend``.

    On the CPU ``start`` decides how much of the cache is read. Elsewhere all of it is, masked: so
    nothing waits for the device, and a CUDA graph can hold the call.
    """
    by = _attend_tiles if start.device.type == "cpu" else _attend_whole
    return by(q, k_cache, v_cache, start, slot, causal=causal)


def _attend_whole(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *, causal: bool
) -> Tensor:
    """``attend`` over all of the cache."""
    if len(k) > 1:  # with one slot there is nothing to gather, and so nothing to copy
        k, v = k[slot], v[slot]
    width, group = q.shape[1], q.shape[2] // k.shape[1]
    row = arange(width, device=start.device)
    last = start[:, None] + (row if causal else width - 1)  # [R, T], or [R, 1]
    mask = _mask(last.expand(-1, width), group, k.shape[2], q.dtype)
    return _attend_rows(q, k, v, mask)


def _attend_tiles(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor, slot: Tensor, *, causal: bool
) -> Tensor:
    """``attend`` on the CPU."""
    n_sequences, width, n_heads, head_dim = q.shape
    n_tiles = -(-width // ROW_MULTIPLE)
    if width % ROW_MULTIPLE:
        q = F.pad(q, (0, 0, 0, 0, 0, n_tiles * ROW_MULTIPLE - width))
    group = n_heads // k_cache.shape[1]
    starts, slots = tuple(start.tolist()), slot.tolist()
    last_row = None if causal else width - 1
    outs = []
    for begin, end, n_keys in _calls(starts, width, n_tiles, group * q.itemsize, causal):
        rows = slice(begin * ROW_MULTIPLE, end * ROW_MULTIPLE)
        n_batch = n_sequences * (end - begin)  # of which one factor is 1
        out = _attend_rows(
            q[:, rows].reshape(n_batch, ROW_MULTIPLE, n_heads, head_dim),
            _first_keys(k_cache, slots, n_keys).expand(n_batch, -1, -1, -1),
            _first_keys(v_cache, slots, n_keys).expand(n_batch, -1, -1, -1),
            _tile_mask(starts, rows.start, rows.stop, last_row, group, n_keys, q.dtype),
        )
        outs.append(out.view(n_sequences, -1, n_heads, head_dim))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out[:, :width].contiguous()


def _calls(
    starts: tuple[int, ...], width: int, n_tiles: int, key_bytes: int, causal: bool
) -> Iterator[tuple[int, int, int]]:
    """(first tile, last + 1, keys) of each call: tiles that see as many keys, within MASK_BYTES.

    Of several sequences the tiles take turns, since a batch has one stride from K to K. A row's
    mask has ``key_bytes`` for each key.
    """
    begin = 0
    while begin < n_tiles:
        n_keys = _n_keys(starts, width, begin, causal)
        most = MASK_BYTES // (ROW_MULTIPLE * n_keys * key_bytes) if len(starts) == 1 else 1
        end = begin + 1
        while end < min(begin + most, n_tiles) and _n_keys(starts, width, end, causal) == n_keys:
            end += 1
        yield begin, end, n_keys
        begin = end


def _n_keys(starts: tuple[int, ...], width: int, tile: int, causal: bool) -> int:
    """The keys that a tile of rows is given: those that it sees, in whole multiples."""
    n_rows = min((tile + 1) * ROW_MULTIPLE, width) if causal else width
    return -(-(max(starts) + n_rows) // KEY_MULTIPLE) * KEY_MULTIPLE


def _first_keys(cache: Tensor, slots: list[int], n_keys: int) -> Tensor:
    """Rows 0 … n_keys - 1 of a layer's K or V, [R, KV, n_keys, D]: past the cache's end, zeros.

    A view, unless they end there or the slots are not neighbours.
    """
    first, n_slots = slots[0], len(slots)
    if slots == list(range(first, first + n_slots)):
        rows = cache[first : first + n_slots, :, :n_keys]
    else:
        rows = cache[slots, :, :n_keys]
    return F.pad(rows, (0, 0, 0, n_keys - rows.shape[2])) if rows.shape[2] < n_keys else rows


@functools.lru_cache(maxsize=1)  # the layers of a pass have the same
def _tile_mask(
    starts: tuple[int, ...],
    begin: int,
    end: int,
    last_row: int | None,
    group: int,
    n_keys: int,
    dtype: torch.dtype,
) -> Tensor:
    """The mask of the tiles that are rows ``begin`` … ``end`` - 1 of each block.

    A row sees the keys up to its own position, or to that of ``last_row``.
    """
    row = arange(begin, end) if last_row is None else torch.full((end - begin,), last_row)
    last = torch.tensor(starts)[:, None] + row
    return _mask(last.view(-1, ROW_MULTIPLE), group, n_keys, dtype, n_shared=int(last.min()) + 1)


def _mask(last: Tensor, group: int, n_keys: int, dtype: torch.dtype, n_shared: int = 0) -> Tensor:
    """[R, 1, G · T, S] to add to the scores, where a row sees up to the key ``last`` [R, T].

    Every row sees the first ``n_shared`` keys, so there is nothing to compare.
    """
    mask = torch.zeros(len(last), group, last.shape[1], n_keys, dtype=dtype, device=last.device)
    hidden = arange(n_shared, n_keys, device=last.device) > last[:, None, :, None]
    mask[..., n_shared:] = mask.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return mask.flatten(1, 2)[:, None]


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [R, T, H, D] over k and v [R, KV, S, D] under ``_mask``'s mask -> like q."""
    n_sequences, width, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    group = n_heads // n_kv_heads
    # Query heads that share a KV head become rows of one product: [R, KV, G · T, D].
    q = q.view(n_sequences, width, n_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(n_sequences, n_kv_heads, group * width, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.view(n_sequences, n_kv_heads, group, width, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_sequences, width, n_heads, head_dim).contiguous()
