"""The terminal's tables: every field that has something to show, in its unit."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from orthrus_fast.bench.tables import cell, fields, show, spread

SUMMARY = {"median": 2.0, "p10": 1.9, "p90": 2.1, "n": 5}
PART = {
    "part_seconds": 1.0,
    "label": "replayed acceptance",
    "accept": 0.85,
    "at": [
        {"context": 70, "tokens_per_second": {"diffusion": SUMMARY}, "tokens_equal_to_ar": True},
        {"context": 300, "tokens_per_second": {"diffusion": SUMMARY}, "tokens_equal_to_ar": False},
    ],
    "left_out": [],
}


def shown(capsys: pytest.CaptureFixture[str], name: str, part: Any) -> list[list[str]]:
    show(Console(width=100), name, part)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100 and "…" not in text
    return [line.split() for line in text.splitlines()]


def test_a_column_an_entry_and_a_broken_promise_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = shown(capsys, "cycles", PART)
    assert ["cycles,", "REPLAYED", "ACCEPTANCE"] in lines and ["accept", "85.0%"] in lines
    assert ["context", "70", "300"] in lines
    assert ["tokens", "equal", "to", "ar", "yes", "NO"] in lines
    assert ["tokens", "per", "second", "diffusion", "2.00", "±5%", "2.00", "±5%"] in lines


def test_a_column_a_combination_with_its_problem(capsys: pytest.CaptureFixture[str]) -> None:
    passes = {"at": [{"context": 40, "verify": {"ms": SUMMARY}}]}
    good = {"runner": "eager", "compile_mode": None, "problem": None, "passes": passes}
    bad = {"runner": "compiled", "compile_mode": "default", "problem": "ended with exit status -6"}
    lines = shown(capsys, "modes", {"combinations": [good, bad]})
    assert ["combination", "eager", "compiled", "default"] in lines
    assert ["verify", "ms", "2.00", "±5%", "–"] in lines
    assert ["problem", "–", "ended", "with", "exit", "status", "-6"] in lines


def test_a_part_that_was_left_out_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    show(Console(width=100), "cycles", {"skipped": "no draft view"})
    assert capsys.readouterr().out == "cycles: left out, no draft view\n"


def test_fields_of_nested_objects_have_names_of_their_own() -> None:
    found = {
        "ceiling": {"bytes_per_s": 2.5e12},
        "why": None,
        "left_out": [{"slots": 2, "why": "x"}],
    }
    assert dict(fields(found)) == {"ceiling bytes per s": "2.5e+03 GB/s", "left out: 2 slots": "x"}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("weights_bytes", 4_150_000_000, "4.15 GB"),
        ("share_by_weights", 0.717, "71.7%"),
        ("accepted_at_position", [0.9, None], "90.0% –"),
        ("cycles", 1234, "1234"),
        ("speedup", 3.614, "3.61"),
        ("tokens_equal", False, "NO"),
    ],
)
def test_cells(name: str, value: Any, text: str) -> None:
    assert cell(name, value) == text


def test_a_spread_is_half_of_the_way_from_the_10th_to_the_90th_percentile() -> None:
    assert spread({"median": 200.0, "p10": 199.0, "p90": 201.0}) == "200 ±0.5%"
    assert spread({"median": 2000.4, "p10": 1900.0, "p90": 2100.0}) == "2000 ±5%"
