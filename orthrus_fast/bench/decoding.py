"""Whole decodes in the decoder's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.decoder import Decoder
    from orthrus_fast.runners import EagerRunner
    from orthrus_fast.sampling import SamplingParams


class Decoded(NamedTuple):
    """Some prompts decoded at once."""

    tokens: list[list[int]]  # new ones, by prompt
    accepted_by_prompt: list[list[int]]  # drafts accepted, by cycle
    tokens_per_second: float  # of all together, while all decode; 0 where they never do

    @property
    def accepted(self) -> list[int]:
        """Of all prompts, one after another."""
        return [n for of_prompt in self.accepted_by_prompt for n in of_prompt]

    @property
    def tokens_per_cycle(self) -> float | None:
        n_after_first = sum(len(tokens) - 1 for tokens in self.tokens)
        return n_after_first / len(self.accepted) if self.accepted else None


def decode(
    decoder: Decoder,
    prompts: list[list[int]],
    n_tokens: int,
    drafting: bool,
    width: int,
    settings: Sequence[SamplingParams | None] | None = None,
) -> Decoded:
    """Serve the prompts in the decoder's own loop, text and mailbox included.

    ``settings``: one for each prompt; None is greedy.
    """
    decoder._runner.state.reset()
    each = settings or [None] * len(prompts)
    requests = [decoder._request(p, n_tokens, s) for p, s in zip(prompts, each, strict=True)]
    for _ in decoder._run(requests, drafting, width):
        pass
    tokens = [request.tokens for request in requests]
    accepted = [request.accepted for request in requests]
    # Until the first one ends: a slot that waits for others to end, as none does whose place the
    # next prompt takes, would count against drafting alone. By Wald's identity this is unbiased.
    seconds = min(r.last_at for r in requests) - max(r.first_at for r in requests)
    n_cycles = min(map(len, accepted))
    n_emitted = sum(
        min(sum(of_cycles[:n_cycles]) + n_cycles, len(ids) - 1)
        for ids, of_cycles in zip(tokens, accepted, strict=True)
    )
    return Decoded(tokens, accepted, n_emitted / seconds if seconds > 0 else 0.0)


def seeded(
    bench: Bench,
    n: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[SamplingParams]:
    """The settings of ``n`` sequences, each with a seed of its own. Raises RequestError."""
    from orthrus_fast.sampling import SamplingParams

    seeds = [(bench.args.seed + index) % 2**64 for index in range(n)]
    return [SamplingParams(temperature, top_k, top_p, seed=seed) for seed in seeds]


@contextmanager
def endless(runner: EagerRunner) -> Iterator[None]:
    """No token ends a text: what is decoded has the length that was asked for."""
    eos = runner.eos.clone()
    runner.eos.fill_(-1)  # in place: a captured graph reads this tensor
    try:
        yield
    finally:
        runner.eos.copy_(eos)


@contextmanager
def served_by(decoder: Decoder, runner: EagerRunner) -> Iterator[None]:
    """Another runner in the decoder's loop, over the same state and cache."""
    own, decoder._runner = decoder._runner, runner
    try:
        yield
    finally:
        decoder._runner = own
