"""What a pass over a block begins with and what follows it, a kernel each.

They do what ``plain.embed`` and ``steps.commit_accepted`` do in PyTorch, where that takes a dozen
launches. Nothing here is computed but whole numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import overlaps, release, wait
from orthrus_fast.sampling import NO_TOKEN


@triton.jit(do_not_specialize=["width"])
def _embed_kernel(  # type: ignore[no-untyped-def]
    tokens, start, weight, cos, sin, x, positions, cos_rows, sin_rows, width,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: its embedding, its position, and the rotary table's row of that."""
    row = tl.program_id(0).to(tl.int64)
    column, dim = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    wait(OVERLAP)
    release(OVERLAP)
    position = tl.load(start + row // width).to(tl.int64) + row % width
    token = tl.load(tokens + row)
    embedding = tl.load(weight + token * SIZE + column, mask=column < SIZE)
    tl.store(x + row * SIZE + column, embedding, mask=column < SIZE)
    tl.store(positions + row, position)
    at, source = row * HEAD_DIM + dim, position * HEAD_DIM + dim
    tl.store(cos_rows + at, tl.load(cos + source))
    tl.store(sin_rows + at, tl.load(sin + source))


def embed(
    tokens: Tensor, start: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``interface.Embed``."""
    (n_rows, width), (size, head_dim) = tokens.shape, (weight.shape[1], cos.shape[1])
    assert weight.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    x = weight.new_empty(n_rows, width, size)
    positions = tokens.new_empty(n_rows, width)
    cos_rows, sin_rows = (cos.new_empty(n_rows, width, head_dim) for _ in range(2))
    overlap, block = overlaps(tokens.device), triton.next_power_of_2(size)
    launch: Any = _embed_kernel[(n_rows * width,)]
    launch(
        *(tokens.contiguous(), start, weight, cos, sin, x, positions, cos_rows, sin_rows, width),
        *(size, block, head_dim, overlap),
        num_warps=4,
        launch_pdl=overlap,
    )
    return x, positions, cos_rows, sin_rows


@triton.jit(do_not_specialize=["width", "n_ends"])
def _commit_kernel(  # type: ignore[no-untyped-def]
    block, target, greedy, logits, eos, report, length, anchor, tokens, max_length, done, drafting,
    width, n_ends, n_logits, capacity,
    NO_TOKEN: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One slot."""
    slot = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    inside, at = t < width, slot * width + t
    wait(OVERLAP)
    best = tl.load(greedy + at, mask=inside, other=0)
    best = tl.load(logits + at * n_logits + best, mask=inside, other=0.0).to(tl.float32)
    chosen = tl.load(target + at, mask=inside, other=0)
    chosen = tl.where(tl.abs(best) < float("inf"), chosen, NO_TOKEN)  # nor is a NaN less
    is_end = chosen == NO_TOKEN
    for i in range(n_ends):
        is_end |= chosen == tl.load(eos + i)

    proposed = tl.load(block + at + 1, mask=t < width - 1, other=0)
    is_stop = (proposed != chosen) | (t >= width - 1)
    n_accepted = tl.min(tl.where(is_stop, t, BLOCK), 0)
    n_accepted = tl.where(tl.load(drafting + slot) != 0, n_accepted, 0)
    last = tl.minimum(n_accepted, tl.min(tl.where(is_end, t, BLOCK), 0))
    before, most = tl.load(length + slot), tl.load(max_length + slot)
    was_done = tl.load(done + slot)
    room = tl.where(was_done != 0, 0, most - before - 1)
    keep = (t <= last) & (t < room)
    n_new = tl.sum(keep.to(tl.int32), 0)
    after = before + n_new

    emitted = tl.maximum(chosen, 0)  # the model is never given NO_TOKEN
    is_newest = t == n_new - 1
    tl.store(tokens + slot * capacity + before + 1 + t, emitted, mask=keep)
    tl.store(anchor + slot + t * 0, emitted, mask=is_newest)
    ended = tl.sum((is_newest & is_end).to(tl.int32), 0) > 0
    is_done = (was_done != 0) | ended | (after + 1 >= most)
    tl.store(length + slot, after)
    tl.store(done + slot, is_done.to(tl.uint8))
    columns = report + slot * (width + 3)
    tl.store(columns + t, chosen, mask=inside)
    tl.store(columns + width, n_new.to(tl.int64))
    tl.store(columns + width + 1, tl.minimum(n_accepted, n_new).to(tl.int64))
    tl.store(columns + width + 2, is_done.to(tl.int64))


def commit_accepted(
    state: Any, block: Tensor, target: Tensor, greedy: Tensor, logits: Tensor, eos: Tensor
) -> Tensor:
    """See ``steps.commit_accepted``; ``state`` is a ``steps.State``."""
    n_slots, width = block.shape
    assert all(tensor.is_contiguous() for tensor in (block, target, greedy, logits))
    report = torch.empty(n_slots, width + 3, dtype=torch.int64, device=block.device)
    overlap = overlaps(block.device)
    launch: Any = _commit_kernel[(n_slots,)]
    launch(
        *(block, target, greedy, logits, eos, report, state.length, state.anchor, state.tokens),
        *(state.max_length, state.done.view(torch.uint8), state.drafting.view(torch.uint8)),
        *(width, len(eos), logits.shape[-1], state.tokens.shape[1], NO_TOKEN),
        *(max(triton.next_power_of_2(width), 32), overlap),  # one binary for most widths
        num_warps=1,
        launch_pdl=overlap,
    )
    return report
