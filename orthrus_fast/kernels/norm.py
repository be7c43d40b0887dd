"""The residual stream's sum and its norm, in one kernel.

What ``plain.add_norm`` does in PyTorch, op by op with the same rounding: only the order in
which the norm's mean is summed differs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import fetch, first_columns, overlaps, release, wait

# Bytes of the next weight, and of each of its rows: the best of what was timed.
PREFETCH_LIMIT = (8 * 2**20, 768)
PREFETCHERS = 64  # programs at least, where there is something to ask for


@triton.jit
def sum_partials(  # type: ignore[no-untyped-def]
    first, stride, mask, N_PARTIALS: tl.constexpr
):
    """The 1, 2 or 4 partial sums of a product, added pairwise, neighbours first."""
    total = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    if N_PARTIALS > 1:
        total += tl.load(first + stride, mask=mask, other=0.0)
    if N_PARTIALS > 2:
        third = tl.load(first + 2 * stride, mask=mask, other=0.0)
        total += third + tl.load(first + 3 * stride, mask=mask, other=0.0)
    return total


@triton.jit
def is_absent(words):  # type: ignore[no-untyped-def]
    """Which words other GPUs have not sent yet (``symmetric.ABSENT``)."""
    return words.to(tl.int32, bitcast=True) == -1


@triton.jit
def await_words(words, mask, broken):  # type: ignore[no-untyped-def]
    """What other GPUs send here, once it has come or nobody shall wait any more.

    All threads of a program leave at once, for the decision is a sum over all of them.
    """
    n_absent = 1
    while n_absent > 0:
        absent = is_absent(tl.load(words, mask=mask, other=0, volatile=True))
        absent &= tl.load(broken, volatile=True) == 0
        n_absent = tl.sum(absent.to(tl.int32))
    return tl.load(words, mask=mask, other=0, volatile=True)


@triton.jit
def await_sum(  # type: ignore[no-untyped-def]
    row, stride, column, inside, broken, BLOCK: tl.constexpr, N_PARTIALS: tl.constexpr
):
    """``sum_partials`` of a row that all GPUs send, once it has come or nobody shall wait any more.

    Until its first words have come only these are asked for, for the product needs the memory.
    """
    last = row + (N_PARTIALS - 1) * stride
    waits = True
    while waits:
        waits = is_absent(tl.load(row, volatile=True)) | is_absent(tl.load(last, volatile=True))
        waits &= tl.load(broken, volatile=True) == 0
    total = tl.zeros((BLOCK,), tl.float32)
    n_absent = 1
    while n_absent > 0:
        total = tl.load(row + column, mask=inside, other=0.0, volatile=True)
        part = tl.load(last + column, mask=inside, other=0.0, volatile=True)
        absent = is_absent(total) | is_absent(part)
        if N_PARTIALS > 2:
            second = tl.load(row + stride + column, mask=inside, other=0.0, volatile=True)
            third = tl.load(row + 2 * stride + column, mask=inside, other=0.0, volatile=True)
            absent |= is_absent(second) | is_absent(third)
            total += second
            part += third  # of two numbers the order does not matter
        total += part
        absent &= tl.load(broken, volatile=True) == 0
        n_absent = tl.sum(absent.to(tl.int32))
    return total


@triton.jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x, partials, weight, total, normed, prefetch, broken, n_elements,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, N_PARTIALS: tl.constexpr, EPS: tl.constexpr,
    REGION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: x plus the partials' sum, rounded to x's dtype at each step, then its norm.

    Programs without a row only ask for their share of the next weight. With ``broken`` the partials
    come from other GPUs, and their places are emptied. Then nobody waits for the product to be
    done: it started this kernel when all before it was, and its sums say when they have come.
    """
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    release(OVERLAP)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if broken is None:
        wait(OVERLAP)
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    if program >= n_elements // SIZE:
        fetch(prefetch, program, n_programs, REGION, OVERLAP)
        return
    begin = program.to(tl.int64) * SIZE
    at = begin + column
    dtype = x.dtype.element_ty
    if broken is None:
        update = sum_partials(partials + at, n_elements, inside, N_PARTIALS)
    else:
        fetch(prefetch, program, n_programs, REGION, OVERLAP)
        row = partials + begin
        update = await_sum(row, n_elements, column, inside, broken, BLOCK, N_PARTIALS)
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if broken is None:
        fetch(prefetch, program, n_programs, REGION, OVERLAP)
    else:
        wait(OVERLAP)  # the product may still read what lies where the results go
    row = (row + update.to(dtype).to(tl.float32)).to(dtype)
    tl.store(total + at, row, mask=inside)
    row = row.to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row) / SIZE + EPS)
    row = row.to(dtype).to(tl.float32) * scale
    tl.store(normed + at, row.to(dtype), mask=inside)
    if broken is not None:
        tl.debug_barrier()  # all threads have read theirs
        for part in tl.static_range(N_PARTIALS):
            empty = tl.full((BLOCK,), -1, tl.int32).to(tl.float32, bitcast=True)
            tl.store(partials + part * n_elements + at, empty, mask=inside)


def add_norm(
    x: Tensor, partials: Tensor, weight: Tensor, eps: float, prefetch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``interface.AddNorm``. Partials are float32, or x's dtype where P is 1; a row's results
    depend on that row alone. The beginning of ``prefetch`` [N, K] goes into the cache.
    """
    return launch(x, partials, weight, eps, prefetch)


def launch(
    x: Tensor,
    partials: Tensor,
    weight: Tensor,
    eps: float,
    prefetch: Tensor | None = None,
    broken: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``add_norm``; with ``broken`` of partials that other GPUs send (``symmetric.Exchange``)."""
    size = x.shape[-1]
    assert x.is_contiguous() and partials.is_contiguous() and partials.shape[1:] == x.shape
    assert len(partials) in (1, 2, 4)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(size)
    overlap = overlaps(x.device)
    region = tuple(first_columns(prefetch, *PREFETCH_LIMIT))
    n_rows = x.numel() // size
    start: Any = _add_norm_kernel[(max(n_rows, PREFETCHERS * (overlap and region[2] > 0)),)]
    start(
        *(x, partials, weight, total, normed, x if prefetch is None else prefetch, broken),
        x.numel(),
        *(size, block, len(partials), eps, region, overlap),
        num_warps=min(max(block // 128, 1), 16),  # 16 rather than 4: 1.7B's layer took 3% less
        enable_fp_fusion=False,  # where the model is float32, as PyTorch rounds
        launch_pdl=overlap,
    )
    return total, normed


# A new name for each new signature: the compiler's cache on disk knows operators by name alone.
add_norm_op = torch.library.custom_op("orthrus_fast::add_rms_norm", add_norm, mutates_args=())
add_norm_op.register_fake(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
