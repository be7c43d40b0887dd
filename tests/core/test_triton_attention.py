"""The Triton backend without a GPU: interpreted for numbers and bits, compiled for each chip."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast.config import read_config
from tests.judge import dense_attention
from tests.kernel_compile import CHIPS, EVERY_CHIP, compile_for, interpreted, read_before_waiting
from tests.marks import slow_but

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast.attention import triton as backend

# Splits at 0, 64, 128, 256, 384 and 640, two tiles in the shortest; several row tiles a block.
BANDS = ((64, 128), (128, 384), (256, None))
TILES = backend.Tiles(rows=16, keys=32, num_warps=4, num_stages=2)
WHOLE = ((768, None),)
CAPACITY = 768
SLOW = pytest.mark.slow
EDGES = [0, 1, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 383, 384, 639, 640, 641]

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], Tensor]


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    if "compiles" in request.node.name:
        yield
        return
    with interpreted(backend), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "JOIN_UNROLL", 4)  # six splits take two rounds
        patch.setattr(backend, "LONG_BLOCK", 24)  # a program of more rows walks all splits
        yield


def run(q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, causal: bool) -> Tensor:
    return backend.attend(q, k, v, start, slot, causal=causal, bands=BANDS, tiles=TILES)


def run_with(choose: Callable[[int], tuple[backend.Bands, backend.Tiles]]) -> Run:
    """``run``, with splits and tiles that follow the width of the block."""

    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, c: bool) -> Tensor:
        bands, tiles = choose(q.shape[1])
        return backend.attend(q, k, v, start, slot, causal=c, bands=bands, tiles=tiles)

    return attend


def run_in_a_small_cache(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, causal: bool
) -> Tensor:
    capacity = -(-(int(start.max()) + q.shape[1]) // 64) * 64
    k, v = k[:, :, :capacity].contiguous(), v[:, :, :capacity].contiguous()
    return run(q, k, v, start, slot, causal)


def make_cache(
    dtype: torch.dtype, n_kv_heads: int = 1, head_dim: int = 16, n_slots: int = 1
) -> tuple[Tensor, Tensor]:
    k = torch.randn(n_slots, n_kv_heads, CAPACITY, head_dim).to(dtype)
    return k, torch.randn(k.shape).to(dtype)


def error(
    attend: Run, starts: list[int], width: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> float:
    """Largest difference from the dense computation, both views, one block in a slot of its own."""
    n_heads, n_kv_heads, head_dim = shape
    torch.manual_seed(width)
    k, v = make_cache(dtype, n_kv_heads, head_dim, len(starts) + 1)
    q = torch.randn(len(starts), width, n_heads, head_dim).to(dtype)
    start = torch.tensor(starts, dtype=torch.int32)
    slot = torch.arange(len(starts), 0, -1)
    worst = 0.0
    for causal in (True, False):
        got = attend(q, k, v, start, slot, causal)
        assert got.dtype == dtype and got.is_contiguous()
        for r, (begin, s) in enumerate(zip(starts, slot.tolist(), strict=True)):
            wanted = dense_attention(q[r].double(), k[s].double(), v[s].double(), begin, causal)
            worst = max(worst, float((got[r].double() - wanted).abs().max()))
    return worst


@pytest.mark.parametrize(
    "starts, width, shape",
    [
        ([0, 31, 64, 127, 256, 640], 1, (2, 2, 16)),
        pytest.param(EDGES, 1, (2, 2, 16), marks=SLOW),
        ([0, 63, 127, 257, 640], 5, (3, 1, 16)),
        pytest.param(EDGES[:9], 5, (3, 1, 16), marks=SLOW),
        pytest.param(EDGES[9:], 5, (3, 1, 16), marks=SLOW),
        ([0, 121, 377], 16, (4, 2, 64)),  # the last row of a tile begins a split
        pytest.param([50, 620], 32, (2, 1, 16), marks=SLOW),
        ([27], 100, (6, 2, 16)),  # a long block, which walks all splits
        pytest.param([0, 27, 400], 100, (6, 2, 16), marks=SLOW),
    ],
)
def test_matches_dense_attention(
    starts: list[int], width: int, shape: tuple[int, int, int]
) -> None:
    assert error(run, starts, width, shape, torch.float32) < 2e-6


@pytest.mark.parametrize(
    "dtype, bound, width",
    slow_but(
        [(torch.bfloat16, 0.03, 5)],
        [(*kind, n) for kind in ((torch.bfloat16, 0.03), (torch.float16, 4e-3)) for n in (5, 100)],
    ),
)
def test_matches_dense_attention_in_half_precision(
    dtype: torch.dtype, bound: float, width: int
) -> None:
    assert error(run, [0, 61, 383], width, (3, 1, 64), dtype) < bound


def test_its_own_tiles_and_splits_match_too() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, c: bool) -> Tensor:
        return backend.attend(q, k, v, start, slot, causal=c)

    for dtype, bound in [(torch.float32, 2e-6), (torch.bfloat16, 0.03)]:
        for width in (3,) if dtype == torch.float32 else (3, 90):
            assert error(attend, [127, 500], width, (3, 1, 64), dtype) < bound


def test_a_split_of_which_a_row_sees_nothing_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch: list[Tensor] = []
    launch = {(1, 4, 1): lambda *args, **options: scratch.extend(args[:3])}
    monkeypatch.setattr(backend, "_join_kernel", launch)
    k, v = make_cache(torch.float32)
    start, slot = torch.tensor([62], dtype=torch.int32), torch.tensor([0])
    run(torch.randn(1, 4, 1, 16), k, v, start, slot, True)
    partial_max, partial_sum, partial_acc = (
        part[0, 0, 1] for part in scratch
    )  # the split that begins at 64
    assert partial_max.isinf().tolist() == [True, True, False, False]
    assert partial_sum[:2].tolist() == [0, 0] and not partial_acc[:2].any()
    assert partial_sum[2:].tolist() > [0, 0] and partial_acc[2:].all()


def test_a_mask_one_wide_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_visible", lambda key, last: key[None, :] <= last[:, None] + 1)
    assert error(run, [5, 300], 5, (2, 1, 16), torch.float32) > 1e-3
    assert not all_equal(rows_at(run, 300, 5, torch.float32))


def rows_at(
    attend: Run, position: int, width: int, dtype: torch.dtype, n_rows: int = 6
) -> list[Tensor]:
    """The same query at the same position, from ``n_rows`` rows of a block at most.

    Alone and in a batch. Neighbours, batchmates, and what the cache holds past the position are
    different every time.
    """
    torch.manual_seed(position)
    k, v = make_cache(dtype)
    query = torch.randn(2, 16).to(dtype)
    rows = []
    for i, t in enumerate(range(0, min(width, position + 1), -(-width // n_rows))):
        n_blocks = 1 + i % 2
        q = torch.randn(n_blocks, width, 2, 16).to(dtype)
        q[-1, t] = query
        start = torch.tensor([11 * t, position - t][-n_blocks:], dtype=torch.int32)
        other_k, other_v = make_cache(dtype)
        other_k[:, :, : position + 1], other_v[:, :, : position + 1] = (
            k[:, :, : position + 1],
            v[:, :, : position + 1],
        )
        k_cache, v_cache = torch.cat((k.flip(2), other_k)), torch.cat((v.flip(2), other_v))
        slot = torch.tensor([0, 1][-n_blocks:])
        rows.append(attend(q, k_cache, v_cache, start, slot, True)[-1, t])
    return rows


def all_equal(rows: list[Tensor]) -> bool:
    return all(torch.equal(row, rows[0]) for row in rows)


TALL = run_with(lambda width: (BANDS, TILES._replace(rows=64)))
QUICK = [(torch.float32, 33), (torch.float32, 400), (torch.bfloat16, 127)]
POSITIONS = (0, 31, 33, 63, 64, 66, 127, 258, 383, 642)


@pytest.mark.parametrize(
    "dtype, position", slow_but(QUICK, product((torch.float32, torch.bfloat16), POSITIONS))
)
def test_a_rows_bits_do_not_depend_on_its_block(dtype: torch.dtype, position: int) -> None:
    """One row, a part of a row tile, several of these, which walk the splits, and very many."""
    blocks = [(run, 1, 1), (run, 5, 5), (TALL, 5, 1), (run, 16, 3), (TALL, 100, 2)]
    blocks.append((run_in_a_small_cache, 3, 1))
    assert all_equal(
        [
            row
            for attend, *size in blocks
            for row in rows_at(attend, position, size[0], dtype, size[1])
        ]
    )


def test_a_row_that_is_joined_in_parts_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    k, v = make_cache(torch.float32, head_dim=128)
    of = torch.randn(1, 3, 2, 128), k, v, torch.tensor([650], dtype=torch.int32), torch.tensor([0])
    whole = run(*of, causal=True)
    monkeypatch.setattr(backend, "MANY_SPLITS", 5)  # there are six
    assert torch.equal(run(*of, causal=True), whole)


class JoinAtOnce:
    """In the place of the join kernel: the splits that a row sees, in no order."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return self.launch

    def launch(
        self,
        high: Tensor,
        sums: Tensor,
        acc: Tensor,
        start: Tensor,
        out: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        n_heads = out.shape[2]
        edges = torch.tensor(backend.split_boundaries(CAPACITY, BANDS))
        for block, t, head in product(*map(range, out.shape[:3])):
            n_splits = int((edges <= start[block] + t).sum())
            group = n_heads // high.shape[1]
            at = (block, head // group, slice(n_splits), t * group + head % group)
            scale = out.shape[3] ** -0.5 / math.log(2)
            weights = torch.exp2((high[at] - high[at].max()) * scale)
            out[block, t, head] = weights @ acc[at] / (weights @ sums[at])


FAULTS: dict[str, Run] = {
    "splits follow the rows": run_with(lambda w: (((64 * w, None),), TILES)),
    "a long block is not split": run_with(lambda w: (BANDS if w < 16 else WHOLE, TILES)),
    "key tiles follow the rows": run_with(lambda w: (BANDS, TILES._replace(keys=16 + w % 2 * 16))),
    "an unordered join": run,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_its_bits_would_be_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "an unordered join":
        monkeypatch.setattr(backend, "_join_kernel", JoinAtOnce())
    one, many = (rows_at(FAULTS[fault], 400, width, torch.float32, 1)[0] for width in (1, 16))
    assert torch.allclose(one, many, atol=2e-6) and not torch.equal(one, many)


@pytest.mark.parametrize("bands", [backend.SPLITS, BANDS, ((64, None),)])
@pytest.mark.parametrize("capacity", [64, 128, 192, 2048, 2112, 8192, 40960])
def test_split_edges_are_those_of_the_kernels(bands: backend.Bands, capacity: int) -> None:
    lines = backend._lines(bands)
    edges = backend.split_boundaries(capacity, bands)
    begins = [max(size * i - offset for size, offset in lines) for i in range(len(edges) + 1)]
    assert begins[:-1] == edges and edges[0] == 0 and edges[-1] < capacity <= begins[-1]
    for length in range(1, capacity + 1, 37):
        n_splits = min(-(-(length + offset) // size) for size, offset in lines)
        assert n_splits == sum(edge < length for edge in edges)


EMBEDDED = read_config(Path(__file__).parents[2] / "model")
assert EMBEDDED.block_size is not None
SHAPES = {  # n_heads, n_kv_heads, head_dim, block
    "1.7B": (16, 8, 128, 32),
    "8B": (32, 8, 128, 32),  # and the 4B
    "embedded": (EMBEDDED.n_heads, EMBEDDED.n_kv_heads, EMBEDDED.head_dim, EMBEDDED.block_size),
    "wide heads": (8, 4, 256, 32),
}
PREFILL = 2048


def tiles_for(
    shape: str, dtype: str, width: int, capability: int, n_splits: int = 20
) -> backend.Tiles:
    n_heads, n_kv_heads, head_dim, _ = SHAPES[shape]
    chip = backend.Chip(capability, CHIPS[capability])
    n_rows = width * n_heads // n_kv_heads
    return backend.choose_tiles(n_rows, n_splits, head_dim, 4 if dtype == "fp32" else 2, chip)


def compile_both(
    shape: str, dtype: str, causal: bool, width: int, capability: int, tiles: backend.Tiles
) -> list[tuple[Any, dict[str, Any], Any, set[str]]]:
    """The split kernel and, if the block is short, the one that joins.

    Each with its constants, what was made of it, and what it reads before it waits.
    """
    n_heads, n_kv_heads, head_dim, _ = SHAPES[shape]
    walks = width * n_heads // n_kv_heads > backend.LONG_BLOCK
    signature = dict.fromkeys(["q", "k_cache", "v_cache", "out", "prefetch"], f"*{dtype}")
    signature |= dict.fromkeys(["partial_max", "partial_sum", "partial_acc"], "*fp32")
    signature |= {"start": "*i32", "slot": "*i64"}
    signature |= dict.fromkeys(["capacity", "width", "n_splits"], "i32")
    names = ["N_HEADS", "N_KV_HEADS", "HEAD_DIM", "LINES", "CAUSAL"]
    values = (n_heads, n_kv_heads, head_dim, backend._lines(backend.SPLITS), causal)
    common = dict(zip(names, values, strict=True))
    own = common | {"WALKS": walks, "ROW_TILE": tiles.rows, "KEY_TILE": tiles.keys}
    own |= {"REGION": (2048, 4096, 4096)}
    options = (capability, tiles.num_warps, tiles.num_stages)
    split = compile_for(backend._split_kernel, signature, own, *options)
    made = [(backend._split_kernel, own, split, {"start", "slot"})]  # see attend: these stand still
    if not walks:
        own = common | {"UNROLL": backend.JOIN_UNROLL, "N_DIMS": min(head_dim, 32)}
        joined = compile_for(backend._join_kernel, signature, own, capability, 1, 3)
        made.append((backend._join_kernel, own, joined, {"start"}))
    return made


@pytest.mark.parametrize("capability", EVERY_CHIP)
@pytest.mark.parametrize(
    "shape, dtype, causal, width",
    [
        ("8B", "bf16", True, None),
        pytest.param("1.7B", "fp16", False, None, marks=SLOW),
        pytest.param("1.7B", "bf16", True, 1, marks=SLOW),
        ("8B", "bf16", True, 1),
        ("8B", "bf16", True, PREFILL),
        ("embedded", "bf16", False, None),
        pytest.param("embedded", "bf16", True, PREFILL, marks=SLOW),
        pytest.param("embedded", "fp32", True, None, marks=SLOW),
        pytest.param("1.7B", "fp32", True, None, marks=SLOW),
        pytest.param("1.7B", "fp32", True, PREFILL, marks=SLOW),
        pytest.param("wide heads", "bf16", True, PREFILL, marks=SLOW),
    ],
)
def test_compiles_within_each_chips_shared_memory(
    capability: int, shape: str, dtype: str, causal: bool, width: int | None
) -> None:
    width = width or SHAPES[shape][3]
    tiles = tiles_for(shape, dtype, width, capability)
    compiled = compile_both(shape, dtype, causal, width, capability, tiles)
    ptx = compiled[0][2].asm["ptx"]
    assert ("bulk.prefetch" in ptx) is (capability >= 90)
    assert ("tf32" not in ptx) and (dtype == "fp32" or "mma" in ptx)
    for kernel, own, made, early in compiled:
        assert made.metadata.shared <= CHIPS[capability]
        if capability >= 90:
            assert read_before_waiting(kernel, own, made.asm["ptx"]) == early
        else:
            assert "griddepcontrol" not in made.asm["ptx"]


def sums_lie(ttgir: str) -> set[str]:
    """How the scores and the weighted values of a tile are spread over threads and warps."""
    results = r"(?:tt\.dot|warp_group_dot|tmem_load) .*-> tensor<[^#]*, (#\w+)>"
    return {
        re.findall(rf"^{name} = (.*)$", ttgir, re.MULTILINE)[0]
        for name in re.findall(results, ttgir)
    }


def share_rows_only(shape: str, dtype: str, width: int, chip: int, tiles: backend.Tiles) -> bool:
    """Whether each warp has 16 rows to itself, with all of their keys."""
    layouts = sums_lie(compile_both(shape, dtype, True, width, chip, tiles)[0][2].asm["ttgir"])
    return (
        bool(layouts)
        and tiles.rows == 16 * tiles.num_warps
        and all(f"warpsPerCTA = [{tiles.num_warps}, 1]" in layout for layout in layouts)
    )


@pytest.mark.parametrize("capability", EVERY_CHIP)
@pytest.mark.parametrize(
    "shape, dtype", slow_but([("8B", "bf16")], [*product(SHAPES, ["bf16"]), ("1.7B", "fp32")])
)
def test_compiles_sums_of_one_order_at_every_width(capability: int, shape: str, dtype: str) -> None:
    """Nothing but the GPU can show the bits; this shows what they were seen to follow there."""
    block = SHAPES[shape][3]
    widths = (1, block, block, PREFILL)
    tiles = [
        tiles_for(shape, dtype, width, capability, n_splits)
        for width, n_splits in zip(widths, (20, 5, 20, 20), strict=True)
    ]
    if len({(tile.rows, tile.num_warps) for tile in tiles}) > 1:
        assert {tile.keys for tile in tiles} == {64}
        for width, tile in zip(widths, tiles, strict=True):
            assert share_rows_only(shape, dtype, width, capability, tile)
    else:
        made = [
            compile_both(shape, dtype, True, width, capability, tile)[0][2]
            for width, tile in zip(widths, tiles, strict=True)
        ]
        layouts = [sums_lie(each.asm["ttgir"]) for each in made]
        assert layouts[0] and all(each == layouts[0] for each in layouts)


@pytest.mark.parametrize("chip, rows", slow_but([(90, 16)], [(90, 16), (80, 16), (80, 64)]))
def test_compiles_show_where_warps_share_keys(chip: int, rows: int) -> None:
    assert not share_rows_only("8B", "bf16", 1, chip, backend.Tiles(rows, 64, 4, 2))
