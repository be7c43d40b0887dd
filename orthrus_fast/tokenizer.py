"""Text to token ids and back.

Every file read here belongs to a checkpoint that nobody vouches for.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from orthrus_fast.chat_template import ChatTemplate
from orthrus_fast.errors import CheckpointError, PromptError, TemplateError, one_line, shown
from orthrus_fast.files import MAX_JSON_BYTES, read_bytes, read_object

_T = TypeVar("_T")
_NAMES = [  # of special tokens, in the order in which transformers adds those that are missing
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
]


class Tokenizer:
    """The tokenizer and the chat template of a checkpoint directory; made by ``from_directory``."""

    def __init__(
        self,
        path: Path,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        chat_template: ChatTemplate,
    ) -> None:
        self._path, self._backend, self._special_tokens = path, backend, special_tokens
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder().values()
        self._skipped = frozenset(token.content for token in added if token.special)
        self._byte_of = _byte_of()

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and, where they exist, the other files that transformers heeds.

        These are tokenizer_config.json, the templates and, unless tokenizer_config.json has
        ``added_tokens_decoder``, special_tokens_map.json and added_tokens.json. Tokens that
        tokenizer.json lacks are added as transformers adds them, with the same ids. Raises
        CheckpointError for a file that is missing, too large, or damaged, for a decoder or
        normalizer not supported, and where the files contradict each other.
        ``clean_up_tokenization_spaces`` is ignored, as transformers 5 ignores it for BPE: removing
        spaces before punctuation corrupts the text, and would contradict pieces already streamed.
        """
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        config = read_object(config_path) if config_path.exists() else {}
        if config.get("fast_tokenizer_files"):
            raise CheckpointError(f"{config_path}: fast_tokenizer_files: only {path.name} is read")
        backend = _load_backend(path)
        _check_added_tokens(config, config_path, backend)
        named, special = _special_tokens(directory, config)
        if _is_legacy(config) and (directory / "added_tokens.json").exists():
            _add_tokens(backend, directory / "added_tokens.json", special)
        backend.add_special_tokens(special)
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        chat_template = ChatTemplate.from_directory(directory, config)
        return cls(path, backend, named, chat_template)

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self._path.parent

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

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
        return b"".join(self.bytes_of(t, skip_special) for t in tokens).decode("utf-8", "replace")

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        return Detokenizer(lambda token: self.bytes_of(token, skip_special))

    def special_ids(self) -> list[int]:
        """The ids that are no text."""
        added = self._backend.get_added_tokens_decoder()
        return [index for index, token in added.items() if token.special]

    def verbatim_encoder(self) -> Callable[[str], list[int]]:
        """A function that gives the ids of a text whose bytes, decoded, are the text's own.

        Nothing is normalized, and names of special tokens are text like any other.
        """
        fields = json.loads(self._backend.to_str()) | {"normalizer": None, "post_processor": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(fields))
        backend.encode_special_tokens = True
        return lambda text: list(backend.encode(text, add_special_tokens=False).ids)

    def bytes_of(self, token: int, skip_special: bool = True) -> bytes:
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
        """Return the prompt that the checkpoint's template makes of chat messages.

        ``variables`` are the template's own, by name. None for ``tools`` or ``enable_thinking``
        is as if not given. Raises what ``ChatTemplate.render`` raises, and PromptError for text
        that is not Unicode.
        """
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        defaults = {**self._special_tokens, "add_generation_prompt": add_generation_prompt}
        text = self.chat_template.render(messages, tools, variables, defaults)
        _check_unicode(text)
        return text

    def thinks_by_default(self) -> bool:
        """Return whether the template leaves thinking on unless ``enable_thinking`` is False."""
        hello = [{"role": "user", "content": "Hello"}]
        try:
            if not self.chat_template.mentions("enable_thinking"):
                return False
            unset, on, off = (
                self.render_chat(hello, enable_thinking=v) for v in (None, True, False)
            )
        except (PromptError, TemplateError):  # said where a prompt of the user's is rendered
            return False
        return unset == on != off


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
        problem = one_line(f"{path}: refused by the tokenizers library: {error}")
        raise CheckpointError(problem) from None


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    content = read_bytes(path, MAX_JSON_BYTES)
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


def _byte_of() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _is_legacy(config: dict[str, Any]) -> bool:
    """Return whether transformers heeds the older files beside tokenizer_config.json."""
    return "added_tokens_decoder" not in config


def _special_tokens(directory: Path, config: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the named special tokens, and the texts of all in transformers' order."""
    named, extra = _read_special_tokens(config, directory / "tokenizer_config.json")
    path = directory / "special_tokens_map.json"
    if _is_legacy(config) and path.exists():
        fields = read_object(path)
        if extra:  # transformers adds to extra_special_tokens, and passes over its older name
            fields.pop("additional_special_tokens", None)
        more_named, more_extra = _read_special_tokens(fields, path)
        named, extra = named | more_named, extra + more_extra
    present = {name: token for name, token in named.items() if token is not None}
    ranks = {name: i for i, name in enumerate(_NAMES)}
    ordered = sorted(present, key=lambda name: ranks.get(name, len(ranks)))
    return present, list(dict.fromkeys([*(present[name] for name in ordered), *extra]))


def _read_special_tokens(
    fields: dict[str, Any], path: Path
) -> tuple[dict[str, str | None], list[str]]:
    """Return the special tokens of one file: bos_token, eos_token and so on by name, and a list.

    A field that only looks like one by its name, such as ``num_image_token: 256``, has no effect.
    """
    own = {name: value for name, value in fields.items() if name.endswith("_token")}
    extra = fields.get("extra_special_tokens") or fields.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        own, extra = own | extra, []
    if not isinstance(extra, list):
        raise CheckpointError(f"{path}: extra_special_tokens: neither a list nor an object")
    named: dict[str, str | None] = {}
    for name, value in own.items():
        if name in _NAMES and value is None:
            named[name] = None
        elif name in _NAMES or isinstance(value, (str, dict)):
            named[name] = _content(value, f"{path}: {name}")
    return named, [_content(token, f"{path}: extra_special_tokens") for token in extra]


def _content(token: Any, name: str) -> str:
    """Return the text of a token: a string, or an object with a content."""
    fields = token if isinstance(token, dict) else {"content": token}
    if not isinstance(fields.get("content"), str) or not fields["content"]:
        raise CheckpointError(f"{name}: neither text nor an object with content")
    return str(fields["content"])


def _add_tokens(backend: tokenizers.Tokenizer, path: Path, special: Sequence[str]) -> None:
    """Add the tokens of added_tokens.json that tokenizer.json lacks, in the order of their ids."""
    declared = read_object(path)
    if not all(type(index) is int for index in declared.values()):
        raise CheckpointError(f"{path}: not an object of ids by token")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text, index in sorted(declared.items(), key=lambda item: item[1]):
        if text and text not in known:
            plain = tokenizers.AddedToken(text, normalized=text not in special, special=False)
            backend.add_tokens([plain])
        if backend.token_to_id(text) != index:
            raise CheckpointError(
                f"{path}: {shown(text)!r}: id {index} is not the one that follows from "
                f"tokenizer.json ({backend.token_to_id(text)}); correct one of the two files"
            )


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


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"prompt: character {error.start} is a lone surrogate, which is not Unicode text"
        ) from None
