"""The choice of a width alone: what it expects, what it learns, what finding out costs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus_fast.engine.width import FIRST_GUESS, Acceptance, Times, WidthPolicy

WIDTHS = [1, 4, 8, 16, 32]


@given(st.lists(st.floats(0, 1), min_size=31, max_size=31))
def test_expected_tokens_are_the_chances_of_each_prefix(shares: list[float]) -> None:
    expected = []
    for width in WIDTHS:
        chance, tokens = 1.0, 1.0
        for share in shares[: width - 1]:
            chance *= share
            tokens += chance
        expected.append(tokens)
    assert Acceptance(shares).expected_tokens(WIDTHS) == pytest.approx(expected)
    assert Acceptance(shares).expected_tokens([8]) == pytest.approx([expected[2]])


def test_a_share_moves_only_where_a_cycle_could_show_it() -> None:
    acceptance = Acceptance([0.5] * 7)
    acceptance.saw(2, 7)  # two right, the third wrong, nothing known of the others
    assert [share > 0.5 for share in acceptance.shares] == [True, True, *[False] * 5]
    assert [share == 0.5 for share in acceptance.shares] == [False] * 3 + [True] * 4
    narrow = Acceptance([0.5] * 7)
    narrow.saw(3, 3)  # all right, and no more were proposed
    assert [share > 0.5 for share in narrow.shares] == [True] * 3 + [False] * 4
    assert narrow.shares[3:] == [0.5] * 4


@pytest.mark.parametrize("true_share", [0.3, 0.7, 0.95])
def test_it_learns_the_share_whatever_the_width(true_share: float) -> None:
    """At widths that cut most runs short, too."""
    chance, found = random.Random(0), []
    acceptance = Acceptance([FIRST_GUESS] * 31)
    for _ in range(2000):
        n_drafts = chance.choice((3, 7, 31))
        n = next((i for i in range(n_drafts) if chance.random() >= true_share), n_drafts)
        acceptance.saw(n, n_drafts)
        found.append(acceptance.shares[0])
    assert sum(found[100:]) / len(found[100:]) == pytest.approx(true_share, abs=0.02)


def test_times_not_seen_yet_follow_those_that_were() -> None:
    times = Times({1: 1.0, 8: 2.0, 32: 3.0})
    times.saw(8, 0.02)
    assert [times[width] for width in (1, 8, 32)] == pytest.approx([0.01, 0.02, 0.03])
    times.saw(1, 0.015)
    assert [times[width] for width in (1, 8)] == pytest.approx([0.015, 0.02])
    for _ in range(200):
        times.saw(8, 0.04)
    assert times[8] == pytest.approx(0.04)
    times.saw(8, 60.0)  # somebody had a coffee
    assert times[8] < 0.05
    times.saw(5, 1.0)  # a width that is none of these


def test_the_widest_within_a_time_or_the_smallest() -> None:
    times = Times({64: 0.01, 256: 0.03, 512: 0.06}, seen=True)
    found = [times.widest_within(seconds) for seconds in (1.0, 0.06, 0.05, 0.01, 0.0, -1.0)]
    assert found == [512, 512, 256, 64, 64, 64]


def policy(fixed: int | None = None) -> WidthPolicy:
    """Times such as a GPU's at few slots: a draft costs another pass, rows cost little."""
    return WidthPolicy(WIDTHS, Times({1: 1.0, 4: 2.0, 8: 2.05, 16: 2.1, 32: 2.3}, seen=True), fixed)


def test_without_drafts_or_with_a_fixed_width_there_is_no_choice() -> None:
    one = policy(fixed=8)
    assert one.choose([], 3) == 1
    assert one.choose([one.start()], 3) == 8
    assert policy().choose([], 3) == 1


@pytest.mark.parametrize(
    ("share", "n_others", "width"), [(0.95, 0, 32), (0.7, 0, 16), (0.3, 0, 1), (0.95, 30, 1)]
)
def test_the_width_that_pays_most(share: float, n_others: int, width: int) -> None:
    """Neighbours that do not draft pay for drafts without having any."""
    one = policy()
    acceptance = Acceptance([share] * 31)
    one.choose([acceptance], n_others)  # which may be to find out
    assert one.choose([acceptance], n_others) == width


def simulate(one: WidthPolicy, share: float, n_cycles: int, seed: int = 0) -> tuple[float, int]:
    """Time and tokens of a text whose drafts are right with this chance."""
    chance, seconds, tokens = random.Random(seed), 0.0, 0
    acceptance = one.start()
    for _ in range(n_cycles):
        width = one.choose([acceptance], 0)
        n = next((i for i in range(width - 1) if chance.random() >= share), width - 1)
        if width > 1:
            one.saw(acceptance, n, width - 1)
        seconds, tokens = seconds + one.times[width], tokens + n + 1
    return seconds, tokens


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_where_drafts_do_not_pay_finding_out_costs_little(share: float) -> None:
    seconds = tokens = 0.0
    one = policy()
    for text in range(20):
        took, gave = simulate(one, share, 150, seed=text)
        seconds, tokens = seconds + took, tokens + gave
    assert tokens / seconds > 0.97  # of the tokens that AR gives in a unit of time


@pytest.mark.parametrize("share", [0.7, 0.8, 0.95])
def test_where_drafts_pay_it_is_near_the_best_width(share: float) -> None:
    seconds, tokens = simulate(policy(), share, 3000)
    fixed = [simulate(policy(width), share, 3000) for width in WIDTHS[1:]]
    assert tokens / seconds > 0.95 * max(gave / took for took, gave in fixed)


def test_it_finds_out_when_a_text_begins_to_be_easy() -> None:
    one = policy()
    simulate(one, 0.0, 400)
    acceptance, widths = one.start(), list[int]()
    for _ in range(300):
        width = one.choose([acceptance], 0)
        widths.append(width)
        if width > 1:
            one.saw(acceptance, width - 1, width - 1)
    assert widths[0] > 1, "a new request is looked at once"
    first = next(i for i in range(300) if min(widths[i : i + 20]) > 1)
    assert first < 250
