"""Matrix products whose rows do not depend on each other: fixed tiles, fixed order of summation.

The fallback where a library's product fails ``rows_are_alike`` on the user's card.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

BLOCK_N = 64  # weight rows of a tile
_REDUCE_BLOCK = 1024


class Tiles(NamedTuple):
    """What a launch is made of. Of these only block_m depends on the number of rows of x."""

    block_m: int
    block_k: int
    n_splits: int
    n_stages: int


def tiles_for(n_rows: int, n_columns: int, n_inner: int, itemsize: int, shared_limit: int) -> Tiles:
    """Tiles of an [n_rows, n_inner] x [n_columns, n_inner] product; ``shared_limit`` in bytes.

    Best on an H100 among the tiles tried (bfloat16, 32 rows): 64 x 128, up to 5 stages; 4 splits
    of the inner dimension where the grid has 32 tiles, 2 where it has 40, none from 64 on.
    """
    block_m = min(max(triton.next_power_of_2(n_rows), 16), 128)
    block_k = 128 if itemsize == 2 else 32  # float32 has no matrix unit: operands sit in registers
    n_tiles = triton.cdiv(n_columns, BLOCK_N)
    wanted = 4 if n_tiles <= 32 else 2 if n_tiles <= 48 else 1
    n_splits = max(1, min(wanted, triton.cdiv(n_inner, block_k) // 4))
    stage = (BLOCK_N + block_m) * block_k * itemsize
    return Tiles(block_m, block_k, n_splits, min(5, shared_limit // stage))


@triton.jit(do_not_specialize=["n_rows"])  # one binary for every M of a tile size
def _product_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    n_rows,
    n_columns,
    K: tl.constexpr,
    N_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of out [N_SPLITS, n_rows, n_columns], summed over one split of the inner dimension.

    The weight is the left operand: with few rows of x, only its side of the tile is long enough
    for Hopper's matrix unit. Programs that share a weight tile are neighbours, for the cache.
    """
    STEPS: tl.constexpr = (K + BLOCK_K * N_SPLITS - 1) // (BLOCK_K * N_SPLITS)
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, BLOCK_K)
    # Past the edges the last row is read again, and not stored: no mask in the loop.
    x_row = x + tl.minimum(row, n_rows - 1).to(tl.int64) * K
    weight_row = weight + tl.minimum(column, n_columns - 1).to(tl.int64) * K
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * STEPS, (split + 1) * STEPS):
        inner = step * BLOCK_K + k
        if K % (BLOCK_K * N_SPLITS) == 0:
            weight_tile = tl.load(weight_row + inner[None, :])
            x_tile = tl.load(x_row + inner[:, None])
        else:
            weight_tile = tl.load(weight_row + inner[None, :], mask=inner[None, :] < K, other=0.0)
            x_tile = tl.load(x_row + inner[:, None], mask=inner[:, None] < K, other=0.0)
        total = tl.dot(weight_tile, x_tile, total, input_precision="ieee")
    target = out + (split * n_rows + row).to(tl.int64) * n_columns + column
    inside = (row < n_rows) & (column < n_columns)
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_splits_kernel(  # type: ignore[no-untyped-def]
    parts, out, n_elements, N_SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """parts [N_SPLITS, n_elements] -> out [n_elements], summed in the splits' order."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < n_elements
    total = tl.load(parts + element, mask=inside)
    for split in tl.static_range(1, N_SPLITS):
        total += tl.load(parts + split * n_elements + element, mask=inside)
    tl.store(out + element, total.to(out.dtype.element_ty), mask=inside)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K] transposed -> [M, N]; bfloat16, float16 or float32.

    Sums are float32, without TF32. A row of the result depends on that row of x alone, not on its
    index or its neighbours. Nor does the order of summation depend on M: the bits of a row are the
    same at every M as far as the matrix unit sums alike in tiles of 16, 32, 64 and 128 rows.
    """
    (n_rows, n_inner), n_columns = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape[1] == n_inner
    tiles = tiles_for(n_rows, n_columns, n_inner, x.itemsize, _shared_limit(x.device))
    out = x.new_empty(n_rows, n_columns)
    parts = out
    if tiles.n_splits > 1:
        parts = x.new_empty(tiles.n_splits, n_rows, n_columns, dtype=torch.float32)
    n_tiles = triton.cdiv(n_columns, BLOCK_N)
    launch: Any = _product_kernel[triton.cdiv(n_rows, tiles.block_m), n_tiles, tiles.n_splits]
    launch(
        *(x, weight, parts, n_rows, n_columns),
        *(n_inner, tiles.n_splits, tiles.block_m, BLOCK_N, tiles.block_k),
        num_warps=4,
        num_stages=tiles.n_stages,
        enable_fp_fusion=True,  # said, because the default differs between Triton's versions
    )
    if tiles.n_splits > 1:
        launch = _sum_splits_kernel[(triton.cdiv(out.numel(), _REDUCE_BLOCK),)]
        launch(parts, out, out.numel(), tiles.n_splits, _REDUCE_BLOCK, enable_fp_fusion=True)
    return out


@cache
def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory a block may ask for; the interpreter, on the CPU, has no limit."""
    if device.type == "cpu":
        return 99 * 1024
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


product_op = torch.library.custom_op("orthrus_fast::product", product, mutates_args=())


@product_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class FixedTileLinear(nn.Module):
    """A linear layer without bias over ``product``: forward takes x [..., K] to [..., N]."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        multiply = product_op if torch.compiler.is_compiling() else product
        out: Tensor = multiply(x.reshape(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], -1)


def replace_linears(model: nn.Module, shapes: set[tuple[int, int]]) -> int:
    """Swap every bias-free nn.Linear whose weight is one of ``shapes``, (N, K) each.

    The weights are shared with what they replace, so tied ones stay tied. Returns the number.
    """
    n_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or child.bias is not None:
                continue
            if tuple(child.weight.shape) in shapes:
                setattr(parent, name, FixedTileLinear(child.weight))
                n_replaced += 1
    return n_replaced


def rows_are_alike(
    linear: Callable[[Tensor], Tensor],
    n_rows: int,
    n_columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a row of ``linear(x)`` [n_rows, N], x [n_rows, n_columns], depends on its row alone.

    Compares bits on random rows: one row at every index, rows permuted, and each row among zeros.
    Draws from its own generator and waits for the device once.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_rows, n_columns, generator=generator, dtype=dtype, device=device)
    expected = linear(x)
    same = linear(x[:1].repeat(n_rows, 1)) == expected[0]
    alike = same.all()
    for _ in range(4):
        order = torch.randperm(n_rows, generator=generator, device=device)
        alike &= (linear(x[order]) == expected[order]).all()
    for row in range(n_rows):
        alone = torch.zeros_like(x)
        alone[row] = x[row]
        alike &= (linear(alone)[row] == expected[row]).all()
    return bool(alike)
