"""A process of its own for a server's connections, so that they take no time of the engine's.

The interpreter runs one thread of a process at a time: beside many clients the engine's would wait
for its turn, and the device for the engine. The process that has the decoder keeps it, and the
front asks for texts through a pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import OrthrusError
from orthrus_fast.server.access import Guard
from orthrus_fast.server.app import Facts, ServerSettings, Service, tokenizer_of
from orthrus_fast.server.jobs import Jobs, News, Order
from orthrus_fast.server.listening import make_server
from orthrus_fast.server.worker import Worker
from orthrus_fast.tokenizer import Tokenizer

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOST = "the process that has the decoder has ended; its log says why"


class Front:
    """A process that serves clients on ``listener``, which it takes over.

    Make it before the model is loaded: meanwhile it imports what it needs.
    """

    def __init__(self, listener: socket.socket, drain_seconds: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        how = (other, listener, drain_seconds)
        self._process = spawn.Process(target=run_front, args=how, name="front", daemon=True)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the new process has it, too
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, interrupt)
        other.close()
        listener.close()  # else clients would still connect to it at the front's end
        self._sending, self._is_up = threading.Lock(), threading.Event()
        self._is_to_end = self._is_over = False

    def start(self, decoder: Decoder, settings: ServerSettings) -> bool:
        """Begin to serve; returns once the front listens, False if it has ended before.

        Raises RequestError for a decoder that has no tokenizer.
        """
        self._send((Facts.of(decoder), tokenizer_of(decoder).directory, settings))
        self._worker = Worker(decoder, self._send)
        threading.Thread(target=self._receive, name="orders", daemon=True).start()
        self._is_up.wait()
        return not self._is_over

    def decode(self) -> None:
        """Decode what the front asks for, until it ends or ``pause`` is called in another thread.

        Call it in the thread that loaded the model: on a CPU OpenMP gives each thread that computes
        threads of its own, and all are slow where they are more than the machine has (a fourth, of
        the embedded model on two cores).
        """
        self._worker.run()

    def pause(self) -> None:
        """Have ``decode`` return; texts wait until it is called again."""
        self._worker.stop()

    def end(self) -> None:
        """Have the front finish what runs, within its time, and then end."""
        self._is_to_end = True
        self._process.terminate()

    def join(self) -> None:
        """Wait for the front's end. Raises OrthrusError where it has failed."""
        self._process.join()
        if self._process.exitcode and not self._is_to_end:
            raise OrthrusError(f"the server's front ended with code {self._process.exitcode}")

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # it has ended
            while True:
                order: Order | None = pickle.loads(self._pipe.recv_bytes())
                if order is not None:
                    self._worker.order(order)
                self._is_up.set()
        self._is_over = True
        self._is_up.set()
        self._worker.stop()

    def _send(self, what: Any) -> None:
        data = pickle.dumps(what, pickle.HIGHEST_PROTOCOL)
        with contextlib.suppress(OSError), self._sending:  # it has ended, which ``_receive`` sees
            self._pipe.send_bytes(data)


def run_front(pipe: Connection, listener: socket.socket, drain_seconds: int) -> None:
    """The front's process."""
    try:
        setup: tuple[Facts, Path, ServerSettings] = pickle.loads(pipe.recv_bytes())
    except EOFError:  # no model was loaded
        return
    facts, directory, settings = setup
    service = Service(facts, Tokenizer.from_directory(directory), settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        connect(pipe, service.jobs, lambda: setattr(server, "should_exit", True))
        yield

    app = Guard(service.app(lifespan), settings.access, service.answered)
    server = make_server(app, drain_seconds)
    begin_to_end = server.handle_exit

    def on_signal(number: int, frame: Any) -> None:
        if number == signal.SIGINT and server.should_exit:  # the second one
            os._exit(0)  # at once, where uvicorn would say what it cancels
        begin_to_end(number, frame)

    server.handle_exit = on_signal  # type: ignore[method-assign, assignment]
    for number in SIGNALS:  # which uvicorn raises again at its end
        signal.signal(number, on_signal)
    server.run(sockets=[listener])


def connect(pipe: Connection, jobs: Jobs, end: Callable[[], None]) -> None:
    """Send the orders of jobs through a pipe and have them hear what comes; ``end`` with it.

    Call it in their event loop. That it is done is sent first, as None.
    """
    loop = asyncio.get_running_loop()

    def order(one: Order | None) -> None:
        with contextlib.suppress(OSError):  # it has ended, which ``receive`` sees
            pipe.send_bytes(pickle.dumps(one, pickle.HIGHEST_PROTOCOL))

    def receive() -> None:
        try:
            while True:
                news: list[News] = pickle.loads(pipe.recv_bytes())
                loop.call_soon_threadsafe(jobs.hear, news)
        except (EOFError, OSError):
            loop.call_soon_threadsafe(jobs.lose, LOST)
            end()
        except RuntimeError:
            pass  # the loop has ended before

    jobs.order = order
    threading.Thread(target=receive, name="news", daemon=True).start()
    order(None)
