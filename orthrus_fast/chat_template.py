"""Chat messages to a prompt, by the checkpoint's own template.

A template is a program that nobody vouches for. It runs in jinja2's immutable sandbox, set up as
transformers sets it up, so that it renders what transformers renders.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import BuiltinMethodType
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orthrus_fast.errors import CheckpointError, PromptError, TemplateError, one_line
from orthrus_fast.files import read_bytes

MAX_TEMPLATE_BYTES = 2**18  # the longest templates of the field have some 30 kB
MAX_OUTPUT = 2**24  # characters of a rendered prompt
MAX_LENGTH = 2**20  # of what one operator makes: characters, entries, or bits of a number
MAX_PIECES = 100_000  # taken to be joined where nobody knows: what jinja's ``range`` may have
MAX_NUMBER = 9999  # that a filter or method of text may be given: widths, counts, indents


class ChatTemplate:
    """The templates of a checkpoint directory: usually one, sometimes another for tools."""

    def __init__(self, path: Path, sources: Mapping[str, str]) -> None:
        self._path = path
        self._sources = sources
        self._environment = _Environment()

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate:
        """chat_template.jinja, else tokenizer_config.json's field. Raises CheckpointError."""
        path, value = directory / "chat_template.jinja", tokenizer_config.get("chat_template")
        if path.exists():
            try:
                value = read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{path}: not UTF-8 ({error})") from None
        else:
            path = directory / "tokenizer_config.json"
        if value is None:
            return cls(path, {})
        entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
        sources = {}
        for entry in entries:
            fields = entry if isinstance(entry, dict) else {}
            name, text = fields.get("name"), fields.get("template")
            if not isinstance(name, str) or not isinstance(text, str):
                raise CheckpointError(
                    f"{path}: chat_template: neither text nor a list of names and templates"
                )
            if len(text) > MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path}: chat_template: over {MAX_TEMPLATE_BYTES} bytes")
            sources[name] = text
        return cls(path, sources)

    def __bool__(self) -> bool:
        return bool(self._sources)

    def mentions(self, variable: str) -> bool:
        """Whether a template's text contains the name; one that does not cannot heed it."""
        return any(variable in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt. Raises PromptError for messages or tools of the wrong form, TemplateError for
        a template that is missing, does not parse, raises, or reaches out of its sandbox."""
        values = {name: _plain(value, f"variable {name!r}") for name, value in variables.items()}
        values |= {"messages": _messages(messages), "tools": None, "documents": None} | values
        if tools is not None:
            values["tools"] = _plain(tools, "tools")
            if not all(isinstance(tool, dict) for tool in values["tools"]):
                raise PromptError("tools: every tool must be a dict, its JSON schema")
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise TemplateError(f"{self._path}: no chat template in the checkpoint")
        try:
            pieces = self._environment.from_string(self._sources[name]).generate(values)
            return _join(pieces)
        except TemplateSyntaxError as error:
            problem = f"line {error.lineno}: {error.message}"
        except RecursionError:
            problem = "nested too deeply"
        except MemoryError:
            problem = "out of memory"
        except JinjaError as error:  # raise_exception, the sandbox, an undefined name, a limit
            problem = str(error)
        except Exception as error:  # a template may fail in any way that Python code may
            problem = f"{type(error).__name__}: {error}"
        raise TemplateError(one_line(f"{self._path}: chat template: {problem}"))


def _join(pieces: Any) -> str:
    texts, n_characters = [], 0
    for piece in pieces:
        n_characters += len(piece)
        if n_characters > MAX_OUTPUT:
            raise SecurityError(f"writes more than {MAX_OUTPUT} characters")
        texts.append(piece)
    return "".join(texts)


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as transformers 5 hands them on: no None fields, reasoning under its usual names."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError("messages: not a list with at least one message")
    plain = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"messages[{i}]: not a dict with a 'role' that is text")
        fields = {k: v for k, v in _plain(message, f"messages[{i}]").items() if v is not None}
        for name in ("reasoning_content", "thinking", "reasoning"):
            if name in fields:
                reasoning = fields[name]
                fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
                break
        plain.append(fields)
    return plain


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy of JSON-like data, so that no object of the caller's comes near the template."""
    if depth > 100:
        raise PromptError(f"{name}: nested too deeply")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):  # subclasses, such as enums, are stripped to the plain type
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(k, name, depth + 1): _plain(v, name, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        copies = [_plain(item, name, depth + 1) for item in value]
        return copies if isinstance(value, list) else tuple(copies)
    raise PromptError(f"{name}: {type(value).__name__} is not text, number, list or dict")


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with transformers' settings and a few bounds.

    Bounded: the output, one ``range`` (100,000, by jinja2), what one operator makes in one go, and
    the numbers given to filters and methods. Not bounded: time (ranges within ranges), and memory
    by many small steps. A template can waste a user's time, until Ctrl-C; it cannot reach Python.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = _tojson
        self.filters = {name: _small(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("__"):
            self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # jinja's own is an Undefined, which prints as nothing: an attempt would go unseen.
        raise SecurityError(f"reaches for {attribute!r} of {type(obj).__name__!r}, which is unsafe")

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, (str, int)):
            values = [*args, *kwargs.values()]
            _check_numbers(function.__name__, values)
            _check_texts(function.__name__, function.__self__, values)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _check_widths(left)
        else:
            _check_product(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(str(value.__self__))
        return wrapped


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Refuse ``*`` and ``**`` that would make a huge text, list or number."""
    sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
    if not all(isinstance(size, int) for size in sizes):
        return
    if operator == "**":
        length = sizes[0].bit_length() * sizes[1]
    elif sizes == [left, right]:
        length = left.bit_length() + right.bit_length()
    else:
        length = sizes[0] * sizes[1]
    if length > MAX_LENGTH:
        raise SecurityError(f"{operator} makes a value longer than {MAX_LENGTH}")


def _check_widths(text: str) -> None:
    """Refuse a format whose width or precision is huge, or comes from a value."""
    if re.search(r"\d{5}|%[-+ #0\d.]*\*|:[^}]*\{", text):
        raise SecurityError(f"formats with a number above {MAX_NUMBER}, or one from a value")


def _check_numbers(name: str, values: Sequence[Any]) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_NUMBER for value in values):
        raise SecurityError(f"{name} with a number above {MAX_NUMBER}")


def _check_texts(name: str, value: Any, values: Sequence[Any]) -> None:
    """Refuse to put a text into another so often that the result is huge."""
    texts = [text for text in values if isinstance(text, str)]
    if name == "replace" and len(texts) > 1:
        text, (old, new) = str(value), texts[:2]
        length = (text.count(old) if old else len(text) + 1) * len(new)
    elif name == "join":  # a method's value is the separator, a filter's is what is joined
        sizes = [len(v) if hasattr(v, "__len__") else MAX_PIECES for v in (value, *values)]
        length = math.prod(sizes[:2]) if len(sizes) > 1 else 0
    elif name in ("indent", "translate"):
        tables = [table.values() for table in values if isinstance(table, Mapping)]
        texts += [text for table in tables for text in table if isinstance(text, str)]
        length = len(str(value)) * max(map(len, texts), default=0)
    else:
        return
    if length > MAX_OUTPUT:
        raise SecurityError(f"{name} makes a text longer than {MAX_OUTPUT}")


def _small(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses large numbers in its arguments; what it filters may be any."""

    @functools.wraps(function)  # keeps jinja's mark for a context as first argument
    def checked(*args: Any, **kwargs: Any) -> Any:
        skipped = 2 if hasattr(function, "jinja_pass_arg") else 1  # the context, and the value
        value, values = args[skipped - 1], [*args[skipped:], *kwargs.values()]
        _check_numbers(name, values)
        _check_texts(name, value, values)
        if name == "format":
            _check_widths(str(value))
        return function(*args, **kwargs)

    return checked


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("render_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def render_body(self, caller: Macro) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers': plain JSON, where jinja2's own escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
