"""Attention of blocks of any width over a long cache, in Triton: the keys are split over the chip.

Each program walks the tiles of one split with an online softmax (Milakov & Gimelshein 2018, arXiv
1805.02867) and leaves a partial result; a second kernel joins the splits (Flash-Decoding, Dao et
al. 2023). A long block fills the chip by its rows: there a program walks all splits and joins as it
goes. Query rows that share a KV head are packed into one tile.

A causal row's bits depend on its query and on the keys up to its position alone, at every width:
tiles and splits begin at fixed positions, the warps of a tile share its rows and never its keys, a
split's sums start afresh and are joined to those before them, one after another, by the same
arithmetic in both kernels, and a tile or split of which a row sees nothing changes none of its
sums. Fused operations are written as such: the compiler fuses nothing by itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.attention import Backend
from orthrus_fast.errors import UnsupportedError
from orthrus_fast.kernels.overlap import fetch, first_rows, overlaps, release, wait
from orthrus_fast.kernels.select import why_no_triton
from orthrus_fast.kernels.tiles import shared_memory

Bands: TypeAlias = "tuple[tuple[int, int | None], ...]"

# (keys in a split, position up to which): short splits first, so that a short context fills the
# chip; longer ones later, so that a long one does not drown in partial results.
SPLITS: Bands = ((256, 4352), (512, 8448), (1024, None))
KEY_TILE = 64  # the longest tile of keys; shorter ones divide it, and it divides S and every split
LONG_BLOCK = 256  # query rows per KV head past which they fill the chip without splitting the keys
MANY_TILES = 128  # of rows, of all slots, which do so, too
MANY_SPLITS = 18  # from which 128 rows are better read by one tile, and rows joined in parts
PREFETCH_LIMIT = 8 * 2**20  # bytes of the next weight: the best of what was timed
JOIN_UNROLL = 8  # partial results that the second kernel loads before it joins them


class Chip(NamedTuple):
    """What of a GPU the tiles follow: 90 for capability 9.0, and bytes that one block may use."""

    capability: int
    shared_memory: int


class Tiles(NamedTuple):
    """What a program of the first kernel holds: rows of queries, keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """This backend. Raises UnsupportedError where its kernels cannot run."""
    obstacle = why_no_triton(device, dtype, head_dim)
    if obstacle:
        raise UnsupportedError(f"attention 'triton': {obstacle}; use 'auto' or 'sdpa'")
    return Backend("triton", attend, split_boundaries, row_invariant=True)


def choose_tiles(n_rows: int, n_splits: int, head_dim: int, itemsize: int, chip: Chip) -> Tiles:
    """Tiles for ``n_rows`` query rows per KV head, such that all of one chip and dtype agree.

    In 2 bytes that is 64 keys and 16 rows a warp: sums over keys then lie alike within a warp
    (measured on an H100). Elsewhere, and with sm_100's tensor memory, where it was not, one tile
    serves every number of rows. Two tiles of 64 rows are sooner done than one of 128; but that one
    reads the keys once, and wins where there are many.
    """
    large = chip.shared_memory >= 160 * 1024
    if itemsize == 4:  # no matrix unit multiplies fp32: larger tiles overflow the registers
        return Tiles(32, 32 if head_dim <= 64 else 16, 4, 2)
    if head_dim > 128:
        return Tiles(64, 64 if large else 32, 8, 2)
    if 100 <= chip.capability < 120:
        return Tiles(64, 64, 4, 4 if large else 2)
    # Where there is no wgmma, Triton lays warps over rows only if these are as many as a head's
    # dimensions; over keys, the sums would be others than those of the tiles above and below.
    over_rows = chip.capability == 90 or head_dim <= 64
    if n_rows <= 16 and not over_rows:
        return Tiles(16, 64, 1, 3 if large else 2)  # fewer stages, more programs side by side
    tall = n_rows > LONG_BLOCK or (n_rows >= 128 and n_splits > MANY_SPLITS)
    if tall or not over_rows:
        return Tiles(128, 64, 8, 3 if large else 2)
    return Tiles(64, 64, 4, 4 if large else 2)


def _fills_the_chip(n_rows: int, n_splits: int, n_tiles: int) -> bool:
    """Whether ``n_tiles`` of rows, of all slots, are programs enough without splitting the keys."""
    no_slot_is_long = n_splits <= MANY_SPLITS  # which the others would wait for
    return n_rows > LONG_BLOCK or n_splits == 1 or (n_tiles >= MANY_TILES and no_slot_is_long)


def _joined_at_once(n_rows: int, n_splits: int, head_dim: int) -> int:
    """How many of a row's dimensions one program of the second kernel joins."""
    if n_splits <= MANY_SPLITS:
        return head_dim
    return min(head_dim, 32 if n_rows >= 128 else 64)


def split_boundaries(capacity: int, bands: Bands = SPLITS) -> list[int]:
    """The positions below ``capacity`` at which a split of the keys begins."""
    boundaries: list[int] = []
    begin = 0
    for size, until in bands:
        end = capacity if until is None else min(until, capacity)
        boundaries.extend(range(begin, end, size))
        begin = end
    return boundaries


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    slot: Tensor,
    prefetch: Tensor | None = None,
    *,
    causal: bool,
    bands: Bands = SPLITS,
    tiles: Tiles | None = None,
) -> Tensor:
    """See ``kernels.interface.Attend``. Reads nothing on the host.

    bfloat16, float16 or float32; head_dim a power of two from 16 to 256; S a multiple of KEY_TILE.
    ``start`` and ``slot`` are read while the kernel launched last may still run: it must not write
    them, nor let this one start before what wrote them is done (qk_norm_rope_write keeps to that).
    """
    n_blocks, width, n_heads, head_dim = q.shape
    n_kv_heads, capacity = k_cache.shape[1:3]
    assert q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert capacity % KEY_TILE == 0 and n_heads % n_kv_heads == 0
    n_rows = width * n_heads // n_kv_heads
    n_splits = len(split_boundaries(capacity, bands))
    tiles = tiles or choose_tiles(n_rows, n_splits, head_dim, q.itemsize, _chip(q.device))
    n_tiles = n_kv_heads * triton.cdiv(n_rows, tiles.rows)
    walks = _fills_the_chip(n_rows, n_splits, n_blocks * n_tiles)
    stages = min(tiles.num_stages, 3) if walks else tiles.num_stages  # two programs side by side
    out, overlap = torch.empty_like(q), overlaps(q.device)
    shape = (0,) if walks else (n_blocks, n_kv_heads, n_splits, n_rows)
    partial_max, partial_sum = (q.new_empty(shape, dtype=torch.float32) for _ in range(2))
    partial_acc = partial_max.new_empty(*shape, head_dim)
    common = (width, n_splits, n_heads, n_kv_heads, head_dim, _lines(bands), causal, overlap)
    _split_kernel[1 if walks else n_splits, n_tiles, n_blocks](
        *(q, k_cache, v_cache, start, slot, out, partial_max, partial_sum, partial_acc),
        *(q if prefetch is None else prefetch, capacity),
        *common,
        *(walks, tiles.rows, tiles.keys, tuple(first_rows(prefetch, PREFETCH_LIMIT))),
        num_warps=tiles.num_warps,
        num_stages=stages,
        enable_fp_fusion=False,
        launch_pdl=overlap,
    )
    if not walks:
        n_dims = _joined_at_once(n_rows, n_splits, head_dim)
        _join_kernel[n_heads * (head_dim // n_dims), width, n_blocks](
            *(partial_max, partial_sum, partial_acc, start, out, *common, n_dims, JOIN_UNROLL),
            **{"num_warps": 1, "enable_fp_fusion": False, "launch_pdl": overlap},
        )
    return out


@functools.cache
def _lines(bands: Bands) -> tuple[tuple[int, int], ...]:
    """(size, offset) of each band: split i begins at the largest of ``size · i - offset``.

    For the begins are a piecewise linear function of i, convex because splits only grow.
    """
    lines, begin, n_before, last_size = [], 0, 0, 0
    for size, until in bands:
        assert size % KEY_TILE == 0 and size > last_size
        lines.append((size, size * n_before - begin))
        if until is not None:
            assert (until - begin) % size == 0
            n_before, begin, last_size = n_before + (until - begin) // size, until, size
    return tuple(lines)


@functools.cache
def _chip(device: torch.device) -> Chip:
    """The chip of ``device``; on the CPU, for Triton's interpreter, the smallest one."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 6)
    return Chip(10 * major + minor, shared_memory(device))


@triton.jit
def _split_begin(split, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    begin = split * 0
    for band in tl.static_range(len(LINES)):
        begin = tl.maximum(begin, split * LINES[band][0] - LINES[band][1])
    return begin


@triton.jit
def _splits_of(length, LINES: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many splits hold the first ``length`` keys."""
    n_splits = length
    for band in tl.static_range(len(LINES)):
        size, offset = LINES[band][0], LINES[band][1]
        n_splits = tl.minimum(n_splits, (length + offset + size - 1) // size)
    return n_splits


@triton.jit
def _visible(key, last):  # type: ignore[no-untyped-def]
    """[rows, keys]: a row sees the keys up to its last one."""
    return key[None, :] <= last[:, None]


@triton.jit
def _keys_of(  # type: ignore[no-untyped-def]
    split, length, first_row, t,
    width, GROUP: tl.constexpr, LINES: tl.constexpr, CAUSAL: tl.constexpr,
    WALKS: tl.constexpr, ROW_TILE: tl.constexpr,
):  # fmt: skip
    """The keys of one split, or of all, that a tile of rows sees: begin, end, each row's last."""
    if CAUSAL:
        last = length - width + t
        # Tiles past the lowest row's position are seen by no row.
        end = tl.minimum(length, length - width + (first_row + ROW_TILE - 1) // GROUP + 1)
    else:
        last = length - 1 + 0 * t
        end = length
    begin = 0
    if not WALKS:
        begin = _split_begin(split, LINES)
        end = tl.minimum(end, _split_begin(split + 1, LINES))
    return begin, end, last


@triton.jit
def _nothing(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The maximum, sum and weighted values of rows that have seen no key."""
    row_max = tl.full((ROWS,), -float("inf"), tl.float32)
    return row_max, tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, HEAD_DIM), tl.float32)


@triton.jit
def _attend_tile(queries, keys, values, seen, sums, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The running maximum, sum and weighted values of each row, with one more tile of keys.

    The maximum is that of the scores before they are scaled. ``seen`` None: all are.
    """
    row_max, row_sum, acc = sums
    scores = tl.dot(queries, tl.trans(tl.load(keys)), input_precision="ieee")
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == -float("inf"), 0.0, new_max)  # of a row that has seen no key yet
    weights = tl.exp2(tl.fma(scores, SCALE, (base * -SCALE)[:, None]))
    shrink = tl.exp2((row_max - base) * SCALE)
    value = tl.load(values)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee")
    return new_max, tl.fma(row_sum, shrink, tl.sum(weights, 1)), acc


@triton.jit
def _join_weights(row_max, part_max, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The maximum with one more split, and by what the sums so far and the split's count now.

    A split of which a row saw nothing counts 0, and the sums so far 1. Key 0, which every row sees,
    is in the first split: the new maximum is finite.
    """
    new_max = tl.maximum(row_max, part_max)
    return new_max, tl.exp2((row_max - new_max) * SCALE), tl.exp2((part_max - new_max) * SCALE)


@triton.jit
def _join(total, shrink, part, weight):  # type: ignore[no-untyped-def]
    """A sum over the splits so far and over one more, which are weighted as above."""
    return tl.fma(total, shrink, part * weight)


@triton.jit
def _join_rows(sums, part, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The maximum, sum and weighted values of each row, with one more split."""
    row_max, shrink, weight = _join_weights(sums[0], part[0], SCALE)
    row_sum = _join(sums[1], shrink, part[1], weight)
    return row_max, row_sum, _join(sums[2], shrink[:, None], part[2], weight[:, None])


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    queries, keys, values, split, end, n_seen_by_all, last, SCALE: tl.constexpr,
    HEAD_DIM: tl.constexpr, LINES: tl.constexpr, WALKS: tl.constexpr, ROW_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
):  # fmt: skip
    """The maximum, sum and weighted values of each row over the keys of a split, up to ``end``."""
    key, dim = tl.arange(0, KEY_TILE), tl.arange(0, HEAD_DIM)
    inner = key[:, None] * HEAD_DIM + dim[None, :]  # of a tile, which is whole: it divides S
    part = _nothing(ROW_TILE, HEAD_DIM)
    begin, end = _split_begin(split, LINES), tl.minimum(end, _split_begin(split + 1, LINES))
    if WALKS:  # most tiles are seen whole, and are sooner done without a mask
        n_whole = tl.maximum(tl.minimum(end, n_seen_by_all) - begin, 0) // KEY_TILE
        for first in range(begin, begin + n_whole * KEY_TILE, KEY_TILE):
            tile = first * HEAD_DIM + inner
            part = _attend_tile(queries, keys + tile, values + tile, None, part, SCALE)
        begin += n_whole * KEY_TILE
    for first in range(begin, end, KEY_TILE):
        tile, seen = first * HEAD_DIM + inner, _visible(first + key, last)
        part = _attend_tile(queries, keys + tile, values + tile, seen, part, SCALE)
    return part


@triton.jit(do_not_specialize=["width", "n_splits"])  # one binary for blocks of every width
def _split_kernel(  # type: ignore[no-untyped-def]
    q, k_cache, v_cache, start, slot, out, partial_max, partial_sum, partial_acc, prefetch,
    capacity, width, n_splits,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr, CAUSAL: tl.constexpr, OVERLAP: tl.constexpr, WALKS: tl.constexpr,
    ROW_TILE: tl.constexpr, KEY_TILE: tl.constexpr, REGION: tl.constexpr,
):  # fmt: skip
    """One split, or, if it ``WALKS``, all of them, for one tile of rows that share a KV head."""
    GROUP: tl.constexpr = N_HEADS // N_KV_HEADS
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5  # log2(e) / sqrt(D), for exp2
    n_rows = width * GROUP
    split = tl.program_id(0)
    kv_head = tl.program_id(1) % N_KV_HEADS
    # The last rows see most keys: they go first, so that short work is left for the end.
    first_row = (tl.cdiv(n_rows, ROW_TILE) - 1 - tl.program_id(1) // N_KV_HEADS) * ROW_TILE
    block = tl.program_id(2).to(tl.int64)

    release(OVERLAP)
    row = first_row + tl.arange(0, ROW_TILE)
    t = row // GROUP
    length = tl.load(start + block).to(tl.int32) + width
    begin, end, last = _keys_of(
        split, length, first_row, t, width, GROUP, LINES, CAUSAL, WALKS, ROW_TILE
    )
    if begin >= end:
        return
    dim = tl.arange(0, HEAD_DIM)
    q_row = (block * width + t) * N_HEADS + kv_head * GROUP + row % GROUP
    in_block = (row < n_rows)[:, None]
    cache_row = (tl.load(slot + block).to(tl.int64) * N_KV_HEADS + kv_head) * capacity * HEAD_DIM
    wait(OVERLAP)
    queries = tl.load(q + q_row[:, None] * HEAD_DIM + dim[None, :], mask=in_block, other=0.0)
    n_seen_by_all = length - width + first_row // GROUP + 1 if CAUSAL else length
    sums = _nothing(ROW_TILE, HEAD_DIM)  # of the splits that are joined
    # A loop within a loop: where one loop joined at a split's end, its products would run in turn.
    for at_split in range(split, _splits_of(end, LINES) if WALKS else split + 1):
        part = _attend_split(
            queries, k_cache + cache_row, v_cache + cache_row, at_split, end, n_seen_by_all, last,
            SCALE, HEAD_DIM, LINES, WALKS, ROW_TILE, KEY_TILE,
        )  # fmt: skip
        sums = _join_rows(sums, part, SCALE) if WALKS else part
    if block == 0:  # now that its keys and values are here
        n_programs = tl.num_programs(1) * (1 if WALKS else _splits_of(length, LINES))
        program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        fetch(prefetch, program, n_programs, REGION, OVERLAP)
    if WALKS:
        result = (sums[2] / sums[1][:, None]).to(out.dtype.element_ty)
        tl.store(out + q_row[:, None] * HEAD_DIM + dim[None, :], result, mask=in_block)
    else:
        p_row = ((block * N_KV_HEADS + kv_head) * n_splits + split) * n_rows + row
        tl.store(partial_max + p_row, sums[0], mask=row < n_rows)
        tl.store(partial_sum + p_row, sums[1], mask=row < n_rows)
        tl.store(partial_acc + p_row[:, None] * HEAD_DIM + dim[None, :], sums[2], mask=in_block)


@triton.jit(do_not_specialize=["width", "n_splits"])
def _join_kernel(  # type: ignore[no-untyped-def]
    partial_max, partial_sum, partial_acc, start, out, width, n_splits,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    LINES: tl.constexpr, CAUSAL: tl.constexpr, OVERLAP: tl.constexpr, N_DIMS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Join the splits that a row of one head sees, N_DIMS of its dimensions."""
    GROUP: tl.constexpr = N_HEADS // N_KV_HEADS
    SCALE: tl.constexpr = 1.4426950408889634 / HEAD_DIM**0.5
    PARTS: tl.constexpr = HEAD_DIM // N_DIMS
    head, t, block = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2).to(tl.int64)
    release(OVERLAP)
    n_visible = tl.load(start + block).to(tl.int32) + (t + 1 if CAUSAL else width)
    n_seen = _splits_of(n_visible, LINES)
    first_split = (block * N_KV_HEADS + head // GROUP) * n_splits
    dim = tl.program_id(0) % PARTS * N_DIMS + tl.arange(0, N_DIMS)
    row_max = -float("inf")
    row_sum = 0.0
    acc = tl.zeros((N_DIMS,), tl.float32)
    wait(OVERLAP)
    for first in range(0, n_seen, UNROLL):
        for i in tl.static_range(UNROLL):
            split = first + i
            p_row = (first_split + split) * (width * GROUP) + t * GROUP + head % GROUP
            values = partial_acc + p_row * HEAD_DIM + dim
            part_max = tl.load(partial_max + p_row, mask=split < n_seen, other=-float("inf"))
            part_sum = tl.load(partial_sum + p_row, mask=split < n_seen, other=0.0)
            part_acc = tl.load(values, mask=split + 0 * dim < n_seen, other=0.0)
            row_max, shrink, weight = _join_weights(row_max, part_max, SCALE)
            row_sum = _join(row_sum, shrink, part_sum, weight)
            acc = _join(acc, shrink, part_acc, weight)
    o_row = (block * width + t) * N_HEADS + head
    tl.store(out + o_row * HEAD_DIM + dim, (acc / row_sum).to(out.dtype.element_ty))
