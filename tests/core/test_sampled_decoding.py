"""Sampling through the whole decoder: the modes agree, slots are apart, stop strings end a text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orthrus_fast
from orthrus_fast import SamplingParams, steps
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError
from tests.checkpoints import write_checkpoint
from tests.decoders import always_drafting, unchecked
from tests.judge import Judge, follows

few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=[], tied=False)


def load(directory: Path, **options: Any) -> Decoder:
    with unchecked():
        options = always_drafting(directory, {"dtype": "float64", **options})
        return orthrus_fast.load(directory, device="cpu", **options)


@pytest.fixture(scope="module")
def exact(tiny: Path) -> Decoder:
    return load(tiny)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.0])),
        top_k=draw(st.sampled_from([None, 1, 3, 20, 1000])),
        top_p=draw(st.sampled_from([None, 0.3, 0.8, 0.95, 1.0])),
        min_p=draw(st.sampled_from([None, 0.05, 0.5])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=80)


@few
@given(params(), prompts, st.integers(1, 40), st.sampled_from([2, 5, 16]))
def test_both_modes_sample_what_the_judge_samples(
    chosen: SamplingParams, prompt: list[int], budget: int, width: int
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = write_checkpoint(
            Path(temporary) / "model", seed=width, block_size=width, tied=False, eos_token_id=[9]
        )
        decoder = load(directory)
        ar, diffusion = (decoder.generate(prompt, budget, chosen, m) for m in ("ar", "diffusion"))
        assert ar.tokens == diffusion.tokens
        expected, margins = Judge(directory).generate(prompt, budget, (9,), chosen)
        assert follows(ar.tokens, expected, margins, near_tie=1e-5)  # noise is float32 everywhere
        assert (ar.finish_reason, ar.seed) == (diffusion.finish_reason, chosen.seed)
        assert diffusion.stats.cycles <= ar.stats.cycles


def test_sampling_accepts_drafts(exact: Decoder) -> None:
    """The same noise makes drafts agree: more than one token a cycle, at every temperature."""
    for temperature in (0.3, 1.0):
        chosen = SamplingParams(temperature=temperature, seed=1)
        per_cycle = [exact.generate([i, 5, 6], 60, chosen).stats.tokens_per_cycle for i in range(4)]
        assert sum(per_cycle) / 4 > 1.25


def test_other_noise_in_drafts_would_be_refused_and_change_nothing(
    exact: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = SamplingParams(temperature=1.0, seed=4)
    expected = exact.generate([5, 6], 50, chosen)
    runner = exact.runner
    honest = runner._sample_block

    def one_position_on(state: steps.State, logits: torch.Tensor, sample: Any) -> torch.Tensor:
        offset = torch.arange(2, logits.shape[1] + 2)
        return sample(logits, state.length[:, None] + offset, state.settings)

    monkeypatch.setattr(runner, "_sample_block", one_position_on)
    other = exact.generate([5, 6], 50, chosen)
    assert other.tokens == expected.tokens
    assert other.stats.tokens_per_cycle < expected.stats.tokens_per_cycle
    assert runner._sample_block is not honest


def test_a_text_does_not_depend_on_its_slot_neighbours_or_order(tiny: Path) -> None:
    requests: list[tuple[list[int], SamplingParams | None]] = [
        ([i + 1] * (1 + 17 * i % 70), SamplingParams(temperature=t, top_k=k, seed=i) if t else None)
        for i, (t, k) in enumerate(
            [(1.0, None), (0.0, None), (0.5, 20), (2.0, 5), (0.0, 3), (0.9, 2)]
        )
    ]
    alone, many = load(tiny), load(tiny, slots=3)
    for mode in ("ar", "diffusion"):
        expected = [alone.generate(p, 20, s, mode).tokens for p, s in requests]
        for order in ([0, 1, 2, 3, 4, 5], [5, 2, 4, 0, 3, 1]):
            got = many.generate(
                [requests[i][0] for i in order], 20, [requests[i][1] for i in order], mode
            )
            assert [result.tokens for result in got] == [expected[i] for i in order]


def test_results_come_as_they_end_and_in_order_from_generate(tiny: Path) -> None:
    directory = write_checkpoint(
        tiny.parent / "ending", seed=3, tied=False, eos_token_id=list(range(0, 272, 9))
    )
    decoder = load(directory, slots=2)
    batch: Any = [[1, 2], [], [3] * 50, [4], [10**6], [5, 6]]
    completed = list(decoder.as_completed(batch, 40))
    assert sorted(index for index, _ in completed) == list(range(6))
    assert [index for index, _ in completed] != list(range(6))
    in_order = decoder.generate(batch, 40)
    assert [result.tokens for _, result in sorted(completed)] == [r.tokens for r in in_order]
    assert [r.finish_reason == "error" for r in in_order] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


def test_a_seed_is_drawn_and_reported(exact: Decoder) -> None:
    first, second = (exact.generate([5], 30, SamplingParams(temperature=1.0)) for _ in range(2))
    assert first.seed is not None and second.seed is not None and first.seed != second.seed
    assert max(first.seed, second.seed) < 2**48  # whole in any JSON reader
    again = SamplingParams(temperature=1.0, seed=first.seed)
    assert exact.generate([5], 30, again, "ar").tokens == first.tokens
    assert exact.generate([5], 5, SamplingParams()).seed is None


def test_the_checkpoints_own_settings(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=[])
    (directory / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true}'
    )
    decoder = load(directory)
    own = decoder.generate([5, 6], 40, SamplingParams.from_checkpoint(seed=8))
    spelled = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, seed=8)
    assert own.tokens == decoder.generate([5, 6], 40, spelled).tokens
    assert own.tokens != decoder.generate([5, 6], 40).tokens


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=[])
    (directory / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    decoder = load(directory)
    own = decoder.generate([5, 6], 20, SamplingParams.from_checkpoint())
    assert (own.tokens, own.seed) == (decoder.generate([5, 6], 20).tokens, None)


def test_logprobs_are_the_judges(tiny: Path, exact: Decoder) -> None:
    judge = Judge(tiny)
    for chosen in (SamplingParams(logprobs=True), SamplingParams(1.0, seed=3, logprobs=True)):
        results = [exact.generate([5, 6, 7], 25, chosen, mode) for mode in ("ar", "diffusion")]
        assert results[0].logprobs == results[1].logprobs
        judge.forget()
        logits = judge.feed([5, 6, 7])
        for token, logprob in zip(results[1].tokens, results[1].logprobs, strict=True):
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
            logits = judge.step(token)
    assert exact.generate([5], 5).logprobs is None


@few
@given(st.data(), st.sampled_from(["ar", "diffusion"]), st.sampled_from([0.0, 1.0]))
def test_a_stop_string_ends_the_text_before_it(
    exact: Decoder, data: st.DataObject, mode: str, temperature: float
) -> None:
    chosen = SamplingParams(temperature=temperature, seed=2)
    whole = exact.generate([104, 105], 40, chosen, mode)
    assert exact.tokenizer is not None
    stops = []
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(whole.text) - 1))
        stops.append(whole.text[begin : begin + data.draw(st.integers(1, 9))])
    stops.append("never in a text of random bytes")
    stopping = SamplingParams(temperature=temperature, seed=2, stop=tuple(stops))
    chunks, stream = [], exact.stream([104, 105], 40, stopping, mode)
    for chunk in stream:
        chunks.append(chunk)
        assert all(stop not in "".join(c.text for c in chunks) for stop in stops)
    # The string that is complete first ends the text; of several, the one that began first.
    places = [(whole.text.find(stop), stop) for stop in stops if stop in whole.text]
    found = min(((begin + len(stop), begin) for begin, stop in places), default=(0, None))[1]
    result = stream.result
    assert result.text == "".join(chunk.text for chunk in chunks) == whole.text[:found]
    assert result.finish_reason == ("stop" if found is not None else "length")
    assert result.tokens == whole.tokens[: len(result.tokens)]
    detokenizer = exact.tokenizer.detokenizer()
    text_before_last = "".join(map(detokenizer.push, result.tokens[:-1]))
    assert found is None or not any(stop in text_before_last for stop in stops)
    assert exact.generate([104, 105], 40, chosen, mode).tokens == whole.tokens


@pytest.mark.parametrize("eos", [False, True])
def test_text_held_back_for_a_stop_string_comes_at_the_end(tmp_path: Path, eos: bool) -> None:
    """The last characters of the text begin a stop string that the end leaves unfinished."""
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True, eos_token_id=[])
    free = load(directory).generate("hi", 20)
    if eos:
        directory = write_checkpoint(
            tmp_path / "ends", seed=3, tokenizer=True, eos_token_id=free.tokens[-1:]
        )
    decoder = load(directory)
    whole = decoder.generate("hi", 20)
    assert whole.finish_reason == ("eos" if eos else "length") and len(whole.text) > 2
    stopping = SamplingParams(stop=(whole.text[-2:] + "never",))
    for mode in ("ar", "diffusion"):
        stream = decoder.stream("hi", 20, stopping, mode)
        assert "".join(chunk.text for chunk in stream) == whole.text
        assert stream.result.text == whole.text
        assert stream.result.finish_reason == whole.finish_reason


def test_a_stop_string_within_a_block_cuts_all_that_follows_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, log-probabilities and accepted drafts, of a block that is right to its end."""
    decoder = load(tiny)
    asked = SamplingParams(logprobs=True)
    whole = decoder.generate("hi", 17, asked)
    text = torch.tensor([*b"hi", *whole.tokens])
    assert whole.logprobs is not None and decoder.tokenizer is not None
    pieces = list(map(decoder.tokenizer.detokenizer().push, whole.tokens))
    in_the_block = [n for n in range(4, 8) if pieces[n] and pieces[n] not in "".join(pieces[:n])]
    last = in_the_block[0]  # neither the first token nor the last of the block after it

    def perfect(model: Any, cache: Any, state: steps.State, *_: Any) -> None:
        known = text[int(state.length[0]) + 1 :][:7]
        state.proposals[0, : len(known)] = known

    monkeypatch.setattr(steps, "draft", perfect)
    stopping = SamplingParams(logprobs=True, stop=(pieces[last],))
    stream = decoder.stream("hi", 17, stopping)
    chunks = list(stream)
    result = stream.result
    assert (result.finish_reason, result.text) == ("stop", "".join(pieces[:last]))
    assert result.tokens == whole.tokens[: last + 1]
    assert result.logprobs == whole.logprobs[: last + 1]
    assert result.stats is not None and result.stats.accepted == (last,)
    assert [chunk.n_accepted for chunk in chunks] == [0, last]
    assert [len(chunk.tokens) for chunk in chunks] == [1, last]


def test_a_stopped_slot_is_refilled(tiny: Path) -> None:
    many = load(tiny, slots=2)
    texts = [many.generate(p, 40).text for p in ("one", "two", "three", "four")]
    stop = tuple(text[5:7] for text in texts)
    got = many.generate(["one", "two", "three", "four"], 40, SamplingParams(stop=stop))
    cut = [min(text.find(s) for s in stop if s in text) for text in texts]
    assert [r.text for r in got] == [text[:n] for text, n in zip(texts, cut, strict=True)]
    assert {r.finish_reason for r in got} == {"stop"}
    while many.engine.has_work:
        many.engine.step()
    assert many.runner.state.done.all()


def test_settings_that_do_not_fit_the_prompts(exact: Decoder) -> None:
    with pytest.raises(RequestError, match="3 prompts, but sampling has 2"):
        exact.generate([[1], [2], [3]], 5, [None, None])
    with pytest.raises(RequestError, match="2 prompts, but .* max_new_tokens 1"):
        exact.as_completed([[1], [2]], [5])
    with pytest.raises(RequestError, match="max_new_tokens: 0 is below 1"):
        exact.as_completed([[1], [2]], [5, 0])
    budgets = dict(exact.as_completed([[1], [2], [3]], [5, 9, 2]))
    assert [len(budgets[i].tokens) for i in range(3)] == [5, 9, 2]
    with pytest.raises(RequestError, match="a list of settings needs a list of prompts"):
        exact.generate([1, 2], 5, [None])
