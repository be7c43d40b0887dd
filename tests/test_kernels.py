"""The Triton kernels: numbers in Triton's interpreter, and machine code for every chip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orthrus_fast import model
from tests.kernel_compile import CHIPS, compile_for, interpreted

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

import triton.language as tl
from triton.runtime import interpreter

from orthrus_fast.kernels import product as products
from orthrus_fast.kernels import qk_norm_rope as rope

# hidden, intermediate, heads, KV heads; head_dim 128 and 151936 tokens in all of them
CHECKPOINTS = {
    "1.7B": (2048, 6144, 16, 8),
    "4B": (2560, 9728, 32, 8),
    "8B": (4096, 12288, 32, 8),
}
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = list(TRITON_NAMES)


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the kernels of both modules on the CPU, and round as a GPU does."""
    convert = interpreter._convert_float

    def to_nearest(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        """The interpreter's own cast to bfloat16 truncates."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, rounding)
        return torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)
    with interpreted(rope), interpreted(products):
        yield


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
        "qkv": size * draw(n_rows, width, (n_heads + 2 * n_kv_heads) * head_dim),
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
    [(16, 8, 128, 1, 5), (32, 8, 128, 2, 3), (6, 2, 64, 3, 4), (4, 2, 16, 2, 1), (3, 3, 16, 1, 7)],
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
    expected = run(model.qk_norm_rope_write, inputs)
    got = run(rope.qk_norm_rope_write, inputs)
    assert_rounded_alike(got[0], expected[0])
    written = (inputs["slot"][:, None], slice(None), inputs["positions"])
    assert_rounded_alike(got[1][written], expected[1][written])
    assert torch.equal(got[2], expected[2])  # v is copied
    got[1][written] = inputs["k_cache"][written]
    assert torch.equal(got[1], inputs["k_cache"])  # and nothing else is touched


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_kernels_rows_do_not_depend_on_each_other(
    interpreting: None, dtype: torch.dtype
) -> None:
    inputs = make_rope_inputs(dtype, 6, 2, 64, 2, 5)
    by_row = ("qkv", "cos", "sin", "positions")
    q, k_cache, v_cache = run(rope.qk_norm_rope_write, inputs)

    turned = inputs | {name: inputs[name].flip(1).contiguous() for name in by_row}
    got = run(rope.qk_norm_rope_write, turned)
    assert all(map(torch.equal, got, (q.flip(1), k_cache, v_cache)))

    columns = {name: inputs[name].flatten(0, 1)[:, None].contiguous() for name in by_row}
    columns["slot"] = inputs["slot"].repeat_interleave(5)
    got = run(rope.qk_norm_rope_write, inputs | columns)
    assert all(map(torch.equal, got, (q.flatten(0, 1)[:, None], k_cache, v_cache)))

    alone = torch.zeros_like(inputs["qkv"])
    alone[1, 2] = inputs["qkv"][1, 2]
    got = run(rope.qk_norm_rope_write, inputs | {"qkv": alone})
    assert torch.equal(got[0][1, 2], q[1, 2])


# product


def make_operands(
    n_rows: int, n_columns: int, n_inner: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(n_rows + n_columns)
    x = torch.randn(n_rows, n_inner, generator=random).to(dtype)
    weight = torch.randn(n_columns, n_inner, generator=random) * n_inner**-0.5
    return x, weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_rows, n_columns, n_inner",
    [(1, 64, 128), (5, 70, 200), (16, 1, 32), (17, 130, 1000), (32, 320, 896), (130, 65, 7)],
)
def test_product_is_within_rounding_of_float64(
    interpreting: None, dtype: torch.dtype, n_rows: int, n_columns: int, n_inner: int
) -> None:
    x, weight = make_operands(n_rows, n_columns, n_inner, dtype)
    got = products.product(x, weight)
    assert got.dtype == dtype and got.shape == (n_rows, n_columns)
    expected = x.double() @ weight.double().T
    # One rounding to the dtype, and float32 sums of summands of which few exceed 1.
    bound = 0.51 * torch.finfo(dtype).eps * expected.abs() + 2e-6
    assert bool(((got.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_columns, n_inner", [(70, 1100), (70, 200)])  # split, and not
def test_a_products_row_has_the_same_bits_anywhere(
    interpreting: None, dtype: torch.dtype, n_columns: int, n_inner: int
) -> None:
    x, weight = make_operands(130, n_columns, n_inner, dtype)
    whole = products.product(x, weight)
    for n_rows in (1, 2, 16, 17, 33, 65, 128):
        assert torch.equal(products.product(x[:n_rows], weight), whole[:n_rows])
    assert torch.equal(products.product(x.flip(0), weight), whole.flip(0))
    alone = torch.zeros_like(x)
    alone[3] = x[3]
    assert torch.equal(products.product(alone, weight)[3], whole[3])


def test_small_grids_are_split_and_the_order_of_summation_ignores_m() -> None:
    def n_splits(n_columns: int, n_inner: int) -> int:
        found = {
            products.tiles_for(m, n_columns, n_inner, 2, limit)[1:3]
            for m in (1, 16, 32, 100, 128, 500)
            for limit in CHIPS.values()
        }
        assert len(found) == 1  # block_k and n_splits
        return found.pop()[1]

    assert n_splits(2048, 2048) == n_splits(2048, 6144) == 4  # 1.7B: o, down
    assert n_splits(2560, 9728) == 2  # 4B: down
    assert n_splits(4096, 4096) == n_splits(151936, 2048) == 1
    assert n_splits(320, 384) == 1  # three steps are not worth splitting


class Tied(nn.Module):
    """Linears of several shapes, one below another, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.inner = nn.ModuleList(
            nn.ModuleDict({"o": nn.Linear(32, 24, bias=False)}) for _ in "ab"
        )
        self.other = nn.Linear(24, 32, bias=False)
        self.biased = nn.Linear(32, 24)


def test_only_the_asked_linears_are_replaced_and_weights_stay_tied(interpreting: None) -> None:
    tree = Tied().requires_grad_(False)
    x = torch.randn(2, 3, 32)
    expected = {"o": tree.inner[1]["o"](x), "lm_head": tree.lm_head(x)}
    names = set(tree.state_dict())
    assert products.replace_linears(tree, {(24, 32), (40, 32)}) == 3
    assert tree.lm_head.weight is tree.embed_tokens.weight
    assert set(tree.state_dict()) == names
    assert type(tree.other) is nn.Linear and type(tree.biased) is nn.Linear
    for name, module in (("o", tree.inner[1]["o"]), ("lm_head", tree.lm_head)):
        assert isinstance(module, products.FixedTileLinear)
        assert module(x).shape == expected[name].shape
        assert torch.allclose(module(x), expected[name], atol=1e-6)
    assert products.replace_linears(tree, {(24, 32), (40, 32)}) == 0


# rows_are_alike, on products of plain PyTorch


def row_by_row(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([weight @ row for row in x])


def last_row_in_another_order(x: Tensor, weight: Tensor) -> Tensor:
    out = row_by_row(x, weight)
    out[-1] = weight.flip(1) @ x[-1].flip(0)
    return out


def zero_rows_change_the_order(x: Tensor, weight: Tensor) -> Tensor:
    """Only a row among zeros shows it."""
    if bool((x == 0).all(1).any()):
        return row_by_row(x.flip(1), weight.flip(1))
    return row_by_row(x, weight)


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
        (last_row_in_another_order, False),
        (zero_rows_change_the_order, False),
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

    assert products.rows_are_alike(linear, 16, 100, torch.float32, cpu) is alike
    assert torch.equal(torch.get_rng_state(), state)


# Operators under torch.compile


def test_operators_say_what_they_return_and_change(interpreting: None) -> None:
    checks = ("test_schema", "test_faketensor")
    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    torch.library.opcheck(rope.qk_norm_rope_write_op, (), inputs, test_utils=checks)
    operands = make_operands(3, 70, 32, torch.bfloat16)
    torch.library.opcheck(products.product_op, operands, test_utils=checks)


def test_a_compiled_layer_calls_the_operators(interpreting: None) -> None:
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    inputs = make_rope_inputs(torch.float32, 4, 2, 16, 2, 3)
    linear = products.FixedTileLinear(nn.Parameter(torch.randn(128, 32), requires_grad=False))
    x = torch.randn(2, 3, 32)

    def layer(x: Tensor, inputs: dict[str, Any]) -> Tensor:
        q: Tensor = rope.qk_norm_rope_write_op(**(inputs | {"qkv": linear(x)}))
        return q

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    with torch.inference_mode():
        expected = run(rope.qk_norm_rope_write, inputs | {"qkv": linear(x)})
        got = run(lambda **inputs: compiled(x, inputs), inputs)
    assert all(map(torch.equal, got, expected))
    assert [name for name in called if "orthrus_fast" in name] == [
        "orthrus_fast.product.default",
        "orthrus_fast.qk_norm_rope_write.default",
    ]


# Machine code


def product_shapes() -> set[tuple[int, int]]:
    """(N, K) of every product of the public checkpoints."""
    shapes = set()
    for hidden, intermediate, n_heads, n_kv_heads in CHECKPOINTS.values():
        shapes |= {
            ((n_heads + 2 * n_kv_heads) * 128, hidden),
            (hidden, n_heads * 128),
            (2 * intermediate, hidden),
            (hidden, intermediate),
            (151936, hidden),
        }
    return shapes


@pytest.mark.parametrize("chip", CHIPS)
def test_product_fits_every_chip(chip: int) -> None:
    cases = [(torch.bfloat16, 32, *shape) for shape in sorted(product_shapes())]
    cases += [(torch.bfloat16, n_rows, 4096, 4096) for n_rows in (1, 64, 128)]
    cases += [(dtype, 32, 2048, 2048) for dtype in (torch.float16, torch.float32)]
    cases += [(torch.float32, 128, 2048, 2048)]
    launches = {}  # by all that differs between binaries, but for the number of steps along K
    for dtype, n_rows, n_columns, n_inner in cases:
        tiles = products.tiles_for(n_rows, n_columns, n_inner, dtype.itemsize, CHIPS[chip])
        launches[dtype, tiles] = n_inner
    assert len(launches) == 9
    for (dtype, tiles), n_inner in launches.items():
        metadata = compile_product(chip, TRITON_NAMES[dtype], tiles, n_inner)
        assert metadata.shared <= CHIPS[chip]


def compile_product(chip: int, dtype: str, tiles: products.Tiles, n_inner: int) -> Any:
    out = "*fp32" if tiles.n_splits > 1 else f"*{dtype}"
    signature = {"x": f"*{dtype}", "weight": f"*{dtype}", "out": out}
    constants = {"K": n_inner, "N_SPLITS": tiles.n_splits, "BLOCK_M": tiles.block_m}
    return compile_for(
        products._product_kernel,
        signature | {"n_rows": "i32", "n_columns": "i32"},
        constants | {"BLOCK_N": products.BLOCK_N, "BLOCK_K": tiles.block_k},
        chip,
        num_warps=4,
        num_stages=tiles.n_stages,
    )


@pytest.mark.parametrize("dtype", TRITON_NAMES.values())
def test_sum_of_splits_compiles(dtype: str) -> None:
    signature = {"parts": "*fp32", "out": f"*{dtype}", "n_elements": "i32"}
    for chip in CHIPS:
        compile_for(
            products._sum_splits_kernel, signature, {"N_SPLITS": 4, "BLOCK": 1024}, chip, 4, 3
        )


@pytest.mark.parametrize("chip", CHIPS)
def test_rope_kernel_compiles_for_every_chip(chip: int) -> None:
    heads = {(n_heads, n_kv_heads) for _, _, n_heads, n_kv_heads in CHECKPOINTS.values()}
    cases = [("bf16", *pair) for pair in heads] + [("fp16", 16, 8), ("fp32", 16, 8)]
    for dtype, n_heads, n_kv_heads in cases:
        tensors = ("qkv", "q_norm", "k_norm", "cos", "sin", "q", "k_cache", "v_cache")
        signature = {name: f"*{dtype}" for name in tensors}
        signature |= {"positions": "*i64", "slot": "*i64", "capacity": "i32"}
        constants = {"N_HEADS": n_heads, "N_KV_HEADS": n_kv_heads, "HEAD_DIM": 128}
        constants |= {"HEADS": 4, "EPS": 1e-6}
        kernel = rope._qk_norm_rope_write_kernel
        metadata = compile_for(kernel, signature, constants, chip, 1, 3)
        assert metadata.shared <= CHIPS[chip]
