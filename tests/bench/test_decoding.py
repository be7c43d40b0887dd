"""Whole decodes: rates by hand, shares of right drafts, replayed drafts."""

from __future__ import annotations

import pytest

from orthrus_fast.bench.decoding import (
    Text,
    expected_tokens_per_cycle,
    ignore_eos,
    patched,
    rated,
    share_of_right_drafts,
)
from orthrus_fast.engine.request import Update
from orthrus_fast.errors import RequestError
from tests.bench.runs import TINY, session


def test_a_rate_is_of_the_time_in_which_all_decode() -> None:
    """The first ends after two cycles, at 5 s; what the other does alone does not count."""

    def text(accepted: list[int], n_tokens: int, first_at: float, last_at: float) -> Text:
        return Text([0] * n_tokens, accepted, first_at, last_at)

    both = rated([text([3, 2], 7, 1.0, 5.0), text([0, 1, 4], 9, 2.0, 9.0)])
    assert both.tokens_per_second == (6 + 3) / (5.0 - 2.0)  # of 7 the last is past the budget
    assert both.accepted == [3, 2, 0, 1, 4] and both.n_emitted == 14
    assert rated([text([1, 1], 5, 1.0, 3.0)]).tokens_per_second == 2.0
    one_after_another = rated([text([1], 3, 1.0, 2.0), text([1], 3, 3.0, 4.0)])
    assert one_after_another.tokens_per_second == 0.0


def test_an_error_of_the_engine_ends_a_measurement() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        Text().take(Update(0, [], finish_reason="error", error="CUDA out of memory"))


@pytest.mark.parametrize("width", [2, 8, 16, 32])
@pytest.mark.parametrize("part", [0.001, 0.2, 0.75, 0.999])
def test_a_share_gives_the_tokens_per_cycle_that_were_asked(width: int, part: float) -> None:
    asked = 1 + part * (width - 1)
    share = share_of_right_drafts(asked, width)
    assert 0 < share < 1
    assert expected_tokens_per_cycle(share, width) == pytest.approx(asked, rel=1e-12)
    again = share_of_right_drafts(expected_tokens_per_cycle(share, width), width)
    assert again == pytest.approx(share, rel=1e-9)


def test_up_to_one_it_is_the_share_itself() -> None:
    assert [share_of_right_drafts(p, 8) for p in (0.0, 0.85, 1.0)] == [0.0, 0.85, 1.0]


@pytest.mark.parametrize("asked", [8, 31.5])
def test_more_than_a_block_can_give_is_refused_with_the_range(asked: float) -> None:
    with pytest.raises(RequestError, match=f"accept: {asked:g} tokens per cycle is not above 1"):
        share_of_right_drafts(asked, 8)


def test_methods_and_ends_of_text_are_put_back() -> None:
    runner = session(*TINY, "--new-tokens", "8").runner
    eos = runner.eos.tolist()
    with pytest.raises(KeyError), ignore_eos(runner), patched(runner, draft=print):
        assert set(runner.eos.tolist()) <= {-1} and runner.draft is print
        raise KeyError
    assert runner.eos.tolist() == eos and "draft" not in vars(runner)
