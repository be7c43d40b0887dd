"""Between the fused projection and attention: qk-norm, rotary embedding and the cache write.

One kernel for what ``plain.qk_norm_rope_write`` does in PyTorch, op by op with
the same rounding: only the order in which the norm's mean is summed differs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.norm import sum_partials
from orthrus_fast.kernels.overlap import overlaps, release, wait

# Heads of one kind that a program takes, whether there are so many or not, so that its layout
# follows no count: 4 x 64 elements load 16 bytes a lane.
HEADS = 4


@triton.jit
def _norm_and_rotate(  # type: ignore[no-untyped-def]
    first, second, weight, cos, sin, EPS: tl.constexpr, HALF: tl.constexpr
):
    """Both halves [HEADS, HALF] of some heads -> the same, in the model's dtype.

    Every product is rounded to that dtype before it is used, as eager PyTorch rounds it.
    """
    dtype = first.dtype
    column = tl.arange(0, HALF)
    first, second = first.to(tl.float32), second.to(tl.float32)
    mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) * (0.5 / HALF)
    scale = tl.rsqrt(mean + EPS)[:, None]
    first_weight = tl.load(weight + column).to(tl.float32)
    second_weight = tl.load(weight + HALF + column).to(tl.float32)
    first = ((first * scale).to(dtype).to(tl.float32) * first_weight).to(dtype).to(tl.float32)
    second = ((second * scale).to(dtype).to(tl.float32) * second_weight).to(dtype).to(tl.float32)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    first_by_cos, first_by_sin = (first * cos).to(dtype), (first * sin).to(dtype)
    second_by_cos, second_by_sin = (second * cos).to(dtype), (second * sin).to(dtype)
    rotated_first = first_by_cos.to(tl.float32) - second_by_sin.to(tl.float32)
    rotated_second = second_by_cos.to(tl.float32) + first_by_sin.to(tl.float32)
    return rotated_first.to(dtype), rotated_second.to(dtype)


@triton.jit
def _zero_non_finite(value):  # type: ignore[no-untyped-def]
    """See ``plain.zero_non_finite``."""
    return tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0).to(value.dtype)


@triton.jit
def _qk_norm_rope_write_kernel(  # type: ignore[no-untyped-def]
    qkv, q_norm, k_norm, cos, sin, positions, slot, q, k_cache, v_cache, capacity, n_elements,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, EPS: tl.constexpr, N_PARTIALS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (t, r, group): HEADS neighbouring heads of one row, all of them q, k or v heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_GROUPS: tl.constexpr = (N_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (N_KV_HEADS + HEADS - 1) // HEADS
    # 64 bits from here on: the cache may hold more than 2**31 elements.
    r = tl.program_id(1).to(tl.int64)
    row = r * tl.num_programs(0) + tl.program_id(0)
    group = tl.program_id(2)
    is_q, is_v = group < Q_GROUPS, group >= Q_GROUPS + KV_GROUPS
    n_heads = tl.where(is_q, N_HEADS, N_KV_HEADS)  # of this kind
    before = tl.where(is_q, 0, tl.where(is_v, N_HEADS + N_KV_HEADS, N_HEADS))
    group -= tl.where(is_q, 0, tl.where(is_v, Q_GROUPS + KV_GROUPS, Q_GROUPS))
    head = group * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < n_heads) & (column < HALF)

    # Released after the wait: the next kernel then starts knowing that all before this are done.
    wait(OVERLAP)
    release(OVERLAP)
    cos_row = tl.load(cos + row * HEAD_DIM + column)  # its second half repeats the first
    sin_row = tl.load(sin + row * HEAD_DIM + column)
    slot_row = tl.load(slot + r) * N_KV_HEADS * capacity + tl.load(positions + row)
    source = qkv + (row * (N_HEADS + 2 * N_KV_HEADS) + before + head) * HEAD_DIM + column
    first = sum_partials(source, n_elements, inside, N_PARTIALS).to(q.dtype.element_ty)
    second = sum_partials(source + HALF, n_elements, inside, N_PARTIALS).to(q.dtype.element_ty)

    if is_q:
        first, second = _norm_and_rotate(first, second, q_norm, cos_row, sin_row, EPS, HALF)
        target = q + (row * N_HEADS + head) * HEAD_DIM + column
    else:
        in_cache = (slot_row + head.to(tl.int64) * capacity) * HEAD_DIM + column
        if is_v:
            target = v_cache + in_cache
        else:
            first, second = _norm_and_rotate(first, second, k_norm, cos_row, sin_row, EPS, HALF)
            target = k_cache + in_cache
        first, second = _zero_non_finite(first), _zero_non_finite(second)
    tl.store(target, first, mask=inside)
    tl.store(target + HALF, second, mask=inside)


def qk_norm_rope_write(
    partials: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """See ``interface.QkNormRopeWrite``.

    Partials are added pairwise, then rounded to the cache's dtype. All tensors are contiguous,
    bfloat16, float16 or float32 throughout; head_dim is a power of two; the second half of ``cos``
    and ``sin`` repeats the first. A row's results depend on that row alone.
    """
    q = _empty_q(partials, q_norm, k_cache)
    n_rows, width, n_heads, head_dim = q.shape
    _, n_kv_heads, capacity, _ = k_cache.shape
    assert partials.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    assert cos.shape == sin.shape == (n_rows, width, head_dim)
    assert cos.is_contiguous() and sin.is_contiguous() and positions.is_contiguous()
    overlap = overlaps(q.device)
    n_groups = triton.cdiv(n_heads, HEADS) + 2 * triton.cdiv(n_kv_heads, HEADS)
    grid = (width, n_rows, n_groups)
    launch: Any = _qk_norm_rope_write_kernel[grid]
    launch(
        *(partials, q_norm, k_norm, cos, sin, positions, slot, q, k_cache, v_cache, capacity),
        *(partials[0].numel(), n_heads, n_kv_heads, head_dim, HEADS, eps, len(partials), overlap),
        num_warps=1,
        launch_pdl=overlap,
        enable_fp_fusion=False,  # in float32 a fused x * cos + y * sin would skip a rounding
    )
    return q


def _empty_q(partials: Tensor, q_norm: Tensor, k_cache: Tensor) -> Tensor:
    _, n_rows, width, n_features = partials.shape
    head_dim = q_norm.shape[0]
    return k_cache.new_empty(n_rows, width, n_features // head_dim - 2 * k_cache.shape[1], head_dim)


qk_norm_rope_write_op = torch.library.custom_op(
    "orthrus_fast::qk_norm_rope_write", qk_norm_rope_write, mutates_args=("k_cache", "v_cache")
)
qk_norm_rope_write_op.register_fake(
    lambda partials, q_norm, *rest: _empty_q(partials, q_norm, k_cache=rest[-2])
)
