"""Which tiles a product is launched with: defaults, the tables, and what ``tuning`` tries."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import build_on_meta
from orthrus_fast.config import read_config
from orthrus_fast.kernels import tiles
from orthrus_fast.kernels.formats import PLACES
from orthrus_fast.kernels.interface import LARGEST_STEP
from orthrus_fast.kernels.tiles import Tiles, default_tiles, find_tiles
from orthrus_fast.options import DRAFT_WEIGHTS, PUBLIC_SHAPES, TILED_ROWS
from tests.kernel_compile import CHIPS

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast import tuning
from orthrus_fast.tuning import Shape

MODELS = {name: shape_config(name) for name in PUBLIC_SHAPES}
EMBEDDED = read_config(Path("model"))
SHAPES = tuple(
    shape
    for config in MODELS.values()
    for shape in tuning.product_shapes(build_on_meta(config), formats=("", *DRAFT_WEIGHTS[1:]))
)
OF_TWO_RANKS = tuple(
    shape
    for config in MODELS.values()
    for shape in tuning.product_shapes(build_on_meta(config.share(0, 2)), (32,), ("", "int4"))
)
SHARED = {f"sm_{chip}": shared for chip, shared in CHIPS.items()}
COMMITTED: dict[str, Any] = json.loads(tiles.committed_table().read_text("utf-8"))["chips"]
TILES = Tiles(16, 64, 32, False, False, 4, 2)


def test_a_table_or_the_default_has_the_tiles_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {(rows, 70, 520, ""): TILES._replace(block_m=rows) for rows in (16, 32, 2048)}
    monkeypatch.setattr(tiles, "_of_device", lambda device: (99 * 1024, table))
    weight = torch.empty(70, 520, dtype=torch.bfloat16)

    def of(*shape: int, weight: Tensor = weight) -> Tiles:
        return find_tiles(weight.new_empty(*shape, weight.shape[1]), weight)

    for n_rows, rows in ((2, 16), (16, 16), (17, 32), (1025, 2048), (9000, 2048)):
        assert of(n_rows) == of(1, n_rows) == of(n_rows, 1) == table[rows, 70, 520, ""]
    assert of(2, 3, 4) == table[32, 70, 520, ""]
    for n_rows in (1, 33, 1024):
        assert of(n_rows) == default_tiles(n_rows, 2, 99 * 1024)
    assert of(16, weight=torch.empty(520, 70).bfloat16()) == default_tiles(16, 2, 99 * 1024)
    assert of(16, weight=weight.float()) == default_tiles(16, 4, 99 * 1024)
    shares = [torch.empty(*shape).bfloat16() for shape in ((35, 520), (70, 260), (24, 520))]
    near = [of(16, weight=share) for share in shares]
    assert near == [table[16, 70, 520, ""]] * 2 + [default_tiles(16, 2, 99 * 1024)]
    table[16, 24, 530, ""] = TILES._replace(descriptors=True)
    narrow = [torch.empty(*shape).bfloat16() for shape in ((24, 528), (24, 529))]
    assert of(16, weight=narrow[0]).descriptors  # whose rows are whole pieces of 16 bytes
    assert of(16, weight=narrow[1]) == default_tiles(16, 2, 99 * 1024)


DEFAULT_CLASSES = (16, 32, 64, 128, 2048)  # of TILED_ROWS, that have tiles of their own by default


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_default_tiles_fit_the_chip_and_serve_a_class(chip: str, itemsize: int) -> None:
    for n_rows in (*range(1, 300), *TILED_ROWS, 5000):
        chosen = default_tiles(n_rows, itemsize, SHARED[chip])
        assert chosen == default_tiles(tiles.row_class(n_rows), itemsize, SHARED[chip])
        stage = (chosen.block_m + chosen.block_n) * chosen.block_k * itemsize
        assert chosen.num_stages >= 2 and stage * chosen.num_stages <= SHARED[chip]
        assert chosen.block_m >= min(n_rows, 64) and LARGEST_STEP % chosen.block_k == 0
    kinds = [
        {default_tiles(n, itemsize, SHARED[chip]) for n in of}
        for of in (TILED_ROWS, DEFAULT_CLASSES)
    ]
    assert kinds[0] == kinds[1]
    assert [tiles.row_class(n) for n in (1, 2, 16, 17, 1024, 1025, 5000)] == [
        *(1, 16, 16, 32, 1024, 2048, 2048)
    ]


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this machine one with an H100; return where its user's tuned table is looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    properties = SimpleNamespace(shared_memory_per_block_optin=1234)
    for name, value in (
        ("current_device", 0),
        ("get_device_capability", (9, 0)),
        ("get_device_name", "a card"),
        ("get_device_properties", properties),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return tiles.tuned_table("sm_90")


def test_a_tuned_table_goes_before_the_committed_one(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_device = tiles._of_device.__wrapped__  # not what it has kept of another test
    committed = tiles.read_table(tiles.committed_table(), "sm_90")
    key = (32, 4096, 4096, "")
    assert tiles.tables_of("sm_90") == ["committed"] and committed[key] != TILES
    assert read_device(torch.device("cuda")) == (1234, committed)
    assert tiles.tables_of("sm_75") == []

    tuning.write_table(card, {"32x4096x4096": TILES, "16x70x520": TILES})
    assert tiles.tables_of("sm_90") == ["committed", str(card)]
    tuned = {key: TILES, (16, 70, 520, ""): TILES}
    assert read_device(torch.device("cuda")) == (1234, committed | tuned)
    assert tiles.read_tables("sm_75") == {}

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiles.tuned_table("sm_90") == tmp_path / ".cache" / card.relative_to(tmp_path / "cache")
    assert tiles.tables_of("sm_90") == ["committed"]


def test_a_table_keeps_what_was_not_measured_again(card: Path) -> None:
    other = TILES._replace(joined=True)
    tuning.write_table(card, {"1x64x64": TILES, "16x64x64": TILES})
    table = json.loads(card.read_text("utf-8"))
    table["chips"]["sm_80"] = table["chips"]["sm_90"]
    card.write_text(tuning.to_json(table), "utf-8")
    tuning.write_table(card, {"16x64x64": other})
    assert tiles.read_table(card, "sm_90") == {(1, 64, 64, ""): TILES, (16, 64, 64, ""): other}
    assert tiles.read_table(card, "sm_80") == {(1, 64, 64, ""): TILES, (16, 64, 64, ""): TILES}
    assert json.loads(card.read_text("utf-8"))["chips"]["sm_90"]["measured_on"] == "a card"
    assert [path.name for path in card.parent.iterdir()] == [card.name]

    text = tiles.committed_table().read_text("utf-8")
    assert tuning.to_json(json.loads(text)) == text


GOOD = [16, 64, 128, False, False, 4, 5]


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "{}",
        '{"chips": []}',
        '{"chips": {"sm_90": {}}}',
        '{"chips": {"sm_90": {"tiles": []}}}',
        *(
            json.dumps({"chips": {"sm_90": {"tiles": {"16x64x64": GOOD, key: values}}}})
            for key, values in (
                ("16x64", GOOD),
                ("17x64x64", GOOD),
                ("axbxc", GOOD),
                ("1x64x64", GOOD[:-1]),
                ("1x64x64", [16, 64, 96, *GOOD[3:]]),
                ("1x64x64", [16, 64, 0, *GOOD[3:]]),
                ("1x64x64", None),
            )
        ),
    ],
)
def test_what_is_no_table_is_not_read(card: Path, text: str | None) -> None:
    if text is not None:
        card.parent.mkdir(parents=True)
        card.write_text(text, "utf-8")
    assert tiles.read_table(card, "sm_90") == {} and tiles.tables_of("sm_90") == ["committed"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"chips": []}'])
def test_what_is_no_table_is_written_anew(card: Path, text: str) -> None:
    card.parent.mkdir(parents=True)
    card.write_text(text, "utf-8")
    tuning.write_table(card, {"16x64x64": TILES})
    assert tiles.read_table(card, "sm_90") == {(16, 64, 64, ""): TILES}


@pytest.mark.parametrize("chip", COMMITTED)
def test_the_committed_table_has_a_candidate_for_each_product_of_the_public_models(
    chip: str,
) -> None:
    table = tiles.read_table(tiles.committed_table(), chip)
    shapes, of_two = (
        {key: shape for shape in some for key in tiles.parse_table(entry_of(shape))}
        for some in (SHAPES, OF_TWO_RANKS)
    )
    assert set(table) <= set(shapes) | set(of_two)
    for key, shape in shapes.items():
        if key in table:
            assert table[key] in list(tuning.candidates(shape, SHARED[chip]))
        elif not shape.format:  # no pass has so many logits
            assert (shape.n_rows, shape.end) == (2048, "argmax")
    for key in set(table) - set(shapes):
        assert table[key] in list(tuning.candidates(of_two[key], SHARED[chip]))


def entry_of(shape: Shape) -> dict[str, Any]:
    """A chip's entry of a table that holds this shape alone."""
    return {"tiles": {shape.key: GOOD}}


@pytest.mark.parametrize("shared", sorted(set(CHIPS.values())))
def test_candidates_fit_the_chip(shared: int) -> None:
    odd = [Shape(rows, 4100, 3001, "") for rows in TILED_ROWS]
    small = tuning.product_shapes(build_on_meta(EMBEDDED))
    for shape in (*SHAPES, *odd, *small):
        tried = list(tuning.candidates(shape, shared))
        assert tried and len(set(tried)) == len(tried)
        for one in tried:
            places = PLACES.get(shape.format, 1)  # words of the weight have so many
            stage = (one.block_m * places + one.block_n) * one.block_k * 2
            assert one.num_stages >= 2 and one.num_stages * stage <= shared
            assert LARGEST_STEP % one.block_k == 0
            assert not one.joined or shape.split < shape.k
            assert not one.descriptors or shape.k % 8 == 0
