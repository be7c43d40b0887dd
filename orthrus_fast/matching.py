"""Grammars at work: which tokens may follow a text, as bit masks over the vocabulary.

llguidance does the parsing (https://github.com/guidance-ai/llguidance). Where a text stands depends
on its tokens alone, so a mask is the same in every mode, width and slot.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from orthrus_fast.errors import RequestError, UnsupportedError, one_line, shown
from orthrus_fast.grammar import Grammar
from orthrus_fast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CACHED = 64  # compiled grammars, some hundred kB each
MOST_FORCED = 256  # characters that are encoded at once; a grammar may force a whole book
PATIENCE = 5.0  # seconds that compiling one may take
STACK = 2**29  # bytes to compile on: rules may lead to each other through a whole source
MOST_MULTIPLE = 10_000  # llguidance makes a state for each remainder
MOST_EXACT = 2**53  # llguidance has numbers as floats; far below 0 it runs out of its stack
_LIMITS = (("maximum", 2**63 - 1), ("maximum", 2**64 - 1))  # of integers, which work
_DEFAULTS: Any = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}"}  # else a text may be nothing else
# Without \u a character is written in one way, so that no name passes for another.
_OVERRIDES: Any = {"lenient": False, "json_allowed_escapes": 'nrbtf\\"'}
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_SCHEMA_IN_LARK = re.compile(r"%json\s*(?=\{)")


class Block(NamedTuple):
    """What verification may put after a text: drafts, masks of the rows that they lead to."""

    drafts: list[int]
    masks: list[bytes]  # one more than drafts, of 32-bit words
    width: int  # rows for which drafts were looked for

    def drafts_for(self, width: int) -> list[int]:
        """Drafts for a block of ``width``, at least as many as rows here.

        The one after the last here is forbidden, so that no row without a mask is reached.
        """
        rest = width - 1 - len(self.drafts)
        return self.drafts + ([first_forbidden(self.masks[-1])] * rest if rest else [])


class Matcher:
    """Where one text stands in its grammar.

    A method raises RequestError once the grammar has taken more steps than llguidance allows.
    """

    def __init__(self, backend: LLMatcher, eos: Sequence[int]) -> None:
        self._backend = backend
        self._eos = frozenset(eos)

    def mask(self) -> bytes:
        """Which tokens may come next, a bit each, the lowest first; padded to 32-bit words."""
        mask = self._backend.compute_bitmask()
        self._check()
        return mask

    def consume(self, tokens: Sequence[int]) -> None:
        """Go on after ``tokens``, which the masks have allowed."""
        self._backend.consume_tokens(list(tokens))
        self._check()

    def restart(self, tokens: Sequence[int]) -> None:
        """Go back to the beginning, and on after ``tokens``."""
        self._backend.reset()
        self.consume(tokens)

    def block(self, proposals: Sequence[int], width: int, forced: bool = True) -> Block:
        """The masks and drafts of a block of ``width``; the text stays where it is.

        Drafts are the proposals up to the first that the grammar forbids; where it leaves no
        choice, its only token stands instead, if ``forced``.
        """
        drafts: list[int] = []
        masks = [self.mask()]
        while len(masks) < width:
            token = self._next_draft(masks[-1], proposals[len(drafts) :], forced)
            if token is None or not self._backend.try_consume_tokens([token]):
                break
            drafts.append(token)
            masks.append(self.mask())
        self._backend.rollback(len(drafts))
        return Block(drafts, masks, width)

    def _next_draft(self, mask: bytes, proposals: Sequence[int], forced: bool) -> int | None:
        """The next draft before an end of the text: a proposal, or the only token allowed."""
        if not (proposals and allows(mask, proposals[0])):
            proposals = self._backend.compute_ff_tokens() if forced else []
        if not proposals or proposals[0] in self._eos:
            return None
        return proposals[0]

    def _check(self) -> None:
        if self._backend.is_error():
            raise RequestError(f"grammar: {one_line(self._backend.get_error())}")


def allows(mask: bytes, token: int) -> bool:
    """Whether a mask has the bit of a token."""
    return bool(mask[token >> 3] >> (token & 7) & 1)


def first_forbidden(mask: bytes) -> int:
    """The lowest id that a mask forbids; there is one: no grammar knows of every special token."""
    index = next(i for i, byte in enumerate(mask) if byte != 0xFF)
    return 8 * index + next(bit for bit in range(8) if not mask[index] >> bit & 1)


class Grammars:
    """Compiles grammars for one tokenizer, while the caller waits; keeps those used lately."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, tuple(eos)
        self._lock = threading.Lock()
        self._compiler: ThreadPoolExecutor | None = None  # a thread once one is compiled
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._of_library: LLTokenizer | None = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of a text.

        Raises RequestError for a grammar that is damaged, not supported, too large or too slow to
        compile, and UnsupportedError where llguidance is not installed.
        """
        if not self._eos:
            raise RequestError("grammar: needs an end-of-sequence id, and the checkpoint has none")
        with self._lock:
            backend = self._compiled.get(grammar)
        if backend is None:
            check_source(grammar)
            with self._lock:
                self._compiler = self._compiler or _thread_with(STACK)
            compiling = self._compiler.submit(self._compile, grammar)
            try:
                backend = compiling.result(PATIENCE)
            except FutureTimeoutError:
                compiling.cancel()
                raise RequestError(
                    f"grammar: {grammar.kind}: compiling takes more than {PATIENCE:g} seconds"
                ) from None
        with self._lock:
            self._compiled[grammar] = backend
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MOST_CACHED:
                self._compiled.popitem(last=False)
            return Matcher(backend.deep_copy(), self._eos)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError:
            raise UnsupportedError(
                "grammar: needs llguidance; pip install 'orthrus-fast[grammar]'"
            ) from None
        with self._lock:
            if self._of_library is None:
                self._of_library = as_library_has_it(self._tokenizer, self._vocab_size, self._eos)
        try:
            source = _library_source(grammar, LLMatcher)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"grammar: {grammar.kind}: {one_line(str(error))}") from None
        limits = LLParserLimits(verbose_errors=False)  # its own are bounds of time and memory, too
        backend = LLMatcher(self._of_library, source, log_level=0, limits=limits)
        if backend.is_error():
            raise RequestError(f"grammar: {grammar.kind}: {one_line(backend.get_error())}")
        Matcher(backend, self._eos).mask()
        return backend


def _thread_with(stack: int) -> ThreadPoolExecutor:
    """A thread for whom that many bytes are kept, of which it takes what it needs."""
    before = threading.stack_size(stack)
    try:
        pool = ThreadPoolExecutor(1, "orthrus-grammar")
        pool.submit(int)  # which starts it
    finally:
        threading.stack_size(before)
    return pool


def check_source(grammar: Grammar) -> None:
    """Refuse schemas that llguidance compiles, but does not hold a text to, or cannot bear.

    Multiples take a time and memory of their own kind, which nothing else bounds; several that hold
    for one number are as one of their least common multiple. Raises RequestError.
    """
    together = 1
    for key, value in _parts_of(grammar):
        why = ""
        if type(value) in (int, float):
            if not -MOST_EXACT <= value <= MOST_EXACT and (key, value) not in _LIMITS:
                why = f"llguidance is not exact beyond {MOST_EXACT}"
            elif key == "multipleOf":
                digits = f"{Decimal(str(abs(value))).normalize():f}".replace(".", "").lstrip("0")
                together = math.lcm(together, int(digits) if 0 < len(digits) < 9 else 0)
                if not 0 < together <= MOST_MULTIPLE:
                    why = f"digits, of the multiple common to all, are 0 or above {MOST_MULTIPLE}"
            elif key == "minProperties" and value > 1:
                why = "a name may come twice"
        elif isinstance(value, dict) and {"prefixItems", "additionalItems"} <= value.keys():
            key, value, why = "additionalItems", "it", "beside prefixItems it is called items"
        elif isinstance(value, str) and _UNWRITABLE.search(value):
            why = "it has control characters"
        if why:
            what = f"{shown(key)}: {shown(str(value))}"
            raise RequestError(f"grammar: {grammar.kind}: {what} is not supported: {why}")


def _parts_of(grammar: Grammar) -> Iterator[tuple[str, Any]]:
    """Each value within the schemas of a grammar, with its key; a list's stands for all within."""
    source, begins = grammar.source.strip(), [0] if grammar.kind == "json_schema" else []
    if grammar.kind == "lark":
        begins = [found.end() for found in _SCHEMA_IN_LARK.finditer(source)]
    try:
        parts = [("", json.JSONDecoder().raw_decode(source, begin)[0]) for begin in begins]
    except (ValueError, RecursionError) as error:
        raise RequestError(f"grammar: {grammar.kind}: {one_line(str(error))}") from None
    while parts:
        key, value = parts.pop()
        yield key, value
        if isinstance(value, dict):
            constant = key in ("const", "enum")  # names within are no keywords
            parts += [(key if constant else name, part) for name, part in value.items()]
        elif isinstance(value, list):
            parts += [(key, part) for part in value]


def _library_source(grammar: Grammar, library: type[LLMatcher]) -> str:
    if grammar.kind.startswith("json"):
        schema = grammar.source.strip() or '{"type": "object"}'
        if schema == "false":
            return library.grammar_from_json_schema(schema)
        schema = "{}" if schema == "true" else schema
        return library.grammar_from_json_schema(schema, _DEFAULTS, _OVERRIDES)
    if grammar.kind == "regex":
        return library.grammar_from_regex(grammar.source)
    return library.grammar_from_lark(grammar.source)


class _Vocabulary:
    """What llguidance asks of a tokenizer, with the names that it asks by."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        self.tokens = [tokenizer.bytes_of(token, skip_special=False) for token in range(vocab_size)]
        special = {*tokenizer.special_ids(), *eos}  # of which none is text
        self.special_token_ids = sorted(one for one in special if one < vocab_size)
        self.eos_token_id = eos[0]
        self._encode = tokenizer.verbatim_encoder()

    def __call__(self, text: str) -> list[int]:
        """The ids of the next bytes of what the grammar forces; of which the first few are used."""
        return self._encode(text[:MOST_FORCED])


def as_library_has_it(tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> LLTokenizer:
    """The tokenizer for llguidance: ids of an entry that is special, or of none, match no text."""
    from llguidance import LLTokenizer

    wrapped: Any = _Vocabulary(tokenizer, vocab_size, eos)
    return LLTokenizer(wrapped, n_vocab=vocab_size, eos_token=list(eos))
