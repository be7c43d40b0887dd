"""Processes that tests have started, and those that these have."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, in any of its threads."""
    try:
        files = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(word) for file in files for word in file.read_text().split()]
    except OSError:  # it has just ended
        return []


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended, as it is about to."""
    for _ in range(600):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} goes on")


def free_port() -> int:
    """A port of this host that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
