"""What long parts have measured so far: kept in the file, so that a second start goes on there."""

from __future__ import annotations

from collections.abc import Callable

from orthrus_fast.bench.common import Result


class Kept:
    """Results of a part's steps, by part, in the order in which they came.

    ``write`` is called after each; without a file it does nothing.
    """

    def __init__(
        self,
        entries: dict[str, list[Result]] | None = None,
        write: Callable[[], None] = lambda: None,
    ) -> None:
        self._entries = {} if entries is None else entries
        self._write = write

    def of(self, part: str) -> list[Result]:
        """All results of a part's steps so far."""
        return list(self._entries.get(part, []))

    def find(self, part: str, **key: object) -> Result | None:
        """The step whose result has these fields."""
        of_part = self._entries.get(part, [])
        return next((e for e in of_part if all(e[k] == v for k, v in key.items())), None)

    def add(self, part: str, entry: Result) -> None:
        self._entries.setdefault(part, []).append(entry)
        self._write()
