"""Where the turns of a chat come from: a terminal with line editing, or a pipe."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

from orthrus_fast.cli.terminal import fail
from orthrus_fast.errors import PromptError

PROMPT = "> "
PASTE_GAP = 0.05  # seconds; between pasted lines there is less, between typed ones more
CUT = 4095  # bytes of a line that Linux keeps where no line editing reads the terminal
BRACKETS_ON, BRACKETS_OFF = "\x1b[?2004h", "\x1b[?2004l"  # a terminal marks what is pasted


class Keyboard:
    """Reads turns from standard input; ``typed`` says whether that is a terminal.

    Where both ends are terminals, Python's readline edits lines and keeps a history in memory.
    """

    def __init__(self) -> None:
        self.typed = sys.stdin.isatty()
        self._readline = import_readline() if self.typed and sys.stdout.isatty() else None
        self._brackets = self._readline is not None and marks_pastes(self._readline)

    def read(self) -> str | None:
        """Return the next turn, a paste of several lines as one; None at the end of the input.

        Ctrl-C discards the line; twice on an empty line raises KeyboardInterrupt, as once in a
        pipe. Raises PromptError for a pipe that is not UTF-8.
        """
        warned = False
        while True:
            try:
                return self._read_lines()
            except EOFError:
                if self.typed and not self._brackets:  # else readline has ended the line
                    print(file=sys.stderr)
                return None
            except UnicodeDecodeError:
                if not self.typed:
                    raise PromptError("standard input: not valid UTF-8") from None
                fail("this line is not valid UTF-8 and was dropped")
            except KeyboardInterrupt:
                if not self.typed:
                    raise
                empty = self._readline is None or not self._readline.get_line_buffer()
                print(
                    "" if warned or not empty else "\n(Ctrl-D leaves, and Ctrl-C again)",
                    file=sys.stderr,
                )
                if empty and warned:
                    raise
                warned = empty

    def _read_lines(self) -> str:
        """Return a line, and what was pasted with it."""
        if not self.typed:
            return input()
        joins = not self._brackets and not is_waiting(0)  # what waits was typed during the answer
        if sys.stdout.isatty():
            lines = [input(PROMPT)]
        else:  # standard output is for the answers
            print(PROMPT, end="", file=sys.stderr, flush=True)
            lines = [input()]
        with suppress(EOFError):
            while joins and is_waiting(PASTE_GAP):
                lines.append(input())
        if self._readline is None and any(
            len(line.encode(errors="replace")) >= CUT for line in lines
        ):
            fail(f"a line was cut: without line editing a terminal keeps {CUT} bytes; use a pipe")
            return ""
        return "\n".join(lines)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep what is typed within out of what is printed, and give it to the next ``read``."""
        try:
            import termios
        except ImportError:  # Windows echoes only what is being read
            yield
            return
        if not self.typed:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        quiet = list(before)
        quiet[3] &= ~(termios.ECHO | termios.ICANON)  # Ctrl-C still interrupts
        try:
            termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
            self._mark(BRACKETS_ON)
            yield
        finally:
            with suppress(termios.error):  # the terminal may be gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
            self._mark(BRACKETS_OFF)

    def _mark(self, sequence: str) -> None:
        if self._brackets:
            sys.stdout.write(sequence)
            sys.stdout.flush()


def import_readline() -> ModuleType | None:
    """Return Python's readline, which edits the lines of ``input`` from now on, or None."""
    try:
        import readline
    except ImportError:  # Windows
        return None
    return readline


def marks_pastes(readline: ModuleType) -> bool:
    """Ask readline to take a bracketed paste as one input; return whether it will.

    GNU readline does from 8.1 on, where the terminal can; libedit never does.
    """
    libedit = "libedit" in (readline.__doc__ or "")
    if (
        libedit
        or readline._READLINE_VERSION < 0x801
        or os.environ.get("TERM") in (None, "", "dumb")
    ):
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True


def is_waiting(seconds: float) -> bool:
    """Return whether standard input has more to read, or has it within ``seconds``."""
    if os.name != "posix":  # only sockets can be waited for
        return False
    return bool(select.select([sys.stdin], [], [], seconds)[0])
