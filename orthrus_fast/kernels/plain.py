"""The operations of ``interface`` in plain PyTorch: the reference, and what runs without a GPU.

Rounding follows transformers' Qwen3: norms in float32 (float64 for float64 weights), cast back
before the weight is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.cache import write_rows
from orthrus_fast.kernels.formats import dequantize
from orthrus_fast.kernels.interface import Attend, Kernels, Weight
from orthrus_fast.kernels.plain_sampling import choose, logprobs, sample

ROW_MULTIPLE = 16  # of rows that a CPU's library multiplies at once, and of queries that attend
MOST_OF_A_THREAD = 2**15 - 1  # numbers; PyTorch shares larger tensors among its threads


def padded_linear(x: Tensor, weight: Tensor, row_multiple: int, gated: bool) -> Tensor:
    """x [..., K] times weight [N, K] transposed; on a CPU with rows up to a multiple, all zeros.

    ``gated``: then SwiGLU of its two halves, [..., N / 2].
    """
    rows = x.reshape(-1, x.shape[-1])
    n_rows = len(rows)
    if x.device.type == "cpu" and n_rows % row_multiple:
        rows = F.pad(rows, (0, 0, 0, -n_rows % row_multiple))
    out = F.linear(rows, weight)[:n_rows]
    out = gate_up(out) if gated else out
    return out.view(*x.shape[:-1], -1)


def gate_up(rows: Tensor) -> Tensor:
    """rows [M, 2 · I], gate and up -> silu(gate) · up [M, I].

    PyTorch's silu on the CPU takes another exp for the last few numbers of a row, and of what a
    thread is given. So it is given whole rows for each thread, or too little to share at all.
    """
    gate, up = rows.chunk(2, dim=-1)
    n_rows, size = gate.shape
    n_alone = max(1, MOST_OF_A_THREAD // size)
    if rows.device.type != "cpu" or n_rows <= n_alone:
        return F.silu(gate) * up
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    n_threads = torch.get_num_threads()
    n_shared = n_rows // n_threads * n_threads
    # Not a share for every thread; or a row alone would be shared, too.
    if n_shared * size <= n_threads * MOST_OF_A_THREAD or size > MOST_OF_A_THREAD:
        n_shared = 0
    ends = [*range(n_shared, n_rows, n_alone), n_rows]
    for begin, end in pairwise([0, *ends] if n_shared else ends):
        torch.mul(F.silu(gate[begin:end]), up[begin:end], out=out[begin:end])
    return out


# The same as a custom operator: a compiler calls it without looking inside.
padded_linear_op: Any = torch.library.custom_op("orthrus_fast::padded_linear", mutates_args=())(
    padded_linear
)
padded_linear_op.register_fake(
    lambda x, weight, _, gated: x.new_empty(*x.shape[:-1], len(weight) // (2 if gated else 1))
)


def plain_kernels(attend: Attend) -> Kernels:
    """The kernels of plain PyTorch, and ``attend``."""
    return Kernels(attend, qk_norm_rope_write, add_norm, PlainProducts(), sample, logprobs, embed)


@dataclass(frozen=True)
class PlainProducts:
    """``Products`` by the library that PyTorch calls, which splits K as it likes.

    Libraries choose how they sum by the number of rows. On a CPU they are given whole multiples of
    ``row_multiple``, at which a row's bits were seen not to depend on that number.
    """

    row_multiple: int = ROW_MULTIPLE
    linear: Callable[[Tensor, Tensor, int, bool], Tensor] = padded_linear

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        return self._product(x, weight, False)[None]

    def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
        return self._product(x, weight, True)

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self._product(x, weight, False)
        return choose(logits), logits

    def _product(self, x: Tensor, weight: Weight, gated: bool) -> Tensor:
        return self.linear(x, dequantize(weight, x.dtype), self.row_multiple, gated)


def embed(
    tokens: Tensor, start: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``interface.Embed``."""
    positions = start[:, None].long() + torch.arange(tokens.shape[1], device=tokens.device)
    return F.embedding(tokens, weight), positions, cos[positions], sin[positions]


def add_norm(
    x: Tensor, partials: Tensor, weight: Tensor, eps: float, prefetch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``interface.AddNorm``."""
    x = x + sum_partials(partials, x.dtype)
    return x, rms_norm(x, weight, eps)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The 1, 2 or 4 partial sums [P, ...] of a product, added pairwise and rounded once."""
    while len(partials) > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0].to(dtype)


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
