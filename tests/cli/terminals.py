"""A terminal for tests: a program at one end of a pseudo-terminal, a person's keys at the other."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTROLLING = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # for Ctrl-C
PATIENCE = 60  # seconds, after which a test fails that would wait for ever


class Terminal:
    """``screen`` is all that was written to it."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master, self.process = master, process
        self.screen, self._seen = "", 0

    def type(self, keys: str) -> None:
        left = keys.encode()
        while left:
            self._read(0)  # or both ends wait, once what is echoed fills the buffer
            if select.select([], [self.master], [], 0.05)[1]:
                left = left[os.write(self.master, left[:512]) :]

    def interrupt(self) -> None:
        """Press Ctrl-C once the program waits: readline misses it just before, until a next key."""
        state, deadline = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + PATIENCE
        while state.exists() and state.read_text().rpartition(") ")[2][0] != "S":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        self.type("\x03")

    def paste(self, text: str) -> None:
        """As terminals do: Enter ends lines; in brackets where the program asked for them."""
        on, off = (self.screen.rfind(f"\x1b[?2004{mode}") for mode in "hl")
        text = text.replace("\n", "\r")
        self.type(f"\x1b[200~{text}\x1b[201~" if on > off else text)

    def wait(self, text: str) -> str:
        """What was written since the last wait, up to ``text``."""
        deadline = time.monotonic() + PATIENCE
        while (found := self.screen.find(text, self._seen)) < 0:
            more = self._read(0.1)
            late = time.monotonic() > deadline
            assert more is not None and not late, f"no {text!r} in {self.screen[self._seen :]!r}"
        since, self._seen = self.screen[self._seen : found], found + len(text)
        return plain(since)

    def end(self) -> tuple[int, str]:
        """Exit code, and what was written since the last wait."""
        while self._read(0.1) is not None:
            pass
        return self.process.wait(PATIENCE), plain(self.screen[self._seen :])

    def _read(self, seconds: float) -> str | None:
        if not select.select([self.master], [], [], seconds)[0]:
            return None if self.process.poll() is not None else ""
        try:
            part = os.read(self.master, 65536).decode()
        except OSError:  # Linux says so when the other end is closed
            return None
        self.screen += part
        return part or None


def plain(written: str) -> str:
    """What was written, without colours and switches of the terminal."""
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", written).replace("\r", "")


@contextmanager
def terminal(
    code: str, *arguments: object, term: str = "xterm", **streams: Any
) -> Iterator[Terminal]:
    """Run Python ``code`` in a terminal, except for the ``streams`` that go elsewhere."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "PYTHONPATH": str(ROOT), "INPUTRC": os.devnull}
    line = [sys.executable, "-c", CONTROLLING + code, *map(str, arguments)]
    streams = {"stdin": slave, "stdout": slave, "stderr": slave, **streams}
    process = subprocess.Popen(line, env=environment, start_new_session=True, **streams)
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
