"""Grammars: what may be asked for, the masks of a text, and what they leave of a distribution."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from orthrus_fast import Grammar, SamplingParams, matching, steps
from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.grammar import MAX_SCHEMA, MAX_SOURCE
from orthrus_fast.kernels import plain_sampling
from orthrus_fast.matching import Grammars, Matcher, allows
from orthrus_fast.sampling import Settings
from orthrus_fast.tokenizer import Tokenizer
from tests.embedded import EOS, VOCAB

pytestmark = pytest.mark.usefixtures("patient")

RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "n": {"type": "integer"},
        "kind": {"enum": ["small", "small and round", None, "<|im_end|>", "e\u0301"]},
    },
    "required": ["name", "n", "kind"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "record": RECORD,
    "list": {"type": "array", "items": RECORD, "maxItems": 2},
    "bounded": {"type": "array", "items": {"type": "number", "minimum": -3, "maximum": 7}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "union": {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}, RECORD]},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0},
    "recursive": {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    "free": {"type": "object", "patternProperties": {"^k[0-9]$": {"type": "null"}}},
}


def schema(source: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(source))


def allowed(mask: bytes) -> list[int]:
    return [token for token in range(VOCAB) if allows(mask, token)]


def walk(matcher: Matcher, chance: random.Random, most: int = 60) -> list[int]:
    """A random text of the grammar, which tends to its end; the end is not part of it."""
    tokens: list[int] = []
    while len(tokens) < most:
        ids = allowed(matcher.mask())
        if ids == [EOS] or (EOS in ids and chance.random() < 0.5):
            return tokens
        closing = [token for token in ids[:200] if token != EOS]
        tokens.append(chance.choice(closing))
        matcher.consume(tokens[-1:])
    return tokens


# What may be asked for


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar("json_object")),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}},
            Grammar("json_schema", '{"type": "null"}'),
        ),
        ({"type": "regex", "regex": "a+"}, Grammar("regex", "a+")),
        ({"type": "lark", "lark": 'start: "a"'}, Grammar("lark", 'start: "a"')),
    ],
)
def test_a_response_format_is_a_grammar(value: Any, expected: Grammar | None) -> None:
    assert Grammar.from_response_format(value) == expected


@pytest.mark.parametrize(
    "value",
    ["text", {}, {"type": "xml"}, {"type": ["x"]}, {"type": "json_schema"}, {"type": "regex"}]
    + [{"type": "json_schema", "json_schema": {"schema": bad}} for bad in (None, 1, [], {"a": {1}})]
    + [{"type": "json_schema", "json_schema": bad} for bad in ({}, [], "schema")],
)
def test_a_response_format_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(RequestError):
        Grammar.from_response_format(value)


@pytest.mark.parametrize(
    ("kind", "source", "named"),
    [
        ("xml", "", "'xml' is not one of"),
        ("json_object", "{}", "has no source"),
        ("regex", "", "needs a source"),
        ("regex", 3, "int is not text"),
        ("lark", "x" * (MAX_SOURCE + 1), f"more than {MAX_SOURCE}"),
        ("regex", "x" * (MAX_SOURCE + 1), f"more than {MAX_SOURCE}"),
        ("json_schema", "x" * (MAX_SCHEMA + 1), f"more than {MAX_SCHEMA}"),
    ],
)
def test_a_grammar_that_is_none_is_refused(kind: str, source: Any, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        Grammar(kind, source)


def test_settings_take_a_grammar_alone() -> None:
    with pytest.raises(RequestError, match="grammar"):
        SamplingParams(grammar="json")  # type: ignore[arg-type]


# Masks


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_texts_are_valid(grammars: Grammars, tokenizer: Tokenizer, name: str) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    ended = 0
    for seed in range(20):
        matcher, chance = grammars.matcher(schema(SCHEMAS[name])), random.Random(seed)
        tokens = walk(matcher, chance)
        if allows(matcher.mask(), EOS):
            text = tokenizer.decode(tokens, skip_special=False)
            validator.validate(json.loads(text))
            ended += 1
    assert ended > (name not in ("record", "list", "union"))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_mask_follows_from_the_tokens_before_it_alone(grammars: Grammars, name: str) -> None:
    """Whatever a matcher was asked before, forwards and back: as one that has only the tokens."""
    grammar, chance = schema(SCHEMAS[name]), random.Random(1)
    for _ in range(3):
        tokens = walk(grammars.matcher(grammar), chance)
        matcher, at = grammars.matcher(grammar), 0
        while at < len(tokens):
            proposals = tokens[at : at + chance.randint(0, 9)] + [5, 6]
            block = matcher.block(proposals, width=8)
            assert len(block.masks) == len(block.drafts) + 1 <= 8
            for i, mask in enumerate(block.masks):
                fresh = grammars.matcher(grammar)
                fresh.consume(tokens[:at] + block.drafts[:i])
                assert mask == fresh.mask()
            assert block.masks[0] == matcher.mask()
            n = chance.randint(1, 4)
            matcher.consume(tokens[at : at + n])
            at += n
        matcher.restart(tokens[:3])
        fresh = grammars.matcher(grammar)
        fresh.consume(tokens[:3])
        assert matcher.mask() == fresh.mask()


def test_no_text_is_white_space_to_the_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    for text, is_json in (
        ('[1, 2]', True), ("[\n  1,\n  2\n]", True), ("[ 1\r\n]", True), ("[1 ,2]", True),
        ("[  1]", False), ("[\n\n1]", False), ("[\n" + 41 * " " + "1]", False), (" [1]", False),
    ):  # fmt: skip
        matcher = grammars.matcher(schema({"type": "array", "items": {"type": "integer"}}))
        try:
            matcher.consume(tokenizer.encode(text))
        except RequestError:
            assert not is_json, text
        else:
            assert is_json and allows(matcher.mask(), EOS), text


@pytest.mark.parametrize(
    "source",
    [
        {"properties": {"a": {"type": "integer"}}},
        {"properties": {"a": False}},
        {"patternProperties": {"^a": {"type": "integer"}}},
        {"properties": {"a": {"type": "integer"}}, "x-guidance": {"json_allowed_escapes": "u"}},
    ],
)
def test_no_name_passes_for_another(
    grammars: Grammars, tokenizer: Tokenizer, source: dict[str, Any]
) -> None:
    """As JSON's other way to write a letter would, where other names are free."""
    for text, fits in (('{"a": "x"}', False), ('{"\\u0061": "x"}', False), ('{"b": "x"}', True)):
        matcher = grammars.matcher(schema(source))
        try:
            matcher.consume(tokenizer.verbatim_encoder()(text))
        except RequestError:
            assert not fits, text
        else:
            assert fits == allows(matcher.mask(), EOS), text


def test_what_is_forced_is_drafted_without_proposals(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    matcher = grammars.matcher(Grammar("lark", 'start: "a long beginning: " /[0-9]+/'))
    block = matcher.block([], 8)
    assert len(block.drafts) > 3
    assert "a long beginning:".startswith(tokenizer.decode(block.drafts))
    forced = [allowed(mask) for mask in block.masks[:-1]]
    assert forced == [[token] for token in block.drafts]


def test_no_row_without_a_mask_is_reached(grammars: Grammars) -> None:
    """The first draft past those that the grammar allows is one that it forbids."""
    matcher = grammars.matcher(schema({"type": "integer"}))
    for proposals in ([], [EOS], [4000], allowed(matcher.mask())[1:3]):
        block = matcher.block(proposals, 4)
        drafts = block.drafts_for(6)
        assert len(drafts) == 5 and drafts[: len(block.drafts)] == block.drafts
        assert not allows(block.masks[-1], drafts[len(block.drafts)])


def test_ids_that_are_no_text_are_never_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ids = allowed(grammars.matcher(Grammar("regex", r"(.|\n)*")).mask())
    assert set(ids) & {*tokenizer.special_ids()} == {EOS}
    assert not any(tokenizer.bytes_of(token, skip_special=False) == b"" for token in ids)


def test_text_is_encoded_byte_for_byte(tokenizer: Tokenizer) -> None:
    encode = tokenizer.verbatim_encoder()
    for text in ("<|im_end|>", "e\u0301 \ufb01", '{"a":1}', ""):
        tokens = encode(text)
        assert b"".join(map(tokenizer.bytes_of, tokens)) == text.encode()
        assert not set(tokens) & {*tokenizer.special_ids()}


# Compiling


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "http://example.com/x.json"}, "http://example.com/x.json"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"not": {}, "x-guidance": {"lenient": True}}, "not"),
        (False, "Unsatisfiable"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        # These it compiles, into texts that are none of theirs.
        ({"const": 2**53 + 1}, "const: 9007199254740993 is not supported"),
        ({"enum": [[{"a": 2**60 + 1}]]}, "enum: 1152921504606846977 is not supported"),
        ({"maximum": 2**53 + 3, "type": "integer"}, "maximum: 9007199254740995 is not supported"),
        ({"type": "object", "minProperties": 2}, "minProperties: 2 is not supported"),
        ({"prefixItems": [{}], "additionalItems": {}}, "additionalItems: it is not supported"),
        ({"enum": ["a", "\x1b"]}, "control characters"),
        # And of these it dies.
        ({"const": -(2**63)}, "const: -9223372036854775808 is not supported"),
        ({"enum": [{"maximum": -(2**63)}]}, "enum: -9223372036854775808 is not supported"),
        ({"type": "integer", "maximum": -1e300}, "maximum: -1e.300 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    grammars: Grammars, source: Any, named: str
) -> None:
    with pytest.raises(RequestError, match=named):
        grammars.matcher(schema(source))


def test_a_schema_within_another_grammar_is_looked_at_too(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    within = 'start: "a" %%json {"const": %d}'
    matcher = grammars.matcher(Grammar("lark", within % 7))
    matcher.consume(tokenizer.encode("a7"))
    with pytest.raises(RequestError, match="const: -9223372036854775808 is not supported"):
        grammars.matcher(Grammar("lark", within % -(2**63)))


@pytest.mark.parametrize("bounds", [{"maximum": 2**63 - 1}, {"maximum": 2**64 - 1}])
def test_the_limits_of_integers_in_memory_are_served(
    grammars: Grammars, tokenizer: Tokenizer, bounds: dict[str, int]
) -> None:
    matcher = grammars.matcher(schema({"type": "integer", "minimum": 0, **bounds}))
    matcher.consume(tokenizer.encode(str(2**63 - 1)))
    assert allows(matcher.mask(), EOS)


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


REFUSED = {
    "deep": Grammar("json_schema", nested(20000)),
    "open": Grammar("json_schema", "[" * 200_000),
    "recursive": schema({"$ref": "#"}),
    "circle": schema({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}),
    "product": schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(4)]}
                for i in range(12)
            ]
        }
    ),
    "multiple": schema({"type": "integer", "multipleOf": 1_000_003}),
    "multiples": schema({"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}),
    "huge": Grammar("json_schema", '{"multipleOf": 1e999999999}'),
    "escaped": Grammar("json_schema", '{"type": "integer", "multiple\\u004ff": 1000003}'),
    "damaged": Grammar("json_schema", '{"type": '),
    "nonsense": Grammar("lark", "nonsense ((("),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_grammar_is_refused_in_a_line(grammars: Grammars, name: str) -> None:
    with pytest.raises(RequestError) as refused:
        grammars.matcher(REFUSED[name])
    message = str(refused.value)
    assert "\n" not in message and len(message) < 1200 and message.startswith("grammar: ")


HARD = {
    "long": schema({"enum": ["x" * 240_000]}),
    "many": schema({"enum": [f"value {i}" for i in range(15_000)]}),
    "properties": schema({"properties": {f"p{i}": {"type": "string"} for i in range(5000)}}),
    "powers": Grammar("regex", "((((a{0,100}){0,100}){0,100}){0,100}){0,100}"),
    "intersection": Grammar("lark", "start: A\nA: /.*a.{20}.*/ & /.*b.{20}.*/ & /.*c.{20}.*/"),
    "items": schema({"items": {"type": "string"}, "minItems": 100_000, "type": "array"}),
    "multiples": schema({"items": {"type": "integer", "multipleOf": 9973}}),
    "references": schema(
        {
            "$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(4000)}
            | {"d4000": True},
            "$ref": "#/$defs/d0",
        }
    ),
    "rules": Grammar(
        "lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(1600)) + 'r1600: "a"'
    ),
    "choices": Grammar("regex", "a?" * (MAX_SOURCE // 2)),
}


@pytest.mark.parametrize("name", HARD)
def test_a_hard_grammar_is_served_or_given_up(grammars: Grammars, name: str) -> None:
    try:
        walk(grammars.matcher(HARD[name]), random.Random(0), most=100)
    except RequestError as error:
        assert str(error).startswith("grammar: ")


def test_compiling_is_given_up_after_a_while(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = Grammars(tokenizer, VOCAB, [EOS])
    monkeypatch.setattr(matching, "PATIENCE", 0.05)
    monkeypatch.setattr(matching, "MOST_MULTIPLE", 10**6)
    with pytest.raises(RequestError, match="more than 0.05 seconds"):
        grammars.matcher(schema({"type": "integer", "multipleOf": 65537}))


@pytest.mark.parametrize(
    "pattern", ["^(a+)+$", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y", "[ab]*a[ab]{40}"]
)
def test_patterns_that_are_slow_elsewhere_are_not_here(grammars: Grammars, pattern: str) -> None:
    matcher = grammars.matcher(Grammar("regex", pattern))
    walk(matcher, random.Random(0))


def test_a_grammar_is_compiled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiled = Grammars(tokenizer, VOCAB, [EOS]), list[Grammar]()
    monkeypatch.setattr(matching, "MOST_CACHED", 2)
    compile_one = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda g: (compiled.append(g), compile_one(g))[1])
    a, b, c = (Grammar("regex", text) for text in "abc")
    first, second = grammars.matcher(a), grammars.matcher(a)
    first.consume([tokenizer.encode("a")[0]])
    assert not allows(second.mask(), EOS) and allows(first.mask(), EOS)
    for grammar in (b, a, c, a, b):
        grammars.matcher(grammar)
    assert compiled == [a, b, c, b]


def test_without_the_library_a_grammar_is_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"orthrus-fast\[grammar\]"):
        Grammars(tokenizer, VOCAB, [EOS]).matcher(Grammar("json_object"))


# What masks leave


@pytest.mark.parametrize("vocab_size", [32, 33, 64, 100])
def test_what_is_forbidden_is_minus_infinity(vocab_size: int) -> None:
    torch.manual_seed(0)
    logits, keep = torch.randn(2, 3, vocab_size), torch.rand(2, 3, vocab_size) < 0.4
    keep[..., 0] = True
    words = -(-vocab_size // 32)
    bits = torch.zeros(2, 3, words * 32, dtype=torch.int64)
    bits[..., :vocab_size] = keep
    masks = (bits.view(2, 3, words, 32) << torch.arange(32)).sum(-1).to(torch.int32)
    greedy, masked = steps.constrain(logits, masks)
    expected = torch.where(keep, logits, -torch.inf)
    assert torch.equal(masked, expected) and torch.equal(greedy, expected.argmax(-1))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (1.7, None), (0.8, 5)])
def test_draws_follow_the_renormalized_distribution(temperature: float, top_k: int | None) -> None:
    """Chi-squared over the allowed tokens; filters act among those. Seeds are fixed."""
    n, vocab_size = 40_000, 40
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(4))
    keep = torch.zeros(vocab_size, dtype=torch.bool)
    keep[[1, 5, 6, 17, 20, 31, 32, 39]] = True
    word = torch.tensor([sum(1 << i for i in range(32) if keep[i]), keep[39] * 128 + keep[32]])
    masks = torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)
    masked = steps.constrain(logits, masks)[1]
    settings = Settings.create(1, torch.device("cpu"))
    settings.put(0, SamplingParams(temperature, top_k=top_k, seed=11))
    position = torch.arange(n)[None]
    drawn = plain_sampling.sample(masked.expand(1, n, -1), position, settings)[0]
    counts = torch.bincount(drawn, minlength=vocab_size)
    left = torch.where(keep, logits, -torch.inf)
    if top_k is not None:
        left = torch.where(left >= left.topk(top_k).values[-1], left, -torch.inf)
    expected = (left / temperature).softmax(-1) * n
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_squared = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert chi_squared < 24.3  # of 7 degrees of freedom once in a thousand


def test_an_end_of_text_id_is_no_text(tmp_path: Path) -> None:
    """Were it, a text would end in the middle."""
    tokenizer = Tokenizer.from_directory(embedded_checkpoint())
    a = tokenizer.encode("a")[0]
    matcher = Grammars(tokenizer, VOCAB, [EOS, a]).matcher(Grammar("regex", "[ab]+"))
    assert not allows(matcher.mask(), a)
    matcher.consume(tokenizer.encode("b"))
    assert allows(matcher.mask(), a) and allows(matcher.mask(), EOS)
