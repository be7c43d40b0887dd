"""Who gets which slot, and what runs next. Host code alone: lists of ids, no tensors.

A slot remembers the ids of its committed cache rows after its request has ended, and a request
whose prompt begins alike starts from there. Three facts keep these rows whole: a pass writes to a
slot from the device's ``length`` on; that is never less than the rows known here, because it moves
with every pass over a prompt that is launched; and rows are forgotten here before others are
written in their place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

from orthrus_fast.engine.request import Request
from orthrus_fast.engine.width import Acceptance
from orthrus_fast.matching import Block

WORTH_A_COPY = 32  # rows: with fewer, a copy takes about as long as computing them


@dataclass(eq=False)
class Sequence:
    """A request in its slot."""

    request: Request
    slot: int
    n_reused: int  # rows of the prompt that were there at its start
    n_prefilled: int  # rows of the prompt that are there, or launched
    acceptance: Acceptance | None  # of its drafts; None: mode ar
    tokens: list[int] = field(default_factory=list)  # new ones, as far as they have been read
    n_unread: int = 0  # launches that give it a token at least, and have not been read
    is_drafted: bool = False  # proposals for its next block are under way; only under a grammar
    block: Block | None = None  # its next one, or the one under way; only under a grammar

    @property
    def is_prefilling(self) -> bool:
        return self.n_prefilled < len(self.request.prompt)

    @property
    def is_masked(self) -> bool:
        """Whether it has a grammar."""
        return self.request.matcher is not None

    @property
    def has_masks(self) -> bool:
        """Whether its next block is ready, masks and all."""
        return self.block is not None and self.n_unread == 0

    def may_go_on(self, ahead: bool) -> bool:
        """Whether there is room for a token after those of the launches under way.

        Under a grammar a block's masks have to be made of what was read; ``ahead``: its pass may
        come before them.
        """
        waits = self.is_masked and (self.is_drafted or (self.n_unread > 0 and not ahead))
        return not waits and len(self.tokens) + self.n_unread < self.request.max_new_tokens


@dataclass
class Slot:
    """What the host knows of one slot."""

    index: int
    rows: list[int] = field(default_factory=list)  # ids of its committed cache rows
    key: str = ""  # of the request that they come from
    used: int = 0  # when its rows were used last, by the scheduler's clock
    sequence: Sequence | None = None


@dataclass(frozen=True)
class Admission:
    """Where a waiting request is to go: ``slot`` keeps ``n_kept`` rows of its own.

    Up to ``n_reused`` the rows come from the slot ``source``, if that is more.
    """

    request: Request
    slot: int
    source: int
    n_kept: int
    n_reused: int


@dataclass(frozen=True)
class Work:
    """The next launch: a pass over a part of ``prompt``, or a cycle of ``cycle``."""

    prompt: Sequence | None = None
    cycle: tuple[Sequence, ...] = ()
    ahead: bool = False  # nobody else would wait for the masks of the cycle


class Scheduler:
    """Requests in the order in which they came, one prompt at a time, between cycles."""

    def __init__(self, n_slots: int, reuse: bool = True) -> None:
        self.slots = [Slot(index) for index in range(n_slots)]
        self.waiting: deque[Request] = deque()
        self.reuse = reuse
        self.takes_turns = True  # False: all prompts first, then cycles
        self._clock = 0
        self._cycle_is_next = False

    @property
    def sequences(self) -> list[Sequence]:
        """Those that have a slot, by slot."""
        return [slot.sequence for slot in self.slots if slot.sequence is not None]

    def plan(self) -> Admission | None:
        """The first waiting request and its slot; None where none waits or no slot is free.

        One prompt is prefilled at a time. The request goes to the free slot with the longest common
        beginning, if that is at least half of what the slot remembers: little is lost. Else it goes
        to the free slot that was used least recently, with rows copied from any slot, busy or not.
        """
        free = [slot for slot in self.slots if slot.sequence is None]
        prefilling = any(sequence.is_prefilling for sequence in self.sequences)
        if not self.waiting or not free or prefilling:
            return None
        request = self.waiting[0]
        if not self.reuse:
            return Admission(request, free[0].index, free[0].index, 0, 0)
        shared = [self._n_shared(request, slot) for slot in self.slots]
        longest = max(free, key=lambda slot: (shared[slot.index], -len(slot.rows)))
        oldest = min(free, key=lambda slot: slot.used)
        target = longest if 2 * shared[longest.index] >= len(longest.rows) > 0 else oldest
        source = max(self.slots, key=lambda slot: shared[slot.index])
        n_kept = shared[target.index]
        if shared[source.index] < n_kept + WORTH_A_COPY:
            source = target
        return Admission(request, target.index, source.index, n_kept, shared[source.index])

    def _n_shared(self, request: Request, slot: Slot) -> int:
        """Rows of the slot that the request may use: all of its prompt's but the last at most."""
        if request.reuse_key != slot.key:
            return 0
        return n_common(request.prompt, slot.rows, len(request.prompt) - 1)

    def forget(self, slot: int, n_kept: int) -> None:
        """Rows from ``n_kept`` on are about to be written over."""
        del self.slots[slot].rows[n_kept:]

    def admit(self, admission: Admission, acceptance: Acceptance | None) -> Sequence:
        """The request has its slot now, with the rows that it reuses."""
        request, slot = self.waiting.popleft(), self.slots[admission.slot]
        assert request is admission.request and slot.sequence is None
        n_rows = admission.n_reused
        slot.rows, slot.key = request.prompt[:n_rows], request.reuse_key
        slot.sequence = Sequence(request, slot.index, n_rows, n_rows, acceptance)
        self._use(slot, self.slots[admission.source])
        return slot.sequence

    def _use(self, *slots: Slot) -> None:
        self._clock += 1
        for slot in slots:
            slot.used = self._clock

    def next(self, looks_ahead: bool = False) -> Work:
        """The next launch; passes over prompts and cycles take turns. Empty: there is none.

        ``looks_ahead``: a pass may come before its masks, where all others would wait for theirs.
        """
        decoding = [s for s in self.sequences if not s.is_prefilling]
        ahead = looks_ahead and all(s.is_masked and not s.has_masks for s in decoding)
        cycle = tuple(s for s in decoding if s.may_go_on(ahead))
        prompt = next((s for s in self.sequences if s.is_prefilling), None)
        if prompt is None or (cycle and self._cycle_is_next and self.takes_turns):
            return Work(cycle=cycle, ahead=ahead)
        return Work(prompt=prompt)

    def prefilled(self, sequence: Sequence, end: int) -> None:
        """A pass up to the prompt's token ``end`` - 1 was launched; the last one gives a token."""
        slot = self.slots[sequence.slot]
        slot.rows += sequence.request.prompt[sequence.n_prefilled : end]
        sequence.n_prefilled = end
        sequence.n_unread += not sequence.is_prefilling
        self._cycle_is_next = True

    def cycled(self, sequences: tuple[Sequence, ...]) -> None:
        """A cycle of these was launched."""
        for sequence in sequences:
            sequence.n_unread += 1
        self._cycle_is_next = False

    def owns(self, sequence: Sequence) -> bool:
        """Whether the sequence has its slot still."""
        return self.slots[sequence.slot].sequence is sequence

    def extend(self, sequence: Sequence, tokens: list[int]) -> None:
        """A launch gave these tokens, one at least; the newest of a sequence has no row yet."""
        self.slots[sequence.slot].rows += [*sequence.tokens[-1:], *tokens[:-1]]
        sequence.tokens += tokens

    def end(self, sequence: Sequence) -> None:
        """Free the slot, which keeps its rows."""
        slot = self.slots[sequence.slot]
        slot.sequence = None
        self._use(slot)

    def cancel(self, request_id: int) -> Sequence | None:
        """End a request early; its sequence, if it had a slot. Unknown ones are no error."""
        for sequence in self.sequences:
            if sequence.request.id == request_id:
                self.end(sequence)
                return sequence
        self.waiting = deque(one for one in self.waiting if one.id != request_id)
        return None

    def rewind(self, sequence: Sequence) -> None:
        """Forget the launches that have not been read, which are lost."""
        sequence.n_unread, prompt = 0, sequence.request.prompt
        sequence.is_drafted, sequence.block = False, None
        if not sequence.tokens:  # the first one comes with the prompt's last pass
            sequence.n_prefilled = min(sequence.n_prefilled, len(prompt) - 1)
        text = prompt[: sequence.n_prefilled] + sequence.tokens[:-1]
        self.slots[sequence.slot].rows = text


def n_common(a: list[int], b: list[int], most: int) -> int:
    """The length of the common beginning, ``most`` at most."""
    most = min(most, len(a), len(b))
    if a[:most] == b[:most]:
        return most
    return bisect_left(range(1, most), True, key=lambda n: a[:n] != b[:n])
