"""Replayed acceptance: draft passes at full cost, whose proposals give way to a known text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from orthrus_fast.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.runners import EagerRunner


@contextmanager
def replaced(runner: EagerRunner, **methods: Callable[..., Any]) -> Iterator[None]:
    """Other methods on this one runner."""
    for name, method in methods.items():
        setattr(runner, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(runner, name)


class Replay:
    """Replayed acceptance: draft passes whose proposals give way to a corrupted known text.

    A position's draft is right or wrong for a whole decode, drawn beforehand. That is as good as
    drawing it in each cycle: no position is judged twice, since a wrong one ends its cycle and
    verification then supplies the token itself.
    """

    def __init__(self, bench: Bench, salt: int = 0) -> None:
        import torch

        self.runner, self.accept = bench.runner, bench.accept
        state = bench.runner.state
        self.drafts = torch.zeros_like(state.tokens)  # [B, S]
        self.offset = torch.arange(1, bench.width, device=bench.device)
        self.random = torch.Generator(bench.device).manual_seed(bench.args.seed + 1 + salt)
        self.vocab_size = bench.decoder.config.vocab_size

    def know(self, slot: int, tokens: Tensor) -> None:
        """Set the text [n] that ``slot`` will decode, prompt included; drafts are drawn from it."""
        import torch

        shift = torch.empty_like(tokens).random_(1, self.vocab_size, generator=self.random)
        draw = torch.rand(len(tokens), generator=self.random, device=tokens.device)
        wrong = (tokens + shift) % self.vocab_size
        self.drafts[slot, : len(tokens)] = torch.where(draw < self.accept, tokens, wrong)

    def draft(self, sampling: bool = False) -> None:
        """The runner's draft pass, and then other proposals; nothing is read on the host."""
        import torch

        type(self.runner).draft(self.runner, sampling)
        state = self.runner.state
        at = state.length[:, None] + self.offset  # the anchor sits at position length
        torch.gather(self.drafts, 1, at, out=state.proposals)


def expected_tokens_per_cycle(accept: float, width: int) -> float:
    """Mean of 1 + the length of the run of right drafts, each right with probability ``accept``."""
    return sum(accept**n for n in range(width))


def share_of_right_drafts(asked: float, width: int) -> float:
    """``asked`` itself up to 1; above, the share that gives so many tokens per cycle.

    Raises RequestError for more than blocks of ``width`` rows can give.
    """
    if asked <= 1:
        return asked
    if asked >= width:
        raise RequestError(
            f"accept: {asked:g} tokens per cycle is not above 1 and below {width}, "
            "the rows of a block"
        )
    low, high = 0.0, 1.0
    for _ in range(64):  # each halves what is left; a float has 53 bits
        middle = (low + high) / 2
        if expected_tokens_per_cycle(middle, width) < asked:
            low = middle
        else:
            high = middle
    return high
