"""Sampling on a GPU: what ``sampling.sample`` says, in eight short kernels.

The filters first leave as few tokens as they can, in programs for every chunk of every row, so that
one program for each row may search among those. Nothing is sorted, and nothing is approximate:
thresholds are searched among the ordered ranks of the floats, by counting and by integer sums.

1. ``_survey_kernel``: the greatest logit of every group of tokens.
2. ``_bound_kernel``: the best logit; and, for top-k, the k-th greatest of the groups' greatest. At
   least k tokens are as great as that, so the k-th greatest token is none below it.
3. ``_weigh_kernel``, twice, for top-p without top-k: the mass at and above eight edges, first in
   even steps below the best, then in even steps between the two edges where top_p is reached.
4. ``_gather_kernel``: the tokens that may decide, those from top-k's bound on or between the last
   two edges, side by side.
5. ``_search_kernel``: the row's floor, the threshold of all its filters.
6. ``_draw_kernel``: each chunk's best score, noise and all; chunks below the floor are skipped.
7. ``_pick_kernel``: the best of them.

A row's token depends on that row, its slot's settings and its position alone: programs of a row
meet only in integer sums, which are exact in any order, and in a list whose order is not looked at.
What a slot does not ask for costs it little more than the launch.

Every program waits for the kernel before its own, also where it has nothing to do: so whoever waits
knows that all the kernels before are done, and scratch may be written anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import overlaps, release, wait
from orthrus_fast.sampling import MINUS_INFINITY_RANK, bits_that_differ, mass_scale


class Blocks(NamedTuple):
    """What a launch is made of: tokens, all powers of two."""

    group: int = 64
    chunk: int = 4096  # of a program that reads the whole row
    gathered: int = 2048  # of the list at a time
    draw: int = 1024  # of a program that draws


class Warps(NamedTuple):
    """Of a program of each kernel."""

    survey: int = 4
    bound: int = 8
    weigh: int = 8
    gather: int = 8
    search: int = 8
    draw: int = 4
    pick: int = 4


BLOCKS, WARPS = Blocks(), Warps()
_LEAST_RANK = tl.constexpr(MINUS_INFINITY_RANK)
_NO_TOKEN = tl.constexpr(2147483647)
_N_EDGES = tl.constexpr(8)
_N_WEIGHINGS = tl.constexpr(2)
_SPAN = tl.constexpr(16.0)  # below the best, in temperatures; the last edge takes in all below


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
    temperature, top_k, top_p, min_p, slot, VOCAB: tl.constexpr
):
    """A slot's temperature, k, p and min-p: 0, 1 and 0 where a filter has no say."""
    heat, k = tl.load(temperature + slot), tl.load(top_k + slot)
    p, least = tl.load(top_p + slot), tl.load(min_p + slot)
    k = tl.where((heat > 0) & (k < VOCAB), k, 0)
    return heat, k, tl.where(heat > 0, p, 1.0), tl.where(heat > 0, least, 0.0)


@triton.jit
def _held(  # type: ignore[no-untyped-def]
    values,
    n,
    threshold,
    best,
    heat,
    WEIGHED: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many of ``values`` [n] are not below the threshold, or, if WEIGHED, their mass."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, n, BLOCK):
        index = first + tl.arange(0, BLOCK)
        value = tl.load(values + index, mask=index < n, other=0.0).to(tl.float32)
        kept = (index < n) & (value >= threshold)
        if WEIGHED:
            total += tl.where(kept, _mass(value, best, heat, SCALE), 0)
        else:
            total += kept.to(tl.int64)
    return tl.sum(total)


@triton.jit
def _threshold(  # type: ignore[no-untyped-def]
    values,
    n,
    low,
    high,
    need,
    above,
    best,
    heat,
    WEIGHED: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest threshold that ``need`` is held at: at ``low`` it is, past ``high`` it is not.

    ``above`` is held by those past ``high`` that ``values`` [n] lacks. It may lack any below
    ``low``, too: what is held there is ``need`` or more, with them or without. Thresholds are tried
    in steps of 2**SHIFT ranks, which tell 16-bit floats apart.
    """
    low, high = _rank(low) >> SHIFT, _rank(high) >> SHIFT
    while low < high:
        middle = (low + high + 1) >> 1
        there = _float_of_rank(middle << SHIFT)
        held = above + _held(values, n, there, best, heat, WEIGHED, SCALE, BLOCK)
        reached = held.to(tl.float64) >= need
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return _float_of_rank(low << SHIFT)


@triton.jit
def _edge(best, heat, depth):  # type: ignore[no-untyped-def]
    """The logit ``depth`` temperatures below the best; -inf from _SPAN on."""
    return tl.where(depth >= _SPAN, -float("inf"), best - heat * depth)


@triton.jit
def _need(held, p):  # type: ignore[no-untyped-def]
    """The mass that makes top_p of ``held``; p may be 0 once it is a float32."""
    return tl.maximum(p.to(tl.float64) * held.to(tl.float64), 1.0)


@triton.jit
def _bracket(held, p, N_DONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two edges between which top_p is reached, after N_DONE weighings of the row.

    ``held`` [N_DONE, _N_EDGES] int64 -> the upper edge's depth (0: there is none), how much deeper
    the lower one lies, and the mass at and above the upper one.
    """
    first, above = p * 0, (p * 0).to(tl.int64)
    width = first + _SPAN
    if N_DONE > 0:
        need = _need(tl.load(held + _N_EDGES - 1), p)  # the last edge's is the row's whole mass
        for done in tl.static_range(N_DONE):
            masses = tl.load(held + done * _N_EDGES + tl.arange(0, _N_EDGES))
            n_short = tl.sum((masses.to(tl.float64) < need).to(tl.int32))  # 7 at most
            last_short = tl.load(held + done * _N_EDGES + tl.maximum(n_short - 1, 0))
            above = tl.where(n_short > 0, last_short, above)
            width *= 1.0 / _N_EDGES  # exactly: a power of two
            first += n_short * width
    return first, width, above


@triton.jit(do_not_specialize=["width"])
def _survey_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    held,
    n_gathered,
    width,
    VOCAB: tl.constexpr,
    N_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of a row: its groups' greatest into maxima [rows, N_GROUPS]; sums start at 0."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, k, p, least = _settings(temperature, top_k, top_p, min_p, row // width, VOCAB)
    if (k > 0) | (p < 1) | (least > 0):
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        at = logits + row * VOCAB + token
        value = tl.load(at, mask=token < VOCAB, other=-float("inf")).to(tl.float32)
        tl.store(maxima + row * N_GROUPS + group, tl.max(value, 1), mask=group < N_GROUPS)
        if chunk == 0:
            sums = tl.arange(0, _N_WEIGHINGS * _N_EDGES)
            tl.store(held + row * (_N_WEIGHINGS * _N_EDGES) + sums, sums.to(tl.int64) * 0)
            tl.store(n_gathered + row, 0)


@triton.jit(do_not_specialize=["width"])
def _bound_kernel(  # type: ignore[no-untyped-def]
    maxima,
    temperature,
    top_k,
    top_p,
    min_p,
    bests,
    bounds,
    width,
    VOCAB: tl.constexpr,
    N_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: its best logit, and one that at least k tokens reach (-inf without top-k)."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    heat, k, p, least = _settings(temperature, top_k, top_p, min_p, row // width, VOCAB)
    if (k > 0) | (p < 1) | (least > 0):
        maxima += row * N_GROUPS
        group = tl.arange(0, BLOCK)
        value = tl.load(maxima + group, mask=group < N_GROUPS, other=-float("inf"))
        best = tl.max(value)
        bound = -float("inf")
        if (k > 0) & (k <= N_GROUPS):
            low = tl.min(tl.where(group < N_GROUPS, value, float("inf")))
            need, none = k.to(tl.float64), k * 0
            # In steps of 2**16 ranks: a bound may be a little low.
            bound = _threshold(
                maxima, N_GROUPS, low, best, need, none, best, heat, False, 1.0, 16, BLOCK
            )
        tl.store(bests + row, best)
        tl.store(bounds + row, bound)


@triton.jit(do_not_specialize=["width"])
def _weigh_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    bests,
    held,
    width,
    N_DONE: tl.constexpr,
    VOCAB: tl.constexpr,
    SCALE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of a row: the mass at and above each edge, added to held [rows, 2, _N_EDGES].

    The edges divide the bracket that the N_DONE weighings before have left; the last is its end.
    """
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, k, p, least = _settings(temperature, top_k, top_p, min_p, row // width, VOCAB)
    if (k == 0) & (p < 1):
        best = tl.load(bests + row)
        held += row * (_N_WEIGHINGS * _N_EDGES)
        first, step, above = _bracket(held, p, N_DONE)
        step *= 1.0 / _N_EDGES
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = token < VOCAB
        value = tl.load(logits + row * VOCAB + token, mask=inside, other=0.0).to(tl.float32)
        mass = tl.where(inside, _mass(value, best, heat, SCALE), 0)
        for edge in tl.static_range(_N_EDGES):
            there = _edge(best, heat, first + (edge + 1) * step)
            there = tl.sum(tl.where(value >= there, mass, 0))
            tl.atomic_add(held + N_DONE * _N_EDGES + edge, there, sem="relaxed")


@triton.jit(do_not_specialize=["width"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    bests,
    bounds,
    held,
    n_gathered,
    gathered,
    width,
    VOCAB: tl.constexpr,
    N_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of a row: those of its logits that may decide, to gathered [rows, VOCAB]."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, k, p, least = _settings(temperature, top_k, top_p, min_p, row // width, VOCAB)
    if (k > 0) | (p < 1):
        low, high = tl.load(bounds + row), float("nan")  # at and above which there are none
        if k == 0:
            best = tl.load(bests + row)
            first, step, above = _bracket(held + row * (_N_WEIGHINGS * _N_EDGES), p, _N_WEIGHINGS)
            low = _edge(best, heat, first + step)
            high = tl.where(first > 0, _edge(best, heat, first), high)
        group = chunk * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        mask = group < N_GROUPS
        greatest = tl.load(maxima + row * N_GROUPS + group, mask=mask, other=-float("inf"))
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
    temperature,
    top_k,
    top_p,
    min_p,
    bests,
    bounds,
    held,
    n_gathered,
    gathered,
    floors,
    width,
    VOCAB: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: the logit that all its filters reach down to; -inf without any."""
    release(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    heat, k, p, least = _settings(temperature, top_k, top_p, min_p, row // width, VOCAB)
    floor = -float("inf")
    if (k > 0) | (p < 1) | (least > 0):
        best = tl.load(bests + row)
        gathered += row * VOCAB
        high, above = best, k * 0
        if k > 0:
            n, low, need = tl.load(n_gathered + row), tl.load(bounds + row), k.to(tl.float64)
            floor = _threshold(
                gathered, n, low, best, need, above, best, heat, False, SCALE, SHIFT, BLOCK
            )
        if p < 1:
            n = tl.load(n_gathered + row)
            if k > 0:
                low = floor
                total = _held(gathered, n, low, best, heat, True, SCALE, BLOCK)
            else:
                held += row * (_N_WEIGHINGS * _N_EDGES)
                total = tl.load(held + _N_EDGES - 1)
                first, step, above = _bracket(held, p, _N_WEIGHINGS)
                low = _edge(best, heat, first + step)
                high = _edge(best, heat, first)  # the best, where there is none
            need = _need(total, p)
            floor = _threshold(
                gathered, n, low, high, need, above, best, heat, True, SCALE, SHIFT, BLOCK
            )
        if least > 0:
            spread = heat.to(tl.float64) * tl.log(least.to(tl.float64))
            floor = tl.maximum(floor, (best.to(tl.float64) + spread).to(tl.float32))
    tl.store(floors + row, floor)


@triton.jit
def _better(value, index, other, other_index):  # type: ignore[no-untyped-def]
    """The greater value and its index; the lower index at a tie."""
    wins = (value > other) | ((value == other) & (index < other_index))
    return tl.where(wins, value, other), tl.where(wins, index, other_index)


@triton.jit
def _drawn(  # type: ignore[no-untyped-def]
    logits, first, floor, heat, key, place, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The best score of tokens ``first`` … first + BLOCK - 1 and its token, the lowest at a tie."""
    score = tl.full((BLOCK // 4,), -float("inf"), tl.float32)
    chosen = tl.full((BLOCK // 4,), _NO_TOKEN, tl.int32)
    group = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros_like(group)
    words = tl.philox(key, group, place.to(tl.int32) + zero, zero, zero)
    for lane in tl.static_range(4):
        token = 4 * group + lane
        inside = token < VOCAB
        value = tl.load(logits + token, mask=inside, other=-float("inf")).to(tl.float32)
        uniform = ((words[lane] >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608)
        # -log(u) is 2**-24 at least; where a device's log falls short of that near 1, as far
        # as 0, the noise would be infinite.
        noise = -tl.log(tl.maximum(-tl.log(uniform), 1.0 / 16777216))
        value = tl.where(inside & (value >= floor), value + heat * noise, -float("inf"))
        score, chosen = _better(value, tl.where(inside, token, _NO_TOKEN), score, chosen)
    greatest = tl.max(score)
    return greatest, tl.min(tl.where(score == greatest, chosen, _NO_TOKEN))


@triton.jit(do_not_specialize=["width"])
def _draw_kernel(  # type: ignore[no-untyped-def]
    logits,
    position,
    temperature,
    seed,
    maxima,
    floors,
    scores,
    tokens,
    width,
    VOCAB: tl.constexpr,
    N_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One chunk of a row: its best score and token; a greedy row's scores are its logits."""
    release(OVERLAP)
    wait(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, floor = tl.load(temperature + row // width), tl.load(floors + row)
    logits += row * VOCAB
    score, token = -float("inf"), _NO_TOKEN
    if heat > 0:
        # Without a filter there are no maxima, and no floor that they could fail to reach.
        group = chunk * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        n_groups = tl.where(floor > -float("inf"), N_GROUPS, 0)
        greatest = maxima + row * N_GROUPS + group
        greatest = tl.load(greatest, mask=group < n_groups, other=-float("inf"))
        if tl.max(greatest) >= floor:
            key, place = tl.load(seed + row // width), tl.load(position + row)
            score, token = _drawn(logits, chunk * BLOCK, floor, heat, key, place, VOCAB, BLOCK)
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


def _find_floors(
    rows: _Launcher, settings: tuple[Tensor, ...], width: int
) -> tuple[Tensor, Tensor]:
    """Settings [B] each but the seed -> the groups' greatest [rows, n], the rows' floors [rows].

    Without a filter, a row's floor is -inf and its groups' greatest are not written.
    """
    logits, vocab, start = rows.logits, rows.logits.shape[1], rows.start
    n_groups, n_chunks = triton.cdiv(vocab, BLOCKS.group), triton.cdiv(vocab, BLOCKS.chunk)
    groups = (n_groups, BLOCKS.group, BLOCKS.chunk)
    scale, n_bits = mass_scale(vocab), bits_that_differ(logits.dtype)
    maxima, bests, bounds, floors = (rows.scratch(*shape) for shape in ((n_groups,), (), (), ()))
    held = rows.scratch(_N_WEIGHINGS.value, _N_EDGES.value, dtype=torch.int64)
    n_gathered = rows.scratch(dtype=torch.int32)
    gathered = rows.scratch(vocab, dtype=logits.dtype)

    survey = (logits, *settings, maxima, held, n_gathered, width, vocab, *groups)
    start(_survey_kernel, n_chunks, WARPS.survey, *survey)
    bound = (maxima, *settings, bests, bounds, width, vocab)
    block = triton.next_power_of_2(n_groups)
    start(_bound_kernel, 1, WARPS.bound, *bound, n_groups, block)
    for n_done in range(_N_WEIGHINGS.value):
        weigh = (logits, *settings, bests, held, width, n_done, vocab, scale, BLOCKS.chunk)
        start(_weigh_kernel, n_chunks, WARPS.weigh, *weigh)
    found = (bests, bounds, held, n_gathered, gathered)
    gather = (logits, *settings, maxima, *found, width, vocab, *groups)
    start(_gather_kernel, n_chunks, WARPS.gather, *gather)
    search = (*settings, *found, floors, width, vocab, scale, 32 - n_bits, BLOCKS.gathered)
    start(_search_kernel, 1, WARPS.search, *search)
    return maxima, floors


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
    _, width, vocab = logits.shape
    position = position.long().contiguous()
    rows = _Launcher(logits.contiguous().view(-1, vocab), overlaps(logits.device))
    maxima, floors = _find_floors(rows, (temperature, top_k, top_p, min_p), width)

    out = torch.empty_like(position)
    n_groups, n_draws = maxima.shape[1], triton.cdiv(vocab, BLOCKS.draw)
    scores, tokens = rows.scratch(n_draws), rows.scratch(n_draws, dtype=torch.int32)
    draw = (rows.logits, position, temperature, seed, maxima, floors, scores, tokens, width)
    blocks = (vocab, n_groups, BLOCKS.group, BLOCKS.draw)
    rows.start(_draw_kernel, n_draws, WARPS.draw, *draw, *blocks)
    pick = (scores, tokens, out, n_draws, triton.next_power_of_2(n_draws))
    rows.start(_pick_kernel, 1, WARPS.pick, *pick)
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
