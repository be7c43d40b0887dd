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

GREEN, DIM, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"
SHOWN_LINES = 15  # of a prompt


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


def write_output(text: str) -> None:
    """Write to standard output at once. Raises OSError, which names it."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        error.filename = "standard output"
        raise


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


def coloured() -> bool:
    """Return whether the user's terminal may be sent colours."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show_prompt(text: str) -> None:
    """Print a prompt on standard error, dimmed on a terminal; of a long one its first lines."""
    lines = printable(text, True).splitlines()
    more = len(lines) - SHOWN_LINES
    if more > 0:
        lines[SHOWN_LINES:] = [f"… ({more} more lines)"]
    dim, plain = (DIM, PLAIN) if sys.stderr.isatty() and coloured() else ("", "")
    print("\n".join(f"{dim}{line}{plain}" for line in lines), file=sys.stderr)


def render(chunk: Chunk, show_blocks: bool, terminal: bool) -> str:
    """Return a chunk's text; ``show_blocks`` marks accepted proposals in green, or by ⟨…⟩."""
    accepted = printable("".join(chunk.pieces[: chunk.n_accepted]), terminal)
    bonus = printable("".join(chunk.pieces[chunk.n_accepted :]), terminal)
    if not show_blocks or not accepted:
        return accepted + bonus
    if terminal and coloured():
        return f"{GREEN}{accepted}{PLAIN}{bonus}"
    return f"⟨{accepted}⟩{bonus}"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes and the time left on a terminal's standard error, after a second."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (what, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeLeft(), "left")
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
