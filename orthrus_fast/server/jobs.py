"""The event loop's side of decoding: jobs, and what goes between them and the engine's worker.

The worker may be in this process or in another one: orders and news are plain data.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from orthrus_fast.errors import OrthrusError, QueueFullError, RequestError
from orthrus_fast.results import Chunk, Generation
from orthrus_fast.sampling import SamplingParams

NOTHING = Chunk([], [], 0)


@dataclass(frozen=True)
class Task:
    """A text to decode. ``max_new_tokens`` None: all that fits."""

    ids: list[int]
    max_new_tokens: int | None
    sampling: SamplingParams
    mode: str | None


class Begin(NamedTuple):
    """An order: decode the texts of a job."""

    job: int
    tasks: list[Task]
    reuse_key: str


class Leave(NamedTuple):
    """An order: end what has not ended of a job, within a step."""

    job: int


class Begun(NamedTuple):
    """News: a job's texts are queued, or none is because of an error."""

    job: int
    error: Exception | None


@dataclass(frozen=True)
class Piece:
    """News: a chunk of the text ``index`` of a job; with the last one comes the result.

    ``seconds`` have passed since the piece before it; the text was queued so long before its first.
    """

    job: int
    index: int
    chunk: Chunk
    result: Generation | None
    seconds: float
    is_first: bool


class Ended(NamedTuple):
    """News: the worker decodes no more."""

    reason: str


Order = Begin | Leave
News = Begun | Piece | Ended


class Job:
    """The texts of one request. Whoever has it calls ``close``."""

    def __init__(self, jobs: Jobs, number: int, n_texts: int) -> None:
        self._jobs, self.number = jobs, number
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._n_taken = 0  # texts whose end was taken
        self._n_texts = n_texts
        self.n_running = n_texts  # texts that have not ended

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
        """Take in a piece."""
        self._pieces.put_nowait(piece)

    def close(self) -> None:
        """End what has not ended, within a step of the engine."""
        self._jobs.close(self)


class Jobs:
    """All jobs of a worker that has ``slots``; belongs to one event loop.

    ``order`` hands the worker an order; what it tells goes to ``hear``, in the loop. ``watch`` is
    called with every piece. At most ``max_waiting`` texts wait for a slot.
    """

    def __init__(self, slots: int, max_waiting: int, watch: Callable[[Piece], None]) -> None:
        self.n_texts = 0  # that have been admitted and have not ended
        self.failure: str | None = None  # why the worker decodes no more, if it does not
        self.order: Callable[[Order], None]  # of whoever connects the two
        self._slots, self._capacity = slots, slots + max_waiting
        self._watch = watch
        self._n_jobs = 0
        self._jobs: dict[int, Job] = {}  # those that have not ended, by number
        self._accepting: dict[int, asyncio.Future[None]] = {}

    @property
    def n_running(self) -> int:
        """Texts that have a slot, as far as known here."""
        return min(self.n_texts, self._slots)

    @property
    def n_waiting(self) -> int:
        """Texts that wait for a slot."""
        return self.n_texts - self.n_running

    async def submit(self, tasks: list[Task], reuse_key: str) -> Job:
        """Queue all of the tasks or none.

        Raises QueueFullError, PromptError and RequestError for what can't be decoded, and
        OrthrusError where the worker has ended.
        """
        if self.failure is not None:
            raise OrthrusError(self.failure)
        if len(tasks) > self._capacity:
            raise RequestError(f"{len(tasks)} texts in one request, over {self._capacity}")
        if self.n_texts + len(tasks) > self._capacity:
            raise QueueFullError(
                f"queue: {self.n_texts} texts are decoded or wait already, of {self._capacity} "
                f"at most, and this request has {len(tasks)}; try again later"
            )
        self._n_jobs += 1
        job = self._jobs[self._n_jobs] = Job(self, self._n_jobs, len(tasks))
        self.n_texts += len(tasks)
        accepted = self._accepting[job.number] = asyncio.get_running_loop().create_future()
        self.order(Begin(job.number, tasks, reuse_key))
        try:
            await accepted
        except BaseException:
            job.close()
            raise
        finally:
            del self._accepting[job.number]
        return job

    def close(self, job: Job) -> None:
        """End what has not ended of a job."""
        if job.n_running:
            self.n_texts -= job.n_running
            job.n_running = 0
            del self._jobs[job.number]
            self.order(Leave(job.number))

    def hear(self, news: list[News]) -> None:
        """Take in what the worker tells."""
        for one in news:
            if isinstance(one, Piece):
                self._watch(one)
                self._hand_over(one)
            elif isinstance(one, Begun):
                self._settle(one)
            else:
                self.lose(one.reason)

    def lose(self, reason: str) -> None:
        """End all texts, for the worker decodes no more."""
        self.failure, ended = reason, OrthrusError(reason)
        for job in list(self._jobs.values()):
            self._settle(Begun(job.number, ended))
            for index in range(job.n_running):
                job.put(Piece(job.number, index, NOTHING, Generation.failed(ended, None), 0, False))

    def _hand_over(self, piece: Piece) -> None:
        job = self._jobs.get(piece.job)
        if job is None:  # it was closed meanwhile
            return
        job.put(piece)
        if piece.result is not None:
            job.n_running -= 1
            self.n_texts -= 1
            if not job.n_running:
                del self._jobs[job.number]

    def _settle(self, begun: Begun) -> None:
        accepted = self._accepting.get(begun.job)
        if accepted is None or accepted.done():  # the client left meanwhile
            return
        if begun.error is None:
            accepted.set_result(None)
        else:
            accepted.set_exception(begun.error)
