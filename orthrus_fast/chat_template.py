"""Chat messages to a prompt, by the checkpoint's own template.

A template is a program that nobody vouches for. It runs in jinja2's immutable sandbox, set up as
transformers sets it up, so that it renders what transformers renders.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import string
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn, TypeVar

from jinja2 import Template, TemplateSyntaxError, meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, markup_join, str_join
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from orthrus_fast.errors import CheckpointError, OrthrusError, PromptError, TemplateError, one_line
from orthrus_fast.files import TEMPLATE_FILES, read_bytes

_T = TypeVar("_T")

MAX_TEMPLATE_BYTES = 2**18  # the longest templates of the field have some 30 kB
MAX_OUTPUT = 2**24  # characters of a rendered prompt, and of any text that a template makes
MAX_MADE = 2**28  # of all texts and lists that one rendering makes
MAX_LENGTH = 2**20  # of what ``*`` and ``**`` make: characters, entries, or bits of a number
MAX_NUMBER = 9999  # of a width or a count, and of a format's
_PROBE = "what is written here"
_WIDTHS = frozenset(  # filters and methods that make as much as a number says
    "batch center expandtabs indent ljust rjust round slice to_bytes zfill".split()
)
_SELECTING = frozenset(  # filters that hand on what they get, and never write it out as text
    "abs count d default dictsort first float groupby int items last length list map max min random"
    " reject rejectattr reverse select selectattr sort unique".split()
)


class ChatTemplate:
    """The templates of a checkpoint directory: usually one, sometimes another for tools."""

    def __init__(self, path: Path, sources: Mapping[str, str]) -> None:
        self._path = path
        self._sources = sources
        self._environment = _Environment()
        self._compiled: dict[str, tuple[Template, frozenset[str]]] = {}

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: dict[str, Any]) -> ChatTemplate:
        """Read the template files, or where there is none, tokenizer_config.json's field.

        As in transformers, a file of ``additional_chat_templates`` replaces one of its name, and
        the field counts only where there is no file. Raises CheckpointError.
        """
        sources, path = {}, directory / "tokenizer_config.json"
        for name, file in TEMPLATE_FILES:
            if (directory / file).exists():
                path = directory / file
                try:
                    sources[name] = read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")
                except UnicodeDecodeError as error:
                    raise CheckpointError(f"{path}: not UTF-8 ({error})") from None
        return cls(path, sources or _from_config(path, tokenizer_config.get("chat_template")))

    def __bool__(self) -> bool:
        return bool(self._sources)

    def mentions(self, variable: str) -> bool:
        """Return whether a template reads the variable. Raises TemplateError if it cannot parse."""
        return any(variable in self._compile(name)[1] for name in self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        defaults: Mapping[str, Any],
    ) -> str:
        """Return the prompt. ``variables`` are the caller's; ``defaults`` need not be mentioned.

        Raises PromptError for messages or tools of the wrong form, and for tools and variables that
        the template does not mention; TemplateError for a template that is missing, does not parse,
        raises, or reaches out of its sandbox.
        """
        values = {name: _plain(value, f"variable {name!r}") for name, value in variables.items()}
        values = {"documents": None, **defaults, **values, "messages": _messages(messages)}
        values["tools"] = None if tools is None else _plain(tools, "tools")
        if not all(isinstance(tool, dict) for tool in values["tools"] or ()):
            raise PromptError("tools: every tool must be a dict, its JSON schema")
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        template, mentioned = self._compile(name)
        for variable in [*variables, *(["tools"] if tools else [])]:
            if variable not in mentioned:
                raise PromptError(f"{variable}: the chat template has no such variable; leave out")
        if any(isinstance(message.get("content"), (list, tuple)) for message in values["messages"]):
            part = {"type": "text", "text": _PROBE}
            joins = self._writes(template, values, _PROBE)
            joins = joins or not self._writes(template, values, [part])
            for i, message in enumerate(values["messages"]):
                _check_parts(message, f"messages[{i}]", joins)
        with self._errors():
            return self._environment.render(template, values)

    def _compile(self, name: str) -> tuple[Template, frozenset[str]]:
        """Return a template, compiled when it is first asked for, and the variables it reads."""
        if name not in self._sources:
            only = f" but {', '.join(self._sources)}" if self._sources else " in the checkpoint"
            raise TemplateError(one_line(f"{self._path}: no chat template{only}"))
        if name not in self._compiled:
            with self._errors():
                self._environment.reset()  # constants are worked out while compiling
                syntax = self._environment.parse(self._sources[name])
                template = self._environment.from_string(syntax)
                variables = frozenset(meta.find_undeclared_variables(syntax))
                self._compiled[name] = template, variables
        return self._compiled[name]

    def _writes(self, template: Template, values: Mapping[str, Any], content: Any) -> bool:
        """Return whether the text of a user's message with this content arrives in the prompt."""
        probe = {**values, "messages": [{"role": "user", "content": content}]}
        try:
            with self._errors():
                return _PROBE in self._environment.render(template, probe)
        except TemplateError:
            return False

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn whatever a template raises into a TemplateError of one line."""
        try:
            yield
            return
        except OrthrusError:
            raise
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


def _from_config(path: Path, value: Any) -> dict[str, str]:
    """Return the templates by name of a field that is a text, a dict of texts, or a list."""
    if value is None:
        return {}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else [("default", value)]
    for name, text in pairs:
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{path}: chat_template: neither text nor a list of names and templates"
            )
        if len(text) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: chat_template: over {MAX_TEMPLATE_BYTES} bytes")
    return dict(pairs)


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


def _check_parts(message: dict[str, Any], name: str, joins: bool) -> None:
    """Check that a content of parts is all text; where ``joins``, make it one text.

    Servers join with a line feed (vLLM, llama.cpp): a client's parts are blocks of their own, such
    as a file and a question, and without one the last word of one would grow into the next.
    """
    parts = message.get("content")
    if not isinstance(parts, (list, tuple)):
        return
    for i, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise PromptError(
                f"{name}: content[{i}]: {one_line(repr(kind))[:50]} is not a part with text; only "
                'parts {"type": "text", "text": …} can be decoded'
            )
    if joins:
        message["content"] = "\n".join(part["text"] for part in parts)


class _CodeGenerator(CodeGenerator):
    """Compiles what jinja runs without asking its environment, ``~`` and slices, to calls of it."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join(context, (")
        for argument in node.nodes:
            self.visit(argument, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        sliced = isinstance(node.arg, nodes.Slice)
        self.write("environment.made(" if sliced else "")
        super().visit_Getitem(node, frame)
        self.write(")" if sliced else "")


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with transformers' settings and a few bounds.

    Bounded: the output, one ``range`` (100,000, by jinja2), every text, and the sum of all texts
    and lists that one rendering makes; what would make a huge one is refused before it does. Which
    numbers stand in a template does not matter. Not bounded: time (loops within loops). A template
    can waste a user's time, until Ctrl-C; it cannot reach Python.
    """

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_written
        )
        self._rendering = threading.local()
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bound(name, f) for name, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def reset(self) -> None:
        """Begin to count what is made anew."""
        self._rendering.made = 0

    def render(self, template: Template, values: Mapping[str, Any]) -> str:
        """Return the whole output, which is bounded like any other text."""
        self.reset()
        return self.concat(template.generate(values))

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a template writes into its output, a macro's, or a block's."""
        texts, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_OUTPUT:
                raise SecurityError(f"writes more than {MAX_OUTPUT} characters")
            texts.append(piece)
        return self.made("".join(texts))

    def join(self, context: Context, values: Sequence[Any]) -> str:
        """Return ``a ~ b``."""
        _check_length("~", _length(values))
        return self.made((markup_join if context.eval_ctx.autoescape else str_join)(values))

    def made(self, value: _T) -> _T:
        """Count a text or list that was just made, and return it."""
        if isinstance(value, (str, bytes, list, tuple, dict)):
            size = len(value) * (1 if isinstance(value, (str, bytes)) else 8)  # bytes of an entry
            self._rendering.made += size
            if size > MAX_OUTPUT or self._rendering.made > MAX_MADE:
                raise SecurityError(f"makes texts of over {MAX_OUTPUT}, or {MAX_MADE} in all")
        return value

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("__"):
            self.unsafe_undefined(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _written(argument)  # in the message, where there is no such item
        return super().getitem(obj, argument)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # jinja's own is an Undefined, which prints as nothing: an attempt would go unseen.
        raise SecurityError(f"reaches for {attribute!r} of {type(obj).__name__!r}, which is unsafe")

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, (BuiltinMethodType, MethodType)):
            value, name = function.__self__, function.__name__
            if isinstance(value, (str, bytes, int)):
                args = tuple(map(_taken, args))
                _check_growth(name, value, [*args, *kwargs.values()])
        return self.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_format(_percent_specs(left), right)
        elif operator != "+":
            _check_product(operator, left, right)
        return self.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_format(_brace_specs(str(value.__self__)), [args, kwargs])
            return self.made(wrapped(*args, **kwargs))

        return bounded

    def _bound(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter with its bounds."""
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context

        @functools.wraps(function)  # keeps jinja's mark for a context as first argument
        def checked(*args: Any, **kwargs: Any) -> Any:
            if name not in _SELECTING:
                args = tuple(map(_taken, args))
                value, values = args[skipped], [*args[skipped + 1 :]]
                values += [kwargs[key] for key in sorted(kwargs, reverse=True)]  # old before new
                if name == "format":
                    _check_format(_percent_specs(str(value)), values)
                _check_growth(name, value, values)
            return self.made(function(*args, **kwargs))

        return checked


class _Namespace(Namespace):
    __repr__ = object.__repr__  # jinja's writes out the values, however huge


def _taken(value: Any) -> Any:
    """Return what an iterator yields as a list, so that it can be measured."""
    if not isinstance(value, Iterator):
        return value
    values = list(itertools.islice(value, MAX_RANGE + 1))
    if len(values) > MAX_RANGE:
        raise SecurityError(f"takes more than {MAX_RANGE} values")
    return values


def _written(value: Any) -> Any:
    """Return a value that is about to be written, unless the text would be huge."""
    if not isinstance(value, str):
        _check_length("writing a value", _length([value]))
    return value


def _length(values: Iterable[Any], indent: int = 0) -> int:
    """Return about how many characters the values are as text; counting ends past the limit.

    Each entry has ``indent`` more on every level that it is nested. A small value may be huge as
    text: a list that has another list twice, which has another twice, and so on.
    """
    total, waiting = 0, [(value, 1) for value in values]
    while waiting and total <= MAX_OUTPUT:
        value, depth = waiting.pop()
        total += 1 + indent * depth
        if isinstance(value, (str, bytes)):
            total += len(value)
        elif isinstance(value, Collection):
            total += 64 + 16 * len(value)  # more than most take, so that counting ends soon
            if total <= MAX_OUTPUT:
                waiting += [(entry, depth + 1) for entry in value]
                if isinstance(value, Mapping):
                    waiting += [(entry, depth + 1) for entry in value.values()]
    return total


def _check_length(name: str, length: int) -> None:
    if length > MAX_OUTPUT:
        raise SecurityError(f"{name} makes a text longer than {MAX_OUTPUT}")


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


def _percent_specs(text: str | bytes) -> list[str]:
    """Return the flags, widths and precisions of a ``%`` format; ``*`` may be any number."""
    text = _text(text)
    # A key may have parentheses in it: where there are keys, any ")" may end one.
    start = r"(?:%(?:\([^)]*\))?|\))" if "%(" in text else "%"
    specs = re.findall(start + r"([-+ #0]*[\d*]*(?:\.[\d*]*)?)[a-zA-Z%]", text)
    return [spec.replace("*", "99999") for spec in specs]


def _brace_specs(text: str) -> list[str]:
    """Return the format specs of a text for ``str.format``."""
    parsed = string.Formatter().parse(text)
    return [spec or "" for _, field, spec, _ in parsed if field is not None]


def _check_format(specs: list[str], values: Any) -> None:
    """Refuse a width or precision that is huge, or comes from a value; and a huge result."""
    if any(re.search(r"\d{5}|{", spec) for spec in specs):
        raise SecurityError(f"formats with a number above {MAX_NUMBER}, or one from a value")
    widths = [int(width) for spec in specs for width in re.findall(r"\d+", spec)]
    _check_length("a format", len(specs) * (_length([values]) + max(widths, default=0)))


def _check_growth(name: str, value: Any, values: Sequence[Any]) -> None:
    """Refuse a filter or a method of a text that would make a huge one."""
    if name in _WIDTHS and any(isinstance(v, int) and abs(v) > MAX_NUMBER for v in values):
        raise SecurityError(f"{name} with a number above {MAX_NUMBER}")
    indent = 1 if name == "pprint" else _size(values) if name == "tojson" else 0
    length = _length([value, *values], indent)
    _check_length(name, length)
    if name == "replace" and len(values) > 1:
        text, old, new = (_text(v) for v in (value, *values[:2]))
        length = (text.count(old) if old else len(text) + 1) * len(new)
    elif name == "join":
        length = _n_pieces(value) * _n_pieces(values[0]) if values else 0
    elif name in ("indent", "expandtabs"):
        ends = "\n" if name == "indent" else "\t"
        length = (_text(value).count(ends) + 1) * max(_size(values), 8)
    elif name in ("translate", "urlize", "wordwrap"):  # numbers are characters, or where to wrap
        tables = [v.values() if isinstance(v, Mapping) else v for v in values]
        texts = [t for table in tables if isinstance(table, Iterable) for t in (table, *table)]
        length = len(str(value)) * max((len(t) for t in texts if isinstance(t, str)), default=0)
    _check_length(name, length)


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _n_pieces(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _size(value: Any) -> int:
    """Return a number, or the length of a text; of several the sum."""
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0


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
    raise JinjaError(_written(message))


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
