"""The one thread that steps the engine, and what it hands to the event loop's requests."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from orthrus_fast.decoder import Decoder, Stream
from orthrus_fast.engine.request import Update
from orthrus_fast.errors import QueueFullError, RequestError
from orthrus_fast.results import Chunk, Generation
from orthrus_fast.sampling import SamplingParams

NOTHING = Chunk([], [], 0)
_log = logging.getLogger("orthrus_fast")


@dataclass(frozen=True)
class Task:
    """A text to decode. ``max_new_tokens`` None: all that fits."""

    ids: list[int]
    max_new_tokens: int | None
    sampling: SamplingParams
    mode: str | None


@dataclass(frozen=True)
class Piece:
    """A chunk of the text ``index`` of a job; with the last one comes the result."""

    index: int
    chunk: Chunk
    result: Generation | None = None


class Job:
    """The texts of one request; lives in the event loop. Whoever has it calls ``close``."""

    def __init__(self, worker: Worker, n_texts: int) -> None:
        self._worker = worker
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._n_taken = 0  # texts whose end was taken
        self._n_texts = n_texts
        self.n_running = n_texts  # texts that have not ended
        self.streams: list[Stream] = []  # the worker's

    async def take(self) -> list[Piece]:
        """All the pieces that have come, one at least; empty once every text has ended."""
        if self._n_taken == self._n_texts:
            return []
        pieces = [await self._pieces.get()]
        while not self._pieces.empty():
            pieces.append(self._pieces.get_nowait())
        self._n_taken += sum(piece.result is not None for piece in pieces)
        return pieces

    def put(self, piece: Piece) -> None:
        """Take in a piece, from the worker."""
        self._pieces.put_nowait(piece)

    def close(self) -> None:
        """End what has not ended, within a step of the engine."""
        self._worker.close(self)


@dataclass
class _Text:
    """A text that is under way."""

    job: Job
    index: int
    stream: Stream
    since: float  # when its last piece came, or, before the first one, when it was queued
    is_begun: bool = False


class Worker:
    """Owns a decoder. ``submit`` and what it returns belong to the event loop ``start`` ran in.

    ``watch`` is called, in the worker's thread, with every piece, the seconds since the one before
    it, and whether it is its text's first: then these are since the text was queued. At most
    ``max_waiting`` texts wait for a slot.
    """

    def __init__(
        self, decoder: Decoder, max_waiting: int, watch: Callable[[Piece, float, bool], None]
    ) -> None:
        self.decoder = decoder
        self.n_texts = 0  # that have been admitted and have not ended
        self._capacity = decoder.slots + max_waiting
        self._watch = watch
        self._inbox: deque[Update] = deque()
        self._texts: dict[int, _Text] = {}  # by the engine's id
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve, from within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is at, and with it all texts."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and can decode."""
        return self._thread.is_alive() and self.decoder.engine.failure is None

    @property
    def n_running(self) -> int:
        """Texts that have a slot, as far as known here."""
        return min(self.n_texts, self.decoder.slots)

    @property
    def n_waiting(self) -> int:
        """Texts that wait for a slot."""
        return self.n_texts - self.n_running

    async def submit(self, tasks: list[Task], reuse_key: str) -> Job:
        """Queue all of the tasks or none.

        Raises QueueFullError, and PromptError and RequestError for what can't be decoded.
        """
        if len(tasks) > self._capacity:
            raise RequestError(f"{len(tasks)} texts in one request, over {self._capacity}")
        if self.n_texts + len(tasks) > self._capacity:
            raise QueueFullError(
                f"queue: {self.n_texts} texts are decoded or wait already, of {self._capacity} "
                f"at most, and this request has {len(tasks)}; try again later"
            )
        job = Job(self, len(tasks))
        self.n_texts += len(tasks)
        accepted: asyncio.Future[None] = self._loop.create_future()
        self._order(lambda: self._begin(job, tasks, reuse_key, accepted))
        try:
            await accepted
        except BaseException:
            job.close()
            raise
        return job

    def close(self, job: Job) -> None:
        """End what has not ended of a job."""
        if job.n_running:
            self.n_texts -= job.n_running
            job.n_running = 0
            self._order(lambda: self._end(job))

    def _order(self, what: Callable[[], None]) -> None:
        with self._wake:
            self._orders.append(what)
            self._wake.notify()

    def _hand_over(self, news: list[tuple[Job, Piece]]) -> None:
        for job, piece in news:
            if job.n_running:  # else it was closed meanwhile
                job.put(piece)
                if piece.result is not None:
                    job.n_running -= 1
                    self.n_texts -= 1

    # From here on: the worker's thread.

    def _run(self) -> None:
        while self._wait():
            try:
                while self._orders:
                    self._orders.popleft()()
                self.decoder.step()
                self._deliver()
            except Exception as error:  # of this program: the engine reports those of the device
                self._fail(error)

    def _wait(self) -> bool:
        """Wait for something to do; False once the thread is to end."""
        with self._wake:
            while not (self._orders or self._stopping or self.decoder.engine.has_work):
                self._wake.wait()
            return not self._stopping

    def _begin(
        self, job: Job, tasks: list[Task], reuse_key: str, accepted: asyncio.Future[None]
    ) -> None:
        """Queue the texts of a job; what is refused of them tells ``accepted``."""
        error: Exception | None = None
        try:
            for index, task in enumerate(tasks):
                room = self.decoder.max_seq_len - len(task.ids)
                budget = max(1, room) if task.max_new_tokens is None else task.max_new_tokens
                how = (budget, task.sampling, task.mode, self._inbox, reuse_key)
                stream = self.decoder.submit(task.ids, *how)
                job.streams.append(stream)
                self._texts[stream.id] = _Text(job, index, stream, time.perf_counter())
        except Exception as refused:
            error = refused
        self._loop.call_soon_threadsafe(_settle, accepted, error)

    def _end(self, job: Job) -> None:
        for stream in job.streams:
            if self._texts.pop(stream.id, None) is not None:
                stream.close()

    def _deliver(self) -> None:
        """Make pieces of the updates that have come, and hand them over."""
        news, now = [], time.perf_counter()
        while self._inbox:
            update = self._inbox.popleft()
            if (text := self._texts.get(update.id)) is None:  # it was closed
                continue
            chunk = text.stream.take(update)
            result = None
            if text.stream.is_over:
                result = text.stream.result
                del self._texts[update.id]
            piece = Piece(text.index, chunk, result)
            self._watch(piece, now - text.since, not text.is_begun)
            text.since, text.is_begun = now, True
            news.append((text.job, piece))
        if news:
            self._loop.call_soon_threadsafe(self._hand_over, news)

    def _fail(self, error: Exception) -> None:
        """End all texts with an error."""
        _log.error("the server's worker failed", exc_info=error)
        failed = Generation.failed(error, None)
        news = [(text.job, Piece(text.index, NOTHING, failed)) for text in self._texts.values()]
        for text in self._texts.values():
            text.stream.close()
        self._texts.clear()
        self._loop.call_soon_threadsafe(self._hand_over, news)


def _settle(accepted: asyncio.Future[None], error: Exception | None) -> None:
    if accepted.done():  # the client left meanwhile
        return
    if error is None:
        accepted.set_result(None)
    else:
        accepted.set_exception(error)
