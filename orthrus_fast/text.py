"""From ids to pieces of text, up to the first stop string."""

from __future__ import annotations

from orthrus_fast.tokenizer import Detokenizer


class TextPieces:
    """The text of a growing list of ids; it ends before the first stop string.

    A piece is what may be shown once its token is there: neither a stop string nor what may become
    one. ``stopped`` tells that a stop string came; no more ids may follow.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: tuple[str, ...]) -> None:
        self._detokenizer = detokenizer  # None: there is no text
        self._stop = stop
        self._held_back = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that may be shown with this id."""
        return self._show(self._detokenizer.push(token) if self._detokenizer else "")

    def finish(self) -> str:
        """The text that was held back, as far as no stop string comes in it."""
        text = self._show(self._detokenizer.finish() if self._detokenizer else "")
        if not self.stopped:
            text += self._held_back
        return text

    def _show(self, text: str) -> str:
        self._held_back += text
        found = [(self._held_back.find(stop), stop) for stop in self._stop]
        ends = [(begin + len(stop), begin) for begin, stop in found if begin >= 0]
        if ends:  # the one that was complete first counts
            self.stopped = True
            shown, self._held_back = self._held_back[: min(ends)[1]], ""
            return shown
        n_held = max((overlap(self._held_back, stop) for stop in self._stop), default=0)
        shown = self._held_back[: len(self._held_back) - n_held]
        self._held_back = self._held_back[len(shown) :]
        return shown


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
