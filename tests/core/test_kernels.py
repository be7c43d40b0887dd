"""The Triton kernels: numbers in Triton's interpreter, and machine code for every chip."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from orthrus_fast import model
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.invariance import rows_are_invariant
from orthrus_fast.kernels import plain, plain_sampling
from tests.kernel_compile import CHIPS, EVERY_CHIP, compile_for, interpreted, read_before_waiting
from tests.marks import slow_but

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

import triton
import triton.language as tl
from triton.runtime import interpreter

from orthrus_fast.kernels import norm, overlap, products, rope
from orthrus_fast.kernels.products import CustomProducts, Tiles, launch
from scripts import tune_products
from scripts.tune_products import Shape

MODELS = {name: shape_config(name) for name in tune_products.MODELS}
SLOW = pytest.mark.slow
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = slow_but([torch.bfloat16, torch.float32], TRITON_NAMES)


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the kernels of every module on the CPU, and round as a GPU does."""
    convert = interpreter._convert_float

    def to_nearest(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        """The interpreter's own cast to bfloat16 truncates."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)
    with ExitStack() as stack:
        for module in (rope, products, norm, overlap):
            stack.enter_context(interpreted(module))
        yield


# What is fetched ahead


@triton.jit
def share_kernel(out, N_ROWS: tl.constexpr, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    begin, end = overlap.share_of(tl.program_id(0), tl.num_programs(0), N_ROWS, MOST)
    tl.store(out + 2 * tl.program_id(0), begin)
    tl.store(out + 2 * tl.program_id(0) + 1, end)


@pytest.mark.parametrize("n_rows, n_programs", [(1, 1), (7, 3), (6, 9), (2048, 72), (96, 2)])
def test_a_row_is_fetched_by_one_program(interpreting: None, n_rows: int, n_programs: int) -> None:
    out = torch.empty(n_programs, 2, dtype=torch.int32)
    with interpreted(sys.modules[__name__]):
        share_kernel[n_programs,](out, n_rows, 32)
    rows = [row for begin, end in out.tolist() for row in range(begin, end)]
    assert rows == list(range(min(n_rows, 32 * n_programs)))


def test_what_is_fetched_lies_within_the_weight_and_its_limit() -> None:
    for n, k in [(4096, 2048), (151936, 4096), (10, 64), (24576, 4096), (3, 8)]:
        weight = torch.empty(n, k, dtype=torch.bfloat16)
        for limit in (1, 4096, 2**20, 2**30):
            for head in (overlap.first_columns(weight, limit), overlap.first_rows(weight, limit)):
                assert head.row_bytes == 2 * k and 0 <= head.n_rows <= n
                assert 0 <= head.n_bytes <= head.row_bytes and head.n_bytes % 16 == 0
                assert head.n_rows * head.n_bytes <= limit
    assert overlap.first_columns(torch.empty(512, 2048), 2**20, 768) == (512, 8192, 768)
    assert overlap.first_columns(torch.empty(512, 2048), 2**20) == (512, 8192, 2048)
    assert overlap.first_columns(torch.empty(4096, 2048), 2**20) == (4096, 8192, 256)
    assert overlap.first_rows(torch.empty(512, 2048), 2**20) == (128, 8192, 8192)


def test_what_the_chip_would_refuse_is_not_fetched() -> None:
    odd = torch.empty(100, 33, dtype=torch.bfloat16)
    shifted = torch.empty(64 * 64 + 1, dtype=torch.bfloat16)[1:].view(64, 64)
    for weight in (None, odd, shifted):
        for head in (overlap.first_columns(weight, 2**20), overlap.first_rows(weight, 2**20)):
            assert head == (0, 0, 0)


@pytest.mark.parametrize("view", model.View)
def test_a_kernel_is_told_the_weight_that_is_read_next(view: model.View) -> None:
    """Told another, it would only be slow."""
    layer = model.Layer(shape_config("tiny"), draft_view=True).requires_grad_(False)
    for weight in layer.parameters():
        weight.fill_(0.1)
    told: list[Tensor | None] = []
    read: list[tuple[int, Tensor]] = []  # a weight, and how many were told of before

    class Noting(plain.PlainProducts):
        def partials(self, x: Tensor, weight: Tensor) -> Tensor:
            read.append((len(told), weight))
            return super().partials(x, weight)

        def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
            read.append((len(told), weight))
            told.append(prefetch)
            return super().swiglu(x, weight)

    def attend(q: Tensor, *rest: Any, causal: bool) -> Tensor:
        told.append(rest[4])
        return q

    def add_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
        told.append(arguments[4])
        return plain.add_norm(*arguments)

    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    names = ("positions", "slot", "positions", "cos", "sin")
    places = model.PassPositions(*(inputs[name] for name in names))
    x, update = torch.randn(2, 2, 3, 64)
    kernels = model.Kernels(
        attend, plain.qk_norm_rope_write, add_norm, Noting(), plain_sampling.sample
    )
    caches = inputs["k_cache"], inputs["v_cache"]
    layer(x, update[None], places, *caches, kernels, view)
    attention = layer.attention if view is model.View.AUTOREGRESSIVE else layer.draft_attention
    assert attention is not None
    order = [attention.qkv, attention.o, layer.mlp.gate_up, layer.mlp.down]
    assert len(told) == len(read) == 4
    for n, (linear, ahead, (n_told, weight)) in enumerate(zip(order, told, read, strict=True)):
        assert ahead is linear.weight is weight and n_told == n + 1


# qk_norm_rope_write


def make_rope_inputs(
    dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int, n_rows: int, width: int
) -> dict[str, Any]:
    """Arguments of qk_norm_rope_write, as a mapping by name; slots come in any order."""
    random = torch.Generator().manual_seed(n_heads * 1000 + head_dim + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    n_slots, capacity = n_rows + 2, width + 50
    start = torch.randint(0, 50, (n_rows, 1), generator=random)
    angles = 3 * draw(n_rows, width, head_dim // 2).repeat(1, 1, 2)
    cache = (n_slots, n_kv_heads, capacity, head_dim)
    size = 10 ** (2 * draw(n_rows, width, 1) - 2)  # so small in some rows that eps is felt
    tensors = {
        "partials": size * draw(n_rows, width, (n_heads + 2 * n_kv_heads) * head_dim)[None],
        "q_norm": 1 + 0.3 * draw(head_dim),
        "k_norm": 1 + 0.3 * draw(head_dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "k_cache": draw(*cache),
        "v_cache": draw(*cache),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()} | {
        "eps": 1e-3,
        "positions": start + torch.arange(width),
        "slot": torch.randperm(n_slots, generator=random)[:n_rows],
    }


def run(function: Callable[..., Tensor], inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q, and copies of the caches as the call leaves them."""
    inputs = inputs | {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    return function(**inputs), inputs["k_cache"], inputs["v_cache"]


def assert_rounded_alike(got: Tensor, expected: Tensor) -> None:
    """Equal, but for what the order of the mean's sum changes: last bits, in few places."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    difference = (got.double() - expected.double()).abs()
    last_place = torch.finfo(expected.dtype).eps * expected.double().abs().amax(-1, keepdim=True)
    assert bool((difference <= 3 * last_place).all())
    allowed = 0.25 if expected.dtype == torch.float32 else 0.001  # the mean itself is float32
    assert float((difference > 0).double().mean()) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_heads, n_kv_heads, head_dim, n_rows, width",
    slow_but(
        [(16, 8, 128, 1, 5), (3, 3, 16, 1, 7)],
        [
            (16, 8, 128, 1, 5),
            (32, 8, 128, 2, 3),
            (6, 2, 64, 3, 4),
            (4, 2, 16, 2, 1),
            (3, 3, 16, 1, 7),
        ],
    ),
)
def test_rope_kernel_rounds_as_the_model_does(
    interpreting: None,
    dtype: torch.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    n_rows: int,
    width: int,
) -> None:
    inputs = make_rope_inputs(dtype, n_heads, n_kv_heads, head_dim, n_rows, width)
    expected = run(plain.qk_norm_rope_write, inputs)
    got = run(rope.qk_norm_rope_write, inputs)
    assert_rounded_alike(got[0], expected[0])
    written = (inputs["slot"][:, None], slice(None), inputs["positions"])
    assert_rounded_alike(got[1][written], expected[1][written])
    assert torch.equal(got[2], expected[2])  # v is copied
    got[1][written] = inputs["k_cache"][written]
    assert torch.equal(got[1], inputs["k_cache"])  # and nothing else is touched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", [float("inf"), -float("inf"), float("nan")])
def test_what_overflows_does_not_reach_the_cache(
    interpreting: None, dtype: torch.dtype, what: float
) -> None:
    """It stands there as 0, in one row of k and of v; the rest is as it was without."""
    inputs = make_rope_inputs(dtype, 4, 2, 16, 2, 3)
    bad = inputs["partials"].clone()
    bad[0, 1, 2, 5 * 16 + 3] = what  # k's second head, whose norm spreads it
    bad[0, 1, 2, 7 * 16 + 9] = what  # v's second head
    for function in (plain.qk_norm_rope_write, rope.qk_norm_rope_write):
        _, k_cache, v_cache = run(function, inputs)
        at = (inputs["slot"][1], 1, inputs["positions"][1, 2])
        v_cache[at][9] = 0
        _, k_got, v_got = run(function, inputs | {"partials": bad})
        assert torch.equal(v_got, v_cache)
        assert bool(k_got.isfinite().all())
        k_got[at] = k_cache[at]
        assert torch.equal(k_got, k_cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_kernels_rows_do_not_depend_on_each_other(
    interpreting: None, dtype: torch.dtype
) -> None:
    inputs = make_rope_inputs(dtype, 6, 2, 64, 2, 5)
    by_row = ("cos", "sin", "positions")
    parts = inputs["partials"]
    q, k_cache, v_cache = run(rope.qk_norm_rope_write, inputs)

    turned = {name: inputs[name].flip(1).contiguous() for name in by_row}
    turned = inputs | turned | {"partials": parts.flip(2).contiguous()}
    got = run(rope.qk_norm_rope_write, turned)
    assert all(map(torch.equal, got, (q.flip(1), k_cache, v_cache)))

    columns = {name: inputs[name].flatten(0, 1)[:, None].contiguous() for name in by_row}
    columns["slot"] = inputs["slot"].repeat_interleave(5)
    columns["partials"] = parts.flatten(1, 2)[:, :, None].contiguous()
    got = run(rope.qk_norm_rope_write, inputs | columns)
    assert all(map(torch.equal, got, (q.flatten(0, 1)[:, None], k_cache, v_cache)))

    alone = torch.zeros_like(parts)
    alone[:, 1, 2] = parts[:, 1, 2]
    got = run(rope.qk_norm_rope_write, inputs | {"partials": alone})
    assert torch.equal(got[0][1, 2], q[1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_parts", slow_but([3], [2, 3, 8]))
def test_rope_kernel_adds_parts_in_order_and_rounds_once(
    interpreting: None, dtype: torch.dtype, n_parts: int
) -> None:
    inputs = make_rope_inputs(dtype, 6, 2, 64, 2, 3)
    parts = cancelling_parts(n_parts, inputs["partials"][0])
    whole = plain.sum_partials(parts, dtype)[None]
    expected = run(rope.qk_norm_rope_write, inputs | {"partials": whole})
    got = run(rope.qk_norm_rope_write, inputs | {"partials": parts})
    assert all(map(torch.equal, got, expected))


def cancelling_parts(n_parts: int, like: Tensor) -> Tensor:
    """Float32 parts of which the first two cancel, so that another order of summation is seen."""
    parts = torch.randn(n_parts, *like.shape, generator=torch.Generator().manual_seed(n_parts))
    parts[0] *= 1e5
    parts[1] -= parts[0]
    assert n_parts == 2 or not torch.equal(
        plain.sum_partials(parts, like.dtype), plain.sum_partials(parts.flip(0), like.dtype)
    )
    return parts


# add_norm


def make_norm_inputs(
    dtype: torch.dtype, n_parts: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Arguments of add_norm; so small in some rows that eps is felt."""
    random = torch.Generator().manual_seed(shape[-1] + n_parts)
    size = 10 ** (2 * torch.randn(*shape[:-1], 1, generator=random) - 2)
    x = (size * torch.randn(shape, generator=random)).to(dtype)
    parts = size * torch.randn(n_parts, *shape, generator=random)
    if n_parts > 2:
        parts[0], parts[1] = parts[0] * 1e5, parts[1] - parts[0] * 1e5
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=random)
    return x, parts.to(dtype) if n_parts == 1 else parts, weight.to(dtype), 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_parts", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 2560), (5, 96), (3, 1, 128), (40, 33)])
def test_norm_kernel_rounds_as_the_model_does(
    interpreting: None, dtype: torch.dtype, n_parts: int, shape: tuple[int, ...]
) -> None:
    inputs = make_norm_inputs(dtype, n_parts, shape)
    expected = plain.add_norm(*inputs)
    total, normed = norm.add_norm(*inputs)
    assert torch.equal(total, expected[0])  # the parts' order included
    assert_rounded_alike(normed, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_parts", [1, 3])
def test_norm_kernels_rows_do_not_depend_on_each_other(
    interpreting: None, dtype: torch.dtype, n_parts: int
) -> None:
    x, parts, weight, eps = make_norm_inputs(dtype, n_parts, (7, 96))
    expected = norm.add_norm(x, parts, weight, eps)

    def again(rows: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add_norm(x[rows], parts[:, rows], weight, eps)

    for rows in (torch.arange(7), torch.arange(7).flip(0), torch.tensor([4])):
        assert all(torch.equal(a, b[rows]) for a, b in zip(again(rows), expected, strict=True))
    keep = torch.arange(7)[:, None] == 4
    alone = norm.add_norm(x * keep, parts * keep, weight, eps)
    assert all(torch.equal(a[4], b[4]) for a, b in zip(alone, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_parts", [1, 8])
def test_norms_of_the_public_models_are_within_rounding_of_float64(
    interpreting: None, name: str, n_parts: int
) -> None:
    x, parts, weight, eps = make_norm_inputs(
        torch.bfloat16, n_parts, (32, MODELS[name].hidden_size)
    )
    total, normed = norm.add_norm(x, parts, weight, eps)
    update = parts.double().sum(0)
    # Two roundings of the sum (and the float32 sums of parts that cancel); two more of the norm.
    slack = 2.0**-23 * parts.double().abs().sum(0)
    bound = rounding(torch.bfloat16) * (update.abs() + total.double().abs()) + slack
    assert_close(total, x.double() + update, bound)
    expected = plain.rms_norm(total.double(), weight.double(), eps)
    assert_close(normed, expected, 2.01 * rounding(torch.bfloat16) * expected.abs())


@pytest.mark.parametrize("name, n_parts", slow_but([("1.7B", 4)], product(MODELS, (1, 4))))
def test_ropes_of_the_public_models_are_within_rounding_of_float64(
    interpreting: None, name: str, n_parts: int
) -> None:
    config = MODELS[name]
    heads = (config.n_heads, config.n_kv_heads, config.head_dim)
    inputs = make_rope_inputs(torch.bfloat16, *heads, 1, 32)
    if n_parts > 1:
        shares = torch.rand(n_parts, 1, 1, 1, generator=torch.Generator().manual_seed(n_parts))
        inputs["partials"] = inputs["partials"].float() * shares
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    # Up to six roundings: of the sum, the norm, its weight, both products, their difference.
    for got, expected in zip(
        run(rope.qk_norm_rope_write, inputs), run(plain.qk_norm_rope_write, wide), strict=True
    ):
        largest = torch.maximum(*expected.abs().chunk(2, -1)).repeat(1, 1, 1, 2)
        assert_close(got, expected, 8 * rounding(torch.bfloat16) * largest)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_close(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= bound).all())


# product

ENDS = [("", 1), ("", 3), ("swiglu", 1), ("argmax", 1)]  # and splits


def make_operands(
    n_rows: int, n_columns: int, n_inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n_rows + n_columns)
    x = torch.randn(n_rows, n_inner, generator=random).to(dtype)
    weight = torch.randn(n_columns, n_inner, generator=random) * n_inner**-0.5
    return x, weight.to(dtype)


def check_parts(x: Tensor, weight: Tensor, tiles: Tiles) -> Tensor:
    """The parts, each held against float64 over its split of the inner dimension, and their sum."""
    parts, ids = launch(x, weight, tiles)
    assert parts.shape == (tiles.n_splits, len(x), len(weight)) and ids.shape == (0,)
    assert parts.dtype == (x.dtype if tiles.n_splits == 1 else torch.float32)
    wide, wide_weight = x.double(), weight.double()
    span = math.ceil(x.shape[1] / (tiles.block_k * tiles.n_splits)) * tiles.block_k
    for i, part in enumerate(parts):
        inner = slice(i * span, (i + 1) * span)
        assert_one_rounding(part, wide[:, inner] @ wide_weight[:, inner].T)
    assert_one_rounding(plain.sum_partials(parts, x.dtype), wide @ wide_weight.T)
    return parts


def assert_one_rounding(got: Tensor, expected: Tensor) -> None:
    """To its dtype, after float32 sums of summands of which few exceed 1."""
    assert_close(got, expected, 1.02 * rounding(got.dtype) * expected.abs() + 2e-6)


def check_swiglu(x: Tensor, weight: Tensor, tiles: Tiles) -> None:
    parts, ids = launch(x, weight, tiles, swiglu=True)
    assert parts.shape == (1, len(x), len(weight) // 2) and ids.shape == (0,)
    hidden = parts[0]
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    # Roundings of gate (silu's slope is at most 1.1), of up, of silu and of the result.
    roundings = 1.1 * (gate * up).abs() + 3 * (gate.sigmoid() * gate * up).abs()
    slack = 4e-6 * (1 + gate.abs() + up.abs())
    assert_close(hidden, gate.sigmoid() * gate * up, 1.02 * rounding(x.dtype) * roundings + slack)
    # Op by op from the very same product, of which the identity makes a library's product.
    product = launch(x, weight, tiles)[0][0]
    identity = torch.eye(len(weight), dtype=x.dtype)
    expected = plain.PlainProducts().swiglu(product, identity)
    # Exp's last bits are not the same everywhere: in float32 that is seen, else rounding hides it.
    n_roundings = 12 if x.dtype == torch.float32 else 4.02
    wide = expected.double()
    assert_close(hidden, wide, n_roundings * rounding(x.dtype) * wide.abs())
    if x.dtype != torch.float32:
        assert float((hidden != expected).double().mean()) <= 0.002


def check_greatest(x: Tensor, weight: Tensor, tiles: Tiles) -> None:
    product, ids = launch(x, weight, tiles, argmax="both")
    assert ids.dtype == torch.int64 and torch.equal(ids, product[0].argmax(-1))
    assert torch.equal(product, check_parts(x, weight, tiles))
    nothing, same = launch(x, weight, tiles, argmax="ids")
    assert nothing.numel() == 0 and torch.equal(same, ids)


CHECKS: dict[str, Callable[[Tensor, Tensor, Tiles], object]] = {
    "": check_parts,
    "swiglu": check_swiglu,
    "argmax": check_greatest,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end, n_splits", ENDS)
@pytest.mark.parametrize(
    "n_rows, n_columns, n_inner",
    slow_but(
        [(5, 70, 200), (17, 130, 1000), (130, 66, 7)],
        [(1, 64, 128), (5, 70, 200), (16, 2, 32), (17, 130, 1000), (33, 258, 330), (130, 66, 7)],
    ),
)
def test_product_and_its_ends_are_within_rounding_of_float64(
    interpreting: None,
    dtype: torch.dtype,
    end: str,
    n_splits: int,
    n_rows: int,
    n_columns: int,
    n_inner: int,
) -> None:
    operands = make_operands(n_rows, n_columns, n_inner, dtype)
    CHECKS[end](*operands, Tiles(64, 32, n_splits, 4, 2))


TABLES: dict[str, Any] = json.loads(tune_products.TABLE.read_text("utf-8"))["chips"]
SHAPES = {shape.key: shape for shape in tune_products.shapes()}


@pytest.mark.parametrize(
    "shape, tiles",
    [
        pytest.param(
            SHAPES[key], Tiles(*tiles), id=f"{chip}-{key}", marks=[SLOW] if number % 12 else []
        )
        for chip, table in TABLES.items()
        for number, (key, tiles) in enumerate(table["tiles"].items())
    ],
)
def test_products_of_the_public_models_are_within_rounding_of_float64(
    interpreting: None, shape: Shape, tiles: Tiles
) -> None:
    """Their rows, inner dimension, tiles and splits as in the table; but few of their columns.

    Two tiles and an odd remainder: a column's arithmetic does not know how many others there are,
    and the interpreter would take minutes for all. test_gpu.py has whole shapes.
    """
    n_columns = 2 * tiles.block_n + 38
    operands = make_operands(shape.n_rows, n_columns, shape.k, torch.bfloat16)
    CHECKS[shape.end](*operands, tiles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "planted, winner",
    [
        ({7: 5, 9: 5}, 7),  # within a tile
        ({63: 5, 64: 5}, 63),  # across tiles
        ({70: 5, 149: 5}, 70),
        ({0: 5, 63: 5, 64: 5, 127: 5, 128: 5}, 0),
        ({20: 5, 140: 5.5}, 140),
        ({i: -3 for i in range(150)}, 0),
        ({i: -float("inf") for i in range(150)}, 0),
        ({i: -float("inf") for i in range(149)}, 149),
        ({i: -150 + i for i in range(150)}, 149),  # columns past the last hold no zeros that win
        ({i: -1 - i for i in range(150)}, 0),
        ({3: 0.0, 80: -0.0}, 3),
        ({3: -0.0, 80: 0.0}, 3),
    ],
)
def test_the_lowest_of_equal_logits_is_the_greatest(
    interpreting: None, dtype: torch.dtype, planted: dict[int, float], winner: int
) -> None:
    logits = -torch.rand(150, generator=torch.Generator().manual_seed(winner)) - 0.5
    logits[list(planted)] = torch.tensor([float(value) for value in planted.values()])
    x, weight = torch.ones(1, 1, dtype=dtype), logits[:, None].to(dtype)
    for block_n in (64, 128):
        product, ids = launch(x, weight, Tiles(block_n, 32, 1, 4, 2), argmax="both")
        assert torch.equal(product[0, 0], weight[:, 0])
        assert ids.tolist() == [winner] == [int(product[0, 0].argmax())]


def test_plain_pytorchs_argmax_is_the_lowest_of_equal_logits() -> None:
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [3.0]])
    ids, logits = plain.PlainProducts().lm_head_argmax(torch.ones(1, 2, 1), weight, True)
    assert ids.tolist() == [[1, 1]]
    assert logits.tolist() == [[[1.0, 3.0, 2.0, 3.0, 3.0]] * 2]


@pytest.mark.parametrize("custom", [True, False])
def test_what_overflows_is_the_greatest_of_its_row(interpreting: None, custom: bool) -> None:
    """A NaN in the last tile, of columns that it has and lacks; nothing but NaNs, and -inf."""
    weight = torch.tensor([[1.0], [2.0], *[[0.5]] * 146, [float("nan")], [0.5]])
    x = torch.tensor([[1.0], [float("nan")]])
    tall = torch.tensor([[1.0], [-float("inf")], [2.0], [float("inf")], *[[0.5]] * 66])
    low = torch.full((70, 1), -float("inf"))

    def ids(x: Tensor, weight: Tensor) -> list[int]:
        if not custom:
            return plain.PlainProducts().lm_head_argmax(x, weight, True)[0].tolist()
        return launch(x, weight, Tiles(64, 32, 1, 4, 2), argmax="both")[1].tolist()

    assert ids(x, weight) == [148, 0]
    assert ids(x[:1], tall) == [3]
    assert ids(x[:1], low) == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_rounding_makes_equal_tie(interpreting: None, dtype: torch.dtype) -> None:
    """Each 2**-13 above the one before, of the first of which bfloat16 and float16 make 1."""
    x = torch.tensor([[1.0, 2.0**-13]], dtype=dtype)
    weight = torch.stack((torch.ones(90), torch.arange(90) / 32), 1).to(dtype)
    product, ids = launch(x, weight, Tiles(64, 32, 1, 4, 2), argmax="both")
    assert ids.tolist() == product[0].argmax(-1).tolist() == [89 if dtype == torch.float32 else 0]


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What lies past each tensor that a launch allocates, all 77."""
    found: list[Tensor] = []
    new_empty = Tensor.new_empty

    def padded(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # the interpreter's own
            return new_empty(like, *shape, dtype=dtype, **rest)
        n_elements = math.prod(shape)
        whole = torch.full((n_elements + 1024,), 77, dtype=dtype or like.dtype)
        found.append(whole[n_elements:])
        return whole[:n_elements].view(shape)

    def padded_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return padded(like, *like.shape, dtype=dtype)

    monkeypatch.setattr(Tensor, "new_empty", padded)
    monkeypatch.setattr(torch, "empty_like", padded_like)
    return found


@pytest.mark.parametrize("end, n_splits", ENDS)
def test_nothing_is_written_past_the_last_row(
    interpreting: None, margins: list[Tensor], end: str, n_splits: int
) -> None:
    x, weight = make_operands(5, 70, 200, torch.bfloat16)
    tiles = Tiles(64, 32, n_splits, 4, 2)
    launch(x, weight, tiles, swiglu=end == "swiglu", argmax="both" if end == "argmax" else "")
    norm.add_norm(x, x[None], x[0], 1e-6)
    assert len(margins) == 6 and all(bool((margin == 77).all()) for margin in margins)


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], TRITON_NAMES))
@pytest.mark.parametrize("end, n_splits", ENDS)
@pytest.mark.parametrize("n_inner", slow_but([200], [200, 192]))  # masked, and not
def test_a_products_row_has_the_same_bits_anywhere(
    interpreting: None, dtype: torch.dtype, end: str, n_splits: int, n_inner: int
) -> None:
    x, weight = make_operands(130, 70, n_inner, dtype)
    tiles = Tiles(64, 32, n_splits, 4, 2)
    best = "both" if end == "argmax" else ""

    def rows(x: Tensor) -> Tensor:
        """All that is left of each row, side by side."""
        parts, ids = launch(x, weight, tiles, swiglu=end == "swiglu", argmax=best)
        return torch.cat([*parts.double(), ids[:, None].double()][: len(parts) + bool(best)], 1)

    for block, fewer in ((32, (1, 15, 16, 17, 31)), (130, (1, 33, 64, 129))):
        whole = rows(x[:block])
        assert torch.equal(rows(x[:block]), whole)
        for n_rows in fewer:
            assert torch.equal(rows(x[:n_rows]), whole[:n_rows])
        assert torch.equal(rows(x[:block].flip(0)), whole.flip(0))
        alone = torch.zeros_like(x[:block])
        alone[-3] = x[3]
        assert torch.equal(rows(alone)[-3], whole[3])
    assert len(set(map(tuple, whole.tolist()))) == 130


# CustomProducts


SHARED = 99 * 1024
TABLE = {(16, 70, 520): Tiles(64, 32, 3, 4, 2), (32, 70, 520): Tiles(64, 64, 2, 4, 2)}
FIXED = CustomProducts(plain.PlainProducts(), TABLE, SHARED)


def test_the_table_or_the_library_or_the_default_serves_a_product() -> None:
    weight, other = torch.empty(70, 520), torch.empty(520, 70)
    assert [FIXED.tiles(n, weight) for n in (1, 16, 17, 32)] == [
        TABLE[rows, 70, 520] for rows in (16, 16, 32, 32)
    ]
    for n_rows in (1, 16, 17, 32, 33, 64, 128, 129, 500):
        assert FIXED.is_custom(n_rows, weight) is (n_rows <= 32)
        assert FIXED.is_custom(n_rows, other) is False
    wide = replace(FIXED, table={(128, 70, 520): Tiles(64, 32, 1, 4, 2)})
    assert [wide.is_custom(n, weight) for n in (64, 65, 128, 129)] == [False, True, True, False]

    forced = FIXED.without_cublas(frozenset({(70, 520), (520, 70)}))
    assert forced.tiles(32, weight) == TABLE[32, 70, 520]
    for n_rows, block_m in ((1, 16), (33, 64), (64, 64), (128, 128), (129, 128), (500, 128)):
        expected = products.default_tiles(520, 70, block_m, 4, SHARED)
        assert forced.tiles(n_rows, other) == expected and forced.is_custom(n_rows, other)
    assert forced.is_custom(129, weight) and not forced.is_custom(129, torch.empty(70, 201))
    instead = forced.without_cublas(frozenset({(70, 520)}))
    assert not instead.is_custom(1, other) and instead.is_custom(500, weight)
    assert FIXED.forced == frozenset()


def tuple_of(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@pytest.mark.parametrize("shape", [(2, 3), (17,), ()])
def test_fixed_tile_products_are_the_kernels_with_leading_dimensions(
    interpreting: None, shape: tuple[int, ...]
) -> None:
    n_rows = math.prod(shape)
    x, weight = make_operands(n_rows, 70, 520, torch.float32)
    forced = FIXED.without_cublas(frozenset({(70, 520)}))
    tiles = forced.tiles(n_rows, weight)
    assert tiles is not None and tiles.n_splits > 1  # so that the ends have to leave it
    single = tiles._replace(n_splits=1)
    parts = launch(x, weight, tiles)[0]
    product, ids = launch(x, weight, single, argmax="both")
    hidden = launch(x, weight, single, swiglu=True)[0][0]

    x = x.view(*shape, 520)
    assert torch.equal(forced.partials(x, weight), parts.view(-1, *shape, 70))
    assert torch.equal(forced.swiglu(x, weight), hidden.view(*shape, 35))
    got_ids, logits = forced.lm_head_argmax(x, weight, True)
    assert torch.equal(got_ids, ids.view(shape)) and torch.equal(logits, product.view(*shape, 70))
    assert torch.equal(forced.lm_head_argmax(x, weight, False)[0], ids.view(shape))


def test_what_has_no_tiles_is_the_librarys() -> None:
    """Not interpreted: a kernel of ours would fail here."""
    library = plain.PlainProducts()
    x, weight = make_operands(6, 68, 520, torch.float32)
    x = x.view(2, 3, 520)
    for keep in (True, False):
        both = zip(
            FIXED.lm_head_argmax(x, weight, keep),
            library.lm_head_argmax(x, weight, keep),
            strict=True,
        )
        assert all(torch.equal(a, b) for a, b in both)
    assert torch.equal(FIXED.partials(x, weight), library.partials(x, weight))
    assert torch.equal(FIXED.swiglu(x, weight), library.swiglu(x, weight))


@pytest.mark.parametrize(
    "chip, dtype, found", [((9, 0), "bfloat16", True), ((9, 0), "float32", False)]
)
def test_a_devices_tiles_are_its_chips(
    monkeypatch: pytest.MonkeyPatch, chip: tuple[int, int], dtype: str, found: bool
) -> None:
    device = SimpleNamespace(major=chip[0], minor=chip[1], shared_memory_per_block_optin=1234)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    library = plain.PlainProducts()
    of = CustomProducts.of(library, torch.device("cuda"), getattr(torch, dtype))
    table = products.read_table("sm_90")
    assert of == CustomProducts(library, table if found else {}, 1234) and table


# The table


def test_an_unknown_chip_has_an_empty_table() -> None:
    assert products.read_table("sm_75") == products.read_table("") == {}


@pytest.mark.parametrize("chip", TABLES)
def test_the_table_holds_candidates_for_the_public_models(chip: str) -> None:
    """What it lacks is the library's, on purpose: nothing that has 16 or 32 rows."""
    table = products.read_table(chip)
    assert {f"{m}x{n}x{k}" for m, n, k in table} == set(TABLES[chip]["tiles"]) <= set(SHAPES)
    for (m, n, k), tiles in table.items():
        assert tiles in list(tune_products.candidates(SHAPES[f"{m}x{n}x{k}"]))
    missing = {shape.n_rows for key, shape in SHAPES.items() if key not in TABLES[chip]["tiles"]}
    assert missing <= {64, 128}


# rows_are_invariant, on products of plain PyTorch


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight @ row for row in x])


def one_ulp_up(x: Tensor) -> Tensor:
    """As another order of summation has it, on every machine."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def last_row_an_ulp_higher(x: Tensor, weight: Tensor) -> Tensor:
    out = row_by_row(x, weight)
    return torch.cat((out[:-1], one_ulp_up(out[-1:])))


def zero_rows_lift_the_others(x: Tensor, weight: Tensor) -> Tensor:
    """Only a row among zeros shows it."""
    out = row_by_row(x, weight)
    return one_ulp_up(out) if bool((x == 0).all(1).any()) else out


def positive_first_row_leaks(x: Tensor, weight: Tensor) -> Tensor:
    """Only a permutation shows it: the first row drawn begins with -1.1258."""
    return row_by_row(x, weight) + 1e-6 * float(x[0, 0] > 0)


def neighbours_leak(x: Tensor, weight: Tensor) -> Tensor:
    """No permutation shows it."""
    return row_by_row(x, weight) + 1e-6 * x.double().sum().float()


@pytest.mark.parametrize(
    "multiply, alike",
    [
        (row_by_row, True),
        (last_row_an_ulp_higher, False),
        (zero_rows_lift_the_others, False),
        (positive_first_row_leaks, False),
        (neighbours_leak, False),
    ],
)
def test_products_whose_rows_differ_are_found_out(
    interpreting: None, multiply: Callable[[Tensor, Tensor], Tensor], alike: bool
) -> None:
    weight = torch.randn(24, 100, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    cpu = torch.device("cpu")

    def linear(x: Tensor) -> Tensor:
        assert x.shape == (16, 100)
        return multiply(x, weight)

    assert rows_are_invariant(linear, 16, 100, torch.float32, cpu) is alike
    assert torch.equal(torch.get_rng_state(), state)


def test_one_of_two_rows_is_found_out_whatever_is_drawn() -> None:
    """Where every permutation drawn leaves them in place, too: at 25 and 56 columns."""
    for n in range(1, 60):
        weight, cpu = torch.ones(3, n), torch.device("cpu")
        faulty = partial(last_row_an_ulp_higher, weight=weight)
        assert not rows_are_invariant(faulty, 2, n, torch.float32, cpu), n


# Operators under torch.compile


def test_operators_say_what_they_return_and_change(interpreting: None) -> None:
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    check(rope.qk_norm_rope_write_op, (), inputs)
    split = inputs | {"partials": torch.randn(3, *inputs["partials"].shape[1:])}
    check(rope.qk_norm_rope_write_op, (), split)
    operands = make_operands(3, 70, 32, torch.bfloat16)
    for n_splits in (1, 3):
        check(products.product_op, (*operands, [64, 32, n_splits, 4, 2]))
    tiles = [64, 32, 1, 4, 2]
    for ahead in ((), (operands[1],)):
        check(products.swiglu_product_op, (*operands, tiles, *ahead))
    for keep in (True, False):
        check(products.lm_head_argmax_op, (*operands, tiles, keep))
    for n_parts in (1, 3):
        for ahead in ((), (operands[1],)):
            check(
                norm.add_norm_op, (*make_norm_inputs(torch.bfloat16, n_parts, (2, 3, 96)), *ahead)
            )


def test_a_compiled_layer_calls_the_operators(interpreting: None) -> None:
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "call" in node.op)
        return graph.forward

    layer = model.Layer(shape_config("tiny"), draft_view=False).requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=random) * weight.shape[-1] ** -0.5)
    shapes = {(16, *weight.shape) for weight in layer.parameters() if weight.ndim == 2}
    assert len(shapes) == 4
    table = {shape: Tiles(64, 32, 2, 4, 2) for shape in shapes}
    own = CustomProducts(plain.PlainProducts(), table, SHARED)

    def attend(q: Tensor, *rest: Tensor | None, causal: bool) -> Tensor:
        return q

    kernels = model.Kernels(
        attend, rope.qk_norm_rope_write_op, norm.add_norm_op, own, plain_sampling.sample
    )
    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    names = ("positions", "slot", "positions", "cos", "sin")
    places = model.PassPositions(*(inputs[name] for name in names))
    x, update = torch.randn(2, 2, 3, 64, generator=random)

    def results(forward: Callable[..., Any], kernels: model.Kernels) -> list[Tensor]:
        caches = inputs["k_cache"].clone(), inputs["v_cache"].clone()
        view = model.View.AUTOREGRESSIVE
        return [*forward(layer, x, update[None], places, *caches, kernels, view), *caches]

    def forward(*arguments: Any) -> Any:
        """Of this test alone: what other tests have compiled is not taken for it."""
        return model.Layer.forward(*arguments)

    compiled = torch.compile(forward, fullgraph=True, backend=backend, dynamic=False)
    with torch.inference_mode():
        expected = results(model.Layer.forward, kernels)
        assert all(map(torch.equal, results(compiled, kernels), expected))
        reference = plain.plain_kernels(attend)
        for got, wanted in zip(expected, results(model.Layer.forward, reference), strict=True):
            got = got.sum(0) if got.ndim > wanted.ndim or len(got) != len(wanted) else got
            assert torch.allclose(got, wanted.view_as(got), atol=1e-5)
    assert [name for name in called if "orthrus_fast" in name] == [
        f"orthrus_fast.{name}.default"
        for name in (
            (
                "add_rms_norm product qk_norm_rope_write product "
                "add_rms_norm swiglu_product product"
            ).split()
        )
    ]
    assert not [name for name in called if "linear" in name or "mm" in name or "mul" in name]


# Machine code


REGION = {"REGION": (4096, 8192, 512)}  # rows, bytes from one to the next, bytes of each


def compile_product(chip: int, dtype: str, shape: Shape, tiles: Tiles) -> Any:
    """The kernel for one end, fit for the chip, and waiting for its predecessor where it must."""
    signature = dict.fromkeys(["x", "weight", "out"], f"*{dtype}")
    if tiles.n_splits > 1:
        signature["out"] = "*fp32"
    signature |= {"tile_max": "*fp32", "tile_argmax": "*i32", "n_rows": "i32", "n_columns": "i32"}
    constants = {"K": shape.k, "N_SPLITS": tiles.n_splits, "BLOCK_M": shape.n_rows}
    constants |= {"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    constants |= {"SWIGLU": shape.end == "swiglu", "ARGMAX": "argmax" in shape.end}
    constants |= {"STORE": shape.end != "argmax alone"} | REGION
    signature["prefetch"] = f"*{dtype}"
    kernel = products._product_kernel
    return check_compiled(chip, kernel, signature, constants, tiles.num_warps, tiles.num_stages)


def check_compiled(
    chip: int,
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int = 3,
    early: frozenset[str] = frozenset(),
) -> Any:
    compiled = compile_for(kernel, signature, constants, chip, num_warps, num_stages)
    assert compiled.metadata.shared <= CHIPS[chip]
    ptx = compiled.asm["ptx"]
    assert ("bulk.prefetch" in ptx) is (chip >= 90 and constants.get("REGION", (0, 0, 0))[2] > 0)
    if chip >= 90:
        assert read_before_waiting(kernel, constants, ptx) == early
        assert compiled.metadata.launch_pdl
    else:
        assert "griddepcontrol" not in ptx and not compiled.metadata.launch_pdl
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("chip", TABLES)
def test_the_tables_products_fit_their_chip(chip: str) -> None:
    """A launch for all that differs between binaries, but for the number of steps along K."""
    launches: dict[object, tuple[Shape, Tiles]] = {}
    for key, entry in TABLES[chip]["tiles"].items():
        shape, tiles = SHAPES[key], Tiles(*entry)
        for end in (shape.end, f"{shape.end} alone") if shape.end == "argmax" else (shape.end,):
            kind = (shape.n_rows, end, tiles._replace(n_splits=min(tiles.n_splits, 2)))
            launches.setdefault(kind, (shape._replace(end=end), tiles))
    for shape, tiles in launches.values():
        compile_product(int(chip.removeprefix("sm_")), "bf16", shape, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_default_tiles_fit_every_chip(chip: int) -> None:
    cases = [("bf16", shape) for shape in SHAPES.values() if shape.n_rows in (32, 128)]
    cases += [("bf16", Shape(n_rows, 4096, 4096, "")) for n_rows in (16, 64)]
    cases += [("bf16", Shape(32, 151936, 4096, "argmax alone"))]
    for end in ("", "swiglu", "argmax"):
        cases += [("fp16", Shape(32, 2048, 2048, end)), ("fp32", Shape(32, 2048, 2048, end))]
    cases += [("fp32", Shape(128, 2048, 2048, ""))]
    launches: dict[object, tuple[str, Shape, Tiles]] = {}
    for dtype, shape in cases:
        itemsize = 4 if dtype == "fp32" else 2
        tiles = products.default_tiles(shape.n, shape.k, shape.n_rows, itemsize, CHIPS[chip])
        tiles = tiles._replace(n_splits=1 if shape.end else min(tiles.n_splits, 2))
        launches.setdefault((dtype, shape.n_rows, shape.end, tiles), (dtype, shape, tiles))
    for dtype, shape, tiles in launches.values():
        ptx = compile_product(chip, dtype, shape, tiles).asm["ptx"]
        assert "tf32" not in ptx and (dtype == "fp32" or "mma" in ptx)


def test_default_tiles_split_small_grids_and_the_order_of_summation_ignores_m() -> None:
    def n_splits(n_columns: int, n_inner: int) -> int:
        found = {
            products.default_tiles(n_columns, n_inner, m, 2, limit)[:3]
            for m in products.ROWS
            for limit in CHIPS.values()
        }
        assert len(found) == 1  # block_n, block_k and n_splits
        return int(found.pop()[2])

    assert n_splits(2048, 2048) == n_splits(2048, 6144) == 4  # 1.7B: o, down
    assert n_splits(2560, 9728) == 2  # 4B: down
    assert n_splits(4096, 4096) == n_splits(151936, 2048) == 1
    assert n_splits(320, 384) == 1  # three steps are not worth splitting


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_search_for_the_greatest_compiles_for_every_chip(chip: int) -> None:
    signature = {"tile_max": "*fp32", "tile_argmax": "*i32", "out": "*i64"}
    for block_n in (64, 128):
        n_tiles = math.ceil(151936 / block_n)
        constants = {"N_TILES": n_tiles, "BLOCK": 1 << (n_tiles - 1).bit_length()}
        check_compiled(chip, products._join_argmax_kernel, signature, constants, 8)


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_norm_kernel_compiles_for_every_chip(chip: int) -> None:
    hidden = sorted({config.hidden_size for config in MODELS.values()})
    cases = [("bf16", size, n_parts) for size in hidden for n_parts in (1, 8)]
    for dtype, size, n_parts in [*cases, ("fp16", 2560, 2), ("fp32", 96, 1), ("fp32", 4096, 4)]:
        signature = dict.fromkeys(["x", "weight", "total", "normed", "prefetch"], f"*{dtype}")
        signature |= {"partials": "*fp32" if n_parts > 1 else f"*{dtype}", "n_elements": "i32"}
        block = 1 << (size - 1).bit_length()
        constants = {"SIZE": size, "BLOCK": block, "N_PARTIALS": n_parts, "EPS": 1e-6} | REGION
        num_warps = min(max(block // 128, 1), 16)
        early = frozenset({"weight"})  # no kernel writes it
        check_compiled(chip, norm._add_norm_kernel, signature, constants, num_warps, early=early)


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_rope_kernel_compiles_for_every_chip(chip: int) -> None:
    heads = sorted({(config.n_heads, config.n_kv_heads) for config in MODELS.values()})
    cases = [("bf16", *pair, n_parts) for pair in heads for n_parts in (1, 4)]
    for dtype, n_heads, n_kv_heads, n_parts in [*cases, ("fp16", 16, 8, 1), ("fp32", 16, 8, 2)]:
        tensors = ("qkv", "q_norm", "k_norm", "cos", "sin", "q", "k_cache", "v_cache")
        signature = {name: f"*{dtype}" for name in tensors}
        if n_parts > 1:
            signature["qkv"] = "*fp32"
        signature |= {"positions": "*i64", "slot": "*i64", "capacity": "i32", "n_elements": "i32"}
        constants: dict[str, Any] = {"N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads}
        constants |= {"HEAD_DIM": 128, "HEADS": 4, "EPS": 1e-6, "N_PARTIALS": n_parts}
        kernel = rope._qk_norm_rope_write_kernel
        ptx = check_compiled(chip, kernel, signature, constants, 1).asm["ptx"]
        # Attention reads start and slot before it waits: for that all before this must be done.
        assert ptx.find("launch_dependents") >= ptx.find("griddepcontrol.wait")
