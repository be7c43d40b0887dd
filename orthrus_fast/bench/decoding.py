"""Whole decodes in the decoder's own engine, with the model's own drafts or replayed ones.

Replayed acceptance: the draft pass runs at its full cost, then its proposals are replaced by the
known continuation of the text, a wanted share of it right. So random weights show the speed that a
trained model would have at its acceptance.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus_fast.decoder import Decoder
from orthrus_fast.engine.engine import Engine
from orthrus_fast.engine.request import Request, Update
from orthrus_fast.errors import RequestError
from orthrus_fast.runners import EagerRunner
from orthrus_fast.sampling import SamplingParams

Prompts = list[list[int]]
Settings = Sequence[SamplingParams | None] | None  # one for each prompt; None is greedy


class Decoded(NamedTuple):
    """Some prompts decoded at once."""

    tokens: list[list[int]]  # new ones, by prompt
    accepted_by_prompt: list[list[int]]  # drafts accepted, by cycle
    tokens_per_second: float  # of all together, while all decode; 0 where they never do

    @property
    def accepted(self) -> list[int]:
        """The drafts accepted in each cycle, of all prompts one after another."""
        return [n for of_prompt in self.accepted_by_prompt for n in of_prompt]

    @property
    def n_emitted(self) -> int:
        """The tokens that cycles emitted: the first one of a text comes with the prefill."""
        return sum(len(tokens) - 1 for tokens in self.tokens)


@dataclass
class Text:
    """What has come of one prompt, and when."""

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # drafts, by cycle
    first_at: float = 0.0
    last_at: float = 0.0

    def take(self, update: Update) -> None:
        """Record an update. Raises RuntimeError for one that tells of an error."""
        if update.error is not None:
            raise RuntimeError(update.error)
        self.last_at = time.perf_counter()
        if update.n_accepted is None:
            self.first_at = self.last_at
        else:
            self.accepted.append(update.n_accepted)
        self.tokens += update.tokens


def decode(
    decoder: Decoder,
    prompts: Prompts,
    n: int,
    drafting: bool,
    width: int | None,
    each: Settings = None,
) -> Decoded:
    """Serve the prompts, ``n`` new tokens each, in the decoder's own engine, mailbox included.

    As many of them as there are slots decode at once, the first one in slot 0. Blocks have
    ``width`` rows; None leaves the choice to the engine, cycle by cycle.
    """
    decoder.runner.state.reset()  # idle slots take no time
    settings = [params or SamplingParams() for params in each or [None] * len(prompts)]
    pairs = enumerate(zip(prompts, settings, strict=True))
    requests = [Request(index, prompt, n, params, drafting) for index, (prompt, params) in pairs]
    with fixed_width(decoder.engine, drafting, width):
        texts = run(decoder.engine, requests)
    return rated(texts)


def run(engine: Engine, requests: Sequence[Request]) -> list[Text]:
    """Serve requests, whose ids are 0, 1, …, all prompts first; the engine is idle then."""
    texts = [Text() for _ in requests]
    for request in requests:
        engine.submit(request)
    engine.scheduler.takes_turns = False
    try:
        while engine.has_work:
            for update in engine.step():
                texts[update.id].take(update)
    finally:
        engine.scheduler.takes_turns = True
    return texts


def rated(texts: Sequence[Text]) -> Decoded:
    """Return the texts with their rate while all of them decode.

    Until the first one ends: a slot that waits for others to end, as none does whose place the next
    prompt takes, would count against drafting alone. By Wald's identity this is unbiased.
    """
    seconds = min(text.last_at for text in texts) - max(text.first_at for text in texts)
    n_cycles = min(len(text.accepted) for text in texts)
    n_emitted = sum(
        min(sum(text.accepted[:n_cycles]) + n_cycles, len(text.tokens) - 1) for text in texts
    )
    rate = n_emitted / seconds if seconds > 0 else 0.0
    return Decoded([text.tokens for text in texts], [text.accepted for text in texts], rate)


@contextmanager
def fixed_width(engine: Engine, drafting: bool, width: int | None) -> Iterator[None]:
    """Give cycles this width, or leave it to the engine."""
    before = engine.policy.fixed, engine.ar_width
    engine.policy.fixed = width if drafting else None
    engine.ar_width = engine.ar_width if drafting or width is None else width
    try:
        yield
    finally:
        engine.policy.fixed, engine.ar_width = before


@contextmanager
def ignore_eos(runner: EagerRunner) -> Iterator[None]:
    """Let no token end a text, so that every text has the length that was asked for."""
    eos = runner.eos.clone()
    runner.eos.fill_(-1)  # in place: a captured graph reads this tensor
    try:
        yield
    finally:
        runner.eos.copy_(eos)


@contextmanager
def patched(runner: EagerRunner, **methods: Callable[..., Any]) -> Iterator[None]:
    """Replace methods of this one runner."""
    for name, method in methods.items():
        setattr(runner, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(runner, name)


class Replay:
    """Draft passes whose proposals come from a known text, a share ``accept`` of them right.

    Whether the draft of a position is right is drawn once for a whole decode. That is as good as
    drawing it in each cycle: no position is judged twice, since a wrong draft ends its cycle and
    verification then supplies the token itself. ``width``: rows of a block.
    """

    def __init__(self, runner: EagerRunner, width: int, accept: float, seed: int) -> None:
        self.runner, self.accept = runner, accept
        self.drafts = torch.zeros_like(runner.state.tokens)  # [B, S]
        self.offset = torch.arange(1, width, device=runner.device)
        self.random = torch.Generator(runner.device).manual_seed(seed)
        self.vocab_size = runner.model.config.vocab_size

    def set_text(self, slot: int, tokens: Tensor) -> None:
        """Draw the drafts for the text [n] that ``slot`` will decode, prompt included."""
        shift = torch.empty_like(tokens).random_(1, self.vocab_size, generator=self.random)
        draw = torch.rand(len(tokens), generator=self.random, device=tokens.device)
        wrong = (tokens + shift) % self.vocab_size
        self.drafts[slot, : len(tokens)] = torch.where(draw < self.accept, tokens, wrong)

    def draft(self, width: int, sampling: bool = False) -> None:
        """Run the runner's draft pass, then replace its proposals; the host reads nothing."""
        type(self.runner).draft(self.runner, width, sampling)
        state = self.runner.state
        at = state.length[:, None] + self.offset[: width - 1]  # the anchor sits at length
        state.proposals[:, : width - 1] = self.drafts.gather(1, at)


def expected_tokens_per_cycle(accept: float, width: int) -> float:
    """Return the mean of 1 + a run of right drafts, each right with probability ``accept``."""
    return sum(accept**n for n in range(width))


def share_of_right_drafts(asked: float, width: int) -> float:
    """Return ``asked`` up to 1; above, the share that yields so many tokens per cycle.

    Raises RequestError for more than blocks of ``width`` rows can yield.
    """
    if asked <= 1:
        return asked
    if asked >= width:
        problem = (
            f"{asked:g} tokens per cycle is not above 1 and below {width}, the rows of a block"
        )
        raise RequestError(f"accept: {problem}")
    low, high = 0.0, 1.0
    for _ in range(64):  # each halves what is left; a float has 53 bits
        middle = (low + high) / 2
        is_low = expected_tokens_per_cycle(middle, width) < asked
        low, high = (middle, high) if is_low else (low, middle)
    return high
