"""Which one this process is of several that were started together, as torchrun or ranks say it."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple


class Place(NamedTuple):
    """A process's number among so many."""

    rank: int
    size: int


def launched() -> Place:
    """This process's place; that of the only one where it was started alone."""
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None or "LOCAL_RANK" not in os.environ:  # clusters set the others
        return Place(0, 1)
    return Place(int(rank), int(size))


def local_rank() -> int:
    """The number of this process's GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def leave_talking_to_the_first() -> bool:
    """Whether another process speaks for this one: then it reads and writes nothing from now on."""
    is_beside = launched().rank > 0
    if is_beside:
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")  # noqa: SIM115 (stays open)
    return is_beside
