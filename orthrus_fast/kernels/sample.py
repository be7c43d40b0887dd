"""Sampling on a GPU: what ``plain_sampling.sample`` computes, in eight short kernels.

The filters first leave as few tokens as they can, in programs for every chunk of every row, so that
one program for each row may search among those. Nothing is sorted, and nothing is approximate:
thresholds are searched among the ordered ranks of the floats, by counting and by integer sums.

1. ``_group_max_kernel``: the greatest logit of every group of tokens.
2. ``_bound_kernel``: the best logit; for top-k, the k-th greatest of the maxima, which at least k
   tokens reach, so that the k-th greatest token is not below it.
3. ``_mass_above_kernel``, run twice, for top-p without top-k: the probability mass at and above
   eight levels, evenly below the best, then within the interval in which top_p is reached.
4. ``_gather_kernel``: the tokens from the bound on, or within the last interval, side by side.
5. ``_search_kernel``: the row's threshold, which all its filters together give.
6. ``_draw_kernel``: each chunk's best score, noise included, unless it is below the threshold.
7. ``_pick_kernel``: the best of these.

A row's token depends on that row, its slot's settings and its position alone: programs of a row
meet only in integer sums, which are exact in any order, and in a list whose order is not looked at.
Every program waits for the kernel before its own, also where it has nothing to do: a later kernel
that has waited then knows that all kernels before it are done, and scratch may be written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import overlaps, release, wait
from orthrus_fast.kernels.plain_sampling import (
    MINUS_INFINITY_RANK,
    bits_that_differ,
    choose,
    mass_scale,
)
from orthrus_fast.sampling import Settings


class Blocks(NamedTuple):
    """Tokens, all powers of two."""

    group: int = 64
    chunk: int = 4096  # of a program that reads the whole row
    gathered: int = 2048  # of the list at a time
    draw: int = 1024  # of a program that draws


BLOCKS = Blocks()
_LEAST_RANK = tl.constexpr(MINUS_INFINITY_RANK)
_NO_TOKEN = tl.constexpr(2147483647)
_N_LEVELS = tl.constexpr(8)
_N_PASSES = tl.constexpr(2)
_SPAN = tl.constexpr(16.0)  # below the best, in temperatures; the last level takes in all below


@triton.jit
def _rank(value):  # type: ignore[no-untyped-def]
    """float32 -> int64: its place among all floats, 0 … 2**32 - 1."""
    key = value.to(tl.int32, bitcast=True)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int64) + 2147483648


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
def _settings(  # type: ignore[no-untyped-def]
    temperatures, top_ks, top_ps, min_ps, slot, VOCAB: tl.constexpr
):
    """A slot's temperature, top_k, top_p and min_p; 0, 1 and 0 where a filter is off."""
    temperature, top_k = tl.load(temperatures + slot), tl.load(top_ks + slot)
    top_p, min_p = tl.load(top_ps + slot), tl.load(min_ps + slot)
    top_k = tl.where((temperature > 0) & (top_k < VOCAB), top_k, 0)
    top_p = tl.where(temperature > 0, top_p, 1.0)
    return temperature, top_k, top_p, tl.where(temperature > 0, min_p, 0.0)


@triton.jit
def _mass_above(  # type: ignore[no-untyped-def]
    values, n, threshold, best, temperature,
    BY_MASS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of ``values`` [n] are not below the threshold, or, if BY_MASS, their mass."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < n, other=0.0).to(tl.float32)
        kept = (index < n) & (value >= threshold)
        if BY_MASS:
            total += tl.where(kept, _mass(value, best, temperature, SCALE), 0)
        else:
            total += kept.to(tl.int64)
    return tl.sum(total)


@triton.jit
def _search_threshold(  # type: ignore[no-untyped-def]
    values, n, low, high, need, above, best, temperature,
    BY_MASS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest threshold that ``need`` is reached at; it is at ``low``, and not past ``high``.

    ``above`` is the count or mass past ``high`` of tokens that ``values`` [n] lacks. It may lack
    tokens below ``low``, too: with them or without, ``need`` is reached there. Thresholds are tried
    in steps of 2**SHIFT ranks, which tell 16-bit floats apart.
    """
    low, high = _rank(low) >> SHIFT, _rank(high) >> SHIFT
    while low < high:
        middle = (low + high + 1) >> 1
        there = _float_of_rank(middle << SHIFT)
        mass = above + _mass_above(values, n, there, best, temperature, BY_MASS, SCALE, BLOCK)
        reached = mass.to(tl.float64) >= need
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return _float_of_rank(low << SHIFT)


@triton.jit
def _level(best, temperature, depth):  # type: ignore[no-untyped-def]
    """The logit ``depth`` temperatures below the best; -inf from _SPAN on."""
    return tl.where(depth >= _SPAN, -float("inf"), best - temperature * depth)


@triton.jit
def _need(mass, top_p):  # type: ignore[no-untyped-def]
    """top_p's share of a mass; top_p may be 0 once it is a float32."""
    return tl.maximum(top_p.to(tl.float64) * mass.to(tl.float64), 1.0)


@triton.jit
def _interval(masses, top_p, N_DONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two levels between which top_p is reached, after N_DONE passes over the row.

    ``masses`` [N_DONE, _N_LEVELS] int64 -> the upper level's depth (0: there is none), how much
    deeper the lower one lies, and the mass at and above the upper one.
    """
    first, above = top_p * 0, (top_p * 0).to(tl.int64)
    width = first + _SPAN
    if N_DONE > 0:
        need = _need(tl.load(masses + _N_LEVELS - 1), top_p)  # the last level has the row's mass
        for done in tl.static_range(N_DONE):
            by_level = tl.load(masses + done * _N_LEVELS + tl.arange(0, _N_LEVELS))
            n_short = tl.sum((by_level.to(tl.float64) < need).to(tl.int32))  # 7 at most
            last_short = tl.load(masses + done * _N_LEVELS + tl.maximum(n_short - 1, 0))
            above = tl.where(n_short > 0, last_short, above)
            width *= 1.0 / _N_LEVELS  # exactly: a power of two
            first += n_short * width
    return first, width, above


@triton.jit(do_not_specialize=["width"])
def _group_max_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, top_ks, top_ps, min_ps, group_max, masses, n_gathered, width,
    VOCAB: tl.constexpr, N_GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its groups' maxima into group_max [rows, N_GROUPS]; sums start at 0."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = row // width
    temperature, top_k, top_p, min_p = _settings(temperatures, top_ks, top_ps, min_ps, slot, VOCAB)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        at = logits + row * VOCAB + token
        value = tl.load(at, mask=token < VOCAB, other=-float("inf")).to(tl.float32)
        tl.store(group_max + row * N_GROUPS + group, tl.max(value, 1), mask=group < N_GROUPS)
        if chunk == 0:
            sums = tl.arange(0, _N_PASSES * _N_LEVELS)
            tl.store(masses + row * (_N_PASSES * _N_LEVELS) + sums, sums.to(tl.int64) * 0)
            tl.store(n_gathered + row, 0)


@triton.jit(do_not_specialize=["width"])
def _bound_kernel(  # type: ignore[no-untyped-def]
    group_max, temperatures, top_ks, top_ps, min_ps, bests, bounds, width,
    VOCAB: tl.constexpr, N_GROUPS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: its best logit, and one that at least top_k tokens reach (-inf without top-k)."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    slot = row // width
    temperature, top_k, top_p, min_p = _settings(temperatures, top_ks, top_ps, min_ps, slot, VOCAB)
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        group_max += row * N_GROUPS
        group = tl.arange(0, BLOCK)
        value = tl.load(group_max + group, mask=group < N_GROUPS, other=-float("inf"))
        best = tl.max(value)
        bound = -float("inf")
        if (top_k > 0) & (top_k <= N_GROUPS):
            low = tl.min(tl.where(group < N_GROUPS, value, float("inf")))
            need, none = top_k.to(tl.float64), top_k * 0
            # In steps of 2**16 ranks: a bound may be a little low.
            bound = _search_threshold(
                group_max, N_GROUPS, low, best, need, none, best, temperature, False, 1.0, 16, BLOCK
            )
        tl.store(bests + row, best)
        tl.store(bounds + row, bound)


@triton.jit(do_not_specialize=["width"])
def _mass_above_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, top_ks, top_ps, min_ps, bests, masses, width,
    N_DONE: tl.constexpr, VOCAB: tl.constexpr, SCALE: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: the mass at and above each level, added to masses [rows, 2, _N_LEVELS].

    The levels divide the interval that the N_DONE passes before have left; the last is its end.
    """
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = row // width
    temperature, top_k, top_p, min_p = _settings(temperatures, top_ks, top_ps, min_ps, slot, VOCAB)
    if (top_k == 0) & (top_p < 1):
        best = tl.load(bests + row)
        masses += row * (_N_PASSES * _N_LEVELS)
        first, step, above = _interval(masses, top_p, N_DONE)
        step *= 1.0 / _N_LEVELS
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < VOCAB
        value = tl.load(logits + row * VOCAB + token, mask=inside, other=0.0).to(tl.float32)
        mass = tl.where(inside, _mass(value, best, temperature, SCALE), 0)
        for level in tl.static_range(_N_LEVELS):
            there = _level(best, temperature, first + (level + 1) * step)
            there = tl.sum(tl.where(value >= there, mass, 0))
            tl.atomic_add(masses + N_DONE * _N_LEVELS + level, there, sem="relaxed")


@triton.jit(do_not_specialize=["width"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    logits, temperatures, top_ks, top_ps, min_ps, group_max, bests, bounds, masses, n_gathered,
    gathered, width,
    VOCAB: tl.constexpr, N_GROUPS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: those of its logits that may decide, to gathered [rows, VOCAB]."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = row // width
    temperature, top_k, top_p, min_p = _settings(temperatures, top_ks, top_ps, min_ps, slot, VOCAB)
    if (top_k > 0) | (top_p < 1):
        low, high = tl.load(bounds + row), float("nan")  # at and above which there are none
        if top_k == 0:
            best = tl.load(bests + row)
            first, step, above = _interval(masses + row * (_N_PASSES * _N_LEVELS), top_p, _N_PASSES)
            low = _level(best, temperature, first + step)
            high = tl.where(first > 0, _level(best, temperature, first), high)
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        mask = group < N_GROUPS
        greatest = tl.load(group_max + row * N_GROUPS + group, mask=mask, other=-float("inf"))
        if tl.max(greatest) >= low:
            token = chunk * CHUNK + tl.arange(0, CHUNK)
            inside = token < VOCAB
            logit = tl.load(logits + row * VOCAB + token, mask=inside, other=0.0)
            value = logit.to(tl.float32)
            inside &= (value >= low) & (tl.where(value >= high, 1, 0) == 0)
            place = tl.cumsum(inside.to(tl.int32), 0)
            start = tl.atomic_add(n_gathered + row, tl.sum(inside.to(tl.int32)), sem="relaxed")
            tl.store(gathered + row * VOCAB + start + place - 1, logit, mask=inside)


@triton.jit(do_not_specialize=["width"])
def _search_kernel(  # type: ignore[no-untyped-def]
    temperatures, top_ks, top_ps, min_ps, bests, bounds, masses, n_gathered, gathered,
    thresholds, width,
    VOCAB: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: the logit that all its filters reach down to; -inf without any."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    slot = row // width
    temperature, top_k, top_p, min_p = _settings(temperatures, top_ks, top_ps, min_ps, slot, VOCAB)
    threshold = -float("inf")
    if (top_k > 0) | (top_p < 1) | (min_p > 0):
        best = tl.load(bests + row)
        gathered += row * VOCAB
        high, above = best, top_k * 0
        if top_k > 0:
            n, low, need = tl.load(n_gathered + row), tl.load(bounds + row), top_k.to(tl.float64)
            threshold = _search_threshold(
                gathered, n, low, best, need, above, best, temperature, False, SCALE, SHIFT, BLOCK
            )
        if top_p < 1:
            n = tl.load(n_gathered + row)
            if top_k > 0:
                low = threshold
                total = _mass_above(gathered, n, low, best, temperature, True, SCALE, BLOCK)
            else:
                masses += row * (_N_PASSES * _N_LEVELS)
                total = tl.load(masses + _N_LEVELS - 1)
                first, step, above = _interval(masses, top_p, _N_PASSES)
                low = _level(best, temperature, first + step)
                high = _level(best, temperature, first)  # the best, where there is none
            need = _need(total, top_p)
            threshold = _search_threshold(
                gathered, n, low, high, need, above, best, temperature, True, SCALE, SHIFT, BLOCK
            )
        if min_p > 0:
            spread = temperature.to(tl.float64) * tl.log(min_p.to(tl.float64))
            threshold = tl.maximum(threshold, (best.to(tl.float64) + spread).to(tl.float32))
    tl.store(thresholds + row, threshold)


@triton.jit
def _better(value, index, other, other_index):  # type: ignore[no-untyped-def]
    """The greater value and its index; the lower index at a tie."""
    wins = (value > other) | ((value == other) & (index < other_index))
    return tl.where(wins, value, other), tl.where(wins, index, other_index)


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    logits, first, threshold, temperature, seed, position, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The best score of tokens ``first`` … first + BLOCK - 1 and its token, the lowest at a tie."""
    score = tl.full((BLOCK // 4,), -float("inf"), tl.float32)
    chosen = tl.full((BLOCK // 4,), _NO_TOKEN, tl.int32)
    group = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros_like(group)
    words = tl.philox(seed, group, position.to(tl.int32) + zero, zero, zero)
    for lane in tl.static_range(4):
        token = 4 * group + lane
        inside = token < VOCAB
        value = tl.load(logits + token, mask=inside, other=-float("inf")).to(tl.float32)
        uniform = ((words[lane] >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
        # -log(u) is 2**-24 at least; where a device's log falls short of that near 1, as far
        # as 0, the noise would be infinite.
        noise = -tl.log(tl.maximum(-tl.log(uniform), 1.0 / 16777216))
        value = tl.where(inside & (value >= threshold), value + temperature * noise, -float("inf"))
        score, chosen = _better(value, tl.where(inside, token, _NO_TOKEN), score, chosen)
    greatest = tl.max(score)
    return greatest, tl.min(tl.where(score == greatest, chosen, _NO_TOKEN))


@triton.jit(do_not_specialize=["width"])
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits, positions, temperatures, seeds, group_max, thresholds, scores, tokens, width,
    VOCAB: tl.constexpr, N_GROUPS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its best score and token; a greedy row's scores are its logits."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, threshold = tl.load(temperatures + row // width), tl.load(thresholds + row)
    logits += row * VOCAB
    score, token = -float("inf"), _NO_TOKEN
    if temperature > 0:
        # Without a filter there are no group maxima, and no threshold that they could miss.
        group = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        n_groups = tl.where(threshold > -float("inf"), N_GROUPS, 0)
        greatest = group_max + row * N_GROUPS + group
        greatest = tl.load(greatest, mask=group < n_groups, other=-float("inf"))
        if tl.max(greatest) >= threshold:
            seed, position = tl.load(seeds + row // width), tl.load(positions + row)
            score, token = _draw(
                logits, chunk * BLOCK, threshold, temperature, seed, position, VOCAB, BLOCK
            )
    else:
        index = chunk * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        value = tl.where(value == value, value, -float("inf"))  # a NaN is no score
        score, first = tl.max(value, 0, return_indices=True)  # the lowest index wins a tie
        token = chunk * BLOCK + first
    tl.store(scores + row * tl.num_programs(0) + chunk, score)
    tl.store(tokens + row * tl.num_programs(0) + chunk, token)


@triton.jit
def _pick_kernel(  # type: ignore[no-untyped-def]
    scores, tokens, out, N_CHUNKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One row: the token of the best score, the lowest where several tie."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    at, mask = row * N_CHUNKS + chunk, chunk < N_CHUNKS
    score = tl.load(scores + at, mask=mask, other=-float("inf"))
    token = tl.load(tokens + at, mask=mask, other=_NO_TOKEN)
    best = tl.min(tl.where(score == tl.max(score), token, _NO_TOKEN))
    best = tl.where(best == _NO_TOKEN, 0, best)  # of a row of NaNs, which nothing is drawn from
    tl.store(out + row, best.to(tl.int64))


class _Launcher(NamedTuple):
    """Rows of logits, and how kernels start on them."""

    logits: Tensor  # [rows, V]
    overlap: bool

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor [rows, *shape], not written yet."""
        return self.logits.new_empty(len(self.logits), *shape, dtype=dtype)

    def start(self, kernel: Any, n_chunks: int, num_warps: int, *arguments: Any) -> None:
        """A program for each chunk of each row."""
        kernel[(n_chunks, len(self.logits))](
            *(*arguments, self.overlap),
            num_warps=num_warps,
            enable_fp_fusion=False,  # one rounding for each operation, as PyTorch has it
            launch_pdl=self.overlap,
        )


def _find_thresholds(
    rows: _Launcher, settings: Sequence[Tensor], width: int
) -> tuple[Tensor, Tensor]:
    """Settings [B] each, without the seed -> group maxima [rows, n], thresholds [rows].

    Without a filter, a row's threshold is -inf and its group maxima are not written.
    """
    logits, vocab, start = rows.logits, rows.logits.shape[1], rows.start
    n_groups, n_chunks = triton.cdiv(vocab, BLOCKS.group), triton.cdiv(vocab, BLOCKS.chunk)
    groups = (n_groups, BLOCKS.group, BLOCKS.chunk)
    scale, n_bits = mass_scale(vocab), bits_that_differ(logits.dtype)
    group_max = rows.scratch(n_groups)
    bests, bounds, thresholds = (rows.scratch() for _ in range(3))
    masses = rows.scratch(_N_PASSES.value, _N_LEVELS.value, dtype=torch.int64)
    n_gathered = rows.scratch(dtype=torch.int32)
    gathered = rows.scratch(vocab, dtype=logits.dtype)

    maxima = (logits, *settings, group_max, masses, n_gathered, width, vocab, *groups)
    start(_group_max_kernel, n_chunks, 4, *maxima)
    bound = (group_max, *settings, bests, bounds, width, vocab)
    block = triton.next_power_of_2(n_groups)
    start(_bound_kernel, 1, 8, *bound, n_groups, block)
    for n_done in range(_N_PASSES.value):
        mass_above = (logits, *settings, bests, masses, width, n_done, vocab, scale, BLOCKS.chunk)
        start(_mass_above_kernel, n_chunks, 8, *mass_above)
    found = (bests, bounds, masses, n_gathered, gathered)
    gather = (logits, *settings, group_max, *found, width, vocab, *groups)
    start(_gather_kernel, n_chunks, 8, *gather)
    search = (*settings, *found, thresholds, width, vocab, scale, 32 - n_bits, BLOCKS.gathered)
    start(_search_kernel, 1, 8, *search)
    return group_max, thresholds


def _sample(logits: Tensor, position: Tensor, *settings: Tensor) -> Tensor:
    """``Sample`` of bfloat16, float16 or float32 logits, the settings one by one."""
    _, width, vocab = logits.shape
    position = position.long().contiguous()
    *filters, seed = settings
    rows = _Launcher(logits.contiguous().view(-1, vocab), overlaps(logits.device))
    group_max, thresholds = _find_thresholds(rows, filters, width)

    out = torch.empty_like(position)
    n_groups, n_draws = group_max.shape[1], triton.cdiv(vocab, BLOCKS.draw)
    scores, tokens = rows.scratch(n_draws), rows.scratch(n_draws, dtype=torch.int32)
    draw = (rows.logits, position, filters[0], seed, group_max, thresholds, scores, tokens, width)
    blocks = (vocab, n_groups, BLOCKS.group, BLOCKS.draw)
    rows.start(_draw_kernel, n_draws, 4, *draw, *blocks)
    pick = (scores, tokens, out, n_draws, triton.next_power_of_2(n_draws))
    rows.start(_pick_kernel, 1, 4, *pick)
    return out


@triton.jit
def _logprobs_kernel(  # type: ignore[no-untyped-def]
    logits, tokens, out, VOCAB: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One row: its token's logit less the logarithm of the sum of all logits' exponentials."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    logits += row * VOCAB
    LOWEST: tl.constexpr = -3e38
    high = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(logits + index, mask=index < VOCAB, other=LOWEST).to(tl.float32)
        value = tl.maximum(value, LOWEST)
        new_high = tl.maximum(high, value)
        total = total * tl.exp(high - new_high)
        total += tl.where(index < VOCAB, tl.exp(value - new_high), 0.0)
        high = new_high
    best = tl.max(high)
    total_mass = tl.sum(total * tl.exp(high - best))
    token = tl.maximum(tl.load(tokens + row), 0)
    chosen = tl.load(logits + token).to(tl.float32)
    tl.store(out + row, chosen - (best + tl.log(total_mass)))


@torch.library.custom_op("orthrus_fast::logprobs", mutates_args=())
def logprobs_op(logits: Tensor, tokens: Tensor) -> Tensor:
    logits = logits.contiguous()
    rows = _Launcher(logits.view(-1, logits.shape[-1]), overlaps(logits.device))
    out = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
    rows.start(
        _logprobs_kernel, 1, 8, rows.logits, tokens.contiguous(), out, logits.shape[-1], 4096
    )
    return out


logprobs_op.register_fake(lambda logits, tokens: torch.empty_like(tokens, dtype=torch.float32))


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """See ``interface.Logprobs``; in float32 whatever the logits' dtype."""
    result: Tensor = logprobs_op(
        logits.float() if logits.dtype == torch.float64 else logits, tokens
    )
    return result


sample_op = torch.library.custom_op(
    "orthrus_fast::sample",
    _sample,
    mutates_args=(),
    schema="(Tensor logits, Tensor position, Tensor temperature, Tensor top_k, Tensor top_p, "
    "Tensor min_p, Tensor seed) -> Tensor",
)
sample_op.register_fake(lambda logits, position, *_: torch.empty_like(position, dtype=torch.int64))


def sample(logits: Tensor, position: Tensor, settings: Settings) -> Tensor:
    """See ``interface.Sample``. float64 logits are rounded to float32 where a slot samples."""
    is_double = logits.dtype == torch.float64
    tokens: Tensor = sample_op(logits.float() if is_double else logits, position, *settings)
    if is_double:
        tokens = torch.where(settings.temperature[:, None] > 0, tokens, choose(logits))
    return tokens
