"""The residual stream's sum and its norm, in one kernel.

What ``model.add_norm`` does in plain PyTorch, op by op with the same rounding: only the order in
which the norm's mean is summed differs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import fetch, first_columns, overlaps, release, wait

AHEAD = (8 * 2**20, 768)  # bytes of the next weight, and of a row of it: the best of what was timed


@triton.jit
def _add_norm_kernel(  # type: ignore[no-untyped-def]
    x,
    parts,
    weight,
    total,
    normed,
    ahead,
    n_elements,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    N_PARTS: tl.constexpr,
    EPS: tl.constexpr,
    AHEAD_ROWS: tl.constexpr,
    AHEAD_ROW_BYTES: tl.constexpr,
    AHEAD_BYTES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row: x plus the parts' sum, rounded to x's dtype at each step, then its norm."""
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    release(OVERLAP)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait(OVERLAP)
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    dtype = x.dtype.element_ty
    update = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, N_PARTS):
        update += tl.load(parts + part * n_elements + at, mask=inside, other=0.0)
    row = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    program, n_programs = tl.program_id(0), tl.num_programs(0)
    fetch(ahead, program, n_programs, AHEAD_ROWS, AHEAD_ROW_BYTES, AHEAD_BYTES, OVERLAP)
    row = (row + update.to(dtype).to(tl.float32)).to(dtype)
    tl.store(total + at, row, mask=inside)
    row = row.to(tl.float32)
    row = row * tl.rsqrt(tl.sum(row * row) / SIZE + EPS)
    row = row.to(dtype).to(tl.float32) * scale
    tl.store(normed + at, row.to(dtype), mask=inside)


def add_norm(
    x: Tensor, parts: Tensor, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., hidden_size] plus the sum of ``parts`` [P, ..., hidden_size]: that, and its RMS norm.

    Parts are float32, or x's dtype where P is 1; they are added in order. A row's results depend on
    that row alone. ``ahead`` [N, K] is the weight that is read next; its head goes into the cache.
    """
    size = x.shape[-1]
    assert x.is_contiguous() and parts.is_contiguous() and parts.shape[1:] == x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(size)
    overlap = overlaps(x.device)
    launch: Any = _add_norm_kernel[(x.numel() // size,)]
    launch(
        *(x, parts, weight, total, normed, x if ahead is None else ahead, x.numel()),
        *(size, block, len(parts), eps, *first_columns(ahead, *AHEAD), overlap),
        num_warps=min(max(block // 128, 1), 16),  # 16 rather than 4: 1.7B's layer took 3% less
        enable_fp_fusion=False,  # where the model is float32, as PyTorch rounds
        launch_pdl=overlap,
    )
    return total, normed


add_norm_op = torch.library.custom_op("orthrus_fast::add_norm", add_norm, mutates_args=())


@add_norm_op.register_fake
def _(
    x: Tensor, parts: Tensor, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)
