"""The operations of ``interface`` in plain PyTorch: the reference, and what runs without a GPU.

Rounding follows transformers' Qwen3: norms in float32 (float64 for float64 weights), cast back
before the weight is applied.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.cache import write_rows
from orthrus_fast.kernels.interface import Attend, Kernels
from orthrus_fast.kernels.plain_sampling import choose, sample


def plain_kernels(attend: Attend) -> Kernels:
    """The kernels of plain PyTorch, and ``attend``."""
    return Kernels(attend, qk_norm_rope_write, add_norm, PlainProducts(), sample)


class PlainProducts:
    """``Products`` by the library that PyTorch calls: cuBLAS on a GPU."""

    has_custom: ClassVar[bool] = False

    def partials(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)[None]

    def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    def lm_head_argmax(
        self, x: Tensor, weight: Tensor, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, weight)
        return choose(logits), logits

    def is_custom(self, n_rows: int, weight: Tensor) -> bool:
        return False

    def without_cublas(self, shapes: frozenset[tuple[int, int]]) -> PlainProducts:
        return self


def add_norm(
    x: Tensor, partials: Tensor, weight: Tensor, eps: float, prefetch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``interface.AddNorm``."""
    x = x + sum_partials(partials, x.dtype)
    return x, rms_norm(x, weight, eps)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The partial sums [P, ...] of a product, added in order and rounded once."""
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x scaled to unit root mean square (arXiv 1910.07467), rounded, then times the weight.

    In float32 or wider up to that rounding, as in Qwen3.
    """
    wide = x.to(wide_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and RoPE tables: float32, or float64 where the weights are."""
    return torch.promote_types(dtype, torch.float32)


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
    """See ``interface.QkNormRopeWrite``."""
    n_kv_heads = k_cache.shape[1]
    qkv = sum_partials(partials, k_cache.dtype)
    heads = qkv.view(*qkv.shape[:2], -1, q_norm.shape[0])
    n_heads = heads.shape[-2] - 2 * n_kv_heads
    q, k, v = torch.split(heads, [n_heads, n_kv_heads, n_kv_heads], dim=-2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    k = rotate(rms_norm(k, k_norm, eps), cos, sin)
    write_rows(k_cache, zero_non_finite(k), positions, slot)
    write_rows(v_cache, zero_non_finite(v), positions, slot)
    return rotate(rms_norm(q, q_norm, eps), cos, sin)


def zero_non_finite(x: Tensor) -> Tensor:
    """x with 0 in place of what has overflowed, as it goes to the cache.

    Otherwise it would reach rows that do not see it (0 · NaN is NaN), and the slot's next owner.
    """
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [R, T, heads, head_dim], half-rotation form.

    ``cos`` and ``sin`` [R, T, 1, head_dim] are in x's dtype: transformers rounds them first, too.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
