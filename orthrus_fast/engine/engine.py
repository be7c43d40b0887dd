"""The engine's step: one launch for all requests that it concerns, one report read.

A launch is remembered with the sequences that it serves, so that a slot whose request has ended is
given to the next one while launches with the old one are still on their way: what these report of
it is dropped. All that happens on the device happens in the order in which it was launched.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from orthrus_fast import steps
from orthrus_fast.engine.request import Inputs, Limits, Peers, Request, Update
from orthrus_fast.engine.scheduler import Admission, Scheduler, Sequence
from orthrus_fast.engine.width import Times, WidthPolicy
from orthrus_fast.errors import OrthrusError, PromptError, QueueFullError, RequestError, one_line
from orthrus_fast.matching import Block, Matcher
from orthrus_fast.runners import EagerRunner, SlotOutput
from orthrus_fast.sampling import NO_TOKEN

_log = logging.getLogger("orthrus_fast")


@dataclass(frozen=True)
class _Launch:
    """Work on its way: the sequences that get tokens from it, by the slot that each had."""

    owners: tuple[Sequence, ...]
    width: int  # of a cycle's blocks, or of a pass over a prompt
    is_cycle: bool
    drafts: bool  # without a cycle: proposals, which the owners wait for to make their masks
    began: float
    logits: Tensor | None = None
    is_usual: bool = True  # takes as long as others of its kind and width


class Engine:
    """Serves requests with one runner: ``submit`` and ``cancel`` from any thread, at any time.

    ``step`` does a piece of work, in whichever thread calls it; others wait for as long as that
    takes. ``policy`` chooses the cycles' widths; ``ar_width`` is that of cycles without drafts.
    Without ``one_row`` a row's bits may depend on more than its tokens: then a prompt is cut by its
    length alone, and no rows are reused. ``peers`` are the engines of a model's other ranks.
    """

    def __init__(
        self,
        runner: EagerRunner,
        limits: Limits,
        policy: WidthPolicy,
        ar_width: int = 1,
        one_row: bool = True,
        prefix_reuse: bool = True,
        peers: Peers | None = None,
    ) -> None:
        self.runner = runner
        self.peers = peers
        self.limits = limits
        self.policy = policy
        self.scheduler = Scheduler(runner.cache.n_slots, prefix_reuse and one_row)
        self.ar_width, self._one_row = ar_width, one_row
        widths = runner.prefill_widths or steps.PREFILL_WIDTHS
        seconds = runner.chunk_seconds or {width: float(width) for width in widths}
        self._chunk_times = Times(seconds, seen=bool(runner.chunk_seconds))
        self._submitted: deque[Request] = deque()
        self._cancelled: deque[int] = deque()
        self._in_flight: deque[_Launch] = deque()
        self._updates: list[Update] = []
        self._times: list[tuple[bool, int, float]] = []  # of launches read since the last step
        self._digest = 0  # of all that was read, where there are peers
        self._cycle_seconds = 0.0  # of the newest one
        self._last_read = 0.0
        self._ahead: _Launch | None = None  # a verify pass whose rows wait for their masks
        self._at_work: tuple[Sequence, ...] = ()  # whom an error concerns
        self._unsettled = False  # a step was left half-way
        self._lock = threading.Lock()  # of one step

    def submit(self, request: Request) -> None:
        """Queue a request. Raises PromptError for one that can never run, and QueueFullError."""
        self._check(request)
        if self.is_full:
            raise QueueFullError(
                f"queue: {self.limits.waiting} requests wait already; try again later"
            )
        self._submitted.append(request)

    @property
    def is_full(self) -> bool:
        """Whether as many requests wait as may."""
        return len(self._submitted) + len(self.scheduler.waiting) >= self.limits.waiting

    def cancel(self, request_id: int) -> None:
        """End a request, which gets no more updates; one that has ended or never was is none."""
        self._cancelled.append(request_id)  # takes no lock: garbage collection may call this

    @property
    def failure(self) -> str | None:
        """Why no request can be served any more; None: they are."""
        return None if self.peers is None else self.peers.failure

    @property
    def has_work(self) -> bool:
        """Whether any request has not ended, or any launch has not been read."""
        waiting = self._submitted or self.scheduler.waiting
        return bool(waiting or self.scheduler.sequences or self._in_flight)

    def step(self) -> list[Update]:
        """Launch what comes next, then read the oldest launch, if the device has enough to do.

        What has been read is returned. An error of the device ends the requests that it concerns,
        each with an update that says so. A step that is interrupted loses nothing: the next one
        goes on from what was read.
        """
        with self._lock:
            try:
                with contextlib.nullcontext() if self.peers is None else self.peers.step():
                    self._step()
            except Exception as error:
                self._fail(error)
            updates, self._updates = self._updates, []
            return updates

    def _step(self) -> None:
        if self._unsettled:
            self._recover()
        self._unsettled, self._at_work = True, ()
        self._take_in()
        launched = self._launch()
        n_ahead = self.runner.lookahead if launched else 0
        while len(self._in_flight) > n_ahead:
            self._read()
        self._unsettled = False

    def _check(self, request: Request) -> None:
        vocab_size = self.runner.model.config.vocab_size
        self.limits.check_length(len(request.prompt), request.max_new_tokens)
        for token in request.prompt:
            if isinstance(token, bool) or not 0 <= token < vocab_size:
                raise PromptError(f"prompt: {token!r} is no id below {vocab_size}")

    def _take_in(self) -> None:
        """What callers have asked for, and how long launches took, since the last step."""
        asked = Inputs(list(self._submitted), list(self._cancelled), self._times, self._digest)
        inputs = asked if self.peers is None else self.peers.agree(asked)
        self._times = []
        for _ in asked.requests:
            self._submitted.popleft()
        self.scheduler.waiting.extend(inputs.requests)
        for _ in asked.cancelled:
            self._cancelled.popleft()
        for request_id in inputs.cancelled:
            sequence = self.scheduler.cancel(request_id)
            if sequence is not None:
                self.runner.close(sequence.slot)
        for is_cycle, width, seconds in inputs.times:
            if is_cycle:
                self._cycle_seconds = seconds
            (self.policy.times if is_cycle else self._chunk_times).saw(width, seconds)

    def _launch(self) -> bool:
        """Launch the next piece of work, if there is any."""
        if (admission := self.scheduler.plan()) is not None:
            self._admit(admission)
        work = self.scheduler.next(looks_ahead=self.runner.lookahead > 0)
        if work.prompt is not None:
            self._prefill(work.prompt)
        elif work.cycle and self._ahead is not None:
            self._judge(self._ahead)
        elif work.cycle:
            self._cycle(work.cycle, work.ahead)
        return work.prompt is not None or bool(work.cycle)

    def _admit(self, admission: Admission) -> None:
        """Give a request its slot, with the rows that it reuses."""
        request, slot, n = admission.request, admission.slot, admission.n_reused
        self.scheduler.forget(slot, admission.n_kept)
        if admission.source != slot:
            self.runner.copy_rows(admission.source, slot, admission.n_kept, n)
        self._open(request, slot, request.prompt, n)
        acceptance = self.policy.start() if request.drafting else None
        self.scheduler.admit(admission, acceptance)

    def _open(self, request: Request, slot: int, text: list[int], n_cached: int) -> None:
        how = (request.max_length, request.sampling, request.drafting)
        self.runner.open(slot, text, n_cached, *how)

    def _prefill(self, sequence: Sequence) -> None:
        """Launch the next pass over a prompt, with its first token where it is the last pass."""
        self._at_work = (sequence,)
        request, begin, began = sequence.request, sequence.n_prefilled, time.perf_counter()
        widths, capacity = self.runner.prefill_widths, self.runner.cache.capacity
        most = min(begin + self._longest_chunk(), len(request.prompt))
        begin, end, width = next(steps.prefill_chunks(begin, most, widths, capacity))
        where, logits = (sequence.slot, begin, end, width), None
        is_last = end == len(request.prompt)
        if is_last:
            mask = None if request.matcher is None else request.matcher.mask()
            logits = self.runner.start(*where, request.sampling, mask)
            logits = logits.clone() if request.keep_logits else None
        else:
            self.runner.prefill(*where)
        self.scheduler.prefilled(sequence, end)
        owners = (sequence,) if is_last else ()
        self._in_flight.append(_Launch(owners, width, False, False, began, logits))

    def _longest_chunk(self) -> int:
        """Rows of the next pass over a prompt, at most: fewer where others wait for tokens."""
        decoding = [s for s in self.scheduler.sequences if not s.is_prefilling]
        if not (decoding and self.scheduler.takes_turns and self._one_row):
            return steps.PREFILL_CHUNK
        return self._chunk_times.widest_within(self.limits.max_gap - self._cycle_seconds)

    def _cycle(self, sequences: tuple[Sequence, ...], ahead: bool) -> None:
        """Launch a cycle.

        A sequence under a grammar takes part in every second one: its proposals come from one,
        then the host makes masks of them while that one verifies the others' blocks. Where there
        are no others, ``ahead``, that one verifies its own proposals, and ``_judge`` follows.
        """
        self._at_work = sequences
        choosing = [s for s in sequences if not s.has_masks]
        drafting = [s.acceptance for s in choosing if s.acceptance is not None]
        width = self.policy.choose(drafting, len(choosing) - len(drafting))
        drafts = width > 1
        asking = tuple(
            s for s in choosing if s.is_masked and (ahead or (drafts and s.acceptance is not None))
        )
        ready = tuple(s for s in sequences if s not in asking)
        for sequence in ready:
            if sequence.is_masked and not sequence.has_masks:
                self._mask(sequence, [], 1)
        ready = tuple(s for s in ready if self.scheduler.owns(s))
        blocks = {s.slot: s.block for s in ready if s.block is not None}
        widths = [width if drafts else self.ar_width, *(block.width for block in blocks.values())]
        self._launch_cycle(asking, ready, blocks, drafts, max(widths), ahead)

    def _launch_cycle(
        self,
        asking: tuple[Sequence, ...],
        ready: tuple[Sequence, ...],
        blocks: dict[int, Block],
        drafts: bool,
        width: int,
        ahead: bool,
    ) -> None:
        """Launch what gives ``asking`` their proposals, and a cycle of ``ready``."""
        sampling = _samples((*asking, *ready))
        self.runner.prepare(width, sampling)
        if blocks or ahead:
            self.runner.prepare(width, sampling, masked=True)
        began, is_usual = time.perf_counter(), not (asking or blocks)
        if asking:
            self.runner.propose(width, sampling, drafts, ahead)
            launch = _Launch(asking, width, False, True, began, is_usual=False)
            self._in_flight.append(launch)
            self._ahead = launch if ahead else None
            for sequence in asking:
                sequence.is_drafted = True
        if ready:
            self.runner.launch(drafts and not asking, width, sampling, blocks)
            self._in_flight.append(_Launch(ready, width, True, drafts, began, is_usual=is_usual))
        self.scheduler.cycled(ready)

    def _judge(self, ahead: _Launch) -> None:
        """Launch what ends the cycle of a pass that has verified proposals: masks, then accept.

        Where somebody else may go on before the proposals have come, that pass was in vain.
        """
        self._at_work, self._ahead = ahead.owners, None
        judged = tuple(s for s in ahead.owners if self.scheduler.owns(s) and s.has_masks)
        blocks = {s.slot: s.block for s in judged if s.block is not None}
        if blocks:
            began, sampling = time.perf_counter(), _samples(ahead.owners)
            self.runner.launch(False, ahead.width, sampling, blocks, is_ahead=True)
            launch = _Launch(judged, ahead.width, True, False, began, is_usual=False)
            self._in_flight.append(launch)
            self.scheduler.cycled(judged)

    def _mask(
        self, sequence: Sequence, proposals: list[int], width: int, forced: bool = True
    ) -> None:
        """Make a sequence's next block; end it where its grammar has taken too many steps."""
        assert sequence.request.matcher is not None
        sequence.is_drafted = False
        try:
            sequence.block = sequence.request.matcher.block(proposals, width, forced)
        except RequestError as error:
            self._end(sequence, str(error))

    def _end(self, sequence: Sequence, error: str) -> None:
        """End a sequence from the host's side."""
        self.scheduler.end(sequence)
        self.runner.close(sequence.slot)
        self._updates.append(Update(sequence.request.id, [], finish_reason="error", error=error))

    def _read(self) -> None:
        """Wait for the oldest launch, and tell its sequences what came of it."""
        launch = self._in_flight[0]
        self._at_work = launch.owners
        was_awaited = not self.runner.has_arrived
        outputs = self.runner.read()
        self._in_flight.popleft()
        if self.peers is not None:
            self.peers.check()
            self._digest = zlib.crc32(repr(outputs).encode(), self._digest)
        now = time.perf_counter()
        if was_awaited and launch.is_usual:  # the device had nothing else to do meanwhile
            seconds = now - max(launch.began, self._last_read)
            self._times.append((launch.is_cycle, launch.width, seconds))
        self._last_read = now
        for sequence in launch.owners:
            if self.scheduler.owns(sequence):
                output = outputs[sequence.slot if launch.is_cycle or launch.drafts else 0]
                if launch.drafts and not launch.is_cycle:
                    forced = launch is not self._ahead  # whose pass has its drafts already
                    self._mask(sequence, output.tokens, launch.width, forced)
                else:
                    self._tell(sequence, output, launch)

    def _tell(self, sequence: Sequence, output: SlotOutput, launch: _Launch) -> None:
        """Record what a launch gave to one of its sequences, and report it."""
        request, tokens = sequence.request, output.tokens
        overflow = tokens[-1:] == [NO_TOKEN]
        tokens = tokens[:-1] if overflow else tokens
        sequence.n_unread -= 1
        width = launch.width if sequence.block is None else sequence.block.width
        has_drafts = launch.drafts or sequence.block is not None
        if has_drafts and sequence.acceptance is not None and not output.done:
            self.policy.saw(sequence.acceptance, output.n_accepted or 0, width - 1)
        sequence.block = None
        reason = None
        if output.done:
            eos = self.runner.model.config.eos_token_ids
            reason = (
                "error" if overflow else "eos" if tokens[-1:] and tokens[-1] in eos else "length"
            )
        n_accepted = output.n_accepted and min(output.n_accepted, len(tokens))
        update = Update(
            request.id,
            tokens,
            n_accepted,
            output.logprobs[: len(tokens)] if request.sampling.logprobs else [],
            reason,
            n_reused=sequence.n_reused if n_accepted is None else 0,
            error=self._overflow() if overflow else None,
            logits=launch.logits,
        )
        if tokens:
            self.scheduler.extend(sequence, tokens)
        self._updates.append(update)
        if output.done:
            self.scheduler.end(sequence)
        elif request.matcher is not None:
            self._advance(sequence, request.matcher, tokens)

    def _advance(self, sequence: Sequence, matcher: Matcher, tokens: list[int]) -> None:
        try:
            matcher.consume(tokens)
        except RequestError as error:
            self._end(sequence, str(error))

    def _overflow(self) -> str:
        dtype = str(self.runner.model.embed_tokens.weight.dtype).removeprefix("torch.")
        half = dtype == "float16"  # which ends at 65504
        advice = "use bfloat16 or float32" if half else "the checkpoint may be damaged"
        return f"dtype: logits are not finite in {dtype}; {advice}"

    def _recover(self) -> None:
        """After a step that was left half-way: the device takes up what the host has read."""
        self._at_work = tuple(self.scheduler.sequences)
        self.runner.drain()
        self._in_flight.clear()
        self._ahead = None
        for slot in self.scheduler.slots:
            sequence = slot.sequence
            if sequence is None:
                self.runner.open(slot.index, slot.rows, len(slot.rows), len(slot.rows))
                continue
            self.scheduler.rewind(sequence)
            request, text = sequence.request, sequence.request.prompt + sequence.tokens
            self._open(request, slot.index, text, len(slot.rows))
            if request.matcher is not None:
                request.matcher.restart(sequence.tokens)
            if sequence.tokens:
                self.runner.resume(slot.index, text, sequence.is_masked)

    def _fail(self, error: Exception) -> None:
        """End the requests that an error of the device concerns; what their slots hold is lost.

        With peers that is all of them.
        """
        if self.peers is not None:
            error = self.peers.fail(error)
            self._at_work = tuple(self.scheduler.sequences)
            self._in_flight.clear()
        known = isinstance(error, OrthrusError)
        reason = f": {error}" if known else ""
        _log.error("a step of the engine failed%s", reason, exc_info=None if known else error)
        text = str(error) if known else f"{type(error).__name__}: {one_line(str(error))}"
        failed = [s for s in self._at_work if self.scheduler.owns(s)]
        for sequence in failed:
            self.scheduler.end(sequence)
            self.scheduler.forget(sequence.slot, 0)
        requests = [sequence.request for sequence in failed]
        waiting = self.scheduler.waiting or self._submitted
        if self.peers is not None:
            while waiting := self.scheduler.waiting or self._submitted:
                requests.append(waiting.popleft())
        elif not requests and waiting:  # the one that was about to get a slot
            requests = [waiting.popleft()]
        for request in requests:
            self._updates.append(Update(request.id, [], finish_reason="error", error=text))


def _samples(sequences: tuple[Sequence, ...]) -> bool:
    return any(sequence.request.sampling.samples for sequence in sequences)
