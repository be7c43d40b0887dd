"""The JSON Schema Test Suite, draft 2020-12: what is compiled is kept to, the rest is named.

Its schemas and instances are in fixtures/json_schema_suite.json, which says where they come from.
"""

from __future__ import annotations

import decimal
import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import orthrus_fast
from orthrus_fast import Decoder, Grammar, SamplingParams
from orthrus_fast.errors import RequestError
from orthrus_fast.matching import Grammars, Matcher, allows
from orthrus_fast.tokenizer import Tokenizer
from tests.decoders import unchecked
from tests.embedded import EOS, MODEL, VOCAB
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("patient")
FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "json_schema_suite.json"
CASES: list[dict[str, Any]] = json.loads(FIXTURE.read_text(encoding="utf-8"))["cases"]
PARTS = {"a dozen": CASES[::37]} | {f"{part} of 12": CASES[part::12] for part in range(12)}
QUICK = ["a dozen"]

ORDER = "properties come in the schema's order"
POINT = "a whole number is written without a point"
FORMAT = "a format is kept to, not a remark"
SECOND = "a second 60 in any minute"
SPACE = "\\s and \\S are Unicode's, where U+FEFF is no space"
CONTROL = "control characters that only \\u writes are not written"
FORM = "of the forms of an address, the common ones"
# What the suite has otherwise: in these cases one instance or more, for this reason.
VALID_BUT_FORBIDDEN = {
    "allOf: allOf": ORDER,
    "allOf: allOf with base schema": ORDER,
    "const: const with object": ORDER,
    "const: const with 0 does not match other zero-like types": POINT,
    "const: const with 1 does not match true": POINT,
    "const: const with -2.0 matches integer and float types": POINT,
    "const: float and integers are equal up to 64-bit representation limits": POINT,
    "enum: enum with 0 does not match false": POINT,
    "enum: enum with [0] does not match [false]": POINT,
    "enum: enum with 1 does not match true": POINT,
    "enum: enum with [1] does not match [true]": POINT,
    "type: integer type matches integers": POINT,
    "optional/float-overflow: all integers are multiples of 0.5, if overflow is handled": POINT,
    **{
        f"format: {name} format": FORMAT
        for name in "email ipv4 ipv6 hostname date date-time time uri uuid duration".split()
    },
    "optional/ecmascript-regex: ECMA 262 \\s matches whitespace": f"{SPACE}; {CONTROL}",
    "optional/ecmascript-regex: ECMA 262 \\S matches everything but whitespace": CONTROL,
    "optional/format/email: validation of e-mail addresses": FORM,
    "optional/format/ipv6: validation of IPv6 addresses": FORM,
}
INVALID_BUT_ALLOWED = {
    "optional/format/date: validation of date strings": "29 February in any year",
    "optional/format/date-time: validation of date-time strings": SECOND,
    "optional/format/time: validation of time strings": SECOND,
    "optional/ecmascript-regex: ECMA 262 \\S matches everything but whitespace": SPACE,
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    with unchecked():
        return orthrus_fast.load(MODEL, device="cpu", slots=8)


def compiled(grammars: Grammars, schema: Any) -> Matcher | None:
    """At the beginning of a text; None for a schema that is refused."""
    try:
        return grammars.matcher(Grammar.from_schema(schema))
    except RequestError:
        return None


def accepts(matcher: Matcher, tokens: list[int]) -> bool:
    try:
        matcher.consume(tokens)
        return allows(matcher.mask(), EOS)
    except RequestError:
        return False


def parsed(text: str) -> Any:
    """JSON with numbers that are exact, but for those with an exponent, which may be any."""

    def number(digits: str) -> float | Decimal:
        return float(digits) if "e" in digits.lower() else Decimal(digits)

    return json.loads(text, parse_float=number)


def check_valid(text: str, case: dict[str, Any]) -> None:
    """As far as Python reads patterns as JSON Schema does; days are in a table above."""
    value = parsed(text)
    schema = json.loads(json.dumps(case["schema"]), parse_float=Decimal)
    formats = jsonschema.FormatChecker(("email", "ipv4", "ipv6", "uuid"))
    if not case["name"].startswith("optional/ecmascript-regex"):
        with decimal.localcontext() as context:
            context.prec = 200
            jsonschema.Draft202012Validator(schema, format_checker=formats).validate(value)


@pytest.mark.parametrize("part", slow_but(QUICK, PARTS))
def test_a_schema_that_is_not_supported_is_refused_by_name(grammars: Grammars, part: str) -> None:
    refused = 0
    for case in PARTS[part]:
        try:
            grammars.matcher(Grammar.from_schema(case["schema"]))
        except RequestError as error:
            message = str(error)
            assert message.startswith("grammar: json_schema: ") and message.isprintable()
            words = set(re.findall(r"[\w$:/.-]{2,}", json.dumps(case["schema"])))
            words |= {"float range", "$dynamicAnchor"}  # for a maximum, and for the metaschema
            rest = message.removeprefix("grammar: json_schema: ")
            assert len(rest) < 400 and any(word in rest for word in words), (case, message)
            refused += 1
    assert 0 < refused < len(PARTS[part])


@pytest.mark.parametrize("part", slow_but(QUICK, PARTS))
def test_instances_are_allowed_where_they_are_valid(
    grammars: Grammars, tokenizer: Tokenizer, part: str
) -> None:
    encode = tokenizer.verbatim_encoder()

    def allowed(schema: Any, instance: Any) -> bool:
        matcher = compiled(grammars, schema)
        assert matcher is not None
        return accepts(matcher, encode(json.dumps(instance, ensure_ascii=False)))

    for case in PARTS[part]:
        name, schema = case["name"], case["schema"]
        if compiled(grammars, schema) is None:
            continue
        forbidden = [one for one in case["valid"] if not allowed(schema, one)]
        assert bool(forbidden) == (name in VALID_BUT_FORBIDDEN), (name, schema, forbidden)
        wrong = [one for one in case["invalid"] if allowed(schema, one)]
        assert bool(wrong) == (name in INVALID_BUT_ALLOWED), (name, schema, wrong)


def walk(matcher: Matcher, tokenizer: Tokenizer, chance: random.Random) -> str | None:
    """A random text, rich in escapes, digits and ends of what is open; None for one too long."""
    tokens: list[int] = []
    liked = re.compile(rb'["\]}:,\\u0-9a-f]+')
    while len(tokens) < 80:
        mask = matcher.mask()
        ids = [token for token in range(VOCAB) if allows(mask, token)]
        if ids == [EOS] or (EOS in ids and chance.random() < 0.4):
            return b"".join(map(tokenizer.bytes_of, tokens)).decode()
        texts = {token: tokenizer.bytes_of(token) for token in ids if token != EOS}
        some = [token for token, text in texts.items() if liked.fullmatch(text)]
        ends = [token for token, text in texts.items() if text[:1] in b'"]}']
        draw = chance.random()
        tokens.append(chance.choice((draw < 0.4 and ends) or (draw < 0.8 and some) or [*texts]))
        matcher.consume(tokens[-1:])
    return None


@pytest.mark.parametrize("part", slow_but(QUICK, PARTS))
def test_whatever_the_masks_allow_is_valid(
    grammars: Grammars, tokenizer: Tokenizer, part: str
) -> None:
    """Of any token that they leave, also of one that no model would choose."""
    finished = 0
    for case in PARTS[part]:
        for seed in range(2 if part in QUICK else 12):
            if (matcher := compiled(grammars, case["schema"])) is not None:
                text = walk(matcher, tokenizer, random.Random(seed))
                if text is not None:
                    check_valid(text, case)
                    finished += 1
    assert finished > len(PARTS[part]) / 4


@pytest.mark.slow
@pytest.mark.parametrize("part", [part for part in PARTS if part not in QUICK])
def test_finished_texts_are_valid_and_the_same_in_both_modes(decoder: Decoder, part: str) -> None:
    settings: list[tuple[SamplingParams, dict[str, Any]]] = []
    for case in PARTS[part]:
        grammar = Grammar.from_schema(case["schema"])
        try:
            decoder.compile_grammar(grammar)
        except RequestError:
            continue
        for _ in range(2):
            settings.append((SamplingParams(1.5, seed=len(settings), grammar=grammar), case))
    prompt = decoder.encode([{"role": "user", "content": "Convert to JSON: foo=1, bar=x"}])
    params = [one for one, _ in settings]
    ar = decoder.generate([prompt] * len(params), 40, params, "ar")
    # From the last on: in other slots, beside others.
    diffusion = decoder.generate([prompt] * len(params), 40, params[::-1], "diffusion")[::-1]
    for one, other, (_, case) in zip(ar, diffusion, settings, strict=True):
        assert (one.tokens, one.text) == (other.tokens, other.text), case
        assert one.finish_reason == other.finish_reason in ("eos", "length"), (one.error, case)
        if one.finish_reason == "eos":
            check_valid(one.text, case)
    assert sum(one.finish_reason == "eos" for one in ar) > len(ar) / 2
