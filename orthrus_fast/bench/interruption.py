"""Ctrl-C and SIGTERM end the program in order, and its exit status says which it was."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything that an interruption ends, ends by this, too."""


@contextmanager
def heeding_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises Terminated in the main thread; the handler before is put back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only that thread may set handlers
        return

    def end(number: int, frame: Any) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def status(interruption: KeyboardInterrupt) -> int:
    """The exit status, after a line that says what is left."""
    number = signal.SIGTERM if isinstance(interruption, Terminated) else signal.SIGINT
    what = "interrupted" if number == signal.SIGINT else "terminated"
    print(f"{what}; what was measured stays in --json's file", file=sys.stderr)
    return 128 + number
