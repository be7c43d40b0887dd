"""Matrix products by kernels of this package, at every number of rows, on every chip.

A row of a result depends on that row of x alone, to the bit: each partial sum takes its share of
the inner dimension K from the first column to the last, whatever the tile (seen to agree for tiles
of 16 to 256 rows, so for every kind of matrix instruction), and the shares and the order in which
the partial sums are added belong to the weight (``interface.k_split``). What follows a product is
done where its sums already are, in registers: SwiGLU after gate and up, the argmax after the output
head. With few rows the partial sums of a weight are left to the kernel that comes next, which adds
them as it reads them: so a small product has programs enough. With many, a program adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orthrus_fast.kernels.overlap import fetch, first_columns, overlaps, release, wait
from orthrus_fast.kernels.tiles import Tiles, find_tiles

PREFETCH_LIMIT = 4 * 2**20  # bytes of the weight after SwiGLU: the best of what was timed


@triton.jit
def swiglu_of(gate, up, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """SwiGLU of sums, rounded as PyTorch rounds it op by op."""
    gate = gate.to(dtype).to(tl.float32)
    gate = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return (gate * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _sum_by_pointers(  # type: ignore[no-untyped-def]
    x_row, weight_row, first,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One partial sum of a tile [BLOCK_N, BLOCK_M]: SPLIT columns of K from ``first`` on.

    The weight is the left operand: with few rows of x, only its side of the tile is long enough
    for Hopper's matrix unit.
    """
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for step in range(0, SPLIT, BLOCK_K):
        inner = first + step + k
        if K % SPLIT == 0 and SPLIT % BLOCK_K == 0:
            weight_tile = tl.load(weight_row[:, None] + inner[None, :])
            x_tile = tl.load(x_row[None, :] + inner[:, None])
        else:
            inside = inner < K
            weight_tile = tl.load(
                weight_row[:, None] + inner[None, :], mask=inside[None, :], other=0.0
            )
            x_tile = tl.load(x_row[None, :] + inner[:, None], mask=inside[:, None], other=0.0)
        total = tl.dot(weight_tile, x_tile, total, input_precision="ieee")
    return total


@triton.jit
def _sum_by_descriptors(  # type: ignore[no-untyped-def]
    x, weight, row, weight_row, first,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same where the copy engine loads the tiles; past the edges it fills in zeros."""
    total = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    for step in range(0, SPLIT, BLOCK_K):
        x_tile = x.load([row, first + step])
        weight_tile = weight.load([weight_row, first + step])
        total = tl.dot(weight_tile, x_tile.T, total, input_precision="ieee")
    return total


@triton.jit
def _swiglu_by_descriptors(  # type: ignore[no-untyped-def]
    x, weight, row, weight_row, n_columns, dtype: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """SwiGLU of a tile's gate and up, which read the same rows of x."""
    gate = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    up = tl.zeros((COLUMNS, BLOCK_M), tl.float32)
    for step in range(0, K, BLOCK_K):
        x_tile = x.load([row, step]).T
        gate_tile = weight.load([weight_row, step])
        gate = tl.dot(gate_tile, x_tile, gate, input_precision="ieee")
        up_tile = weight.load([n_columns + weight_row, step])
        up = tl.dot(up_tile, x_tile, up, input_precision="ieee")
    return swiglu_of(gate, up, dtype)


@triton.jit
def _partial_sum(  # type: ignore[no-untyped-def]
    x, weight, first, first_row, row, n_rows, first_column, weight_row,
    K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One partial sum of a tile, whichever way the tiles of x and the weight are loaded."""
    if DESCRIPTORS:
        return _sum_by_descriptors(
            x, weight, first_row, first_column, first, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K
        )
    else:
        return _sum_by_pointers(
            x + tl.minimum(row, n_rows - 1).to(tl.int64) * K,
            weight + weight_row.to(tl.int64) * K,
            first, K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    x, weight, split, first_row, row, n_rows, first_column, weight_row,
    K: tl.constexpr, SPLIT: tl.constexpr, N_JOINED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The partial sum ``split`` of a tile, or the sum of the first ``N_JOINED``, pairwise."""
    total = _partial_sum(
        x, weight, split * SPLIT, first_row, row, n_rows, first_column, weight_row,
        K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS,
    )  # fmt: skip
    pair = total
    # Not unrolled: ptxas would find no registers for all, and have each product wait.
    for number in range(1, N_JOINED):
        part = _partial_sum(
            x, weight, number * SPLIT, first_row, row, n_rows, first_column, weight_row,
            K, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS,
        )  # fmt: skip
        if number == 2:
            pair = part
        elif number == 3:
            total += pair + part
        else:
            total += part
    return total


@triton.jit
def greatest(result, column, n_columns):  # type: ignore[no-untyped-def]
    """Each row's greatest value in a tile [columns, rows], and where it is; at a tie the lowest.

    A NaN is neither greater nor less; it must win, so that the chosen logit tells of it.
    """
    value = result.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    value = tl.where(column < n_columns, value, -float("inf"))
    return tl.max(value, 0, return_indices=True)


@triton.jit
def store_everywhere(out, others, at, value, mask):  # type: ignore[no-untyped-def]
    """Store what a tile gives at ``at`` of out, and of the same place in other GPUs' memory."""
    if others is not None:
        for other in tl.static_range(len(others)):
            tl.store(others[other] + at, value, mask=mask)
    tl.store(out + at, value, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])  # one binary for every M of a tile size
def _product_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, others, tile_max, tile_argmax, prefetch, n_rows, n_columns, dtype: tl.constexpr,
    K: tl.constexpr, SPLIT: tl.constexpr, N_PARTIALS: tl.constexpr, JOINED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SWIGLU: tl.constexpr, ARGMAX: tl.constexpr, STORE: tl.constexpr,
    REGION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of out [P, n_rows, n_columns]: a partial sum or, if JOINED, the sum of all.

    Programs that share a weight tile are neighbours, for the cache.
    """
    COLUMNS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N  # of out in a tile
    release(OVERLAP and others is None)
    first_row, first_column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * COLUMNS
    split = tl.program_id(2)
    row = first_row + tl.arange(0, BLOCK_M)
    index = tl.arange(0, BLOCK_N)
    # With SWIGLU the tile's first half are rows of gate, the second the same ones of up.
    weight_row = first_column + index % COLUMNS
    # Past the edges the last row is read again, and not stored: no mask in the loop.
    weight_row = tl.minimum(weight_row, n_columns - 1) + index // COLUMNS * n_columns
    wait(OVERLAP)
    release(OVERLAP and others is not None)  # a norm that waits for nothing but sums
    if DESCRIPTORS and SWIGLU:
        result = _swiglu_by_descriptors(
            x, weight, first_row, first_column, n_columns, dtype, K, BLOCK_M, COLUMNS, BLOCK_K
        )
    else:
        total = _sum(
            x, weight, split, first_row, row, n_rows, first_column, weight_row, K, SPLIT,
            N_PARTIALS if JOINED else 1, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS,
        )  # fmt: skip
        if SWIGLU:
            halves = tl.permute(tl.reshape(total, (2, COLUMNS, BLOCK_M)), (1, 2, 0))
            gate, up = tl.split(halves)
            result = swiglu_of(gate, up, dtype)
        else:
            result = total.to(out.dtype.element_ty)

    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)  # where K is not split
    n_programs = tl.num_programs(0) * tl.num_programs(1)
    fetch(prefetch, program, n_programs, REGION, OVERLAP)
    column = first_column + tl.arange(0, COLUMNS)[:, None]
    at = (split * n_rows + row[None, :]).to(tl.int64) * n_columns + column
    inside = (row[None, :] < n_rows) & (column < n_columns)
    if STORE:
        store_everywhere(out, others, at, result, inside)
    if ARGMAX:
        value, winner = greatest(result, column, n_columns)
        tile = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tile_max + tile, value, mask=row < n_rows)
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


class Room(NamedTuple):
    """Where a product leaves its partial sums; ``others`` are places in other GPUs' memory."""

    partials: Tensor  # those of all GPUs [P, ..., N]
    out: Tensor
    others: tuple[Tensor, ...] | None = None


def empty_partials(x: Tensor, n_columns: int, n_partials: int) -> Tensor:
    """Room for the partial sums [P, ..., N] of x [..., K]; several are float32."""
    dtype = torch.float32 if n_partials > 1 else x.dtype
    return x.new_empty(n_partials, *x.shape[:-1], n_columns, dtype=dtype)


def empty_room(x: Tensor, n_columns: int, n_partials: int) -> Room:
    """``empty_partials``, for one GPU."""
    partials = empty_partials(x, n_columns, n_partials)
    return Room(partials, partials)


MakeRoom = Callable[[Tensor, int, int], Room]  # of x, N and P
Join = Callable[[Tensor, Tensor, Tensor, bool], None]


def join_argmax(tile_max: Tensor, tile_argmax: Tensor, ids: Tensor, overlap: bool) -> None:
    """Each row's id of the greatest of its tiles' maxima, into ``ids``."""
    n_rows, n_tiles = tile_max.shape
    start: Any = _join_argmax_kernel[(n_rows,)]
    block = triton.next_power_of_2(n_tiles)
    start(*(tile_max, tile_argmax, ids, n_tiles, block, overlap), num_warps=8, launch_pdl=overlap)


def launch(
    x: Tensor,
    weight: Tensor,
    split: int,
    tiles: Tiles,
    *,
    swiglu: bool = False,
    argmax: str = "",
    prefetch: Tensor | None = None,
    room: MakeRoom = empty_room,
    join: Join | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., K] times weight [N, K] transposed -> partials [P, ..., N], ids [...].

    ``split`` columns of K make a partial sum; each is float32. Where there is one, or where
    ``tiles`` join them, P is 1 and the result of x's dtype. With ``swiglu``, which does not split,
    it is [1, ..., N / 2]. ``argmax``, which does not either: "ids" leaves the product out, "both"
    keeps it; otherwise ids is empty. The beginning of ``prefetch`` [N, K], the weight that is read
    next, goes into the cache. bfloat16, float16 or float32; sums are float32, without TF32. With
    ``room`` partial sums go where that says, always float32; ``join`` joins the tiles' argmax.
    """
    (n_columns, n_inner), n_rows = weight.shape, x.numel() // x.shape[-1]
    assert x.is_contiguous() and weight.is_contiguous() and x.shape[-1] == n_inner
    split = n_inner if swiglu or argmax else split
    n_partials = math.ceil(n_inner / split)
    assert n_partials in (1, 2, 4) and (n_partials == 1 or prefetch is None)
    overlap, n_halves = overlaps(x.device), 2 if swiglu else 1
    columns, n_columns = tiles.block_n // n_halves, n_columns // n_halves
    # A step ends where its share does, also where a small weight's shares are shorter than a step.
    block_k = math.gcd(tiles.block_k, split) if n_partials > 1 else tiles.block_k
    n_tiles = triton.cdiv(n_columns, columns)
    n_left = 1 if tiles.joined else n_partials
    partials, out, others = room(x, n_columns if argmax != "ids" else 0, n_left)
    tile_max, tile_argmax, ids = empty_argmax(x, n_tiles if argmax else 0)
    region = tuple(first_columns(prefetch, PREFETCH_LIMIT))
    operands = ((x.view(n_rows, n_inner), tiles.block_m), (weight, columns))
    start: Any = _product_kernel[triton.cdiv(n_rows, tiles.block_m), n_tiles, n_left]
    start(
        *(_operand(*side, block_k, tiles.descriptors) for side in operands),
        *(out, others, tile_max, tile_argmax, x if prefetch is None else prefetch),
        *(n_rows, n_columns, triton_type(x.dtype), n_inner, split, n_partials, tiles.joined),
        *(tiles.block_m, tiles.block_n, block_k, tiles.descriptors),
        *(swiglu, bool(argmax), argmax != "ids", region, overlap),
        # Fusion is said, because the default differs between Triton's versions.
        **{"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True},
        launch_pdl=overlap,
    )
    if argmax:
        (join or join_argmax)(tile_max, tile_argmax, ids, overlap)
    return partials, ids


def _operand(rows: Tensor, n_rows: int, n_columns: int, descriptor: bool) -> Any:
    """What a kernel loads tiles of ``rows`` by."""
    return TensorDescriptor.from_tensor(rows, [n_rows, n_columns]) if descriptor else rows


def empty_argmax(x: Tensor, n_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the argmax of rows x [..., K]: values and places [n_rows, n_tiles], ids [...].

    Empty where there are no tiles, because nobody asks for it.
    """
    ids = x.new_empty(x.shape[:-1] if n_tiles else (0,), dtype=torch.int64)
    tile_max = x.new_empty(ids.numel(), n_tiles, dtype=torch.float32)
    return tile_max, torch.empty_like(tile_max, dtype=torch.int32), ids


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def product(x: Tensor, weight: Tensor, split: int, joins: bool = True) -> Tensor:
    """The partial sums [P, ..., N] of ``interface.Products.partials``; without ``joins`` all."""
    tiles = find_tiles(x, weight)
    return launch(x, weight, split, tiles if joins else tiles._replace(joined=False))[0]


def swiglu_product(x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
    """See ``interface.Products.swiglu``."""
    return launch(x, weight, 0, find_tiles(x, weight), swiglu=True, prefetch=prefetch)[0][0]


def lm_head_argmax(x: Tensor, weight: Tensor, return_logits: bool) -> tuple[Tensor, Tensor]:
    """See ``interface.Products.lm_head_argmax``."""
    argmax = "both" if return_logits else "ids"
    partials, ids = launch(x, weight, 0, find_tiles(x, weight), argmax=argmax)
    return ids, partials[0]
