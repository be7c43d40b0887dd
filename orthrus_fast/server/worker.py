"""What steps the engine for a server, in one thread: takes orders, and tells what comes of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from orthrus_fast.decoder import Decoder, Stream
from orthrus_fast.engine.request import Update
from orthrus_fast.results import Generation
from orthrus_fast.server.jobs import NOTHING, Begin, Begun, Ended, News, Order, Piece

COMPILERS = 4  # threads that compile grammars
FAILURE_SECONDS = 1.0  # after which an idle thread looks whether the engine can still decode
_log = logging.getLogger("orthrus_fast")


@dataclass
class _Text:
    """A text that is under way."""

    job: int
    index: int
    stream: Stream
    since: float  # when its last piece came, or, before the first one, when it was queued
    is_begun: bool = False


class Worker:
    """Owns a decoder. ``order`` may be called from any thread, and calls ``tell`` from several."""

    def __init__(self, decoder: Decoder, tell: Callable[[list[News]], None]) -> None:
        self.decoder = decoder
        self._tell = tell
        self._inbox: deque[Update] = deque()
        self._texts: dict[int, _Text] = {}  # by the engine's id
        self._streams: dict[int, list[Stream]] = {}  # by job
        self._orders: deque[Order] = deque()
        self._compiling: set[int] = set()  # jobs whose grammar is compiled
        self._left: set[int] = set()  # those of them that have been left
        self._compilers = ThreadPoolExecutor(COMPILERS, "grammar")
        self._wake = threading.Condition()
        self._stopping = self._has_failed = False

    def run(self) -> None:
        """Decode what is ordered, in this thread, until ``stop`` is called in another one."""
        while self._wait():
            try:
                while self._orders:
                    self._obey(self._orders.popleft())
                self.decoder.step()
                self._deliver()
            except Exception as error:  # of this program: the engine reports those of the device
                self._fail(error)
        self._stopping = False

    def stop(self) -> None:
        """Have ``run`` return after the step that it is at; another run goes on from there."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def order(self, order: Order) -> None:
        """Take an order; all of a job's texts are queued or none."""
        if isinstance(order, Begin) and order.tasks[0].sampling.grammar is not None:
            self._compiling.add(order.job)
            self._compilers.submit(self._compile, order)
        else:
            self._put(order)

    def _put(self, order: Order) -> None:
        with self._wake:
            self._orders.append(order)
            self._wake.notify()

    def _compile(self, order: Begin) -> None:
        """Compile a job's grammar, which the engine's thread would otherwise."""
        grammar = order.tasks[0].sampling.grammar
        assert grammar is not None
        try:
            self.decoder.compile_grammar(grammar)
            self._put(order)
        except Exception as error:
            self._compiling.discard(order.job)
            self._left.discard(order.job)
            self._tell([Begun(order.job, error)])

    # From here on: the thread that runs.

    def _wait(self) -> bool:
        """Wait for something to do; False once ``run`` is to end."""
        with self._wake:
            while not (self._orders or self._stopping or self.decoder.engine.has_work):
                self._wake.wait(FAILURE_SECONDS)
                self._look_for_failure()
            return not self._stopping

    def _look_for_failure(self) -> None:
        """Tell of it, once, where the engine's other ranks have ended."""
        failure = self.decoder.engine.failure
        if failure is not None and not self._has_failed:
            self._has_failed = True
            self._tell([Ended(failure)])

    def _obey(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._begin(order)
            return
        if order.job in self._compiling:
            self._left.add(order.job)
        for stream in self._streams.pop(order.job, []):
            if self._texts.pop(stream.id, None) is not None:
                stream.close()

    def _begin(self, order: Begin) -> None:
        """Queue the texts of a job; what is refused of them is told."""
        self._compiling.discard(order.job)
        if order.job in self._left:
            self._left.discard(order.job)
            return
        error: Exception | None = None
        streams = self._streams[order.job] = []
        try:
            for index, task in enumerate(order.tasks):
                room = self.decoder.max_seq_len - len(task.ids)
                budget = max(1, room) if task.max_new_tokens is None else task.max_new_tokens
                how = (budget, task.sampling, task.mode, self._inbox, order.reuse_key)
                stream = self.decoder.submit(task.ids, *how)
                streams.append(stream)
                self._texts[stream.id] = _Text(order.job, index, stream, time.perf_counter())
        except Exception as refused:  # whoever hears of it orders the others' end
            error = refused
        self._tell([Begun(order.job, error)])

    def _deliver(self) -> None:
        """Make pieces of the updates that have come, and tell them."""
        news: list[News] = []
        now = time.perf_counter()
        while self._inbox:
            update = self._inbox.popleft()
            if (text := self._texts.get(update.id)) is None:  # it was closed
                continue
            chunk = text.stream.take(update)
            result = None
            if text.stream.is_over:
                result = text.stream.result
                self._forget(text)
            since, is_first = text.since, not text.is_begun
            news.append(Piece(text.job, text.index, chunk, result, now - since, is_first))
            text.since, text.is_begun = now, True
        if news:
            self._tell(news)
        self._look_for_failure()

    def _forget(self, text: _Text) -> None:
        """Drop a text that has ended, and its job with the last one."""
        del self._texts[text.stream.id]
        if all(stream.is_over for stream in self._streams[text.job]):
            del self._streams[text.job]

    def _fail(self, error: Exception) -> None:
        """End all texts with an error."""
        _log.error("the server's worker failed", exc_info=error)
        failed, texts = Generation.failed(error, None), list(self._texts.values())
        for text in texts:
            text.stream.close()
        self._texts.clear()
        self._streams.clear()
        self._tell([Piece(one.job, one.index, NOTHING, failed, 0.0, False) for one in texts])
