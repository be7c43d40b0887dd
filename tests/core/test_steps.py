"""The steps of a cycle against plain Python, slot by slot."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthrus_fast import SamplingParams, steps
from orthrus_fast.kernels.plain_sampling import logprobs, sample


def make_state(lengths: list[int], limits: list[int], done: list[bool]) -> steps.State:
    state = steps.State.create(len(lengths), 64, 8, torch.device("cpu"))
    state.length.copy_(torch.tensor(lengths))
    state.max_length.copy_(torch.tensor(limits))
    state.done.copy_(torch.tensor(done))
    state.anchor.copy_(torch.arange(100, 100 + len(lengths)))
    state.tokens.copy_(torch.arange(64).expand(len(lengths), -1) + 1000)
    return state


@given(st.data())
def test_accept_is_the_length_of_the_agreeing_prefix(data: st.DataObject) -> None:
    width = data.draw(st.integers(2, 8))
    row = st.lists(st.integers(0, 2), min_size=width, max_size=width)
    block = data.draw(st.lists(row, min_size=1, max_size=4))
    target = data.draw(st.lists(row, min_size=len(block), max_size=len(block)))
    expected = []
    for proposal, wanted in zip(block, target, strict=True):
        n_accepted = 0
        while n_accepted < width - 1 and proposal[n_accepted + 1] == wanted[n_accepted]:
            n_accepted += 1
        expected.append(n_accepted)
    assert steps.accept(torch.tensor(block), torch.tensor(target)).tolist() == expected


@given(st.data())
def test_commit_moves_each_slot_as_a_plain_loop_does(data: st.DataObject) -> None:
    n_slots, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=n_slots, max_size=n_slots))
    rooms = data.draw(st.lists(st.integers(1, 8), min_size=n_slots, max_size=n_slots))
    done = data.draw(st.lists(st.booleans(), min_size=n_slots, max_size=n_slots))
    accepted = data.draw(st.lists(st.integers(0, width - 1), min_size=n_slots, max_size=n_slots))
    row = st.lists(st.integers(0, 9), min_size=width, max_size=width)
    target = data.draw(st.lists(row, min_size=n_slots, max_size=n_slots))
    eos = data.draw(st.lists(st.integers(0, 9), max_size=3, unique=True))
    limits = [length + 1 + room for length, room in zip(lengths, rooms, strict=True)]
    state = make_state(lengths, limits, done)
    before = state.tokens.clone()

    n_new = steps.commit(
        state, torch.tensor(target), torch.tensor(accepted), torch.tensor(eos, dtype=torch.int64)
    )

    for slot in range(n_slots):
        emitted: list[int] = []
        ended = done[slot]
        for token in target[slot][: accepted[slot] + 1]:
            if ended:
                break
            emitted.append(token)
            ended = token in eos or lengths[slot] + 1 + len(emitted) >= limits[slot]
        end = lengths[slot] + 1 + len(emitted)
        assert int(n_new[slot]) == len(emitted)
        assert int(state.length[slot]) == lengths[slot] + len(emitted)
        assert int(state.anchor[slot]) == (emitted[-1] if emitted else 100 + slot)
        assert bool(state.done[slot]) == ended
        assert state.tokens[slot, lengths[slot] + 1 : end].tolist() == emitted
        assert torch.equal(state.tokens[slot, end:], before[slot, end:])
        assert torch.equal(
            state.tokens[slot, : lengths[slot] + 1], before[slot, : lengths[slot] + 1]
        )


def test_commit_ends_at_an_end_token_or_the_limit_within_what_was_accepted() -> None:
    """Four tokens could be emitted: an end is the first, the second, the last of them, or none."""
    targets = [[9, 1, 2, 3], [1, 9, 2, 9], [1, 2, 3, 9], [1, 2, 3, 4], [1, 2, 3, 4], [9, 9, 9, 9]]
    limits = [60, 60, 60, 60, 13, 60]
    state = make_state([10] * 6, limits, [False] * 6)
    n_new = steps.commit(state, torch.tensor(targets), torch.tensor([3] * 6), torch.tensor([9, 8]))
    assert n_new.tolist() == [1, 2, 4, 4, 2, 1]
    assert state.length.tolist() == [11, 12, 14, 14, 12, 11]
    assert state.anchor.tolist() == [9, 9, 9, 4, 2, 9]
    assert state.done.tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("drafting", [[True, True], [False, False], [True, False]])
def test_accepting_takes_the_greedy_ids_that_it_is_given(drafting: list[bool]) -> None:
    """A kernel finds them; the logits beside them are for sampling alone.

    The first slot's proposals agree twice; the second's never do.
    """
    state = make_state([10, 20], [60, 60], [False, False])
    state.drafting.copy_(torch.tensor(drafting))
    block = torch.tensor([[100, 7, 8, 9], [101, 7, 8, 9]])
    greedy = torch.tensor([[7, 8, 1, 9], [1, 8, 9, 2]])
    nothing, eos = torch.zeros(2, 4, 30), torch.tensor([29])
    report = steps.accept_and_commit(state, block, greedy, nothing, eos, None, logprobs)
    n_accepted = [2 * drafting[0], 0]
    assert report.tolist() == [
        [*row, n + 1, n, 0] for row, n in zip(greedy.tolist(), n_accepted, strict=True)
    ]
    assert state.length.tolist() == [10 + n_accepted[0] + 1, 21]
    assert state.anchor.tolist() == [1 if drafting[0] else 7, 1]


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_a_block_has_the_proposals_of_slots_that_draft(width: int) -> None:
    state = make_state([10, 20], [60, 60], [False, False])
    state.drafting[1] = True
    state.proposals.copy_(torch.arange(14).view(2, 7))
    first, second = steps.make_block(state, width).tolist()
    assert first == [100] * width
    assert second == [101, *range(7, 7 + width - 1)]


def test_accepting_with_sampling_takes_the_logits() -> None:
    """Of a greedy slot, too, which are then equal to the ids; the log-probabilities follow."""
    state = make_state([10, 20], [60, 60], [False, False])
    state.drafting.fill_(True)
    state.settings.put(1, SamplingParams(temperature=1.0, seed=5))
    logits = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(0))
    target = steps.sample_block(state, logits, sample)
    assert torch.equal(target[0], logits[0].argmax(-1))
    block = torch.cat((torch.tensor([[100], [101]]), target[:, :-1]), dim=1)
    block[1, 2] += 1  # two of the second slot's tokens are emitted
    wrong = torch.full_like(target, 3)
    report = steps.accept_and_commit(
        state, block, wrong, logits, torch.tensor([]).long(), sample, logprobs
    )
    probabilities = logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]
    for slot, n_accepted in enumerate([3, 1]):
        row = report[slot].tolist()
        assert row[:7] == [*target[slot].tolist(), n_accepted + 1, n_accepted, 0]
        got = [struct.unpack("f", struct.pack("i", value))[0] for value in row[7:]]
        assert got == pytest.approx(probabilities[slot].tolist(), abs=1e-6)


def test_the_report_counts_the_proposals_that_were_emitted() -> None:
    """Not those that were right past the limit, or past an end."""
    state = make_state([10, 20], [13, 60], [False, False])
    state.drafting.fill_(True)
    block = torch.tensor([[100, 1, 2, 3], [101, 1, 9, 3]])
    greedy, logits = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4]]), torch.zeros(2, 4, 30)
    report = steps.accept_and_commit(
        state, block, greedy, logits, torch.tensor([9]), None, logprobs
    )
    assert report[:, 4:].tolist() == [[2, 2, 1], [2, 2, 1]]


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_a_slot(sampling: bool, what: float) -> None:
    """The first slot at the bonus token, the second within what was proposed, the third nowhere.

    A lone NaN counts, however likely the others are; what is -inf does not.
    """
    state = make_state([10, 20, 30], [60] * 3, [False] * 3)
    state.drafting.fill_(True)
    for slot in range(3):
        state.settings.put(slot, SamplingParams(1e-3 * sampling, seed=5))
    logits = torch.zeros(3, 4, 30)
    target = torch.tensor([[1, 2, 3, 4]] * 3)
    logits.scatter_(2, target[..., None], 9.0)
    logits[0, 2, 29] = logits[1, 1, 29] = what
    logits[2, :, 29] = -torch.inf
    block = torch.tensor([[100, 1, 2, 9], [101, 1, 2, 3], [102, 1, 9, 9]])
    greedy, no_end = logits.argmax(-1), torch.tensor([28])
    kernel = sample if sampling else None
    report = steps.accept_and_commit(state, block, greedy, logits, no_end, kernel, logprobs)
    assert report[0, :3].tolist() == [1, 2, -1] and report[1, :2].tolist() == [1, -1]
    assert report[2, :2].tolist() == [1, 2]
    assert report[:, 4:7].tolist() == [[3, 2, 1], [2, 1, 1], [2, 1, 0]]
    assert state.anchor.tolist() == [0, 0, 2]  # which the model embeds, of a done slot too
    assert state.length.tolist() == [13, 22, 32]
    assert state.tokens[0, 11:14].tolist() == [1, 2, 0]


@pytest.mark.parametrize("sampling", [False, True])
def test_a_first_token_of_logits_that_are_not_finite(sampling: bool) -> None:
    state = make_state([0], [1], [True])
    state.settings.put(0, SamplingParams(0.5 * sampling, seed=5))
    kernel, no_end = sample if sampling else None, torch.tensor([9])
    for what, overflows in ((torch.nan, True), (torch.inf, True), (-torch.inf, False)):
        logits = torch.zeros(30)
        logits[17] = what
        first = steps.first_token(state, 0, logits, 2, kernel)
        assert (int(first) == -1) == overflows
        steps.open_slot(state, 0, torch.tensor([5, 6]), 0, 60, False)
        steps.start_sequence(state, 0, 2, first, no_end)
        assert bool(state.done[0]) == overflows
        assert int(state.anchor[0]) == int(state.tokens[0, 2]) == max(int(first), 0)
    assert int(steps.first_token(state, 0, torch.full((30,), -torch.inf), 2, kernel)) == -1


@given(st.data())
def test_prefill_chunks_cover_the_tokens_once_and_stay_within_the_cache(
    data: st.DataObject,
) -> None:
    end = data.draw(st.integers(1, 9000))
    begin = data.draw(st.integers(0, end - 1))
    capacity = steps.cache_rows(data.draw(st.integers(end, end + 300)), 2)
    n_widths = data.draw(st.integers(0, len(steps.PREFILL_WIDTHS)))
    widths = [width for width in steps.PREFILL_WIDTHS[:n_widths] if width <= capacity]
    chunks = list(steps.prefill_chunks(begin, end, widths, capacity))
    assert [i for first, after, _ in chunks for i in range(first, after)] == [*range(begin, end)]
    for first, after, width in chunks:
        assert after - first <= width <= steps.PREFILL_CHUNK
        assert first + width <= capacity
        assert width in widths if widths else width == after - first
    for first, after, width in chunks[:-1]:
        assert width == after - first  # only the last is padded


@pytest.mark.parametrize(
    "begin, end, capacity, expected",
    [
        (0, 1, 128, [64]),
        (0, 64, 128, [64]),
        (0, 65, 256, [256]),
        (0, 257, 512, [256, 64]),  # not 512: that takes as long as more
        (0, 400, 512, [512]),
        (0, 400, 500, [256, 64, 64, 64]),  # nothing longer would fit
        (300, 301, 448, [64]),
        (0, 5000, 8192, [2048, 2048, 1024]),
    ],
)
def test_a_captured_width_is_padded_where_that_is_cheaper_than_another_pass(
    begin: int, end: int, capacity: int, expected: list[int]
) -> None:
    chunks = steps.prefill_chunks(begin, end, steps.PREFILL_WIDTHS, capacity)
    assert [width for *_, width in chunks] == expected


@pytest.mark.parametrize("capacity", [100, 110])
def test_tokens_at_the_caches_very_end_make_a_pass_of_their_own_width(capacity: int) -> None:
    chunks = steps.prefill_chunks(64, 90, (64, 128), capacity)
    assert list(chunks) == [(64, 90, 26)]


@given(st.integers(2, 5000), st.integers(1, 128))
def test_a_block_at_the_very_end_fits_the_cache(max_seq_len: int, block_size: int) -> None:
    last_length = max_seq_len - 1  # the anchor is the last token that fits
    assert last_length + block_size < steps.cache_rows(max_seq_len, block_size)


def test_a_sequence_ends_at_once_by_budget_or_end_token() -> None:
    state = make_state([0, 0, 0], [1, 1, 1], [True, True, True])
    prompt, eos = torch.tensor([5, 6]), torch.tensor([9])
    for slot, (first, limit) in enumerate([(7, 3), (9, 10), (7, 4)]):
        steps.open_slot(state, slot, prompt, 0, limit, slot == 1)
        steps.start_sequence(state, slot, 2, torch.tensor(first), eos)
    assert state.done.tolist() == [True, True, False]
    assert state.drafting.tolist() == [False, True, False]
    assert state.tokens[2, :3].tolist() == [5, 6, 7]
    assert (state.length.tolist(), state.anchor.tolist()) == ([2, 2, 2], [7, 9, 7])


def test_a_slot_that_is_opened_stays_done_until_it_is_started() -> None:
    """Cycles meanwhile move nothing of it, though it has rows already."""
    state = make_state([30], [1], [False])
    prompt, eos = torch.tensor([5, 6, 7]), torch.tensor([9])
    steps.open_slot(state, 0, prompt, 2, 40, True)
    assert (state.length.tolist(), state.done.tolist()) == ([2], [True])
    assert steps.commit(state, torch.tensor([[3, 3]]), torch.tensor([1]), eos).tolist() == [0]
    assert state.tokens[0, :3].tolist() == [5, 6, 7] and state.length.tolist() == [2]
    steps.start_sequence(state, 0, 3, torch.tensor(8), eos)
    assert (state.length.tolist(), state.done.tolist()) == ([3], [False])
