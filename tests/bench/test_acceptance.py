"""Acceptance of a checkpoint's own drafts: its arithmetic by hand, and the part."""

from __future__ import annotations

from pathlib import Path

import pytest

from orthrus_fast import steps
from orthrus_fast.bench.acceptance import Text, averages, by_position, distinct_trigrams
from orthrus_fast.files import embedded_checkpoint
from tests.bench.runs import EMBEDDED, TINY, run
from tests.bench.test_identity import accept_one_too_many


def text(n_tokens: int, accepted: list[int], equal: bool = True) -> Text:
    return Text(list(range(n_tokens)), accepted, equal)


def test_acceptance_by_position_by_hand() -> None:
    def shares(text: Text, width: int) -> tuple[object, object]:
        found = by_position([text], width)
        return found["accepted_at_position"], found["reached_position"]

    # 1 + (2+1) + (0+1) + (3+1) tokens: the block of four ends with a verified token each time.
    whole = text(9, [2, 0, 3])
    assert not whole.is_cut
    assert shares(whole, 4) == ([2 / 3, 1.0, 0.5], [3, 2, 2])
    # One token fewer: the last block's third draft ended the text, and nothing was refused.
    cut = text(8, [2, 0, 3])
    assert cut.is_cut and shares(cut, 4) == ([2 / 3, 1.0, 0.5], [3, 2, 2])
    cut = text(5, [2, 1])  # 1 + 3 + 1: the second draft of the last block had no judge
    assert cut.is_cut and shares(cut, 4) == ([1.0, 1.0, 0.0], [2, 1, 1])
    assert shares(text(1, []), 3) == ([None, None], [0, 0])


def test_both_averages_by_hand() -> None:
    found = averages([text(9, [2, 0, 3]), text(5, [3]), text(1, [])])
    assert found["token_weighted"] == (8 + 4) / 4
    assert found["mean_over_prompts"] == pytest.approx((8 / 3 + 4) / 2)
    assert found["standard_error"] == pytest.approx((4 - 8 / 3) / 2)
    assert set(averages([text(1, [])]).values()) == {None}
    assert averages([text(5, [3])])["standard_error"] is None


def test_distinct_trigrams_by_hand() -> None:
    assert distinct_trigrams([1, 2, 3, 4]) == 1.0
    assert distinct_trigrams([1, 1, 1, 1, 1]) == 1 / 3
    assert distinct_trigrams([1, 2]) == 1.0


@pytest.mark.parametrize(
    "sampled", [(), pytest.param(("--temperature", "0.7"), marks=pytest.mark.slow)]
)
def test_acceptance_of_the_embedded_checkpoint(sampled: tuple[str, ...], tmp_path: Path) -> None:
    flags = (*EMBEDDED, *sampled, "--parts", "acceptance,identity")
    parts = run(tmp_path / "r.json", *flags)["parts"]
    part, identity = parts["acceptance"], parts["identity"]
    assert part["prompts_file"] == "heldout.jsonl" and part["sampling"] == identity["sampling"]
    assert part["texts_equal_to_ar"] == part["sequences"] == len(part["by_prompt"]) == 3
    assert sum(of["sequences"] for of in part["by_kind"].values()) == 3
    assert part["by_kind"]["records"]["mean_over_prompts"] > 1
    found = part["tokens_per_cycle"]
    assert found["token_weighted"] == pytest.approx(identity["tokens_per_cycle"])
    by_prompt = [prompt["tokens_per_cycle"] for prompt in part["by_prompt"]]
    assert found["mean_over_prompts"] == pytest.approx(sum(by_prompt) / 3)
    assert len(part["accepted_at_position"]) == len(part["reached_position"]) == 15
    assert part["reached_position"] == sorted(part["reached_position"], reverse=True)
    n_cycles = sum(prompt["cycles"] for prompt in part["by_prompt"])
    assert n_cycles - 3 <= part["reached_position"][0] <= n_cycles
    assert part["accepted_at_position"][0] > 0.5  # a trained draft view
    assert 0 < part["distinct_trigrams"] <= 1


def test_texts_that_differ_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "accept", accept_one_too_many)
    part = run(tmp_path / "r.json", *EMBEDDED, "--parts", "acceptance")["parts"]["acceptance"]
    assert part["texts_equal_to_ar"] < 3
    assert [p["equal_to_ar"] for p in part["by_prompt"]].count(True) == part["texts_equal_to_ar"]


def test_without_prompts_acceptance_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = run(tmp_path / "r.json", *TINY, "--new-tokens", "8", "--parts", "acceptance")["parts"]
    why = "random weights have no trained draft view"
    assert part["acceptance"]["skipped"] == why
    assert f"acceptance: left out, {why}" in capsys.readouterr().out
    flags = (*EMBEDDED, "--parts", "acceptance", "--checkpoint", str(embedded_checkpoint()))
    part = run(tmp_path / "c.json", *flags)["parts"]
    assert part["acceptance"]["skipped"] == "no --prompts-file"
