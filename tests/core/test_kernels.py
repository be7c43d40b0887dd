"""The Triton kernels: numbers in Triton's interpreter, and machine code for every chip."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthrus_fast import model
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import build_on_meta
from orthrus_fast.kernels import plain
from orthrus_fast.kernels.formats import Stored
from orthrus_fast.kernels.interface import LARGEST_STEP, Kernels, Weight, k_split
from tests.core.test_tiles import COMMITTED, DEFAULT_CLASSES, EMBEDDED, MODELS, SHAPES
from tests.kernel_compile import (
    CHIPS,
    EVERY_CHIP,
    compile_for,
    interpreted,
    read_before_waiting,
    rounding_as_a_gpu,
)
from tests.marks import slow_but

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

import triton
import triton.language as tl

from orthrus_fast.kernels import custom, norm, overlap, products, rope, tiles
from orthrus_fast.kernels.custom import CompiledProducts, CustomProducts
from orthrus_fast.kernels.products import launch
from orthrus_fast.kernels.tiles import Tiles, default_tiles
from orthrus_fast.tuning import Shape

TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = slow_but([torch.bfloat16, torch.float32], TRITON_NAMES)


@pytest.fixture
def interpreting() -> Iterator[None]:
    """Run the kernels of every module on the CPU, and round as a GPU does."""
    with rounding_as_a_gpu(rope, products, norm, overlap):
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


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_is_told_the_weight_that_is_read_next(causal: bool) -> None:
    """Told another, it would only be slow."""
    layer = model.Layer(shape_config("tiny"), causal).requires_grad_(False)
    for weight in layer.parameters():
        weight.fill_(0.1)
    told: list[Tensor | None] = []
    read: list[tuple[int, Tensor]] = []  # a weight, and how many were told of before

    class Noting(plain.PlainProducts):
        def partials(self, x: Tensor, weight: Weight) -> Tensor:
            read.append((len(told), weight.weight))
            return super().partials(x, weight)

        def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
            read.append((len(told), weight.weight))
            told.append(prefetch)
            return super().swiglu(x, weight)

    seen: list[bool] = []

    def attend(q: Tensor, *rest: Any, causal: bool) -> Tensor:
        told.append(rest[4])
        seen.append(causal)
        return q

    def add_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
        told.append(arguments[4])
        return plain.add_norm(*arguments)

    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    names = ("positions", "slot", "positions", "cos", "sin")
    places = model.PassPositions(*(inputs[name] for name in names))
    x, update = torch.randn(2, 2, 3, 64)
    kernels = replace(plain.plain_kernels(attend), add_norm=add_norm, products=Noting())
    caches = inputs["k_cache"], inputs["v_cache"]
    layer(x, update[None], places, *caches, kernels)
    assert len(told) == len(read) == 4 and seen == [causal]
    steps = zip(layer.linears(), told, read, strict=True)
    for n, (linear, ahead, (n_told, weight)) in enumerate(steps):
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
    partials = inputs["partials"]
    q, k_cache, v_cache = run(rope.qk_norm_rope_write, inputs)

    turned = {name: inputs[name].flip(1).contiguous() for name in by_row}
    turned = inputs | turned | {"partials": partials.flip(2).contiguous()}
    got = run(rope.qk_norm_rope_write, turned)
    assert all(map(torch.equal, got, (q.flip(1), k_cache, v_cache)))

    columns = {name: inputs[name].flatten(0, 1)[:, None].contiguous() for name in by_row}
    columns["slot"] = inputs["slot"].repeat_interleave(5)
    columns["partials"] = partials.flatten(1, 2)[:, :, None].contiguous()
    got = run(rope.qk_norm_rope_write, inputs | columns)
    assert all(map(torch.equal, got, (q.flatten(0, 1)[:, None], k_cache, v_cache)))

    alone = torch.zeros_like(partials)
    alone[:, 1, 2] = partials[:, 1, 2]
    got = run(rope.qk_norm_rope_write, inputs | {"partials": alone})
    assert torch.equal(got[0][1, 2], q[1, 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_partials", slow_but([4], [2, 4]))
def test_rope_kernel_adds_partials_pairwise_and_rounds_once(
    interpreting: None, dtype: torch.dtype, n_partials: int
) -> None:
    inputs = make_rope_inputs(dtype, 6, 2, 64, 2, 3)
    partials = cancelling_partials(n_partials, inputs["partials"][0])
    whole = plain.sum_partials(partials, dtype)[None]
    expected = run(rope.qk_norm_rope_write, inputs | {"partials": whole})
    got = run(rope.qk_norm_rope_write, inputs | {"partials": partials})
    assert all(map(torch.equal, got, expected))


def cancelling_partials(n_partials: int, like: Tensor) -> Tensor:
    """Float32 partials whose neighbours cancel, so that another order of summation is seen."""
    random = torch.Generator().manual_seed(n_partials)
    partials = torch.randn(n_partials, *like.shape, generator=random)
    partials[0::2] *= 1e5
    partials[1::2] -= partials[0::2]
    exact = partials.double().sum(0)
    error = (plain.sum_partials(partials, torch.float32) - exact).abs()
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3]) if n_partials == 4 else ():
        worse = reduce(torch.add, partials[order])
        assert (worse - exact).abs().mean() > 100 * error.mean()
    return partials


# add_norm


def make_norm_inputs(
    dtype: torch.dtype, n_partials: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Arguments of add_norm; so small in some rows that eps is felt."""
    random = torch.Generator().manual_seed(shape[-1] + n_partials)
    size = 10 ** (2 * torch.randn(*shape[:-1], 1, generator=random) - 2)
    x = (size * torch.randn(shape, generator=random)).to(dtype)
    partials = size * torch.randn(n_partials, *shape, generator=random)
    if n_partials > 1:
        partials[0::2] *= 1e5
        partials[1::2] -= partials[0::2]
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=random)
    return x, partials.to(dtype) if n_partials == 1 else partials, weight.to(dtype), 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_partials", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 3, 2560), (5, 96), (3, 1, 128), (40, 33)])
def test_norm_kernel_rounds_as_the_model_does(
    interpreting: None, dtype: torch.dtype, n_partials: int, shape: tuple[int, ...]
) -> None:
    inputs = make_norm_inputs(dtype, n_partials, shape)
    expected = plain.add_norm(*inputs)
    total, normed = norm.add_norm(*inputs)
    assert torch.equal(total, expected[0])  # the partials' order included
    assert_rounded_alike(normed, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_partials", [1, 4])
def test_norm_kernels_rows_do_not_depend_on_each_other(
    interpreting: None, dtype: torch.dtype, n_partials: int
) -> None:
    x, partials, weight, eps = make_norm_inputs(dtype, n_partials, (7, 96))
    expected = norm.add_norm(x, partials, weight, eps)

    def again(rows: Tensor) -> tuple[Tensor, Tensor]:
        return norm.add_norm(x[rows], partials[:, rows], weight, eps)

    for rows in (torch.arange(7), torch.arange(7).flip(0), torch.tensor([4])):
        assert all(torch.equal(a, b[rows]) for a, b in zip(again(rows), expected, strict=True))
    keep = torch.arange(7)[:, None] == 4
    alone = norm.add_norm(x * keep, partials * keep, weight, eps)
    assert all(torch.equal(a[4], b[4]) for a, b in zip(alone, expected, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_partials", [1, 4])
def test_norms_of_the_public_models_are_within_rounding_of_float64(
    interpreting: None, name: str, n_partials: int
) -> None:
    x, partials, weight, eps = make_norm_inputs(
        torch.bfloat16, n_partials, (32, MODELS[name].hidden_size)
    )
    total, normed = norm.add_norm(x, partials, weight, eps)
    update = partials.double().sum(0)
    # Two roundings of the sum (and the float32 sums of partials that cancel); two more of the norm.
    slack = 2.0**-23 * partials.double().abs().sum(0)
    bound = rounding(torch.bfloat16) * (update.abs() + total.double().abs()) + slack
    assert_close(total, x.double() + update, bound)
    expected = plain.rms_norm(total.double(), weight.double(), eps)
    assert_close(normed, expected, 2.01 * rounding(torch.bfloat16) * expected.abs())


@pytest.mark.parametrize("name, n_partials", slow_but([("1.7B", 4)], product(MODELS, (1, 4))))
def test_ropes_of_the_public_models_are_within_rounding_of_float64(
    interpreting: None, name: str, n_partials: int
) -> None:
    config = MODELS[name]
    heads = (config.n_heads, config.n_kv_heads, config.head_dim)
    inputs = make_rope_inputs(torch.bfloat16, *heads, 1, 32)
    if n_partials > 1:
        shares = torch.rand(
            n_partials, 1, 1, 1, generator=torch.Generator().manual_seed(n_partials)
        )
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


# k_split


@given(st.integers(1, 200_000), st.integers(1, 40_000))
def test_k_is_split_at_whole_steps_of_every_tile(n_columns: int, n_inner: int) -> None:
    split = k_split(n_columns, n_inner)
    n_partials = math.ceil(n_inner / split)
    assert n_partials in (1, 2, 4) and split * n_partials >= n_inner
    step = LARGEST_STEP if n_inner >= 4 * LARGEST_STEP else LARGEST_STEP // 4
    assert split % step == 0
    # Two GPUs may own half of the sums each, where a row is shared among them.
    assert (n_partials > 1) is (n_columns <= n_inner and n_inner > step)


@pytest.mark.parametrize(
    "config, expected",
    [
        ("1.7B", {"qkv": 1, "o": 2, "gate_up": 1, "down": 4}),
        ("4B", {"qkv": 1, "o": 2, "gate_up": 1, "down": 2}),
        ("8B", {"qkv": 1, "o": 2, "gate_up": 1, "down": 2}),
        ("embedded", {"qkv": 1, "o": 2, "gate_up": 1, "down": 2}),
    ],
)
def test_the_partial_sums_of_the_models_weights(config: str, expected: dict[str, int]) -> None:
    """Another number is another text, on every chip."""
    layer = build_on_meta(MODELS.get(config, EMBEDDED)).verifier.layers[0]
    assert isinstance(layer, model.Layer)
    linears = dict(zip(expected, layer.linears(), strict=True))
    found = {
        name: math.ceil(linear.weight.shape[1] / linear.split) for name, linear in linears.items()
    }
    assert found == expected


# product

ENDS = [("", 1), ("", 2), ("", 4), ("swiglu", 1), ("argmax", 1)]  # and partials
TILES = Tiles(16, 64, 32, False, False, 4, 2)


def make_operands(
    n_rows: int, n_columns: int, n_inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n_rows + n_columns)
    x = torch.randn(n_rows, n_inner, generator=random).to(dtype)
    weight = torch.randn(n_columns, n_inner, generator=random) * n_inner**-0.5
    return x, weight.to(dtype)


def split_in(n_partials: int, n_inner: int, step: int = 32) -> int:
    split = math.ceil(n_inner / (n_partials * step)) * step
    assert math.ceil(n_inner / split) == n_partials
    return split


def multiply(
    x: Tensor, weight: Tensor, end: str, split: int, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    argmax = "both" if end == "argmax" else ""
    return launch(x, weight, split, tiles, swiglu=end == "swiglu", argmax=argmax)


def check_partials(x: Tensor, weight: Tensor, split: int, tiles: Tiles) -> Tensor:
    """The partials, each against float64 over its share of K; and what joining makes of them."""
    n_partials = math.ceil(x.shape[1] / split)
    partials, ids = launch(x, weight, split, tiles._replace(joined=False))
    assert partials.shape == (n_partials, len(x), len(weight)) and ids.shape == (0,)
    assert partials.dtype == (x.dtype if n_partials == 1 else torch.float32)
    wide, wide_weight = x.double(), weight.double()
    for i, partial_sum in enumerate(partials):
        inner = slice(i * split, (i + 1) * split)
        assert_one_rounding(partial_sum, wide[:, inner] @ wide_weight[:, inner].T)
    whole = plain.sum_partials(partials, x.dtype)
    assert_one_rounding(whole, wide @ wide_weight.T)
    assert torch.equal(launch(x, weight, split, tiles._replace(joined=True))[0], whole[None])
    return partials


def assert_one_rounding(got: Tensor, expected: Tensor) -> None:
    """To its dtype, after float32 sums of summands of which few exceed 1."""
    assert_close(got, expected, 1.02 * rounding(got.dtype) * expected.abs() + 4e-6)


def check_swiglu(x: Tensor, weight: Tensor, _: int, tiles: Tiles) -> None:
    partials, ids = launch(x, weight, 0, tiles, swiglu=True)
    assert partials.shape == (1, len(x), len(weight) // 2) and ids.shape == (0,)
    hidden = partials[0]
    gate, up = (x.double() @ weight.double().T).chunk(2, -1)
    # Roundings of gate (silu's slope is at most 1.1), of up, of silu and of the result.
    roundings = 1.1 * (gate * up).abs() + 3 * (gate.sigmoid() * gate * up).abs()
    slack = 8e-6 * (1 + gate.abs() + up.abs())
    assert_close(hidden, gate.sigmoid() * gate * up, 1.02 * rounding(x.dtype) * roundings + slack)
    # Op by op from the very same product, of which the identity makes plain PyTorch's product.
    product = launch(x, weight, x.shape[1], tiles)[0][0]
    identity = torch.eye(len(weight), dtype=x.dtype)
    expected = plain.PlainProducts().swiglu(product, Stored(identity))
    # Exp's last bits are not the same everywhere: in float32 that is seen, else rounding hides it.
    n_roundings = 12 if x.dtype == torch.float32 else 4.02
    wide = expected.double()
    assert_close(hidden, wide, n_roundings * rounding(x.dtype) * wide.abs())
    if x.dtype != torch.float32:
        assert float((hidden != expected).double().mean()) <= 0.002


def check_argmax(x: Tensor, weight: Tensor, _: int, tiles: Tiles) -> None:
    product, ids = launch(x, weight, 0, tiles, argmax="both")
    assert ids.dtype == torch.int64 and torch.equal(ids, product[0].argmax(-1))
    assert torch.equal(product, check_partials(x, weight, x.shape[1], tiles))
    nothing, same = launch(x, weight, 0, tiles, argmax="ids")
    assert nothing.numel() == 0 and torch.equal(same, ids)


CHECKS: dict[str, Callable[[Tensor, Tensor, int, Tiles], object]] = {
    "": check_partials,
    "swiglu": check_swiglu,
    "argmax": check_argmax,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end, n_partials", ENDS)
@pytest.mark.parametrize(
    "n_rows, n_columns, n_inner",
    slow_but(
        [(5, 70, 200), (17, 130, 1000)],
        [(1, 64, 128), (5, 70, 200), (16, 2, 101), (17, 130, 1000), (33, 258, 330), (130, 66, 99)],
    ),
)
def test_product_and_its_ends_are_within_rounding_of_float64(
    interpreting: None,
    dtype: torch.dtype,
    end: str,
    n_partials: int,
    n_rows: int,
    n_columns: int,
    n_inner: int,
) -> None:
    x, weight = make_operands(n_rows, n_columns, n_inner, dtype)
    CHECKS[end](x, weight, split_in(n_partials, n_inner), TILES)


# Steps of 64 end where the shares of K do; longer ones are cut.
OTHER_TILES = [
    Tiles(32, 32, 64, False, False, 4, 3),
    Tiles(128, 64, 128, True, False, 8, 2),
    Tiles(32, 128, 256, False, False, 4, 2),
    Tiles(64, 64, 64, False, True, 4, 2),
    Tiles(16, 32, 128, True, True, 4, 2),
]


@pytest.mark.parametrize("dtype", slow_but([torch.bfloat16], TRITON_NAMES))
@pytest.mark.parametrize("end, n_partials", ENDS)
@pytest.mark.parametrize("n_inner", slow_but([456], [456, 512]))  # masked, and not
def test_a_products_row_has_the_same_bits_anywhere_with_any_tiles(
    interpreting: None, dtype: torch.dtype, end: str, n_partials: int, n_inner: int
) -> None:
    x, weight = make_operands(70, 38, n_inner, dtype)
    split = split_in(n_partials, n_inner, 64)
    whole, ids = multiply(x, weight, end, split, TILES)
    assert len(set(map(tuple, whole[0].tolist()))) == 70

    def check(tiles: Tiles, x: Tensor, rows: Tensor, of: Tensor) -> None:
        expected = whole[:, of]
        if tiles.joined:
            expected = plain.sum_partials(expected, dtype)[None]
        got, got_ids = multiply(x, weight, end, split, tiles)
        assert torch.equal(got[:, rows], expected)
        assert end != "argmax" or torch.equal(got_ids[rows], ids[of])

    every = torch.arange(70)
    for n_rows in (1, 16, 17):
        check(TILES, x[:n_rows], every[:n_rows], every[:n_rows])
    for chosen in (TILES, *OTHER_TILES):
        check(chosen, x.flip(0), every, every.flip(0))
        alone = torch.zeros_like(x[:20])
        alone[18] = x[69]
        check(chosen, alone, every[18:19], every[69:])


SAMPLED = ("32x2048x6144", "256x24576x4096", "2048x2048x6144", "64x151936x4096")
# A launch of each kind that a table holds; few are quick.
TABLE_LAUNCHES = [
    pytest.param(
        chip,
        shape,
        tiles.read_table(tiles.committed_table(), chip)[(*shape[:3], "")],
        id=f"{chip}-{shape.key}",
        marks=[] if shape.key in SAMPLED else pytest.mark.slow,
    )
    for chip, entry in COMMITTED.items()
    for shape in {
        (tuple(entry["tiles"][shape.key]), shape.end, shape.k // shape.split): shape
        for shape in sorted(SHAPES, key=lambda shape: shape.key in SAMPLED)
        if shape.key in entry["tiles"] and not shape.format  # which test_quantized_kernels.py has
    }.values()
]


@pytest.mark.parametrize("chip, shape, chosen", TABLE_LAUNCHES)
def test_products_with_the_tables_tiles_are_within_rounding_of_float64(
    interpreting: None, chip: str, shape: Shape, chosen: Tiles
) -> None:
    """Two tiles of rows and an odd one, a tile of columns and an odd remainder; K is cut short.

    The interpreter would take minutes for all. test_gpu.py has whole shapes.
    """
    n_rows, n_columns = min(shape.n_rows, 2 * chosen.block_m + 1), chosen.block_n + 38
    x, weight = make_operands(n_rows, n_columns, 1000, torch.bfloat16)
    CHECKS[shape.end](x, weight, 1024 // (shape.k // shape.split), chosen)


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
        product, ids = launch(x, weight, 0, TILES._replace(block_n=block_n), argmax="both")
        assert torch.equal(product[0, 0], weight[:, 0])
        assert ids.tolist() == [winner] == [int(product[0, 0].argmax())]


def test_plain_pytorchs_argmax_is_the_lowest_of_equal_logits() -> None:
    weight = torch.tensor([[1.0], [3.0], [2.0], [3.0], [3.0]])
    ids, logits = plain.PlainProducts().lm_head_argmax(torch.ones(1, 2, 1), Stored(weight), True)
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
            return plain.PlainProducts().lm_head_argmax(x, Stored(weight), True)[0].tolist()
        return launch(x, weight, 0, TILES, argmax="both")[1].tolist()

    assert ids(x, weight) == [148, 0]
    assert ids(x[:1], tall) == [3]
    assert ids(x[:1], low) == [0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_rounding_makes_equal_tie(interpreting: None, dtype: torch.dtype) -> None:
    """Each 2**-13 above the one before, of the first of which bfloat16 and float16 make 1."""
    x = torch.tensor([[1.0, 2.0**-13]], dtype=dtype)
    weight = torch.stack((torch.ones(90), torch.arange(90) / 32), 1).to(dtype)
    product, ids = launch(x, weight, 0, TILES, argmax="both")
    assert ids.tolist() == product[0].argmax(-1).tolist() == [89 if dtype == torch.float32 else 0]


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What lies past each tensor that a launch allocates, all 77."""
    found: list[Tensor] = []
    new_empty = Tensor.new_empty

    def padded(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        if rest:  # the interpreter's own
            return new_empty(like, *shape, dtype=dtype, **rest)
        shape = tuple(shape[0]) if isinstance(shape[0], tuple) else shape
        n_elements = math.prod(shape)
        whole = torch.full((n_elements + 1024,), 77, dtype=dtype or like.dtype)
        found.append(whole[n_elements:])
        return whole[:n_elements].view(shape)

    def padded_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return padded(like, *like.shape, dtype=dtype)

    monkeypatch.setattr(Tensor, "new_empty", padded)
    monkeypatch.setattr(torch, "empty_like", padded_like)
    return found


@pytest.mark.parametrize("end, n_partials", ENDS)
@pytest.mark.parametrize("joined", [False, True])
def test_nothing_is_written_past_the_last_row(
    interpreting: None, margins: list[Tensor], end: str, n_partials: int, joined: bool
) -> None:
    x, weight = make_operands(5, 70, 200, torch.bfloat16)
    multiply(x, weight, end, split_in(n_partials, 200), TILES._replace(joined=joined))
    norm.add_norm(x, x[None], x[0], 1e-6)
    assert len(margins) == 6 and all(bool((margin == 77).all()) for margin in margins)


# CustomProducts


@pytest.mark.parametrize("shape", [(2, 3), (130,), ()])
@pytest.mark.parametrize("n_inner", [384, 896])  # of the embedded model's o and down
def test_custom_products_are_the_kernels_with_leading_dimensions(
    interpreting: None, shape: tuple[int, ...], n_inner: int
) -> None:
    """Of a slice of these, with defaults: the split is no multiple of their steps."""
    n_rows, split = math.prod(shape), k_split(320, n_inner)
    x, weight = make_operands(n_rows, 70, n_inner, torch.bfloat16)
    partials = check_partials(x, weight, split, TILES)
    product, ids = launch(x, weight, 0, TILES, argmax="both")
    hidden = launch(x, weight, 0, TILES, swiglu=True)[0][0]

    x, made, of = x.view(*shape, n_inner), CustomProducts(), Stored(weight, split=split)
    assert torch.equal(CompiledProducts().partials(x, of), partials.view(2, *shape, 70))
    got = made.partials(x, of)
    assert len(got) == (1 if n_rows > 128 else 2)
    expected = plain.sum_partials(partials, x.dtype).view(*shape, 70)
    assert torch.equal(plain.sum_partials(got, x.dtype), expected)
    assert torch.equal(made.swiglu(x, of, weight), hidden.view(*shape, 35))
    got_ids, logits = made.lm_head_argmax(x, of, True)
    assert torch.equal(got_ids, ids.view(shape)) and torch.equal(logits, product.view(*shape, 70))
    assert torch.equal(made.lm_head_argmax(x, of, False)[0], ids.view(shape))


# Operators under torch.compile


def test_operators_say_what_they_return_and_change(interpreting: None) -> None:
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    check(rope.qk_norm_rope_write_op, (), inputs)
    split = inputs | {"partials": torch.randn(4, *inputs["partials"].shape[1:])}
    check(rope.qk_norm_rope_write_op, (), split)
    for n_rows in (3, 130):  # of which defaults join no partials, and all
        x, weight = make_operands(n_rows, 70, 200, torch.bfloat16)
        for n_partials in (1, 2, 4):
            check(custom.product_op, (x, weight, split_in(n_partials, 200)))
    x = x[:6].view(2, 3, 200)
    for prefetch in ((), (weight,)):
        check(custom.swiglu_product_op, (x, weight, *prefetch))
    for return_logits in (True, False):
        check(custom.lm_head_argmax_op, (x, weight, return_logits))
    for n_partials in (1, 4):
        arguments = make_norm_inputs(torch.bfloat16, n_partials, (2, 3, 96))
        for prefetch in ((), (weight,)):
            check(norm.add_norm_op, (*arguments, *prefetch))


def test_a_compiled_layer_calls_the_operators(interpreting: None) -> None:
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if "call" in node.op)
        return graph.forward

    layer = model.Layer(shape_config("tiny"), causal=True).requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=random) * weight.shape[-1] ** -0.5)

    def attend(q: Tensor, *rest: Tensor | None, causal: bool) -> Tensor:
        return q

    reference = plain.plain_kernels(attend)
    kernels = replace(
        reference,
        qk_norm_rope_write=rope.qk_norm_rope_write_op,
        add_norm=norm.add_norm_op,
        products=CompiledProducts(),
    )
    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    names = ("positions", "slot", "positions", "cos", "sin")
    places = model.PassPositions(*(inputs[name] for name in names))
    x, update = torch.randn(2, 2, 3, 64, generator=random)

    def results(forward: Callable[..., Any], kernels: Kernels) -> list[Tensor]:
        caches = inputs["k_cache"].clone(), inputs["v_cache"].clone()
        x_out, partials = forward(layer, x, update[None], places, *caches, kernels)
        return [x_out, plain.sum_partials(partials, x.dtype), *caches]

    def forward(*arguments: Any) -> Any:
        """Of this test alone: what other tests have compiled is not taken for it."""
        return model.Layer.forward(*arguments)

    compiled = torch.compile(forward, fullgraph=True, backend=backend, dynamic=False)
    with torch.inference_mode():
        expected = results(model.Layer.forward, kernels)
        assert all(map(torch.equal, results(compiled, kernels), expected))
        wanted = results(model.Layer.forward, reference)
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(expected, wanted, strict=True))
    assert [name for name in called if "orthrus_fast" in name] == [
        f"orthrus_fast.{name}.default"
        for name in (
            *("add_rms_norm", "split_product", "qk_norm_rope_write", "split_product"),
            *("add_rms_norm", "gated_product", "split_product"),
        )
    ]
    assert not [name for name in called if "linear" in name or "mm" in name or "mul" in name]


# Machine code


REGION = {"REGION": (4096, 8192, 512)}  # rows, bytes from one to the next, bytes of each
TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def compile_product(
    chip: int, dtype: str, shape: Shape, tiles: Tiles, return_logits: bool = True
) -> Any:
    """The kernel for one end, fit for the chip, and waiting for its predecessor where it must."""
    columns = tiles.block_n // 2 if shape.end == "swiglu" else tiles.block_n
    operands = dict.fromkeys(["x", "weight"], f"*{dtype}")
    if tiles.descriptors:
        heights = {"x": tiles.block_m, "weight": columns}
        operands = {
            name: f"tensordesc<{dtype}[{height},{tiles.block_k}]>"
            for name, height in heights.items()
        }
    n_partials = math.ceil(shape.k / shape.split)
    out = "fp32" if n_partials > 1 and not tiles.joined else dtype
    signature = operands | {"out": f"*{out}", "prefetch": f"*{dtype}"}
    signature |= {"tile_max": "*fp32", "tile_argmax": "*i32", "n_rows": "i32", "n_columns": "i32"}
    constants: dict[str, Any] = {"dtype": TYPES[dtype], "K": shape.k, "SPLIT": shape.split}
    constants |= {"N_PARTIALS": n_partials, "JOINED": tiles.joined, "BLOCK_M": tiles.block_m}
    constants |= {"BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    constants |= {"DESCRIPTORS": tiles.descriptors, "SWIGLU": shape.end == "swiglu"}
    constants |= {"ARGMAX": shape.end == "argmax", "STORE": return_logits}
    constants |= REGION if shape.end == "swiglu" else {"REGION": (0, 0, 0)}
    kernel = products._product_kernel
    compiled = check_compiled(chip, kernel, signature, constants, tiles.num_warps, tiles.num_stages)
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx and (dtype == "fp32" or "mma" in ptx)
    assert ("bulk.tensor" in ptx) is (tiles.descriptors and chip >= 90)
    return compiled


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
        descriptors = {name for name, kind in signature.items() if kind.startswith("tensordesc")}
        assert read_before_waiting(kernel, constants, ptx, descriptors) == early
        assert compiled.metadata.launch_pdl
    else:
        assert "griddepcontrol" not in ptx and not compiled.metadata.launch_pdl
    return compiled


@pytest.mark.parametrize("chip, shape, chosen", TABLE_LAUNCHES)
def test_the_tables_products_compile_for_their_chip(
    capsys: pytest.CaptureFixture[str], chip: str, shape: Shape, chosen: Tiles
) -> None:
    """And ptxas finds registers enough to have a matrix product begin before the last one ends."""
    capability = int(chip.removeprefix("sm_"))
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compile_product(capability, "bf16", shape, chosen)
    log = capsys.readouterr().out
    assert "registers" in log and "serializ" not in log
    if shape.end == "argmax":
        compile_product(capability, "bf16", shape, chosen, return_logits=False)


# Of products whose partial sums are left, with few rows, or joined; and of each end.
WEIGHTS = ((2048, 2048, ""), (2048, 6144, ""), (12288, 2048, "swiglu"), (151936, 2048, "argmax"))


@pytest.mark.parametrize("chip", EVERY_CHIP)
@pytest.mark.parametrize("dtype", slow_but(["bf16"], TYPES))
@pytest.mark.parametrize("n_rows", slow_but([32], DEFAULT_CLASSES))
def test_default_tiles_compile_for_every_chip(chip: int, dtype: str, n_rows: int) -> None:
    chosen = default_tiles(n_rows, 4 if dtype == "fp32" else 2, CHIPS[chip])
    for weight in WEIGHTS if chosen.joined else WEIGHTS[1:]:
        compile_product(chip, dtype, Shape(n_rows, *weight), chosen)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_descriptors_compile_for_every_chip(chip: int) -> None:
    """As ``tuning`` tries them; chips without a copy engine read by pointers."""
    for dtype, joined in (("bf16", True), ("fp16", False), ("fp32", True)):
        chosen = Tiles(64, 64, 64, joined, True, 4, 2)
        for weight in WEIGHTS[1:]:
            compile_product(chip, dtype, Shape(256, *weight), chosen)


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_search_for_the_greatest_compiles_for_every_chip(chip: int) -> None:
    signature = {"tile_max": "*fp32", "tile_argmax": "*i32", "out": "*i64"}
    for block_n in (64, 128, 256):
        n_tiles = math.ceil(151936 / block_n)
        constants = {"N_TILES": n_tiles, "BLOCK": 1 << (n_tiles - 1).bit_length()}
        check_compiled(chip, products._join_argmax_kernel, signature, constants, 8)


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_norm_kernel_compiles_for_every_chip(chip: int) -> None:
    hidden = sorted({config.hidden_size for config in MODELS.values()})
    cases = [("bf16", size, n_partials) for size in hidden for n_partials in (1, 4)]
    for dtype, size, n_partials in [*cases, ("fp16", 2560, 2), ("fp32", 96, 1), ("fp32", 4096, 4)]:
        signature = dict.fromkeys(["x", "weight", "total", "normed", "prefetch"], f"*{dtype}")
        signature |= {"partials": "*fp32" if n_partials > 1 else f"*{dtype}", "n_elements": "i32"}
        block = 1 << (size - 1).bit_length()
        constants = {"SIZE": size, "BLOCK": block, "N_PARTIALS": n_partials, "EPS": 1e-6} | REGION
        num_warps = min(max(block // 128, 1), 16)
        early = frozenset({"weight"})  # no kernel writes it
        check_compiled(chip, norm._add_norm_kernel, signature, constants, num_warps, early=early)


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_rope_kernel_compiles_for_every_chip(chip: int) -> None:
    configs = (*MODELS.values(), EMBEDDED)  # with 6 heads and 2, which leave some of HEADS out
    heads = sorted({(config.n_heads, config.n_kv_heads, config.head_dim) for config in configs})
    cases = [("bf16", *of, 1) for of in heads]
    cases += [("bf16", 16, 8, 128, 4), ("fp16", 16, 8, 128, 1), ("fp32", 6, 2, 64, 2)]
    for dtype, *of, n_partials in cases:
        tensors = ("qkv", "q_norm", "k_norm", "cos", "sin", "q", "k_cache", "v_cache")
        signature = {name: f"*{dtype}" for name in tensors}
        if n_partials > 1:
            signature["qkv"] = "*fp32"
        signature |= {"positions": "*i64", "slot": "*i64", "capacity": "i32", "n_elements": "i32"}
        constants: dict[str, Any] = dict(
            zip(("N_HEADS", "N_KV_HEADS", "HEAD_DIM"), of, strict=True)
        )
        constants |= {"HEADS": rope.HEADS, "EPS": 1e-6, "N_PARTIALS": n_partials}
        kernel = rope._qk_norm_rope_write_kernel
        ptx = check_compiled(chip, kernel, signature, constants, 1).asm["ptx"]
        # Attention reads start and slot before it waits: for that all before this must be done.
        assert ptx.find("launch_dependents") >= ptx.find("griddepcontrol.wait")
