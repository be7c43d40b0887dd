"""Matrix products for blocks of rows: fixed tiles, a fixed order of summation, and what follows.

A row of a result depends on that row of x alone, not on its index or its neighbours. What follows a
product is done where its sums already are, in registers: SwiGLU after gate and up, the argmax after
the output head. Where the inner dimension is split (split-K), the partial sums are left to the
kernel that comes next, which adds them in order as it reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.overlap import fetch, first_columns, overlaps, release, wait

if TYPE_CHECKING:
    from orthrus_fast.kernels.interface import Products


PREFETCH_LIMIT = 4 * 2**20  # bytes of the weight after SwiGLU: the best of what was timed
ROWS = (16, 32, 64, 128)  # the tiles' rows of x; the table has none for more


class Tiles(NamedTuple):
    """What a launch is made of."""

    block_n: int  # rows of the weight in a tile
    block_k: int
    n_splits: int  # of the inner dimension
    num_warps: int
    num_stages: int


def read_table(chip: str) -> dict[tuple[int, int, int], Tiles]:
    """The committed tiles of a chip ("sm_90"): (rows, N, K) -> Tiles; empty for an unknown chip.

    ``python -m scripts.tune_products`` writes them; running never does.
    """
    text = resources.files("orthrus_fast.kernels").joinpath("tiles.json").read_text("utf-8")
    table: dict[tuple[int, int, int], Tiles] = {}
    for key, tiles in json.loads(text)["chips"].get(chip, {"tiles": {}})["tiles"].items():
        n_rows, n_columns, n_inner = map(int, key.split("x"))
        table[n_rows, n_columns, n_inner] = Tiles(*tiles)
    return table


def default_tiles(n_columns: int, n_inner: int, block_m: int, itemsize: int, shared: int) -> Tiles:
    """Tiles for a shape that has none in the table; ``shared``: bytes of a block's shared memory.

    For products of cuBLAS that are not row-invariant. Not tuned; the same on every chip, except
    for the number of stages.
    """
    block_k = 128 if itemsize == 2 else 32  # float32 has no matrix unit: operands sit in registers
    n_tiles = triton.cdiv(n_columns, 64)
    wanted = 4 if n_tiles <= 32 else 2 if n_tiles <= 48 else 1
    n_splits = max(1, min(wanted, triton.cdiv(n_inner, block_k) // 4))
    stage = (64 + block_m) * block_k * itemsize
    return Tiles(64, block_k, n_splits, 4, min(5, shared // stage))


@triton.jit
def _swiglu(tile, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr):  # type: ignore[no-untyped-def]
    """SwiGLU of a tile's halves [2 COLUMNS, BLOCK_M], rounded as PyTorch rounds it op by op."""
    dtype = tile.dtype
    gate, up = tl.split(tl.permute(tl.reshape(tile, (2, COLUMNS, BLOCK_M)), (1, 2, 0)))
    gate = gate.to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (gate * up.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["n_rows"])  # one binary for every M of a tile size
def _product_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, tile_max, tile_argmax, prefetch, n_rows, n_columns,
    K: tl.constexpr, N_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWIGLU: tl.constexpr, ARGMAX: tl.constexpr, STORE: tl.constexpr,
    REGION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of out [N_SPLITS, n_rows, n_columns], summed over one split of the inner dimension.

    The weight is the left operand: with few rows of x, only its side of the tile is long enough
    for Hopper's matrix unit. Programs that share a weight tile are neighbours, for the cache.
    """
    STEPS: tl.constexpr = (K + BLOCK_K * N_SPLITS - 1) // (BLOCK_K * N_SPLITS)
    COLUMNS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N  # of out in a tile
    release(OVERLAP)
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.arange(0, BLOCK_N)
    # With SWIGLU the tile's first half are rows of gate, the second the same ones of up.
    column = tl.program_id(1) * COLUMNS + index % COLUMNS
    # Past the edges the last row is read again, and not stored: no mask in the loop.
    weight_row = tl.minimum(column, n_columns - 1) + index // COLUMNS * n_columns
    weight_row = weight + weight_row.to(tl.int64) * K
    wait(OVERLAP)
    x_row = x + tl.minimum(row, n_rows - 1).to(tl.int64) * K
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(split * STEPS, (split + 1) * STEPS):
        inner = step * BLOCK_K + k
        if K % (BLOCK_K * N_SPLITS) == 0:
            weight_tile = tl.load(weight_row[:, None] + inner[None, :])
            x_tile = tl.load(x_row[None, :] + inner[:, None])
        else:
            inside = inner < K
            weight_tile = tl.load(
                weight_row[:, None] + inner[None, :], mask=inside[None, :], other=0.0
            )
            x_tile = tl.load(x_row[None, :] + inner[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(weight_tile, x_tile, total, input_precision="ieee")

    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)  # where K is not split
    n_programs = tl.num_programs(0) * tl.num_programs(1)
    fetch(prefetch, program, n_programs, REGION, OVERLAP)
    dtype = x.dtype.element_ty
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    at = (split * n_rows + row[None, :]).to(tl.int64) * n_columns + column
    inside = (row[None, :] < n_rows) & (column < n_columns)
    if SWIGLU:
        result = _swiglu(total.to(dtype), COLUMNS, BLOCK_M)
    else:
        result = total.to(out.dtype.element_ty)
    if STORE:
        tl.store(out + at, result, mask=inside)
    if ARGMAX:
        # A NaN is neither greater nor less; it must win, so that the chosen logit tells of it.
        value = result.to(tl.float32)
        value = tl.where(value == value, value, float("inf"))
        value = tl.where(column < n_columns, value, -float("inf"))
        greatest, winner = tl.max(value, 0, return_indices=True)  # the lowest index wins a tie
        tile = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tile_max + tile, greatest, mask=row < n_rows)
        tl.store(tile_argmax + tile, winner + tl.program_id(1) * BLOCK_N, mask=row < n_rows)


@triton.jit
def _join_argmax_kernel(  # type: ignore[no-untyped-def]
    tile_max, tile_argmax, out, N_TILES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    """One row: the id of the greatest of the tiles' maxima, the lowest id where several tie."""
    wait(OVERLAP)
    tile = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * N_TILES
    value = tl.load(tile_max + at + tile, mask=tile < N_TILES, other=-float("inf"))
    winner = tl.argmax(value, 0)
    tl.store(out + tl.program_id(0), tl.load(tile_argmax + at + winner).to(tl.int64))


def launch(
    x: Tensor,
    weight: Tensor,
    tiles: Tiles,
    *,
    swiglu: bool = False,
    argmax: str = "",
    prefetch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [M, K] times weight [N, K] transposed -> partials [P, M, N], ids [M].

    P is ``tiles.n_splits``; partials are float32 where it is not 1. With ``swiglu`` they are
    [1, M, N / 2]. ``argmax``: "ids" leaves the product out, "both" keeps it; otherwise ids is
    empty. The beginning of ``prefetch`` [N, K], the weight that is read next, goes into the cache;
    only where K is not split. bfloat16, float16 or float32; sums are float32, without TF32. A row
    of a result depends on that row of x alone, not on its index or its neighbours.
    """
    (n_rows, n_inner), n_columns = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and weight.shape[1] == n_inner
    assert tiles.n_splits == 1 or not (swiglu or argmax or prefetch is not None)
    block_m, overlap = block_rows(n_rows), overlaps(x.device)
    columns = tiles.block_n
    if swiglu:
        columns, n_columns = columns // 2, n_columns // 2
    n_tiles = triton.cdiv(n_columns, columns)
    partials = _empty_partials(x, n_columns if argmax != "ids" else 0, tiles)
    tile_max = x.new_empty(n_rows if argmax else 0, n_tiles, dtype=torch.float32)
    tile_argmax = torch.empty_like(tile_max, dtype=torch.int32)
    ids = x.new_empty(len(tile_max), dtype=torch.int64)
    region = tuple(first_columns(prefetch, PREFETCH_LIMIT))
    start: Any = _product_kernel[triton.cdiv(n_rows, block_m), n_tiles, tiles.n_splits]
    start(
        *(x, weight, partials, tile_max, tile_argmax, x if prefetch is None else prefetch),
        *(n_rows, n_columns),
        *(n_inner, tiles.n_splits, block_m, tiles.block_n, tiles.block_k),
        *(swiglu, bool(argmax), argmax != "ids", region, overlap),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,  # said, because the default differs between Triton's versions
        launch_pdl=overlap,
    )
    if argmax:
        start = _join_argmax_kernel[(n_rows,)]
        block = triton.next_power_of_2(n_tiles)
        start(
            *(tile_max, tile_argmax, ids, n_tiles, block, overlap), num_warps=8, launch_pdl=overlap
        )
    return partials, ids


def block_rows(n_rows: int) -> int:
    """The tile's rows for a block of ``n_rows``."""
    return next((rows for rows in ROWS if rows >= n_rows), ROWS[-1])


def _empty_partials(x: Tensor, n_columns: int, tiles: Tiles) -> Tensor:
    dtype = torch.float32 if tiles.n_splits > 1 else x.dtype
    return x.new_empty(tiles.n_splits, len(x), n_columns, dtype=dtype)


# Custom operators: a compiler calls these without looking inside. ``tiles`` is a list of ints.


@torch.library.custom_op("orthrus_fast::product", mutates_args=())
def product_op(x: Tensor, weight: Tensor, tiles: Sequence[int]) -> Tensor:
    return launch(x, weight, Tiles(*tiles))[0]


product_op.register_fake(
    lambda x, weight, tiles: _empty_partials(x, weight.shape[0], Tiles(*tiles))
)


@torch.library.custom_op("orthrus_fast::swiglu_product", mutates_args=())
def swiglu_product_op(
    x: Tensor, weight: Tensor, tiles: Sequence[int], prefetch: Tensor | None = None
) -> Tensor:
    return launch(x, weight, Tiles(*tiles), swiglu=True, prefetch=prefetch)[0][0]


swiglu_product_op.register_fake(lambda x, weight, *_: x.new_empty(len(x), weight.shape[0] // 2))


@torch.library.custom_op("orthrus_fast::lm_head_argmax", mutates_args=())
def lm_head_argmax_op(
    x: Tensor, weight: Tensor, tiles: Sequence[int], return_logits: bool
) -> tuple[Tensor, Tensor]:
    partials, ids = launch(x, weight, Tiles(*tiles), argmax="both" if return_logits else "ids")
    return ids, partials[0]


@lm_head_argmax_op.register_fake
def _(
    x: Tensor, weight: Tensor, tiles: Sequence[int], return_logits: bool
) -> tuple[Tensor, Tensor]:
    product = x.new_empty(len(x), weight.shape[0] if return_logits else 0)
    return x.new_empty(len(x), dtype=torch.int64), product


@dataclass(frozen=True)
class CustomProducts:
    """``interface.Products`` by these kernels where the table has tiles, else by cuBLAS.

    ``forced`` are shapes (N, K) that cuBLAS may not compute, because its rows are not invariant.
    """

    has_custom: ClassVar[bool] = True
    cublas: Products
    table: Mapping[tuple[int, int, int], Tiles]  # (rows, N, K)
    shared: int  # bytes of shared memory that a block may use
    forced: frozenset[tuple[int, int]] = frozenset()

    @staticmethod
    def of(cublas: Products, device: torch.device, dtype: torch.dtype) -> CustomProducts:
        """The committed table's tiles for a CUDA device; ``cublas`` computes the rest."""
        properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks a field
        chip = f"sm_{properties.major}{properties.minor}"
        table = read_table(chip) if dtype.itemsize == 2 else {}
        return CustomProducts(cublas, table, int(properties.shared_memory_per_block_optin))

    def is_custom(self, n_rows: int, weight: Tensor) -> bool:
        return self.tiles(n_rows, weight) is not None

    def without_cublas(self, shapes: frozenset[tuple[int, int]]) -> CustomProducts:
        return replace(self, forced=shapes)

    def tiles(self, n_rows: int, weight: Tensor) -> Tiles | None:
        """The tiles of a product of ``n_rows`` rows; None: cuBLAS computes it."""
        n_columns, n_inner = weight.shape
        block_m = block_rows(n_rows)
        tiles = self.table.get((block_m, n_columns, n_inner)) if n_rows <= block_m else None
        if tiles is None and (n_columns, n_inner) in self.forced:
            return default_tiles(n_columns, n_inner, block_m, weight.itemsize, self.shared)
        return tiles

    def partials(self, x: Tensor, weight: Tensor) -> Tensor:
        tiles = self.tiles(x.shape[:-1].numel(), weight)
        if tiles is None:
            return self.cublas.partials(x, weight)
        partials: Tensor = product_op(_rows(x), weight, list(tiles))
        return partials.view(len(partials), *x.shape[:-1], -1)

    def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
        tiles = self.tiles(x.shape[:-1].numel(), weight)
        if tiles is None:
            return self.cublas.swiglu(x, weight, prefetch)
        tiles = tiles._replace(n_splits=1)
        hidden: Tensor = swiglu_product_op(_rows(x), weight, list(tiles), prefetch)
        return hidden.view(*x.shape[:-1], -1)

    def lm_head_argmax(
        self, x: Tensor, weight: Tensor, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        tiles = self.tiles(x.shape[:-1].numel(), weight)
        if tiles is None:
            return self.cublas.lm_head_argmax(x, weight, return_logits)
        tiles = tiles._replace(n_splits=1)
        ids, logits = lm_head_argmax_op(_rows(x), weight, list(tiles), return_logits)
        return ids.view(x.shape[:-1]), logits.view(*x.shape[:-1], logits.shape[-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
