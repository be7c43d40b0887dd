"""The benchmark with weights in fewer bits: what it reads, and that texts stay what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.runs import TINY, run
from tests.marks import slow_but

PARTS = ("--parts", "startup,passes,identity,slots", "--contexts", "40", "--new-tokens", "12")
PARTS += ("--slots-list", "1,2", "--sequences", "2")


@pytest.mark.parametrize("format", slow_but(["int4"], ["fp8", "int8", "int4"]))
def test_a_drafters_format_shows_in_bytes_and_never_in_a_text(tmp_path: Path, format: str) -> None:
    plain = run(tmp_path / "plain.json", *TINY, *PARTS)
    found = run(tmp_path / "found.json", *TINY, *PARTS, "--draft-weights", format)
    assert f"--draft-weights {format}" in found["command"]
    configuration, parts = found["environment"]["configuration"], found["parts"]
    assert (configuration["weights"], configuration["draft_weights"]) == ("checkpoint", format)
    same, before = parts["identity"], plain["parts"]["identity"]
    assert same["sequences_equal"] == 2 and same["rows_differing"] == 0
    assert same["tokens_sha256"] == before["tokens_sha256"]
    sizes = {one["draft"]["weights_bytes"]: one for one in parts["passes"]["at"]}
    (draft,), (verify,) = sizes, {one["verify"]["weights_bytes"] for one in sizes.values()}
    assert draft < verify / 2  # of float32, filled up to whole words
    assert configuration["weight_bytes"]["drafter"] == pytest.approx(draft, rel=0.05)  # and norms
    assert parts["startup"]["seconds"]["quantize"] > 0
    built = [entry["configuration"]["draft_weights"] for entry in parts["slots"]["at"]]
    assert built == [format, format]


def test_both_views_in_fewer_bits_agree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = run(tmp_path / "found.json", *TINY, *PARTS, "--weights", "int4")
    assert caplog.text.count("this is another model") == 1  # not for each number of slots
    same = found["parts"]["identity"]
    assert same["sequences_equal"] == 2 and same["rows_differing"] == 0
    built = found["environment"]["configuration"]
    assert (built["weights"], built["draft_weights"]) == ("int4", "int4")
