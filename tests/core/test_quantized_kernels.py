"""Kernels of weights in fewer bits: numbers in Triton's interpreter, machine code for every chip.

They are held to float64 products with the very weights that they stand for (``dequantize``), at
the level of ``Products``, whatever lies beneath.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from orthrus_fast.kernels import plain
from orthrus_fast.kernels.formats import GROUP, PLACES, Stored, _scale_of, dequantize
from orthrus_fast.kernels.interface import MOST_ROWS, Weight
from orthrus_fast.options import TILED_ROWS
from tests.kernel_compile import (
    CHIPS,
    EVERY_CHIP,
    compile_for,
    read_before_waiting,
    rounding_as_a_gpu,
)
from tests.marks import slow_but
from tests.quantized import QUANTIZED, stored

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast import tuning
from orthrus_fast.kernels import overlap, products, quantized, tiles
from orthrus_fast.kernels.custom import CustomProducts
from orthrus_fast.kernels.tiles import Tiles
from orthrus_fast.tuning import Shape

BF16, FP32 = torch.bfloat16, torch.float32
DTYPES = slow_but([BF16], [BF16, torch.float16, FP32])


@pytest.fixture
def interpreting() -> Iterator[None]:
    """Run the kernels of every module on the CPU, and round as a GPU does."""
    with rounding_as_a_gpu(products, quantized, overlap):
        yield


def make_operands(n_rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [n_rows, k] and a weight [n, k] whose rows differ in size by a factor of up to ten."""
    random = torch.Generator().manual_seed(n_rows * 10**6 + n * 1000 + k)
    x = torch.randn(n_rows, k, generator=random).to(dtype)
    size = 10 ** -torch.rand(n, 1, generator=random) * k**-0.5
    return x, (size * torch.randn(n, k, generator=random)).to(dtype)


def exact(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """The product in float64, and what float32 sums of it may be off."""
    rows, matrix = x.double(), dequantize(weight, torch.float64)
    return rows @ matrix.T, 1e-6 * (rows.abs() @ matrix.abs().T) + 1e-30


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def assert_within(got: Tensor, expected: Tensor, bound: Tensor) -> None:
    assert got.shape == expected.shape
    wrong = ~((got.double() - expected).abs() <= bound)  # a NaN is wrong, too
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, at {wrong.nonzero()[0]}"


# Numbers. One row, one column; K of less than a group, a group, no multiple of one, of a step.
SHAPES = [(1, 64, 256), (1, 70, 320), (5, 130, 512), (17, 66, 1000), (33, 1, 64), (3, 200, 513)]
QUICK = [(1, 70, 320), (5, 130, 512), (17, 66, 1000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("n_rows, n, k", slow_but(QUICK, SHAPES))
def test_products_are_within_rounding_of_float64(
    interpreting: None, format: str, dtype: torch.dtype, n_rows: int, n: int, k: int
) -> None:
    x, weight = make_operands(n_rows, n, k, dtype)
    check_products(x, stored(weight, format))


def check_products(x: Tensor, weight: Weight) -> None:
    """Partial sums, and logits with their greatest."""
    custom, dtype = CustomProducts(), x.dtype
    expected, slack = exact(x, weight)
    rounded = 1.02 * unit(dtype) * expected.abs() + slack + tiny(dtype)
    partials = custom.partials(x, weight)
    assert len(partials) in (1, 2, 4)
    assert partials.dtype == (dtype if len(partials) == 1 else FP32)
    assert_within(plain.sum_partials(partials, dtype), expected, rounded)
    ids, logits = custom.lm_head_argmax(x, weight, True)
    assert logits.dtype == dtype and torch.equal(ids, logits.argmax(-1))
    assert_within(logits, expected, rounded)
    assert torch.equal(custom.lm_head_argmax(x, weight, False)[0], ids)


def tiny(dtype: torch.dtype) -> float:
    """Half of the least number that is not 0, which float16 comes near."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("n_rows, n, k", slow_but([(5, 140, 320)], [(1, 2, 64), (5, 140, 320)]))
def test_swiglu_is_within_rounding_of_float64(
    interpreting: None, format: str, dtype: torch.dtype, n_rows: int, n: int, k: int
) -> None:
    x, matrix = make_operands(n_rows, n, k, dtype)
    weight = stored(matrix, format)
    hidden = CustomProducts().swiglu(x, weight, weight.weight)
    assert hidden.dtype == dtype
    assert_within(hidden, *swiglu_of(x, weight))


def swiglu_of(x: Tensor, weight: Weight) -> tuple[Tensor, Tensor]:
    """In float64, and the error that roundings of gate, up, silu and the result may cause."""
    (gate, up), slack = (of.chunk(2, -1) for of in exact(x, weight))
    silu = torch.nn.functional.silu(gate)
    u = unit(x.dtype)
    error = 1.1 * (u * gate.abs() + slack[0]) * up.abs()
    error += silu.abs() * (u * up.abs() + slack[1]) + 2 * u * (silu * up).abs()
    return silu * up, 1.05 * error + 1e-6 * (silu * up).abs() + tiny(x.dtype)


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("n_rows", slow_but([1, 64], [1, 16, 17, 64, 65, 130, 300]))
def test_default_tiles_of_every_row_class_are_within_rounding(
    interpreting: None, format: str, n_rows: int
) -> None:
    x, weight = make_operands(n_rows, 70, 200, BF16)
    check_products(x, stored(weight, format))


# Tiles that a table may hold: (block_m, block_n, block_k, num_warps, num_stages).
OTHER_TILES = [
    Tiles(16, 64, 64, False, False, 4, 3),
    Tiles(32, 128, 128, False, False, 4, 2),
    Tiles(64, 64, 256, False, False, 8, 2),
]


@pytest.mark.parametrize("end", ["partials", "logits", "swiglu"])
@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("k", slow_but([520], [520, 512]))
def test_a_row_has_the_same_bits_anywhere_with_any_tiles(
    interpreting: None, monkeypatch: pytest.MonkeyPatch, format: str, end: str, k: int
) -> None:
    x, matrix = make_operands(40, 76, k, BF16)
    weight, custom = stored(matrix, format), CustomProducts()

    def multiply(x: Tensor) -> Tensor:
        if end == "partials":
            return custom.partials(x, weight).movedim(0, 1)
        if end == "logits":
            return custom.lm_head_argmax(x, weight, True)[1]
        return custom.swiglu(x, weight)

    whole = multiply(x)
    assert len(set(map(tuple, whole.flatten(1).tolist()))) == 40
    for chosen in (None, *OTHER_TILES):
        if chosen is not None:
            table = {(rows, 76, k, format): chosen for rows in TILED_ROWS}
            monkeypatch.setattr(tiles, "_of_device", lambda _, table=table: (99 * 1024, table))
        for n_rows in (1, 17, 40):
            assert torch.equal(multiply(x[:n_rows]), whole[:n_rows]), (chosen, n_rows)
        assert torch.equal(multiply(x.flip(0).contiguous()), whole.flip(0)), chosen


@pytest.mark.parametrize("format", QUANTIZED)
def test_a_neighbour_that_has_overflowed_is_not_read(interpreting: None, format: str) -> None:
    """Not even times the zeros that a weight is filled up with."""
    x, matrix = make_operands(3, 70, 200, BF16)
    weight, custom = stored(matrix, format), CustomProducts()
    expected = custom.partials(x, weight)[:, :2]
    x[2] = float("nan")
    assert torch.equal(custom.partials(x, weight)[:, :2], expected)


@pytest.mark.parametrize("format", QUANTIZED)
def test_leading_dimensions_stay(interpreting: None, format: str) -> None:
    x, matrix = make_operands(6, 70, 200, BF16)
    weight, custom = stored(matrix, format), CustomProducts()
    flat, block = custom.partials(x, weight), custom.partials(x.view(2, 3, 200), weight)
    assert torch.equal(block, flat.view(len(flat), 2, 3, 70))
    ids, logits = custom.lm_head_argmax(x.view(2, 3, 200), weight, True)
    assert ids.shape == (2, 3) and logits.shape == (2, 3, 70)
    assert torch.equal(ids.flatten(), custom.lm_head_argmax(x, weight, False)[0])


def test_many_rows_are_multiplied_with_the_weight_as_it_was(interpreting: None) -> None:
    x, plain_weight = make_operands(MOST_ROWS + 1, 64, 320, torch.float32)
    whole = Stored(plain_weight, n_inputs=320, split=320)
    few = stored(plain_weight, "int4")
    few.whole = whole
    ours = CustomProducts()
    for multiply in (
        lambda x, weight: plain.sum_partials(ours.partials(x, weight), torch.float32),
        lambda x, weight: ours.swiglu(x, weight),
        lambda x, weight: ours.lm_head_argmax(x, weight, True)[1],
    ):
        assert torch.equal(multiply(x, few), multiply(x, whole))
        assert not torch.equal(multiply(x[1:], few), multiply(x[1:], whole))


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_lowest_of_equal_logits_is_the_greatest(interpreting: None, format: str) -> None:
    matrix = torch.full((150, 64), -0.5)
    matrix[[70, 149]] = 1.0
    x = torch.ones(2, 64, dtype=BF16)
    ids, logits = CustomProducts().lm_head_argmax(x, stored(matrix.to(BF16), format), True)
    assert ids.tolist() == [70, 70] and logits[0, 70] == logits[0, 149] > logits[0, 0]


# The assembly, which the interpreter does not run: followed instruction by instruction


def halves(x: Tensor) -> Tensor:
    """Registers [n] of 32 bits -> their two bfloat16, low half first, in float64 [n, 2]."""
    return x.to(torch.int32).view(BF16).view(-1, 2).double()


def joined(x: Tensor) -> Tensor:
    """Back, rounded to bfloat16."""
    return x.to(BF16).contiguous().view(torch.int32).flatten().long() & 0xFFFFFFFF


def as_float(x: Tensor) -> Tensor:
    return x.to(torch.int32).view(FP32)


def from_float(x: Tensor) -> Tensor:
    return x.view(torch.int32).long() & 0xFFFFFFFF


def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    out, every = torch.zeros_like(a), 0xFFFFFFFF
    for index in range(8):
        if int(table[0]) >> index & 1:
            parts = [x if index >> n & 1 else x ^ every for x, n in ((a, 2), (b, 1), (c, 0))]
            out |= parts[0] & parts[1] & parts[2]
    return out


def prmt(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    places = [int(selector[0]) >> 4 * n & 15 for n in range(4)]
    assert max(places) < 8  # none repeats a sign
    both = a | b << 32
    return sum(((both >> 8 * place & 255) << 8 * n for n, place in enumerate(places)), both * 0)


MASK = 0xFFFFFFFF
PTX: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n & MASK,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "sub.f32": lambda a, b: from_float(as_float(a) - as_float(b)),
    "fma.rn.bf16x2": lambda a, b, c: joined(halves(a) * halves(b) + halves(c)),
    "cvt.rn.bf16x2.f32": lambda high, low: joined(
        torch.stack((as_float(low), as_float(high)), 1).double()
    ),
}


def execute(text: str, operands: dict[str, Tensor]) -> Tensor:
    """What the text leaves in $0, of registers [n] of 32 bits, in int64."""
    registers = dict(operands)

    def read(word: str) -> Tensor:
        if word in registers:
            return registers[word]
        number = int(word[2:], 16) if word.startswith("0f") else int(word, 0)
        return torch.full_like(operands["$1"], number)

    for line in text.strip("{} \n").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = (word.strip() for word in rest.split(","))
            registers[target] = PTX[name](*map(read, sources))
    return registers["$0"]


@pytest.mark.parametrize("format", QUANTIZED)
def test_the_assembly_unpacks_every_word(format: str) -> None:
    """Two words at a time, all that there are, by each scale; against plain PyTorch."""
    words = torch.arange(-(2**15), 2**15).to(torch.int16)
    pairs = torch.stack((words, words.flip(0)), 1).contiguous().view(torch.int32).flatten().long()
    for code in (0, 5, 56, 63, 120, 127) if format == "int4" else (0,):
        codes = torch.full((1, 1), code * 0x01010101, dtype=torch.int32)
        of = Stored(
            words[None], torch.ones(1), codes if format == "int4" else None, 2**20, 0, format
        )
        expected = unpacked(of).double()
        for place in range(PLACES[format]):
            operands = {"$1": pairs & MASK}
            if format == "int4":
                scale = float(_scale_of(torch.tensor(code), FP32))
                both = torch.tensor([[scale, scale], [-136 * scale, -136 * scale]])
                assert torch.equal(both.to(BF16).float(), both)
                operands |= {
                    name: joined(row[None]).expand(len(pairs))
                    for name, row in zip(("$2", "$3"), both, strict=True)
                }
            got = halves(execute(quantized._asm.fn(format, place), operands))
            finite = expected[place].isfinite()
            assert torch.equal(got[:, 0][finite], expected[place][finite]), (code, place)
            assert torch.equal(got[:, 1][finite.flip(0)], expected[place].flip(0)[finite.flip(0)])


def unpacked(of: Stored) -> Tensor:
    """The weights [places, n words] of one row, whose words are groups one after another."""
    n_groups = of.weight.shape[1] // GROUP
    codes = of.group_scale
    codes = None if codes is None else codes.expand(n_groups, 1).contiguous()
    values = dequantize(of._replace(group_scale=codes, n_inputs=2**20), torch.float64)
    return values.view(n_groups, PLACES[of.format], GROUP).transpose(0, 1).flatten(1)


# Machine code


class Launches:
    """Stands for a kernel, and keeps with what it would be launched: names to values."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.kept = kernel, list[tuple[dict[str, Any], dict[str, Any]]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            names = self.kernel.arg_names
            self.kept.append((dict(zip(names, arguments, strict=True)), options))

        return launch


def launch_on(chip: int, rows: int, shape: tuple[int, int], end: str, format: str) -> Any:
    """Arguments and options of the launch on this chip, of tensors without memory."""
    launches = Launches(quantized._quantized_kernel)
    table = tiles.read_table(tiles.committed_table(), f"sm_{chip}")
    meta = stored(torch.empty(shape, device="meta"), format)
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        patch.setattr(quantized, "_quantized_kernel", launches)
        patch.setattr(quantized, "join_argmax", lambda *_: None)
        patch.setattr(quantized, "overlaps", lambda _: chip >= 90)
        patch.setattr(quantized, "first_columns", lambda *_: (4096, 8192, 512))
        patch.setattr(tiles, "_of_device", lambda _: (CHIPS[chip], table))
        held = {
            name: torch.empty(of.shape, dtype=of.dtype, device="cuda")
            for name, of in meta.named_parameters()
        }
        weight = Stored(**held, n_inputs=shape[1], split=meta.split, format=format)
        x = torch.empty(rows, shape[1], dtype=BF16, device="cuda")
        quantized.launch(x, weight, end)
    ((arguments, options),) = launches.kept
    return arguments, options


def type_of(value: Any) -> str:
    """An argument's type in a signature of Triton's."""
    if isinstance(value, Tensor):
        names = {BF16: "bf16", FP32: "fp32", torch.int16: "i16", torch.int32: "i32"}
        return f"*{names[value.dtype]}"
    return "i32"


def compile_launch(
    chip: int, arguments: dict[str, Any], options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The text of the machine code, within the chip's shared memory; and the constants in it."""
    kernel: Any = quantized._quantized_kernel
    fixed = {one.name for one in kernel.params if one.is_constexpr} | {"others"}
    constants = {name: value for name, value in arguments.items() if name in fixed}
    signature = {n: type_of(value) for n, value in arguments.items() if n not in fixed}
    how = (options["num_warps"], options["num_stages"])
    compiled = compile_for(kernel, signature, constants, chip, *how)
    assert compiled.metadata.shared <= CHIPS[chip]
    return compiled.asm["ptx"], constants


# Weights of the 8B, and of a K that is no multiple of a step; what follows the product.
CASES = {
    "gate_up": ((24576, 4096), "swiglu"),
    "down": ((4096, 12288), ""),
    "drafted": ((151936, 4096), "ids"),
    "verified": ((151936, 4096), "both"),
    "odd": ((321, 900), ""),
}
QUICK_CASES = [(90, format, 32, "gate_up") for format in QUANTIZED]
QUICK_CASES += [(90, "int4", 32, "down"), (90, "int4", 32, "drafted"), (86, "int4", 32, "down")]


@pytest.mark.parametrize(
    "chip, format, n_rows, case",
    slow_but(QUICK_CASES, product(CHIPS, QUANTIZED, (1, 32, 2048), CASES)),
)
def test_kernels_compile_for_every_chip(chip: int, format: str, n_rows: int, case: str) -> None:
    """With the table's tiles or the defaults; of bfloat16, and by its matrix unit."""
    arguments, options = launch_on(chip, n_rows, *CASES[case], format)
    ptx, constants = compile_launch(chip, arguments, options)
    assert "mma" in ptx and "tf32" not in ptx and "e4m3" not in ptx
    assert ("bulk.prefetch" in ptx) is (chip >= 90)
    assert options["launch_pdl"] is (chip >= 90)
    if chip >= 90:  # no kernel writes weights
        read = read_before_waiting(quantized._quantized_kernel, constants, ptx)
        tensors = {name for name, value in arguments.items() if isinstance(value, Tensor)}
        assert read & tensors <= {"weight", "scale", "group_scale"}
    else:
        assert "griddepcontrol" not in ptx


@pytest.mark.parametrize("chip", EVERY_CHIP)
@pytest.mark.parametrize("format", QUANTIZED)
def test_candidates_compile_for_every_chip(chip: int, format: str) -> None:
    """One at the edge of the shared memory, as ``tuning`` tries them."""
    (n, k), end = CASES["down"]
    shape = Shape(64, n, k, end, format)
    tried = list(tuning.quantized_candidates(shape, CHIPS[chip]))
    largest = max(tried, key=lambda one: (one.block_n * one.num_stages, one.num_warps))
    table = {(64, n, k, format): largest}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "read_table", lambda *_: table)
        arguments, options = launch_on(chip, 64, (n, k), end, format)
    assert (options["num_warps"], options["num_stages"]) == largest[-2:]
    compile_launch(chip, arguments, options)
