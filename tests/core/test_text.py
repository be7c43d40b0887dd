"""Pieces of text: what a piece that brings several characters at once may show."""

from __future__ import annotations

from typing import Any

import pytest

from orthrus_fast.text import TextPieces


class Syllables:
    """A detokenizer whose ids are places in a list of texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def push(self, token: int) -> str:
        return self.texts[token]

    def finish(self) -> str:
        return ""


@pytest.mark.parametrize(
    "texts, stop, shown",
    [
        (["x", "abcd"], ("abcd", "bc"), "xa"),  # both within one piece: which was complete first
        (["x", "abcd"], ("bc", "abcd"), "xa"),
        (["x", "abc"], ("bc", "abc"), "x"),  # complete at once: which began first
        (["xab", "ab", "c"], ("abc",), "xab"),
        (["xaa", "ab"], ("aab",), "xa"),  # held back is the longest beginning of a stop string
        (["xab", "c"], ("abcd", "bcq"), "xabc"),
    ],
)
def test_stop_strings_in_pieces_of_several_characters(
    texts: list[str], stop: tuple[str, ...], shown: str
) -> None:
    detokenizer: Any = Syllables(*texts)
    pieces = TextPieces(detokenizer, stop)
    text = "".join(map(pieces.push, range(len(texts))))
    assert text + ("" if pieces.stopped else pieces.finish()) == shown
