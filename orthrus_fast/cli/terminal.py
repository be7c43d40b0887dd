"""What is written to the terminal, and what is kept away from it."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from orthrus_fast import Chunk

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def prepare_streams() -> None:
    """Make printing safe: a stream may be closed, or a terminal may lack a character."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it is to stay open)
    for output in (sys.stdout, sys.stderr):
        if output is not None:
            output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("orthrus_fast").setLevel(logging.INFO)


def fail(problem: str) -> int:
    """Print an error as one line and return the exit code of bad input."""
    line = printable(problem, True).replace("\n", "\\n").replace("\t", "\\t")
    print(f"error: {line}", file=sys.stderr)
    return 2


def drop_output() -> None:
    """Let the last flush of standard output succeed, which Python does as it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str, terminal: bool) -> str:
    """Escape control characters for a terminal: a model must not move its cursor or its title."""
    if not terminal:
        return text
    return "".join(
        c.encode("unicode_escape").decode() if category(c) == "Cc" and c not in "\n\t" else c
        for c in text
    )


def render(chunk: Chunk, show_blocks: bool, terminal: bool) -> str:
    """Return a chunk's text; ``show_blocks`` marks accepted proposals in green, or by ⟨…⟩."""
    accepted = printable("".join(chunk.pieces[: chunk.n_accepted]), terminal)
    bonus = printable("".join(chunk.pieces[chunk.n_accepted :]), terminal)
    if not show_blocks or not accepted:
        return accepted + bonus
    if terminal and not os.environ.get("NO_COLOR"):
        return f"{GREEN}{accepted}{PLAIN}{bonus}"
    return f"⟨{accepted}⟩{bonus}"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on a terminal's standard error, once the work has taken a second."""

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what)
    begun = time.monotonic()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if sys.stderr.isatty() and time.monotonic() - begun > 1:
            bar.start()

    try:
        yield update
    finally:
        if bar.live.is_started:  # stopping prints an empty line even where nothing was shown
            bar.stop()
