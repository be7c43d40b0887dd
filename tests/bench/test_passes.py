"""What is timed, and in which state."""

from __future__ import annotations

from typing import Any

import pytest

from orthrus_fast.bench import passes
from orthrus_fast.bench.clocks import measuring, random_cache, set_position, summary
from orthrus_fast.bench.common import ROUNDS
from tests.bench.runs import TINY, session


def test_a_summary_by_hand() -> None:
    found = summary([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 8.0, 7.0, 9.0, 10.0, 11.0])
    assert found == {"median": 6.0, "p10": 2.0, "p90": 10.0, "n": 11}


def test_each_timing_has_its_settings_and_the_slots_are_left_as_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note(runner: Any, width: int, drafting: bool, repeats: int, sampling: bool) -> list[float]:
        settings = runner.state.settings
        names = ("temperature", "top_k", "top_p")
        values = [[round(v, 3) for v in getattr(settings, name).tolist()] for name in names]
        seen.append((sampling, drafting, *values, runner.state.length.tolist()))
        return [1.0]

    def note_preparation(width: int, sampling: bool = False) -> None:
        seen.append((width, sampling))

    seen: list[Any] = []
    built = session(*TINY, "--contexts", "40", "--slots", "2", "--new-tokens", "8")
    monkeypatch.setattr(passes, "cycle_spans", note)
    monkeypatch.setattr(built.runner, "prepare", note_preparation)
    with measuring(built.device):
        passes.sampling(built)
    greedy = (False, True, [0.0, 0.0], [0, 0], [1.0, 1.0], [40, 40])
    sampled = (True, True, [0.7, 0.7], [0, 0], [1.0, 1.0], [40, 40])
    filtered = (True, True, [0.6, 0.6], [20, 20], [0.95, 0.95], [40, 40])
    assert seen == [(8, True), *[greedy, sampled, filtered] * ROUNDS]  # ready before the clock runs
    assert built.runner.state.settings.temperature.tolist() == [0.0, 0.0]


def test_cycles_at_a_position_move_nothing() -> None:
    built = session(*TINY, "--contexts", "40", "--new-tokens", "8")
    state, cache = built.runner.state, built.runner.cache
    with measuring(built.device), random_cache(built):
        set_position(built, 40)
        assert float(cache.k[0].std()) == pytest.approx(1.0, rel=0.1)
        built.runner.launch(True, built.width)
        built.runner.read()
        assert state.length.tolist() == [40] and state.done.tolist() == [True]
    assert state.length.tolist() == [0] and not cache.k[0].any()
