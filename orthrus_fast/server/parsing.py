"""Qwen3's habits in an answer's text: its thought, then content, then tool calls; as text grows.

``<think>…</think>`` at the beginning is a thought; ``<tool_call>{"name": …, "arguments": …}`` with
its closing tag is a call, if the request brought tools. What only looks like one stays text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

from orthrus_fast.text import overlap

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
CALL, END_OF_CALL = "<tool_call>", "</tool_call>"
WHITE = " \t\r\n"


class ToolCall(NamedTuple):
    """A call of the function ``name``; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Part:
    """What a piece of text adds to an answer; one of the three."""

    reasoning: str = ""
    content: str = ""
    call: ToolCall | None = None


class AnswerParser:
    """The parts of one answer, whatever the cuts of the text that is pushed.

    ``in_thought``: the prompt ended within a thought. Line feeds that the chat template puts around
    a thought, and white space around calls, belong to neither side.
    """

    def __init__(self, in_thought: bool = False, tools: bool = False) -> None:
        self._state = self._in_thought if in_thought else self._at_start
        self._tools = tools
        self._held = ""  # text whose part is not known yet
        self._skipped = "\n" if in_thought else ""  # characters to leave out at what comes next

    def push(self, text: str) -> list[Part]:
        """The parts that are sure with this text."""
        self._held += text
        return self._advance(final=False)

    def finish(self) -> list[Part]:
        """The rest, once no more text comes."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            self._held = self._held.lstrip(self._skipped) if self._skipped else self._held
            if self._held and self._skipped:
                self._skipped = ""
            before = self._state
            parts += self._state(final)
            if self._state == before:
                return [part for part in parts if part != Part()]

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _at_start(self, final: bool) -> list[Part]:
        begin = self._held.lstrip()
        if begin.startswith(THOUGHT):
            self._held = begin[len(THOUGHT) :]
            self._state, self._skipped = self._in_thought, "\n"
        elif final or not THOUGHT.startswith(begin):
            self._state = self._in_text
        return []

    def _in_thought(self, final: bool) -> list[Part]:
        end = self._held.find(END_OF_THOUGHT)
        if end < 0:
            n_shown = len(self._held) if final else _unheld(self._held, END_OF_THOUGHT, "\n")
            return [Part(reasoning=self._take(n_shown))]
        reasoning = self._take(end).rstrip("\n")
        self._take(len(END_OF_THOUGHT))
        self._state, self._skipped = self._in_text, "\n"
        return [Part(reasoning=reasoning)]

    def _in_text(self, final: bool) -> list[Part]:
        begin = self._held.find(CALL) if self._tools else -1
        if begin >= 0:
            self._state = self._in_call  # with white space, which is text if it is none
            return [Part(content=self._take(len(self._held[:begin].rstrip(WHITE))))]
        n_shown = len(self._held)
        if self._tools and not final:
            n_shown = _unheld(self._held, CALL, WHITE)
        return [Part(content=self._take(n_shown))]

    def _in_call(self, final: bool) -> list[Part]:
        end = self._held.find(END_OF_CALL)
        if end < 0 and not final:
            return []
        self._state = self._in_text
        begin = self._held.index(CALL) + len(CALL)
        if end >= 0 and (call := _call_of(self._held[begin:end])) is not None:
            self._take(end + len(END_OF_CALL))
            self._skipped = WHITE
            return [Part(call=call)]
        return [Part(content=self._take(begin))]


def _unheld(text: str, tag: str, padding: str) -> int:
    """Characters before what may be the beginning of ``padding`` and ``tag``."""
    return len(text[: len(text) - overlap(text, tag)].rstrip(padding))


def _call_of(text: str) -> ToolCall | None:
    """The call that a JSON text describes, None for any other text."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(call["name"], json.dumps(arguments, ensure_ascii=False))
