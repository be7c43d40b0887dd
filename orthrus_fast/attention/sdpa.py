"""The reference backend: PyTorch's scaled_dot_product_attention with an explicit mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, arange

from orthrus_fast.attention import Backend

# PyTorch's CPU kernel walks the keys in tiles of 512. With whole tiles only, a row's sums run in an
# order that is a function of absolute position, whatever block the row came in, and its bits are
# equal; at 64 they were not (a shorter last tile takes other steps along the keys).
VISIBLE_MULTIPLE = 512


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
    n_rows, width, n_heads, head_dim = q.shape
    n_kv_heads, capacity = k_cache.shape[1:3]
    group = n_heads // n_kv_heads
    visible = capacity
    if start.device.type == "cpu":
        visible = -(-(int(start.max()) + width) // VISIBLE_MULTIPLE) * VISIBLE_MULTIPLE
        visible = min(visible, capacity)
    k, v = k_cache[:, :, :visible], v_cache[:, :, :visible]
    if k_cache.shape[0] > 1:  # with one slot there is nothing to gather, and so nothing to copy
        k, v = k[slot], v[slot]
    mask = _visible_keys(start, width, visible, causal=causal)
    # Query heads that share a KV head become rows of one product: [R, n_kv_heads, group · T, D].
    q = q.view(n_rows, width, n_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    q = q.reshape(n_rows, n_kv_heads, group * width, head_dim)
    mask = mask[:, None, None].expand(-1, 1, group, -1, -1).reshape(n_rows, 1, -1, visible)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    out = out.view(n_rows, n_kv_heads, group, width, head_dim).permute(0, 3, 1, 2, 4)
    return out.reshape(n_rows, width, n_heads, head_dim).contiguous()


def _visible_keys(start: Tensor, width: int, visible: int, *, causal: bool) -> Tensor:
    """Boolean [R, T, visible]: which keys each row may see."""
    key = arange(visible, device=start.device)
    row = arange(width, device=start.device)
    last = start[:, None] + (row if causal else width - 1)  # [R, T], or [R, 1]
    return (key <= last[:, :, None]).expand(-1, width, -1)
