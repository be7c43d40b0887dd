"""orthrus tune: what it asks to be measured, where it keeps the result, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast import tuning
from orthrus_fast.cli.flags import build_tune_parser
from orthrus_fast.cli.main import main
from orthrus_fast.kernels.tiles import Tiles, tuned_table
from orthrus_fast.options import TILED_ROWS
from orthrus_fast.tuning import Shape
from tests.checkpoints import write_checkpoint

TILES = Tiles(16, 64, 128, False, False, 4, 5)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Shape]]:
    """What a machine with a GPU was asked to measure."""
    seen: list[list[Shape]] = []

    def tune(shapes: Iterable[Shape], log: Callable[[str], None]) -> dict[str, Tiles]:
        seen.append(list(shapes))
        log("measuring")
        return {shape.key: TILES for shape in seen[-1]}

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in (
        ("is_available", True),
        ("current_device", 0),
        ("get_device_capability", (9, 0)),
        ("get_device_name", "a card"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return seen


def test_the_public_models_are_measured_unless_another_is_named(
    tmp_path: Path, asked: list[list[Shape]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    got = capsys.readouterr()
    assert (got.out, got.err) == (f"{tuned_table('sm_90')}\n", "measuring\n")
    assert tuned_table("sm_90").is_relative_to(tmp_path / "cache")
    n_quantized = 3 * 15 * (len(TILED_ROWS) - 1)  # but not of the most rows
    assert len(asked[0]) == len(set(asked[0])) == 15 * len(TILED_ROWS) + n_quantized
    more = ["--rows", "1,32", "--weights", "checkpoint,int4"]
    assert main(["tune", "--shape", "8B", *more]) == 0
    assert set(asked[1]) < set(asked[0]) and len(asked[1]) == 2 * 5 * 2
    assert Shape(32, 151936, 4096, "argmax") in asked[1]
    assert Shape(32, 151936, 4096, "argmax", "int4") in asked[1]
    table = tmp_path / "own" / "table.json"
    directory = write_checkpoint(tmp_path / "model")
    assert main(["tune", "--checkpoint", str(directory), "--output", str(table)]) == 0
    assert asked[2][-1] == Shape(2048, 272, 32, "argmax") and "2048x272x32" in table.read_text()


def test_the_flags_know_the_rows_of_a_table() -> None:
    assert tuple(build_tune_parser("tune").parse_args([]).rows) == TILED_ROWS


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "tune: no CUDA device is available here"),
        (["--rows", "1,x"], "--rows: '1,x' is no list of 1, 16, 32"),
        (["--rows", "3"], "--rows: '3' is no list of 1, 16, 32"),
        (["--weights", "int4,fp4"], "--weights: 'int4,fp4' is no list of checkpoint, fp8, int8"),
        (["--shape", "9B"], "--shape: invalid choice: '9B'"),
        (["--shape", "8B", "--checkpoint", "x"], "not allowed with argument --shape"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *words]) == 2
    got = capsys.readouterr()
    assert got.out == "" and got.err.count("\n") == 1
    assert got.err.startswith("error: ") and part in got.err
