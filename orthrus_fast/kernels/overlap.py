"""How the kernels of a pass overlap, on chips of compute capability 9.0 and later.

A pass is a chain of kernels, each of which needs what the one before it leaves. Programmatic
dependent launch (CUDA programming guide) starts a kernel while its predecessor still runs: it sets
itself up, and only then waits for the predecessor to be done. And where a kernel leaves the memory
idle, it prefetches the beginning of the weight that comes next into the second-level cache.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on ``device`` may start before their predecessor is done."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def release(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Let the next kernel start, as soon as every program of this one has come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernels before this one are done and their writes are seen."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


class PrefetchRegion(NamedTuple):
    """The beginning of a matrix, which is asked for before its product starts."""

    n_rows: int
    row_bytes: int  # from one row to the next
    n_bytes: int  # of each row; 0: nothing is asked for


def first_columns(weight: Tensor | None, limit: int, limit_of_a_row: int = 2**31) -> PrefetchRegion:
    """What all programs of a product read first of its weight [N, K]; limits in bytes."""
    if weight is None or not (row_bytes := _row_bytes(weight)):
        return PrefetchRegion(0, 0, 0)
    n_bytes = min(limit // len(weight) // 128 * 128, limit_of_a_row, row_bytes)  # whole cache lines
    return PrefetchRegion(len(weight), row_bytes, n_bytes)


def first_rows(weight: Tensor | None, limit: int) -> PrefetchRegion:
    """Whole rows of a weight [N, K], ``limit`` bytes at most."""
    if weight is None or not (row_bytes := _row_bytes(weight)):
        return PrefetchRegion(0, 0, 0)
    return PrefetchRegion(min(limit // row_bytes, len(weight)), row_bytes, row_bytes)


def _row_bytes(weight: Tensor) -> int:
    """Of a contiguous weight; 0 where the prefetch instruction's 16 bytes do not fit it."""
    row_bytes = weight.shape[1] * weight.itemsize
    return 0 if row_bytes % 16 or weight.data_ptr() % 16 else row_bytes


@triton.jit
def share_of(  # type: ignore[no-untyped-def]
    program, n_programs, N_ROWS: tl.constexpr, MOST: tl.constexpr
):
    """The rows, from … to, that one of ``n_programs`` fetches: its part, but at most ``MOST``."""
    share = tl.minimum(tl.cdiv(N_ROWS, n_programs), MOST)
    begin = tl.minimum(program * share, N_ROWS)
    return begin, tl.minimum(begin + share, N_ROWS)


@triton.jit
def fetch(  # type: ignore[no-untyped-def]
    weight, program, n_programs, REGION: tl.constexpr, OVERLAP: tl.constexpr
):
    """Ask for this program's share of a ``PrefetchRegion``; nothing waits for it or depends on it.

    One row a thread, for asking takes its time: one-row AR, whose norm is one program, would wait.
    """
    if OVERLAP and REGION[2] > 0:
        LANES: tl.constexpr = tl.extra.cuda.num_threads()
        begin, end = share_of(program, n_programs, REGION[0], LANES)
        row = begin + tl.arange(0, LANES)
        tl.inline_asm_elementwise(
            """{
                .reg .pred inside;
                setp.ne.s32 inside, $2, 0;
                @inside cp.async.bulk.prefetch.L2.global [$1], $3;
                mov.b32 $0, 0;
            }""",
            "=r,l,r,r",
            [
                weight.to(tl.int64) + row.to(tl.int64) * REGION[1],
                (row < end).to(tl.int32),
                tl.full((LANES,), REGION[2], tl.int32),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
