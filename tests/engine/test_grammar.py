"""Texts under a grammar: valid, the same in every mode, width and slot, and no others' concern."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orthrus_fast import Decoder, Grammar, SamplingParams, Stream
from orthrus_fast.errors import RequestError
from orthrus_fast.matching import Matcher
from tests.checkpoints import write_checkpoint
from tests.embedded import MODEL
from tests.engine.solo import interrupt, load, skip_without_one_row, unpredictable

pytestmark = pytest.mark.usefixtures("patient")

RECORDS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "id": {"type": "integer", "maximum": 99},
            "item": {"type": "string", "maxLength": 12},
            "price": {"type": "number"},
            "in_stock": {"type": "boolean"},
        },
        "required": ["id", "item", "price", "in_stock"],
        "additionalProperties": False,
    },
    "minItems": 1,
    "maxItems": 3,
}
GRAMMARS = (
    Grammar("json_schema", json.dumps(RECORDS)),
    Grammar("json_object"),
    Grammar("regex", "(ab|ba|[xyz]{2,5}-)*!"),
    Grammar("lark", 'start: "a constant beginning, then " /[0-9]{1,9}/ ("," /[a-c]+/)*'),
    None,
)
SETTINGS = tuple(
    SamplingParams(temperature, seed=seed, logprobs=logprobs, grammar=grammar)
    for grammar in GRAMMARS
    for temperature, seed, logprobs in ((0.0, None, False), (1.5, 3, False), (0.9, 4, True))
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens are bytes; a text of random weights is as random as its grammar lets it be."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(directory, seed=3, tokenizer=True)
    skip_without_one_row(directory)
    return directory


class Alone:
    """What a request gives alone, a token a pass; once each."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._known: dict[Any, Any] = {}

    def told(self, prompt: list[int], budget: int, params: SamplingParams) -> Any:
        key = (tuple(prompt), budget, params)
        if key not in self._known:
            self._known[key] = told(self.decoder.generate(prompt, budget, params, "ar"))
        return self._known[key]


def told(result: Any) -> Any:
    return result.tokens, result.logprobs, result.finish_reason, result.text


@pytest.fixture(scope="module")
def alone(tiny: Path) -> Alone:
    return Alone(load(tiny, prefix_reuse=False))


def check_valid(text: str, params: SamplingParams) -> None:
    """What a schema's text must be: JSON that it allows."""
    if params.grammar is not None and params.grammar.kind.startswith("json"):
        value = json.loads(text)
        if params.grammar.source:
            jsonschema.validate(value, json.loads(params.grammar.source))
        else:
            assert isinstance(value, dict)


def ask(decoder: Decoder, chance: random.Random) -> tuple[Stream, Any]:
    prompt = [chance.randrange(250) for _ in range(chance.choice((1, 3, 40)))]
    budget, params = chance.choice((1, 2, 20, 60)), chance.choice(SETTINGS)
    asked = (prompt, budget, params)
    return decoder.stream(*asked, mode=chance.choice(("ar", "diffusion", "diffusion"))), asked


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("slots", [1, 3])
def test_texts_are_what_they_are_alone(tiny: Path, alone: Alone, slots: int, ahead: int) -> None:
    """In any mode, at widths that change with every cycle, beside any neighbours."""
    decoder, chance = load(tiny, slots=slots), random.Random(ahead)
    unpredictable(decoder.engine, ahead, ahead)
    reading: list[tuple[Stream, Any]] = []
    n_asked = n_valid = 0
    while n_asked < 60 or reading:
        if n_asked < 60 and chance.random() < 0.4:
            reading.append(ask(decoder, chance))
            n_asked += 1
        elif reading:
            stream, asked = reading[chance.randrange(len(reading))]
            if next(stream, None) is None:
                reading.remove((stream, asked))
                assert told(stream.result) == alone.told(*asked), asked
                if stream.result.finish_reason == "eos" and asked[2].grammar is not None:
                    check_valid(stream.result.text, asked[2])
                    n_valid += 1
            elif chance.random() < 0.03:
                stream.close()
                reading.remove((stream, asked))
    assert n_valid > 0


@pytest.mark.parametrize("width", [2, 3, 8])
@pytest.mark.parametrize("params", SETTINGS[:6])
def test_every_width_gives_the_same(
    tiny: Path, alone: Alone, width: int, params: SamplingParams
) -> None:
    decoder = load(tiny, drafting=width)
    for prompt in ([1], [5, 6, 7]):
        result = decoder.generate(prompt, 80, params)
        assert told(result) == alone.told(prompt, 80, params)


def test_a_neighbour_keeps_its_pace(tiny: Path) -> None:
    """It gets a cycle whenever it did: a constrained one waits alone."""
    decoder = load(tiny, slots=2, drafting=8)
    free = decoder.generate([9, 8], 60)
    constrained = decoder.stream([1], 200, SamplingParams(grammar=Grammar("regex", "[a-z]{400}")))
    beside = decoder.generate([9, 8], 60)
    assert beside.tokens == free.tokens and beside.stats.accepted == free.stats.accepted
    n_before = len(constrained.result.tokens)
    for _ in constrained:
        pass
    assert n_before == 0 and len(constrained.result.tokens) == 200


def test_masks_are_of_the_slot_that_has_the_grammar(tiny: Path, alone: Alone) -> None:
    """Two grammars side by side, and then a text without one in each of their slots."""
    decoder = load(tiny, slots=2, drafting=8)
    both = [SamplingParams(grammar=Grammar("regex", f"[{of}]{{50}}")) for of in ("a-m", "n-z")]
    results = decoder.generate([[1], [1]], 50, both)
    for result, params in zip(results, both, strict=True):
        assert told(result) == alone.told([1], 50, params)
    free = SamplingParams()
    for result in decoder.generate([[1], [1, 2]], 50, [free, free]):
        assert result.finish_reason == "length"
    assert decoder.generate([1], 50).tokens == alone.told([1], 50, free)[0]


def test_what_is_forced_costs_no_cycles(tiny: Path) -> None:
    decoder = load(tiny, drafting=8)
    params = SamplingParams(grammar=Grammar("regex", "twenty-eight letters of it[.]"))
    result = decoder.generate([1], 60, params)
    assert result.text == "twenty-eight letters of it." and result.finish_reason == "eos"
    assert result.stats is not None and result.stats.cycles == 4
    assert decoder.generate([1], 60, params, "ar").stats.cycles == 27  # type: ignore[union-attr]


def test_a_budget_ends_a_text_early(tiny: Path) -> None:
    decoder = load(tiny)
    result = decoder.generate([1], 5, SamplingParams(grammar=GRAMMARS[0]))
    assert result.finish_reason == "length" and len(result.tokens) == 5


@pytest.mark.slow
def test_compiled_modes_give_the_same(tiny: Path) -> None:
    decoder = load(tiny, runner="compiled", slots=2)
    settings = [SETTINGS[2], SETTINGS[4], SETTINGS[0], SamplingParams()]
    prompts = [[1], [2], [3], [4]]
    ar, diffusion = (
        [told(one) for one in decoder.generate(prompts, 50, settings, mode)]
        for mode in ("ar", "diffusion")
    )
    assert ar == diffusion


# Faults


def test_a_grammar_that_takes_too_much_ends_its_text_alone(
    tiny: Path, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = Matcher.mask
    calls = iter(range(1000))

    def tired(self: Matcher) -> bytes:
        if next(calls) > 20:
            raise RequestError("grammar: too complex")
        return mask(self)

    decoder = load(tiny, slots=2, drafting=8)
    params = SamplingParams(grammar=Grammar("regex", "[a-z]{90}"))
    decoder.generate([1], 1, params)
    monkeypatch.setattr(Matcher, "mask", tired)
    failed, other = decoder.generate([[1], [2, 3]], 60, [params, None])
    assert failed.error == "grammar: too complex" and failed.finish_reason == "error"
    assert 0 < len(failed.tokens) < 60
    assert told(other) == alone.told([2, 3], 60, SamplingParams())


def test_a_grammar_that_cannot_be_served_is_refused_alone(tiny: Path) -> None:
    decoder = load(tiny)
    bad = SamplingParams(grammar=Grammar("json_schema", '{"not": {}}'))
    with pytest.raises(RequestError, match="not"):
        decoder.generate([1], 5, bad)
    failed, other = decoder.generate([[1], [2]], 5, [bad, None])
    assert failed.finish_reason == "error" and len(other.tokens) == 5


def test_a_grammar_needs_a_tokenizer(tmp_path: Path) -> None:
    decoder = load(write_checkpoint(tmp_path / "model"))
    with pytest.raises(RequestError, match="tokenizer"):
        decoder.generate([1], 5, SamplingParams(grammar=Grammar("json_object")))


CALLS = ["launch", "propose", "verify", "start", "read", "open"]


@pytest.mark.parametrize(
    "where, ahead", [*product(CALLS, (0, 1)), ("score", 1), ("judge", 1), ("draft", 1)]
)
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_loses_nothing(
    tiny: Path, alone: Alone, where: str, ahead: int, after: bool
) -> None:
    decoder = load(tiny, slots=2, drafting=8)
    decoder.runner.lookahead = ahead  # type: ignore[misc]
    # Beside a text without a grammar the verify pass waits for the masks.
    settings = (SETTINGS[0], SamplingParams() if where == "verify" else SETTINGS[1])
    streams = [decoder.stream([7], 40, params) for params in settings]
    interrupt(decoder.runner, where, 2, after)
    with pytest.raises(KeyboardInterrupt):
        for stream in streams:
            for _ in stream:
                pass
    for stream, params in zip(streams, settings, strict=True):
        for _ in stream:
            pass
        assert told(stream.result) == alone.told([7], 40, params)


@pytest.mark.parametrize("where", ["mask", "consume"])
@pytest.mark.parametrize("n_before", [3, 12])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_within_a_matcher_loses_nothing(
    tiny: Path,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    n_before: int,
    after: bool,
) -> None:
    """It may have gone on along a draft, or may not have gone on along what was emitted."""
    decoder, params = load(tiny, drafting=8), SETTINGS[0]
    expected = alone.told([7], 40, params)
    stream = decoder.stream([7], 40, params)
    function, n_calls = getattr(Matcher, where), 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == n_before and not after:
            raise KeyboardInterrupt
        result = function(*arguments)
        if n_calls == n_before:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Matcher, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    for _ in stream:
        pass
    assert told(stream.result) == expected


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_block_is_drafted_and_verified_once(tiny: Path, ahead: int) -> None:
    decoder = load(tiny, drafting=8)
    decoder.runner.lookahead = ahead  # type: ignore[misc]
    calls: list[str] = []
    for name in ("draft", "verify", "score", "judge"):
        function = getattr(decoder.runner, name)

        def counted(*of: Any, name: str = name, function: Any = function) -> Any:
            calls.append(name)
            return function(*of)

        setattr(decoder.runner, name, counted)
    result = decoder.generate([1], 40, SETTINGS[1])
    assert result.stats is not None
    once = ["draft", "score", "judge"] if ahead else ["draft", "verify"]
    n_calls = len(once) * result.stats.cycles
    # What was drafted ahead of the end is of no use.
    assert calls[:n_calls] == once * result.stats.cycles and calls[n_calls:] in ([], once[:2])


@pytest.mark.parametrize("n_before", range(4))
@pytest.mark.parametrize("others", [[None], [1], [None, 0], [1, None]])
def test_neighbours_come_and_go_while_a_pass_waits_for_masks(
    tiny: Path, alone: Alone, n_before: int, others: list[int | None]
) -> None:
    """Some have a grammar, some none: each goes on in a pass of its own kind, or waits."""
    decoder = load(tiny, slots=3, drafting=8)
    decoder.runner.lookahead = 1  # type: ignore[misc]
    asked = [([7], 40, SETTINGS[1])]
    streams = [decoder.stream(*asked[0])]
    for _ in range(n_before):
        next(streams[0])
    for budget in (2, 3, 9):
        for n, other in enumerate(others):
            params = SamplingParams() if other is None else SETTINGS[other]
            asked.append(([n, 5], budget + 2 * n, params))
            streams.append(decoder.stream(*asked[-1]))
        for stream in streams[-len(others) :]:
            for _ in stream:
                pass
    for stream, of in zip(streams, asked, strict=True):
        for _ in stream:
            pass
        assert told(stream.result) == alone.told(*of)


def test_unconstrained_launches_have_no_masks(tiny: Path) -> None:
    decoder = load(tiny, slots=2)
    decoder.generate([[1], [2]], 20)
    assert decoder.runner._masks is None


# The embedded checkpoint


@pytest.fixture(scope="module")
def embedded() -> Decoder:
    return load(MODEL, slots=2)


@pytest.mark.parametrize("grammar", GRAMMARS[:2])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_random_texts_of_the_embedded_model_are_valid(
    embedded: Decoder, grammar: Grammar, temperature: float
) -> None:
    n_ended = 0
    prompts = ["Some records:\n"] * (4 if temperature else 1)
    settings = [
        SamplingParams(temperature, seed=seed, grammar=grammar) for seed in range(len(prompts))
    ]
    results = embedded.generate(prompts, 160, settings)
    slow = embedded.generate(prompts[:1], 60, settings[:1], "ar")
    for result, params in zip(results, settings, strict=True):
        if result.finish_reason == "eos":
            check_valid(result.text, params)
            n_ended += 1
    for result, other in zip(results, slow, strict=False):
        assert result.tokens[: len(other.tokens)] == other.tokens
    assert n_ended > 0 or grammar.kind == "json_object"  # whose texts need not end
