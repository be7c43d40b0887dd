"""Matrix products with weights in fewer bits (``formats``), for blocks of few rows first of all.

A weight is read as it is stored and becomes a number of x's dtype in registers; of bfloat16, two
weights at a time, in three to five instructions. A row's scale is applied to its sums at the end,
that of an int4 group to its weights. So a row of a result depends on that row of x alone, and not
on the tile, as in ``products``.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels.formats import GROUP, PLACES, ZERO
from orthrus_fast.kernels.interface import Weight
from orthrus_fast.kernels.overlap import fetch, first_columns, overlaps, release, wait
from orthrus_fast.kernels.products import (
    PREFETCH_LIMIT,
    Join,
    MakeRoom,
    empty_argmax,
    empty_room,
    greatest,
    join_argmax,
    store_everywhere,
    swiglu_of,
    triton_type,
)
from orthrus_fast.kernels.tiles import Tiles, find_quantized_tiles

# Two words, $1, to bfloat16, $0. Of int4 128 + n comes first, n in its last bits; then times the
# scale $2, plus $3, which takes 128 and the stored zero away again.
_INT4 = """{
    .reg .b32 n;
    shr.b32 n, $1, %d;
    lop3.b32 n, n, 0x000f000f, 0x43004300, 0xea;
    fma.rn.bf16x2 $0, n, $2, $3;
}"""
# Of fp8 the sign stays, the rest moves to where bfloat16 has it, whose exponent is 120 more.
_FP8 = """{
    .reg .b32 n, rest, factor, zero;
    mov.b32 factor, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    shl.b32 n, $1, %d;
    shr.u32 rest, n, 4;
    and.b32 rest, rest, 0x07f007f0;
    lop3.b32 n, n, 0x80008000, rest, 0xea;
    fma.rn.bf16x2 $0, n, factor, zero;
}"""
# Of int8 a byte becomes the last one of the float 2**23 + n.
_INT8 = """{
    .reg .b32 first, second;
    prmt.b32 first, $1, 0x4b000000, 0x765%d;
    prmt.b32 second, $1, 0x4b000000, 0x765%d;
    sub.f32 first, first, 0f4b000080;
    sub.f32 second, second, 0f4b000080;
    cvt.rn.bf16x2.f32 $0, second, first;
}"""


@triton.constexpr_function
def _asm(format, place):  # type: ignore[no-untyped-def]
    """What unpacks the weights at a place of two words."""
    if format == "int4":
        return _INT4 % (4 * place)
    if format == "fp8":
        return _FP8 % (8 * (1 - place))
    return _INT8 % (place, place + 2)


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    words, codes, dtype: tl.constexpr, FORMAT: tl.constexpr, PLACE: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The weights [N, GROUP] at a place of words, those of int4 times the scales of codes [N]."""
    asm: tl.constexpr = _asm(FORMAT, PLACE)
    if FORMAT == "int4":
        scale = ((((codes >> (8 * PLACE)) & 127) + 960) << 20).to(tl.float32, bitcast=True)[:, None]
    if ASM and dtype == tl.bfloat16:
        if FORMAT == "int4":
            of_zero = (scale * -(128.0 + ZERO)).to(tl.bfloat16)
            return tl.inline_asm_elementwise(
                asm, "=r,r,r,r", [words, scale.to(tl.bfloat16), of_zero], tl.bfloat16, True, 2
            )
        else:
            return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.bfloat16, True, 2)
    bits = (words.to(tl.int32) >> (BITS * PLACE)) & (2**BITS - 1)
    if FORMAT == "int4":
        return ((bits - ZERO).to(tl.float32) * scale).to(dtype)
    elif FORMAT == "int8":
        return (bits - ZERO).to(tl.float32).to(dtype)
    else:
        as_float = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return (as_float.to(tl.float32, bitcast=True) * 2.0**120).to(dtype)


@triton.jit
def _partial_sum(  # type: ignore[no-untyped-def]
    x_row, weight_row, group_scale, first, n_weight_rows,
    K: tl.constexpr, SPLIT: tl.constexpr, FORMAT: tl.constexpr, PLACES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One partial sum of a tile [BLOCK_N, BLOCK_M]: SPLIT columns of K from ``first`` on."""
    dtype: tl.constexpr = x_row.dtype.element_ty
    STEP: tl.constexpr = PLACES * GROUP
    EVEN: tl.constexpr = K % SPLIT == 0
    LAST: tl.constexpr = (K + STEP - 1) // STEP - 1
    j = tl.arange(0, GROUP)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # A number of steps that is known: else ptxas has each product wait for the one before.
    for number in range(SPLIT // STEP):
        step = first // STEP + number
        stored = step if EVEN else tl.minimum(step, LAST)  # past the end x is zero
        words = tl.load(weight_row[:, None] + (stored * GROUP + j)[None, :])
        codes = 0
        if FORMAT == "int4":
            codes = tl.load(group_scale + stored * n_weight_rows)
        for place in tl.static_range(PLACES):
            inner = step * STEP + place * GROUP + j
            if EVEN:
                x_tile = tl.load(x_row[None, :] + inner[:, None])
            else:
                x_tile = tl.load(x_row[None, :] + inner[:, None], (inner < K)[:, None], 0.0)
            tile = _unpack(words, codes, dtype, FORMAT, place, 16 // PLACES, ZERO, ASM)
            total += tl.dot(tile, x_tile, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["n_rows"])
def _quantized_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, group_scale, out, others, tile_max, tile_argmax, prefetch,
    n_rows, n_columns, dtype: tl.constexpr,
    K: tl.constexpr, ROW: tl.constexpr, SPLIT: tl.constexpr, FORMAT: tl.constexpr,
    PLACES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SWIGLU: tl.constexpr, ARGMAX: tl.constexpr, STORE: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr,
    REGION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile of out [P, n_rows, n_columns], as ``products._product_kernel`` has it."""
    COLUMNS: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    release(OVERLAP and others is None)
    first_column, split = tl.program_id(1) * COLUMNS, tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    index = tl.arange(0, BLOCK_N)
    weight_index = tl.minimum(first_column + index % COLUMNS, n_columns - 1)
    weight_index += index // COLUMNS * n_columns
    of_weight = tl.load(scale + weight_index)
    wait(OVERLAP)
    release(OVERLAP and others is not None)  # a norm that waits for nothing but sums
    total = _partial_sum(
        x + tl.minimum(row, n_rows - 1).to(tl.int64) * K,
        weight + weight_index.to(tl.int64) * ROW, group_scale + weight_index,
        split * SPLIT, n_columns.to(tl.int64) * (2 if SWIGLU else 1),
        K, SPLIT, FORMAT, PLACES, BLOCK_M, BLOCK_N, GROUP, ZERO, ASM,
    )  # fmt: skip
    total *= of_weight[:, None]
    if SWIGLU:
        halves = tl.permute(tl.reshape(total, (2, COLUMNS, BLOCK_M)), (1, 2, 0))
        gate, up = tl.split(halves)
        result = swiglu_of(gate, up, dtype)
    else:
        result = total.to(dtype)

    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    fetch(prefetch, program, tl.num_programs(0) * tl.num_programs(1), REGION, OVERLAP)
    column = first_column + tl.arange(0, COLUMNS)[:, None]
    at = (split * n_rows + row[None, :]).to(tl.int64) * n_columns + column
    inside = (row[None, :] < n_rows) & (column < n_columns)
    if STORE:
        store_everywhere(out, others, at, result.to(out.dtype.element_ty), inside)
    if ARGMAX:
        value, winner = greatest(result, column, n_columns)
        tile = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(tile_max + tile, value, mask=row < n_rows)
        tl.store(tile_argmax + tile, winner + first_column, mask=row < n_rows)


def launch(
    x: Tensor,
    weight: Weight,
    end: str = "",
    prefetch: Tensor | None = None,
    tiles: Tiles | None = None,
    room: MakeRoom = empty_room,
    join: Join | None = None,
) -> tuple[Tensor, Tensor]:
    """x [..., K] times a quantized weight [N, K] -> partials [P, ..., N], ids [...].

    ``end``: "" for partial sums; "swiglu"; of the output head "ids", or "both" with logits. What is
    not asked for is empty. ``tiles`` None takes those of the tables; ``room`` and ``join`` are as
    in ``products.launch``.
    """
    tiles = tiles or find_quantized_tiles(x, weight)
    swiglu, argmax = end == "swiglu", end in ("ids", "both")
    words, scale, format = weight.weight, weight.scale, weight.format
    n_inner, n_halves = weight.n_inputs, 2 if swiglu else 1
    n_rows, n_columns = x.numel() // n_inner, len(words) // n_halves
    assert scale is not None and x.is_contiguous() and words.is_contiguous()
    assert x.shape[-1] == n_inner
    split = words.shape[1] * PLACES[format] if end else weight.split
    n_partials, overlap = math.ceil(n_inner / split), overlaps(x.device)
    n_tiles = triton.cdiv(n_columns, tiles.block_n // n_halves)
    partials, out, others = room(x, 0 if end == "ids" else n_columns, n_partials)
    tile_max, tile_argmax, ids = empty_argmax(x, n_tiles if argmax else 0)
    region = tuple(first_columns(prefetch, PREFETCH_LIMIT))
    start: Any = _quantized_kernel[triton.cdiv(n_rows, tiles.block_m), n_tiles, n_partials]
    start(
        *(x, words, scale, scale if weight.group_scale is None else weight.group_scale, out),
        *(others, tile_max, tile_argmax, x if prefetch is None else prefetch, n_rows, n_columns),
        *(triton_type(x.dtype if end else out.dtype), n_inner, words.shape[1]),
        *(split, format, PLACES[format], tiles.block_m, tiles.block_n),
        *(swiglu, argmax, end != "ids", GROUP, ZERO.get(format, 0), x.is_cuda),
        *(region, overlap),
        **{"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "enable_fp_fusion": True},
        launch_pdl=overlap,
    )
    if argmax:
        (join or join_argmax)(tile_max, tile_argmax, ids, overlap)
    return partials, ids


def product(x: Tensor, weight: Weight) -> Tensor:
    """See ``interface.Products.partials``."""
    return launch(x, weight)[0]


def swiglu(x: Tensor, weight: Weight, prefetch: Tensor | None) -> Tensor:
    """See ``interface.Products.swiglu``."""
    return launch(x, weight, "swiglu", prefetch)[0][0]


def lm_head_argmax(x: Tensor, weight: Weight, return_logits: bool) -> tuple[Tensor, Tensor]:
    """See ``interface.Products.lm_head_argmax``."""
    partials, ids = launch(x, weight, "both" if return_logits else "ids")
    return ids, partials[0]
