"""orthrus tune: its flags, what it asks to be measured, and what it says without a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch

from orthrus_fast.cli.flags import TUNED_ROWS
from orthrus_fast.cli.main import main
from tests.checkpoints import write_checkpoint

Asked = tuple[list[tuple[int, int, str]], Sequence[int]]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """What a machine with a GPU was asked to measure; its table is a file of one line."""
    seen: list[Asked] = []

    def tune(
        shapes: Iterable[tuple[int, int, str]], rows: Sequence[int], log: Callable[[str], None]
    ) -> Path:
        seen.append((list(shapes), rows))
        log("measuring")
        table = tmp_path / "table.json"
        table.write_text("{}")
        return table

    module = ModuleType("orthrus_fast.tuning")
    module.tune = tune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "orthrus_fast.tuning", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return seen


def test_the_public_models_are_measured_unless_another_is_named(
    tmp_path: Path, asked: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune"]) == 0
    got = capsys.readouterr()
    assert (got.out, got.err) == (f"{tmp_path / 'table.json'}\n", "measuring\n")
    of_8b = [(6144, 4096, ""), (4096, 4096, ""), (24576, 4096, "swiglu"), (4096, 12288, "")]
    of_8b.append((151936, 4096, "argmax"))
    shapes, rows = asked[0]
    assert rows == list(TUNED_ROWS) and len(shapes) == len(set(shapes)) == 15
    assert main(["tune", "--shape", "8B", "--rows", "1,32"]) == 0
    assert asked[1] == (of_8b, [1, 32]) and set(of_8b) < set(shapes)
    directory = write_checkpoint(tmp_path / "model")
    copied = tmp_path / "copied.json"
    assert main(["tune", "--checkpoint", str(directory), "--output", str(copied)]) == 0
    assert asked[2][0][-1] == (272, 32, "argmax") and copied.read_text() == "{}"
    assert capsys.readouterr().out.endswith(f"\n{copied}\n")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "tune: no CUDA device is available here"),
        (["--rows", "1,x"], "--rows: '1,x' is no list of numbers of rows, as 1,32 is"),
        (["--rows", "0"], "--rows: '0' is no list"),
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
