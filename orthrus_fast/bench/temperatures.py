"""The part of sampled acceptance: ours, and beside it rejection sampling's, computed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthrus_fast.bench.common import Result, tell
from orthrus_fast.bench.decoding import decode, seeded, served_by
from orthrus_fast.bench.prompts import chosen_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.steps import State

TEMPERATURES = (0.0, 0.3, 0.7, 1.0)


def expected_accepted(
    draft_logits: Tensor, target_logits: Tensor, drafts: Tensor, temperature: float
) -> Tensor:
    """How many drafts rejection sampling is expected to accept, given the drafts: [B] float64.

    logits [B, K-1, V], drafts [B, K-1] that were drawn from the softmax of ``draft_logits /
    temperature``. The i-th is accepted, after those before it, with probability min(1, target
    probability / draft probability): Leviathan et al. 2023, arXiv 2211.17192, algorithm 1. In
    float64; filters off.
    """

    def log_probability(logits: Tensor) -> Tensor:
        scaled = (logits.double() / temperature).log_softmax(dim=-1)
        return scaled.gather(-1, drafts[..., None])[..., 0]

    ratio = (log_probability(target_logits) - log_probability(draft_logits)).exp()
    return ratio.clamp(max=1).cumprod(dim=-1).sum(dim=-1)


class BlockJudge:
    """Tokens per cycle of sampled blocks, ours and rejection sampling's, not cut by a text's end.

    Its runner decodes by the eager steps over the decoder's own weights, state and cache, since
    nothing reaches into a captured graph. Each block is judged twice on the same logits: by the
    tokens that our noise draws, and by ``expected_accepted``, which nothing is served by. Drafts
    are fresh draws in every block: what is cut off after a wrong draft was judged by no one.
    """

    def __init__(self, bench: Bench, temperature: float) -> None:
        from orthrus_fast.runners import EagerRunner

        runner = bench.runner
        self.runner = EagerRunner(runner.model, runner.state, runner.cache)
        self.temperature = temperature
        self.ours: list[float] = []
        self.rejection: list[float] = []
        for name in ("_sampled", "verify"):
            setattr(self.runner, name, getattr(self, name))

    def _sampled(self, state: State, logits: Tensor) -> Tensor:
        from orthrus_fast.steps import sampled

        self.draft_logits = logits
        return sampled(state, logits)

    def verify(self, width: int, sampling: bool = False) -> Tensor:
        from orthrus_fast.steps import accept, make_block

        state, is_open = self.runner.state, ~self.runner.state.done
        block = make_block(state, width)
        report = type(self.runner).verify(self.runner, width, sampling)
        ours = accept(block, report[:, :width])
        target_logits = self.runner.logits[:, :-1]
        rejection = expected_accepted(
            self.draft_logits, target_logits, block[:, 1:], self.temperature
        )
        self.ours += (1 + ours[is_open]).tolist()
        self.rejection += (1 + rejection[is_open]).tolist()
        return report


def temperatures(bench: Bench) -> Result:
    """A checkpoint's tokens per cycle by temperature, and what rejection sampling would have had.

    ``served``: as the decoder's own runner serves them, the last block cut at the text's end.
    ``uncut``, ``rejection_sampling``: of the whole blocks of a second decode, see ``BlockJudge``.
    Standard errors count cycles as independent.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    if bench.args.shape:
        return {"skipped": "random weights have no trained draft view"}
    prompts = chosen_prompts(bench)
    return {
        "sequences": len(prompts),
        "new_tokens": bench.args.new_tokens,
        "filters": None,
        "served_by": bench.decoder.configuration["runner"],
        "judged_by": "eager steps over the same weights; texts may differ in near ties",
        "rejection_sampling": "arXiv 2211.17192, computed on the uncut blocks' logits, not served",
        "at": [temperatures_at(bench, prompts, temperature) for temperature in TEMPERATURES],
    }


def temperatures_at(bench: Bench, prompts: list[list[int]], temperature: float) -> Result:
    tell(f"temperatures: {temperature}")
    decoder, n_tokens, width = bench.decoder, bench.args.new_tokens, bench.width
    each = seeded(bench, len(prompts), temperature)
    served = decode(decoder, prompts, n_tokens, True, width, each)
    spread = mean_of(served.accepted)
    result: Result = {
        "temperature": temperature,
        "served": {**spread, "mean": served.tokens_per_cycle},
    }
    if temperature > 0:
        judge = BlockJudge(bench, temperature)
        with served_by(decoder, judge.runner):
            decode(decoder, prompts, n_tokens, True, width, each)
        result["uncut"] = mean_of(judge.ours)
        result["rejection_sampling"] = mean_of(judge.rejection)
        result["uncut_over_rejection_sampling"] = ratio_of(judge.ours, judge.rejection)
    return result


def mean_of(values: Sequence[float]) -> Result:
    """Mean, its standard error and the number of values; None where there are none."""
    if not values:
        return {"mean": None, "standard_error": None, "n": 0}
    error = statistics.pstdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "standard_error": error, "n": len(values)}


def ratio_of(values: Sequence[float], others: Sequence[float]) -> Result:
    """As ``mean_of``, of the ratio of two means; its error counts that they come in pairs."""
    if not values:
        return mean_of(values)
    below = statistics.fmean(others)
    ratio = statistics.fmean(values) / below
    rest = [(a - ratio * b) / below for a, b in zip(values, others, strict=True)]  # delta method
    return {**mean_of(rest), "mean": ratio}
