"""Sampling, a program for each row of logits: what ``sampling.sample`` says, on a GPU.

A row's token depends on that row, its slot's settings and its position alone. Filters that a slot
does not ask for cost it nothing. Nothing is sorted: thresholds are searched bit by bit among the
ordered ranks of the floats, by counting and by integer sums, which are exact in any order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits at a time
_LEAST_RANK = tl.constexpr(0x007FFFFF)  # of -inf; below it and above +inf lie the NaNs


@triton.jit
def _float_of_rank(rank):  # type: ignore[no-untyped-def]
    """rank int64, 0 … 2**32 - 1 -> the float32 of that rank; -inf below -inf, NaN above +inf."""
    key = (tl.maximum(rank, _LEAST_RANK) - 2147483648).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _mass(value, best, temperature, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Probability over the best's, in fixed point; the best itself has 1, also if infinite."""
    weight = tl.where(value == best, 1.0, tl.exp((value - best) / temperature))
    return (weight * SCALE).to(tl.int64)


@triton.jit
def _threshold(  # type: ignore[no-untyped-def]
    logits,
    vocab_size,
    best,
    temperature,
    need,
    WEIGHED: tl.constexpr,
    SCALE: tl.constexpr,
    N_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest threshold at and above which lies ``need``: tokens, or, if WEIGHED, mass."""
    rank = need.to(tl.int64) * 0
    for step in range(0, (N_BITS + 1) // 2):  # two bits a pass
        unit = tl.full((), 1, tl.int64) << (30 - 2 * step)
        one, two, three = (
            _float_of_rank(rank + unit),
            _float_of_rank(rank + 2 * unit),
            _float_of_rank(rank + 3 * unit),
        )
        above_one = tl.zeros((BLOCK,), tl.int64)
        above_two = tl.zeros((BLOCK,), tl.int64)
        above_three = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, vocab_size, BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < vocab_size
            value = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
            if WEIGHED:
                mass = tl.where(inside, _mass(value, best, temperature, SCALE), 0)
            else:
                mass = inside.to(tl.int64)
            above_one += tl.where(value >= one, mass, 0)
            above_two += tl.where(value >= two, mass, 0)
            above_three += tl.where(value >= three, mass, 0)
        digit = (tl.sum(above_one).to(tl.float64) >= need).to(tl.int64)
        digit += (tl.sum(above_two).to(tl.float64) >= need).to(tl.int64)
        digit += (tl.sum(above_three).to(tl.float64) >= need).to(tl.int64)
        rank += digit * unit
    return _float_of_rank(rank)


@triton.jit
def _better(value, index, other, other_index):  # type: ignore[no-untyped-def]
    """The greater value and its index; the lower index at a tie."""
    wins = (value > other) | ((value == other) & (index < other_index))
    return tl.where(wins, value, other), tl.where(wins, index, other_index)


@triton.jit(do_not_specialize=["vocab_size"])
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits,
    position,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    out,
    vocab_size,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    N_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = row // WIDTH
    logits += row * vocab_size
    heat = tl.load(temperature + slot)
    k, p, least = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(min_p + slot)
    samples = heat > 0
    floor = -float("inf")
    if samples & ((k > 0) | (p < 1) | (least > 0)):
        highest = tl.full((BLOCK,), -float("inf"), tl.float32)
        for first in range(0, vocab_size, BLOCK):
            token = first + tl.arange(0, BLOCK)
            value = tl.load(logits + token, mask=token < vocab_size, other=-float("inf"))
            highest = tl.maximum(highest, value.to(tl.float32))
        best = tl.max(highest)
        if (k > 0) & (k < vocab_size):
            need = k.to(tl.float64)
            floor = _threshold(logits, vocab_size, best, heat, need, False, SCALE, N_BITS, BLOCK)
        if p < 1:
            held = tl.zeros((BLOCK,), tl.int64)
            for first in range(0, vocab_size, BLOCK):
                token = first + tl.arange(0, BLOCK)
                inside = token < vocab_size
                value = tl.load(logits + token, mask=inside, other=0.0).to(tl.float32)
                kept = inside & (value >= floor)
                held += tl.where(kept, _mass(value, best, heat, SCALE), 0)
            need = tl.maximum(p.to(tl.float64) * tl.sum(held).to(tl.float64), 1.0)
            nucleus = _threshold(logits, vocab_size, best, heat, need, True, SCALE, N_BITS, BLOCK)
            floor = tl.maximum(floor, nucleus)
        if least > 0:
            spread = heat.to(tl.float64) * tl.log(least.to(tl.float64))
            floor = tl.maximum(floor, (best.to(tl.float64) + spread).to(tl.float32))

    key, place = tl.load(seed + slot), tl.load(position + row)
    score = tl.full((BLOCK // 4,), -float("inf"), tl.float32)
    chosen = tl.full((BLOCK // 4,), 2147483647, tl.int32)
    for first in range(0, vocab_size, BLOCK):
        group = first // 4 + tl.arange(0, BLOCK // 4)
        zero = tl.zeros_like(group)
        words = tl.philox(key, group, place.to(tl.int32) + zero, zero, zero)
        for lane in tl.static_range(4):
            token = 4 * group + lane
            inside = token < vocab_size
            value = tl.load(logits + token, mask=inside, other=-float("inf")).to(tl.float32)
            uniform = ((words[lane] >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
            # -log(u) is 2**-24 at least; where a device's log falls short of that near 1, as far
            # as 0, the noise would be infinite.
            noise = -tl.log(tl.maximum(-tl.log(uniform), 1.0 / 16777216))
            kept = inside & (value >= floor)
            value = tl.where(kept, value + heat * noise, -float("inf"))  # 0 for a greedy slot
            token = tl.where(inside, token, 2147483647)
            score, chosen = _better(value, token, score, chosen)
    greatest = tl.max(score)
    tl.store(out + row, tl.min(tl.where(score == greatest, chosen, 2147483647)).to(tl.int64))


@torch.library.custom_op("orthrus_fast::sample", mutates_args=())
def sample_op(
    logits: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
) -> Tensor:
    """logits [B, T, V], position [B, T], settings [B] each -> token ids [B, T] int64.

    bfloat16, float16 or float32 logits. A row's token depends on that row alone.
    """
    n_slots, width, vocab_size = logits.shape
    logits, position = logits.contiguous(), position.long().contiguous()
    out = torch.empty_like(position)
    n_bits = 9 - round(math.log2(torch.finfo(logits.dtype).eps)) if logits.itemsize < 4 else 32
    launch: Any = _sample_kernel[(n_slots * width,)]
    launch(
        *(logits, position, temperature, top_k, top_p, min_p, seed, out, vocab_size),
        *(width, 2.0 ** (62 - vocab_size.bit_length()), n_bits, BLOCK),
        num_warps=16,
        enable_fp_fusion=False,  # one rounding for each operation, as PyTorch has it
    )
    return out


@sample_op.register_fake
def _(
    logits: Tensor,
    position: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
) -> Tensor:
    return torch.empty_like(position, dtype=torch.int64)
