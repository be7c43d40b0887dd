"""The scheduler alone, against a plain model of a device: who owns what, and who writes where."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orthrus_fast import SamplingParams
from orthrus_fast.engine.request import Request
from orthrus_fast.engine.scheduler import WORTH_A_COPY, Scheduler, Sequence, Work, n_common

GREEDY = SamplingParams()


def request(number: int, prompt: list[int], budget: int = 8, key: str = "") -> Request:
    return Request(number, prompt, budget, GREEDY, True, key)


class Device:
    """A cache of ids, whose passes write as the true one's do: from ``length`` on, in every slot.

    Row i of a slot is the text up to there, so that a wrong row shows whatever led to it.
    """

    SCRATCH = 3  # rows that a cycle writes past each slot's length

    def __init__(self, scheduler: Scheduler, n_slots: int) -> None:
        self.scheduler = scheduler
        self.rows: list[list[Any]] = [[None] * 400 for _ in range(n_slots)]
        self.length = [0] * n_slots
        self.text: list[list[int]] = [[] for _ in range(n_slots)]
        self.done = [True] * n_slots
        self.unread: list[tuple[tuple[Sequence, ...], dict[int, list[int]]]] = []
        self.n_launched_since: dict[int, int] = {}

    def admit(self) -> None:
        """As the engine's ``_admit``."""
        plan = self.scheduler.plan()
        if plan is None:
            return
        owned = self.scheduler.slots[plan.slot].sequence
        assert owned is None, "a slot is owned twice"
        self.scheduler.forget(plan.slot, plan.n_kept)
        kept, reused = plan.n_kept, plan.n_reused
        self.rows[plan.slot][kept:reused] = self.rows[plan.source][kept:reused]
        self.text[plan.slot] = list(plan.request.prompt)
        self.length[plan.slot], self.done[plan.slot] = reused, True
        self.scheduler.admit(plan, None)

    def launch(self, work: Work, chunk: int) -> None:
        if work.prompt is not None:
            self.prefill(work.prompt, chunk)
        elif work.cycle:
            self.cycle(work.cycle)

    def write(self, slot: int, begin: int, end: int) -> None:
        for i in range(begin, end):
            self.rows[slot][i] = tuple(self.text[slot][: i + 1])

    def prefill(self, sequence: Sequence, chunk: int) -> None:
        begin, slot = sequence.n_prefilled, sequence.slot
        assert self.length[slot] == begin and self.done[slot]
        end = min(begin + chunk, len(sequence.request.prompt))
        self.write(slot, begin, end)
        self.length[slot] = end
        self.scheduler.prefilled(sequence, end)
        emitted: dict[int, list[int]] = {}
        if end == len(sequence.request.prompt):
            emitted[slot] = [end]
            self.text[slot].append(end)
            self.done[slot] = sequence.request.max_new_tokens == 1
        self.unread.append(((sequence,) if emitted else (), emitted))

    def cycle(self, sequences: tuple[Sequence, ...]) -> None:
        emitted: dict[int, list[int]] = {}
        for slot, length in enumerate(self.length):
            for i in range(length, length + self.SCRATCH):
                self.rows[slot][i] = "scratch"
            if self.done[slot]:
                continue
            owner = self.scheduler.slots[slot].sequence
            limit = 400 if owner is None else owner.request.max_length
            new = list(range(length, min(length + 1 + length % 2, limit - 1)))
            new = [token + 1 for token in new]
            self.text[slot] += new
            self.write(slot, length, length + len(new))
            self.length[slot] += len(new)
            self.done[slot] = self.length[slot] + 1 >= limit
            emitted[slot] = new
        self.scheduler.cycled(sequences)
        self.unread.append((sequences, emitted))

    def read(self) -> list[Sequence]:
        """The sequences that end with what the oldest launch reports."""
        owners, emitted = self.unread.pop(0)
        ended = []
        for sequence in owners:
            if not self.scheduler.owns(sequence):
                continue
            sequence.n_unread -= 1
            self.scheduler.extend(sequence, emitted[sequence.slot])
            if len(sequence.tokens) == sequence.request.max_new_tokens:
                self.scheduler.end(sequence)
                ended.append(sequence)
        return ended

    def cancel(self, number: int) -> None:
        sequence = self.scheduler.cancel(number)
        if sequence is not None:
            self.done[sequence.slot] = True

    def check(self) -> None:
        """Rows that the scheduler knows are those of their text, and all of them are committed."""
        owners = [slot.sequence for slot in self.scheduler.slots if slot.sequence is not None]
        assert len({sequence.request.id for sequence in owners}) == len(owners)
        for slot in self.scheduler.slots:
            assert len(slot.rows) <= self.length[slot.index]
            for i in range(len(slot.rows)):
                assert self.rows[slot.index][i] == tuple(slot.rows[: i + 1]), "a kept row is lost"


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), st.integers(1, 4), st.integers(0, 2), st.booleans())
def test_any_order_of_events(data: st.DataObject, n_slots: int, ahead: int, reuse: bool) -> None:
    """No slot has two owners, kept rows are never written over, and everybody gets a turn."""
    scheduler = Scheduler(n_slots, reuse)
    device = Device(scheduler, n_slots)
    n, order, cancelled = 0, list[int](), set[int]()
    began = list[int]()
    for _ in range(data.draw(st.integers(1, 60))):
        if data.draw(st.integers(0, 3)) == 0:
            prompt = list(range(data.draw(st.sampled_from([1, 5, 40, 90]))))
            prompt += data.draw(st.sampled_from([[], [7], [200, 201]]))
            key = data.draw(st.sampled_from(["", "", "x"]))
            scheduler.waiting.append(request(n, prompt, data.draw(st.integers(1, 6)), key))
            order.append(n)
            n += 1
        if n and data.draw(st.integers(0, 9)) == 0:
            number = data.draw(st.integers(0, n - 1))
            device.cancel(number)
            cancelled.add(number)
        began += step(device, ahead, data.draw(st.sampled_from([1, 4, 64])))
    for _ in range(10_000):
        if not scheduler.waiting and not scheduler.sequences:
            break
        began += step(device, ahead, 16)
    assert not scheduler.waiting and not scheduler.sequences, "somebody starves"
    assert [i for i in began if i not in cancelled] == [i for i in order if i not in cancelled]


def step(device: Device, ahead: int, chunk: int) -> Iterator[int]:
    """One step of the engine; the requests that got a slot in it."""
    scheduler = device.scheduler
    before = {s.request.id for s in scheduler.sequences}
    device.admit()
    admitted = [s.request.id for s in scheduler.sequences if s.request.id not in before]
    work = scheduler.next()
    device.launch(work, chunk)
    device.check()
    launched = work.prompt is not None or bool(work.cycle)
    if len(device.unread) > (ahead if launched else 0):
        device.read()
        device.check()
    return iter(admitted)


def test_it_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import orthrus_fast.engine.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)


def finish(scheduler: Scheduler) -> None:
    """Run everything to its end."""
    device = Device(scheduler, len(scheduler.slots))
    device.length = [len(slot.rows) for slot in scheduler.slots]
    for slot in scheduler.slots:
        device.text[slot.index] = list(slot.rows)
        device.write(slot.index, 0, len(slot.rows))
    while scheduler.waiting or scheduler.sequences:
        list(step(device, 0, 64))


def test_chunks_and_cycles_take_turns() -> None:
    scheduler = Scheduler(3)
    device = Device(scheduler, 3)
    scheduler.waiting.append(request(0, [1] * 10, 50))
    list(step(device, 0, 64))
    scheduler.waiting.extend([request(1, [2] * 40), request(2, [3] * 40)])
    kinds = ""
    for _ in range(12):
        device.admit()
        work = scheduler.next()
        kinds += "c" if work.prompt is None else str(work.prompt.request.id)
        device.launch(work, 10)
        device.read()
    assert kinds == "c1c1c1c1c2c2"
    scheduler.takes_turns = False
    work = scheduler.next()
    assert work.prompt is not None and work.prompt.request.id == 2


def test_a_sequence_joins_no_cycle_after_its_last_token_is_on_its_way() -> None:
    scheduler = Scheduler(1)
    device = Device(scheduler, 1)
    scheduler.waiting.append(request(0, [1], 2))
    device.admit()
    device.launch(scheduler.next(), 64)
    (sequence,) = scheduler.next().cycle  # the first token is not read yet
    device.launch(Work(cycle=(sequence,)), 64)
    assert scheduler.next() == Work()
    assert device.read() == [] and device.read() == [sequence]


def remembering(*texts: list[int]) -> Scheduler:
    """A scheduler whose slots remember these rows, the first one least recently used."""
    scheduler = Scheduler(len(texts))
    for slot, rows in zip(scheduler.slots, texts, strict=True):
        slot.rows = rows
        scheduler._use(slot)
    return scheduler


LONG = list(range(100))


@pytest.mark.parametrize(
    ("texts", "prompt", "slot", "source", "n_kept", "n_reused"),
    [
        ([[5] * 9, [*LONG]], [*LONG, 7], 1, 1, 100, 100),  # the next turn, in place
        ([[5] * 9, [*LONG]], LONG, 1, 1, 99, 99),  # all but the last one
        ([[5] * 9, [*LONG, *LONG]], [*LONG, 7], 1, 1, 100, 100),  # half of what it knows
        ([[5] * 9, [*LONG, *LONG, 1]], [*LONG, 7], 0, 1, 0, 100),  # less: a copy
        ([[5] * 9, LONG[:90]], [*LONG[:20], 200], 0, 0, 0, 0),  # too little for a copy
        ([[*LONG], [8] * 9], [9], 0, 0, 0, 0),  # nothing alike: the least recently used
        ([[*LONG[:50], *[7] * 90], [*LONG]], [*LONG[:50], 3], 1, 1, 50, 50),
        ([[], []], [3], 0, 0, 0, 0),
    ],
)
def test_where_a_request_goes(
    texts: list[list[int]], prompt: list[int], slot: int, source: int, n_kept: int, n_reused: int
) -> None:
    scheduler = remembering(*map(list, texts))
    scheduler.waiting.append(request(0, prompt))
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.slot, plan.source, plan.n_kept, plan.n_reused) == (slot, source, n_kept, n_reused)
    scheduler.admit(plan, None) if plan.source == plan.slot else None


def test_a_busy_slot_lends_its_rows() -> None:
    scheduler = Scheduler(2)
    device = Device(scheduler, 2)
    scheduler.waiting.extend([request(0, [*LONG, 1], 30), request(1, [*LONG, 2], 3)])
    list(step(device, 0, 64))
    list(step(device, 0, 64))
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.slot, plan.source, plan.n_reused) == (1, 0, 100)
    finish_with = [list(step(device, 0, 64)) for _ in range(60)]
    assert finish_with and not scheduler.sequences


def test_rows_are_not_shared_between_keys() -> None:
    scheduler = remembering([*LONG], [])
    scheduler.waiting.append(request(0, [*LONG, 1], key="somebody else"))
    plan = scheduler.plan()
    assert plan is not None and (plan.slot, plan.n_kept, plan.n_reused) == (0, 0, 0)


def test_without_reuse_the_first_free_slot_starts_anew() -> None:
    scheduler = remembering([*LONG], [*LONG])
    scheduler.reuse = False
    for slot in (0, 1):
        scheduler.waiting.append(request(slot, [*LONG, 1]))
        plan = scheduler.plan()
        assert plan is not None and (plan.slot, plan.n_kept, plan.n_reused) == (slot, 0, 0)
        scheduler.forget(slot, 0)
        scheduler.prefilled(scheduler.admit(plan, None), 101)


def test_the_least_recently_used_slot_is_given_away() -> None:
    scheduler = Scheduler(2)
    for first in ([1] * 50, [2] * 50, [1] * 50 + [9], [3] * 50):
        scheduler.waiting.append(request(first[0], first, 1))
        finish(scheduler)
    assert sorted(slot.rows[0] for slot in scheduler.slots) == [1, 3]


def test_lost_launches_are_forgotten() -> None:
    scheduler = Scheduler(1)
    device = Device(scheduler, 1)
    scheduler.waiting.append(request(0, LONG, 9))
    device.admit()
    for n_rows, chunk in ((64, 64), (99, 64)):
        device.launch(scheduler.next(), chunk)
        (sequence,) = scheduler.sequences
        scheduler.rewind(sequence)
        assert len(scheduler.slots[0].rows) == sequence.n_prefilled == n_rows
        device.length[0], device.done[0] = n_rows, True
    device.launch(scheduler.next(), 64)
    device.unread = device.unread[-1:]
    device.read()
    device.launch(scheduler.next(), 64)
    scheduler.rewind(sequence)
    assert sequence.n_unread == 0 and scheduler.slots[0].rows == LONG
    assert sequence.tokens == [100] and not sequence.is_prefilling


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(0, 20))
def test_the_common_beginning(a: list[int], b: list[int], most: int) -> None:
    pairs = zip(a[:most], b[:most], strict=False)
    expected = next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b), most))
    assert n_common(a, b, most) == expected
    assert WORTH_A_COPY > 1
