"""Prompts files: JSON Lines, an object with a prompt on each line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orthrus_fast.errors import PromptError, one_line
from orthrus_fast.sampling import is_integer

MAX_LINE_BYTES = 4 * 2**20  # of a prompt; some hundred times what fits into a context
KINDS = ("prompt", "messages", "ids")


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file."""

    where: str  # file and line, for errors
    index: int  # among the file's prompts, from 0
    id: str | int  # the user's own; else the line's number, from 1
    kind: str  # prompt, messages or ids
    prompt: Any  # str, list of dicts, or list of ints
    settings: Mapping[str, Any]  # the line's own: SamplingParams' names, and a budget


def read_prompts(path: str | Path) -> list[PromptLine]:
    """The prompts of a JSON Lines file, one object a line; blank lines are ignored.

    A line has exactly one of "prompt" (text), "messages" (objects) and "ids" (integers), and may
    have "id" and settings of its own. Whether a prompt can be decoded shows later, in its result.
    Raises PromptError, naming file and line, for a file that cannot be read as that.
    """
    lines: list[PromptLine] = []
    seen: dict[str | int, str] = {}
    try:
        with open(path, "rb") as file:
            for number, content in _numbered_lines(file, path):
                line = _parse_line(content, f"{path}, line {number}", number, len(lines))
                if line.id in seen:
                    raise PromptError(f"{line.where}: id {as_shown(line.id)}: also {seen[line.id]}")
                seen[line.id] = f"line {number}'s"
                lines.append(line)
    except OSError as error:
        raise PromptError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not lines:
        raise PromptError(f"{path}: has no prompts; each line is an object with a prompt")
    return lines


def _numbered_lines(file: BinaryIO, path: str | Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(content) > MAX_LINE_BYTES:
            raise PromptError(f"{path}, line {number}: over {MAX_LINE_BYTES} bytes")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 so
        if content.strip():
            yield number, content


def _parse_line(content: bytes, where: str, number: int, index: int) -> PromptLine:
    fields = _parse_object(content, where)
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise PromptError(f"{where}: {found}: it needs one of prompt, messages and ids")
    for name, value in fields.items():
        if name not in FIELDS:
            known = ", ".join(FIELDS)
            raise PromptError(f"{where}: {as_shown(name)} is not a field; known are {known}")
        what, fits = FIELDS[name]
        if not fits(value):
            raise PromptError(f"{where}: {name}: {as_shown(value)} is not {what}")
    settings = {k: v for k, v in fields.items() if k not in (*KINDS, "id")}
    if "stop" in settings:
        stop = settings["stop"]
        settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return PromptLine(where, index, fields.get("id", number), kinds[0], fields[kinds[0]], settings)


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        fields = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise PromptError(f"{where}: not valid UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise PromptError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise PromptError(f"{where}: not valid JSON ({one_line(str(error))})") from None
    if not isinstance(fields, dict):
        raise PromptError(f"{where}: not a JSON object")
    return fields


def _is_number(value: Any) -> bool:
    return (is_integer(value) or isinstance(value, float)) and -1e9 <= value <= 1e9


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(v, kind) for v in value)


FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("text", lambda value: isinstance(value, str)),
    "messages": ("a list of objects", _is_list_of(dict)),
    "ids": ("a list of integers", lambda v: isinstance(v, list) and all(map(is_integer, v))),
    "id": ("text or an integer", lambda value: isinstance(value, str) or is_integer(value)),
    "max_new_tokens": ("an integer above 0", lambda value: is_integer(value) and value > 0),
    "temperature": ("a number", _is_number),
    "top_k": ("an integer", is_integer),
    "top_p": ("a number", _is_number),
    "min_p": ("a number", _is_number),
    "seed": ("an integer", is_integer),
    "stop": ("text or a list of texts", lambda v: isinstance(v, str) or _is_list_of(str)(v)),
    "logprobs": ("true or false", lambda value: isinstance(value, bool)),
}


def as_shown(value: object) -> str:
    """A value out of a file, on one harmless line of bounded length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
