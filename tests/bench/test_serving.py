"""The part of several requests at once."""

from __future__ import annotations

import pytest

from orthrus_fast.bench import serving
from orthrus_fast.bench.clocks import measuring
from tests.bench.runs import TINY, check_times, session


def test_gaps_first_tokens_and_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PREFILL_LENGTHS", (150, 10**6))
    monkeypatch.setattr(serving, "HISTORY", 120)
    built = session(*TINY, "--new-tokens", "25", "--contexts", "40", "--repeats", "2")
    with measuring(built.device):
        found = serving.engine(built)
    assert found["left_out"] == [10**6]
    (at,) = found["at"]
    assert at["prompt_tokens"] == 150
    for name in ("first_token_ms", "first_token_beside_ms", "gap_before_ms", "longest_gap_ms"):
        check_times(at[name])
    assert at["longest_gap_ms"]["n"] == 2
    turn = found["next_turn"]
    assert (turn["history"], turn["new"], turn["reused"]) == (120, 32, 120)
    check_times(turn["first_token_ms"])
    assert not built.decoder.engine.has_work
