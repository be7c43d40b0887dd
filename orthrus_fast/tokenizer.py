"""Text to token ids and back, and chat messages to text by the checkpoint's own template.

Every file read here belongs to a checkpoint that nobody vouches for. A template is a program: it
runs in jinja2's sandbox with transformers' settings, so that it renders what transformers renders,
under the limits that ``_Environment`` describes.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import BuiltinMethodType
from typing import Any, NoReturn, TypeVar, cast

import tokenizers
from jinja2 import Template, TemplateSyntaxError, nodes
from jinja2.environment import Environment
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from orthrus_fast.config import MAX_JSON_BYTES, read_json
from orthrus_fast.errors import CheckpointError, PromptError, TemplateError

MAX_TEMPLATE_BYTES = 2**18  # the longest templates of the field have some 30 kB
MAX_WORK = 2**27  # of one rendering: a character made costs 1, a list entry 16, a step 128
MAX_SECONDS = 2.0  # of processor time, for what MAX_WORK does not see
MAX_WIDTH = 9999  # widths and counts given to functions that pad or repeat
MAX_INT_BITS = 2**16

_T = TypeVar("_T")
# Filters and methods whose result may be longer than all that went in.
_EXPANDING = frozenset(
    ["batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round", "slice", "tojson", "wordwrap", "zfill"]
)
# Filters that never turn their input into characters: no need to measure it.
_STRUCTURAL = frozenset(
    ["attr", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"]
)
# Random, or quadratic and worse, and in no chat template that we know.
_WITHOUT = ("pprint", "random", "sum", "urlize", "xmlattr")
_WITHOUT_METHODS = ("encode", "maketrans", "to_bytes", "translate")


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint directory; made by ``from_directory``."""

    def __init__(
        self,
        path: Path,
        backend: tokenizers.Tokenizer,
        template_path: Path,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, str],
    ) -> None:
        self._path, self._backend, self._special_tokens = path, backend, special_tokens
        self._template_path, self._templates = template_path, templates
        self._compiled: dict[str, tuple[Template, _Environment]] = {}
        self._rendering = threading.Lock()  # an environment meters one rendering at a time
        added = backend.get_added_tokens_decoder().values()
        self._skipped = frozenset(token.content for token in added if token.special)
        self._byte_of = _byte_of()

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and, where they exist, tokenizer_config.json and chat_template.jinja.

        Raises CheckpointError for a file that is missing, too large, or damaged, for a decoder or
        normalizer not supported, and where the two JSON files contradict each other.
        ``clean_up_tokenization_spaces`` is ignored, as transformers 5 ignores it for BPE: removing
        spaces before punctuation corrupts the text, and would contradict pieces already streamed.
        """
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_path}: not a JSON object")
        backend = _load_backend(path)
        special_tokens = _special_tokens(config, config_path)
        _check_added_tokens(config, config_path, backend)
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = [text for text in special_tokens.values() if text not in known]
        backend.add_special_tokens(list(dict.fromkeys(missing)))  # as transformers does
        template_path, templates = _read_templates(directory, config, config_path)
        return cls(path, backend, template_path, templates, special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text. Special tokens written in it become their ids, as in transformers.

        Raises PromptError for text that is not Unicode (lone surrogates), CheckpointError where
        tokenizer.json makes the library fail. How long its regular expressions take is not bounded.
        """
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of ``render_chat`` with the same arguments; raises what it and ``encode`` raise."""
        return self._encode(self.render_chat(messages, **options), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise PromptError(f"prompt: {type(text).__name__} is not text")
        _check_unicode(text)
        return _guard(
            self._path, lambda: self._backend.encode(text, add_special_tokens=add_special_tokens)
        ).ids

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Ids without an entry give nothing; bytes that are not UTF-8 give U+FFFD."""
        return b"".join(self._bytes(t, skip_special) for t in tokens).decode("utf-8", "replace")

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        return Detokenizer(lambda token: self._bytes(token, skip_special))

    def _bytes(self, token: int, skip_special: bool) -> bytes:
        """The bytes behind one id, exactly as the library's ByteLevel decoder makes them."""
        entry = self._backend.id_to_token(token) if 0 <= token < 2**32 else None
        if entry is None or (skip_special and entry in self._skipped):
            return b""
        try:
            return bytes(self._byte_of[character] for character in entry)
        except KeyError:  # an added token with a character outside the byte alphabet is plain text
            return entry.encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that the checkpoint's template makes of chat messages.

        Raises PromptError for messages or tools of the wrong form and for a result that is not
        Unicode; TemplateError for a template that is missing, does not parse, raises, reaches out
        of its sandbox or goes over a limit of ``_Environment``.
        """
        values: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        values |= {name: _plain(value, f"variable {name!r}") for name, value in variables.items()}
        if enable_thinking is not None:
            values["enable_thinking"] = enable_thinking
        if tools is not None:
            values["tools"] = _plain(tools, "tools")
            if not all(isinstance(tool, dict) for tool in values["tools"]):
                raise PromptError("tools: every tool must be a dict, its JSON schema")
        values["messages"] = _messages(messages)
        values["add_generation_prompt"] = add_generation_prompt
        text = self._render(values)
        _check_unicode(text)
        return text

    def _render(self, values: dict[str, Any]) -> str:
        use_tools = values["tools"] is not None and "tool_use" in self._templates
        name = "tool_use" if use_tools else "default"
        if name not in self._templates:
            raise TemplateError(f"{self._template_path}: no chat template in the checkpoint")
        try:
            with self._rendering:
                if name not in self._compiled:
                    made = _Environment()
                    self._compiled[name] = made.from_string(self._templates[name]), made
                template, environment = self._compiled[name]
                environment.reset()
                return environment.concat(template.generate(values))
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
        raise TemplateError(_one_line(f"{self._template_path}: chat template: {problem}"))


class Detokenizer:
    """Text of a growing list of ids: the pieces, joined, are ``decode`` of all ids, always.

    A piece costs the length of its token. Bytes that may still become a character are held back.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes: "" inside a character and for special tokens."""
        return self._decoder.decode(self._bytes_of(token))

    def finish(self) -> str:
        """What is still held back: U+FFFD for a character that was never completed, else ""."""
        return self._decoder.decode(b"", final=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


def _guard(path: Path, function: Callable[[], _T]) -> _T:
    """Call into the tokenizers library. Its failures become CheckpointErrors that name the file.

    That holds for panics too, which pyo3 derives from BaseException; Rust has then already written
    its own report to standard error, which cannot be prevented from here.
    """
    try:
        return function()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        problem = _one_line(f"{path}: refused by the tokenizers library: {error}")
        raise CheckpointError(problem) from None


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    content = _read_bytes(path, MAX_JSON_BYTES)
    backend = _guard(path, lambda: tokenizers.Tokenizer.from_buffer(content))
    decoder, normalizer = type(backend.decoder).__name__, type(backend.normalizer).__name__
    if decoder != "ByteLevel":  # any other may change text that was already streamed
        raise CheckpointError(f"{path}: decoder: {decoder} is not supported, only ByteLevel is")
    if normalizer not in ("NoneType", "NFC", "NFD", "NFKC", "NFKD"):  # a chain of replacements
        raise CheckpointError(  # can grow a text without bound
            f"{path}: normalizer: {normalizer} is not supported, only the Unicode forms are"
        )
    if getattr(backend.model, "dropout", None):
        raise CheckpointError(f"{path}: model.dropout: makes ids random; refused")
    backend.no_truncation()  # a prompt is never cut or padded in silence
    backend.no_padding()
    return backend


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'file not found'}")
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(f"{path}: {size} bytes, over the limit of {limit}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _special_tokens(config: dict[str, Any], path: Path) -> dict[str, str]:
    """bos_token, eos_token and so on: strings, or AddedToken objects with a content."""
    found = {}
    for name, value in config.items():
        if name.endswith("_token") and value is not None and not isinstance(value, bool):
            content = value.get("content") if isinstance(value, dict) else value
            if not isinstance(content, str):
                raise CheckpointError(f"{path}: {name}: neither text nor an object with content")
            found[name] = content
    return found


def _check_added_tokens(config: dict[str, Any], path: Path, backend: tokenizers.Tokenizer) -> None:
    """tokenizer_config.json repeats the added tokens; a difference would change ids or text."""
    declared, known = config.get("added_tokens_decoder"), backend.get_added_tokens_decoder()
    if declared is None:
        return
    if not isinstance(declared, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder: not an object")
    for name, token in declared.items():
        own = known.get(int(name)) if re.fullmatch("[0-9]{1,10}", name) else None
        said = token if isinstance(token, dict) else {}
        if own is None or (said.get("content"), said.get("special")) != (own.content, own.special):
            raise CheckpointError(f"{path}: added_tokens_decoder: {name}: not as in tokenizer.json")


def _read_templates(
    directory: Path, config: dict[str, Any], config_path: Path
) -> tuple[Path, dict[str, str]]:
    """Templates by name, and the file that they are from; chat_template.jinja goes first."""
    path, value = directory / "chat_template.jinja", config.get("chat_template")
    if path.exists():
        try:
            return path, {"default": _read_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8")}
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path}: not UTF-8 ({error})") from None
    entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
    templates = {}
    for entry in entries if value is not None else []:
        fields = entry if isinstance(entry, dict) else {}
        name, text = fields.get("name"), fields.get("template")
        if not isinstance(name, str) or not isinstance(text, str) or len(text) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{config_path}: chat_template: neither a string nor a list of names and templates "
                f"of at most {MAX_TEMPLATE_BYTES} characters"
            )
        templates[name] = text
    return config_path, templates


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt: character {error.start} is a lone surrogate, which is not Unicode text"
        ) from None


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


# The environment that templates run in.


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox as transformers sets it up, with a meter that counts the work.

    Bounded by MAX_WORK (so memory stays below about 1 GiB, and the refusal is the same everywhere):
    loop steps, calls, filters, operators, the characters and entries that they make, and output.
    What would make a huge value in one go is measured before it runs: ``*``, ``**``, ``%``, format,
    padding, join, replace, indent, tojson, and printing of lists that contain one list many times.
    Processor time is bounded by MAX_SECONDS, looked at in each such step. Not bounded is the time
    of a single step in C: comparing (``==``, ``in``, sort) two lists that each contain one list
    many times, level upon level. Absent: lipsum, and the filters and methods of ``_WITHOUT``.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._text,
        )
        self.reset()
        self.concat = self._concat  # type: ignore[method-assign]
        for name in _WITHOUT:
            del self.filters[name]
        self.filters["tojson"] = _tojson
        self.filters = {name: self._metered(name, f) for name, f in self.filters.items()}
        # Uppercase names, which _Meter's rewriting calls; harmless to a template that does, too.
        self.filters["METERED_LOOP"] = self._steps
        self.filters["METERED"] = self._made
        self.filters["CONCAT"] = lambda *parts: self._concat(map(self._text, parts))
        del self.globals["lipsum"]
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def reset(self) -> None:
        """Start the meter anew, for one rendering."""
        self.work, self.deadline = MAX_WORK, time.thread_time() + MAX_SECONDS

    def spend(self, work: int) -> None:
        self.work -= work + 128
        if self.work < 0:
            raise SecurityError("makes more text or takes more steps than any chat needs")
        if time.thread_time() > self.deadline:
            raise SecurityError(f"takes more than {MAX_SECONDS} seconds")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Meter().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)  # type: ignore[no-any-return]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _WITHOUT_METHODS and super().is_safe_attribute(obj, attr, value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return (
            self.unsafe_undefined(obj, attribute)
            if attribute.startswith("__")
            else (super().getattr(obj, attribute))
        )

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # jinja's own is an Undefined, which prints as nothing: an attempt would go unseen.
        raise SecurityError(f"reaches for {attribute!r} of {type(obj).__name__!r}, which is unsafe")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, formatter = str(value.__self__), _Formatter(self)
        if value.__name__ == "format":
            return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)
        return lambda mapping: formatter.vformat(text, (), mapping)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(function, BuiltinMethodType) and isinstance(function.__self__, (str, int)):
            self._measure(function.__name__, [function.__self__, *args, *kwargs.values()])
        return self._made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._measure_percent(left, right)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _refuse_bits(left.bit_length() + right.bit_length())
        elif operator == "*":
            factors = [len(v) * 16 if hasattr(v, "__len__") else v for v in (left, right)]
            if all(isinstance(factor, int) for factor in factors):
                self._reserve(factors[0] * factors[1])
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _refuse_bits(left.bit_length() * right)
        return self._made(super().call_binop(context, operator, left, right))

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # keeps jinja's mark for a context as first argument
        def metered(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            if values and isinstance(values[0], (Context, EvalContext, Environment)):
                del values[0]
            self._measure(name, values)
            if name == "format" and values:
                self._measure_percent(str(values[0]), values[1:])
            return self._made(function(*args, **kwargs))

        return metered

    def _measure(self, name: str, values: Sequence[Any]) -> None:
        """Refuse, before it runs, what would make more characters than are left to spend."""
        if values and isinstance(values[0], str):  # it may be split into a list of characters
            self._reserve(16 * len(values[0]))
        if name in _STRUCTURAL or not values:
            return
        value, *rest = (self._extent(value) for value in values)
        if name not in _EXPANDING:
            return
        for width in values[1:]:
            if isinstance(width, int):
                if abs(width) > MAX_WIDTH:
                    raise SecurityError(f"{name} with a number above {MAX_WIDTH}")
                rest.append(abs(width))
        self._reserve((1 + value) * (1 + sum(rest)))

    def _measure_percent(self, left: str, right: Any) -> None:
        widths = re.findall(r"\d+", left)
        values = right if isinstance(right, (list, tuple)) else [right]
        if re.search(r"%[-+ #0\d.]*\*", left):  # the width is among the values
            widths += [str(value) for value in values if isinstance(value, int)]
        if any(len(width) > 4 for width in widths):
            raise SecurityError(f"% formatting with a number above {MAX_WIDTH}")
        widest = max(map(int, widths), default=0)
        self._reserve(len(left) + left.count("%") * (self._extent(right) + widest))

    def _reserve(self, work: int) -> None:
        if work > self.work:
            raise SecurityError("makes more text than any chat needs")

    def _extent(self, value: Any) -> int:
        """About how many characters a value takes when printed or as JSON, each level indented."""
        total, stack = 0, [(value, 1)]
        while stack:
            item, depth = stack.pop()
            parts: Any = ()
            if isinstance(item, str):
                total += len(item)
            elif isinstance(item, int):
                total += item.bit_length() // 3
            elif isinstance(item, Mapping):
                parts = [part for pair in item.items() for part in pair]
            elif isinstance(item, _Items):
                parts = item.items
            elif isinstance(item, Iterable) and hasattr(item, "__len__"):
                parts = item  # list, tuple, range, the views of a dict
            total += depth + len(parts)
            self._reserve(total)
            if parts:
                self.spend(16 * (len(parts) + 32))  # looking has its price, too
                stack += [(part, depth + 1) for part in parts]
        return total

    def _text(self, value: Any) -> str:
        """What a template prints, or joins with ``~``."""
        if not isinstance(value, str):
            self._extent(value)
            value = str(value)
        self.spend(len(value))
        return value  # type: ignore[no-any-return]

    def _made(self, value: _T) -> _T | _Items:
        """Pay for a value that an operator, a filter, a call or a slice has made."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, int):
            _refuse_bits(value.bit_length())
            self.spend(0)
        elif isinstance(value, (list, tuple, dict)):
            self.spend(16 * len(value))
        elif isinstance(value, Iterator) and not isinstance(value, (LoopContext, _Items)):
            return _Items(list(self._steps(value)))  # what is lazy could not be measured later
        else:
            self.spend(0)
        return value

    def _steps(self, values: Iterable[_T]) -> Iterator[_T]:
        for value in values:
            self.spend(0)
            yield value

    def _concat(self, pieces: Iterable[str]) -> str:
        texts = []
        for piece in pieces:
            self.spend(len(piece))
            texts.append(piece)
        return "".join(texts)


class _Meter(NodeTransformer):
    """Routes what the sandbox does not intercept through the meter: loops, ``~`` and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), "METERED_LOOP")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node.nodes[0], "CONCAT", node.nodes[1:])

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(node, "METERED") if isinstance(node.arg, nodes.Slice) else node


def _filter(node: nodes.Expr, name: str, args: Sequence[nodes.Expr] = ()) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


class _Items:
    """What a lazy filter gave, made already: like a generator true, and used up by one loop."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items[::-1]

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        if not self.items:
            raise StopIteration
        return self.items.pop()


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


class _Formatter(SandboxedFormatter):
    """str.format, metered. Made for each access to the method."""

    def __init__(self, environment: _Environment) -> None:
        super().__init__(environment)
        self.environment = environment

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self.environment._extent(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        self.environment._measure_percent(format_spec, ())
        return self.environment._text(super().format_field(value, format_spec))


class _Namespace(Namespace):
    """jinja's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: B902 (allows a field named self)
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:  # jinja's prints all fields, however often one contains the other
        return "<Namespace>"


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace field {name!r} begins with an underscore")


def _refuse_bits(bits: int) -> None:
    if bits > MAX_INT_BITS:
        raise SecurityError(f"a number of more than {MAX_INT_BITS} bits")


def _raise_exception(message: str) -> None:
    raise JinjaError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
