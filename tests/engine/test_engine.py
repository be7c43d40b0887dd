"""The engine against each request run alone: any order of arrivals, ends and cancellations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    rule,
    run_state_machine_as_test,
)

from orthrus_fast import SamplingParams, Stream
from orthrus_fast.engine.request import Request
from tests.engine.solo import (
    SETTINGS,
    Solo,
    check_requests,
    check_rows,
    load,
    random_prompt,
    unpredictable,
)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("n_requests", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_requests_are_told_what_they_are_told_alone(
    tiny: Path, solo: Solo, n_requests: int, ahead: int
) -> None:
    """Tokens, log-probabilities, ends; and the rows kept are those of a fresh prefill."""
    engine = load(tiny, slots=4).engine
    unpredictable(engine, 1, ahead)
    ended = check_requests(engine, solo, n_requests, seed=ahead)
    assert {updates[-1].finish_reason for updates in ended} == {"eos", "length"}
    assert sum(updates[0].n_reused for updates in ended) > 3 * len(ended)
    assert check_rows(engine, solo) > 50


class Clients(RuleBasedStateMachine):
    """Readers of one decoder who come, read, leave and ask again, in any order."""

    directory: Path
    solo: Solo
    streams = Bundle("streams")

    @initialize(slots=st.integers(1, 3), seed=st.integers(0, 100), ahead=st.integers(0, 1))
    def begin(self, slots: int, seed: int, ahead: int) -> None:
        self.decoder = load(self.directory, slots=slots)
        unpredictable(self.decoder.engine, seed, ahead)
        self.chance = random.Random(seed)
        self.requests: dict[int, Request] = {}

    @rule(target=streams, drafting=st.booleans(), params=st.sampled_from(SETTINGS))
    def ask(self, drafting: bool, params: SamplingParams) -> Stream:
        prompt, budget = random_prompt(self.chance), self.chance.choice((1, 5, 20))
        stream = self.decoder.stream(prompt, budget, params, "diffusion" if drafting else "ar")
        self.requests[stream.id] = Request(stream.id, prompt, budget, params, drafting)
        return stream

    @rule(target=streams, stream=streams)
    def go_on(self, stream: Stream) -> Stream:
        """As the next turn of a chat does."""
        before = self.requests[stream.id]
        prompt = (before.prompt + stream.result.tokens + [3, 4])[:200]
        params, mode = before.sampling, "diffusion"
        following = self.decoder.stream(prompt, 5, params, mode)
        self.requests[following.id] = Request(following.id, prompt, 5, params, True)
        return following

    @rule(stream=streams, n=st.integers(1, 4))
    def read(self, stream: Stream, n: int) -> None:
        for _ in range(n):
            next(stream, None)
        self.compare(stream)

    @rule(stream=consumes(streams))
    def read_all(self, stream: Stream) -> None:
        for _ in stream:
            pass
        self.compare(stream)
        assert stream.result.finish_reason is not None or stream.is_over

    @rule(stream=consumes(streams), close=st.booleans())
    def leave(self, stream: Stream, close: bool) -> None:
        if close:
            stream.close()
        del stream

    @rule(n=st.integers(1, 8))
    def step(self, n: int) -> None:
        """Somebody else's waiting."""
        for _ in range(n):
            self.decoder._hand_out(self.decoder.engine.step())

    @rule()
    def look(self) -> None:
        check_rows(self.decoder.engine, self.solo)

    def compare(self, stream: Stream) -> None:
        """What was read so far is how the text alone begins."""
        result, expected = stream.result, self.solo.told(self.requests[stream.id])
        n = len(result.tokens)
        assert result.tokens == expected.tokens[:n]
        assert (result.logprobs or []) == expected.logprobs[:n]
        if result.finish_reason is not None:
            assert (n, result.finish_reason) == (len(expected.tokens), expected.finish_reason)

    def teardown(self) -> None:
        if hasattr(self, "decoder"):
            check_rows(self.decoder.engine, self.solo)


def test_any_order_of_readers(tiny: Path, solo: Solo) -> None:
    Clients.directory, Clients.solo = tiny, solo
    few = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(Clients, settings=few)  # type: ignore[no-untyped-call]
