"""Prompts files: JSON Lines, an object with a prompt on each line."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from orthrus_fast.errors import PromptError, one_line
from orthrus_fast.sampling import is_integer

_log = logging.getLogger("orthrus_fast")
MAX_LINE_BYTES = 4 * 2**20  # of a prompt; some hundred times what fits into a context
KINDS = ("prompt", "messages", "ids")
OTHER_NAMES = {"text": "prompt", "max_tokens": "max_new_tokens"}


@dataclass(frozen=True)
class PromptLine:
    """One prompt of a file."""

    where: str  # file and line, for errors
    index: int  # among the file's prompts, from 0
    id: str | int  # the user's own; else the line's number, from 1
    kind: str  # prompt, messages or ids
    prompt: Any  # str, list of dicts, or list of ints
    settings: Mapping[str, Any]  # the line's own: SamplingParams' names, a budget, a schema's JSON
    extra: Mapping[str, Any]  # all its other fields, which the result repeats


def read_prompts(path: str | Path) -> list[PromptLine]:
    """Return the prompts of a JSON Lines file, one object a line; "-" reads standard input.

    A line has exactly one of "prompt" (or "text"), "messages" (objects) and "ids" (integers), and
    may have "id", settings of its own, "json_schema" (a schema, or "any") among them, and other
    fields, which are its ``extra``: a log line warns of those that look like a setting. Blank lines
    are ignored. Whether a prompt can be decoded shows later, in its result. Raises PromptError,
    naming file and line, for what cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    lines: list[PromptLine] = []
    seen: dict[str | int, int] = {}
    suspects: dict[str, str] = {}  # an extra field that looks like a setting -> where it first is
    try:
        with _opened(path) as file:
            for number, content in _numbered_lines(file, name):
                line = _parse_line(content, f"{name}, line {number}", number, len(lines))
                if line.id in seen:
                    also = f"also line {seen[line.id]}'s"
                    raise PromptError(f"{line.where}: id {as_shown(line.id)}: {also}")
                seen[line.id] = number
                lines.append(line)
                for field in line.extra:
                    suspects.setdefault(field, line.where)
    except OSError as error:
        raise PromptError(f"{name}: cannot be read ({error.strerror or error})") from None
    if not lines:
        raise PromptError(f"{name}: has no prompts; each line is an object with a prompt")
    for field, where in suspects.items():
        _warn_of_misspelling(field, where)
    return lines


def _opened(path: str | Path) -> contextlib.AbstractContextManager[BinaryIO]:
    if str(path) != "-":
        return open(path, "rb")
    if sys.stdin is None:
        raise PromptError("standard input: closed; name a prompts file")
    return contextlib.nullcontext(sys.stdin.buffer)


def _numbered_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while content := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(content) > MAX_LINE_BYTES:
            raise PromptError(f"{name}, line {number}: over {MAX_LINE_BYTES} bytes")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # some editors begin UTF-8 so
        if content.strip():
            yield number, content


def _parse_line(content: bytes, where: str, number: int, index: int) -> PromptLine:
    fields = _parse_object(content, where)
    for other, name in OTHER_NAMES.items():
        if other in fields:
            if name in fields:
                raise PromptError(f"{where}: {name} and {other} are the same; give one of them")
            fields[name] = fields.pop(other)
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "none"
        raise PromptError(f"{where}: {found}: it needs one of prompt (text), messages and ids")
    known = {name: fields.pop(name) for name in FIELDS if name in fields}
    for name, value in known.items():
        what, fits = FIELDS[name]
        if not fits(value):
            raise PromptError(f"{where}: {name}: {as_shown(value)} is not {what}")
    prompt, own_id = known.pop(kinds[0]), known.pop("id", number)
    if "stop" in known:
        stop = known["stop"]
        known["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if "json_schema" in known:  # as text, which keeps the order that properties will have
        known["json_schema"] = json.dumps(known["json_schema"])
    return PromptLine(where, index, own_id, kinds[0], prompt, known, fields)


def _warn_of_misspelling(name: str, where: str) -> None:
    names = [known for known in (*FIELDS, *OTHER_NAMES) if known not in ("id", "ids")]
    meant = get_close_matches(name.lower(), names, 1, 0.8)
    if meant or name in SETTINGS_ELSEWHERE:
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        _log.warning("%s: %s is no setting here%s; it changes no text", where, as_shown(name), hint)


def _parse_object(content: bytes, where: str) -> dict[str, Any]:
    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def parse_float(digits: str) -> float:
        if math.isinf(float(digits)):  # which would be written as no JSON
            raise ValueError(f"{digits} is too large")
        return float(digits)

    try:
        text = content.decode("utf-8")
        fields = json.loads(text, parse_constant=refuse_constant, parse_float=parse_float)
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
    "json_schema": ("a schema or 'any'", lambda v: isinstance(v, (dict, bool)) or v == "any"),
}
SETTINGS_ELSEWHERE = (  # of other programs, which change a text there
    "repetition_penalty presence_penalty frequency_penalty logit_bias typical_p num_beams n tools "
    "best_of do_sample max_length ignore_eos enable_thinking system response_format grammar"
).split()


def as_shown(value: object) -> str:
    """A value out of a file, on one harmless line of bounded length."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
