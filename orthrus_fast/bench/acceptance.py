"""The part of real acceptance: what a checkpoint's own drafts are worth on a file of prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from orthrus_fast.bench.common import Result, tell
from orthrus_fast.bench.decoding import decode, seeded
from orthrus_fast.bench.prompts import chosen_prompts, prompts_file

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench


class Text(NamedTuple):
    """One prompt's answer."""

    tokens: list[int]
    accepted: list[int]  # drafts, by cycle
    equal_to_ar: bool

    @property
    def tokens_per_cycle(self) -> float | None:
        return (len(self.tokens) - 1) / len(self.accepted) if self.accepted else None

    @property
    def is_cut(self) -> bool:
        """Whether the text ended within its last block's drafts: those after it had no judge."""
        return sum(self.accepted) + len(self.accepted) > len(self.tokens) - 1


def acceptance(bench: Bench) -> Result:
    """Tokens per cycle, acceptance by position in the block, identity with AR by prompt.

    Sampled where the command line says so, as identity is.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    if bench.args.shape:
        return {"skipped": "random weights have no trained draft view"}
    path = prompts_file(bench)
    if path is None:
        return {"skipped": "no --prompts-file"}
    args, prompts = bench.args, chosen_prompts(bench)
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    texts = decode_texts(bench, prompts, settings)
    accepted, reached = by_position(texts, bench.width)
    return {
        "prompts_file": path.name,
        "sampling": settings,
        "sequences": len(texts),
        "new_tokens": args.new_tokens,
        "tokens_per_cycle": averages(texts),
        "accepted_at_position": accepted,
        "reached_position": reached,
        "distinct_trigrams": statistics.fmean(distinct_trigrams(text.tokens) for text in texts),
        "texts_equal_to_ar": sum(text.equal_to_ar for text in texts),
        "by_prompt": [
            {
                "tokens": len(text.tokens),
                "cycles": len(text.accepted),
                "tokens_per_cycle": text.tokens_per_cycle,
                "equal_to_ar": text.equal_to_ar,
            }
            for text in texts
        ],
    }


def decode_texts(bench: Bench, prompts: list[list[int]], settings: Result) -> list[Text]:
    each = seeded(bench, len(prompts), **settings)
    decoder, n_tokens, width = bench.decoder, bench.args.new_tokens, bench.width
    tell("acceptance: ar")
    ar = decode(decoder, prompts, n_tokens, False, width, each)
    tell("acceptance: diffusion")
    own = decode(decoder, prompts, n_tokens, True, width, each)
    answers = zip(own.tokens, own.accepted_by_prompt, ar.tokens, strict=True)
    return [Text(tokens, accepted, tokens == expected) for tokens, accepted, expected in answers]


def averages(texts: Sequence[Text]) -> Result:
    """Both means: over cycles and over prompts, the latter's error too; None without a cycle."""
    each = [text.tokens_per_cycle for text in texts if text.tokens_per_cycle is not None]
    if not each:
        return {"token_weighted": None, "mean_over_prompts": None, "standard_error": None}
    n_tokens = sum(len(text.tokens) - 1 for text in texts)
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
    return {
        "token_weighted": n_tokens / sum(len(text.accepted) for text in texts),
        "mean_over_prompts": statistics.fmean(each),
        "standard_error": error,
    }


def by_position(texts: Sequence[Text], width: int) -> tuple[list[float | None], list[int]]:
    """Of draft positions 1 … width - 1: the share accepted, and of how many that were reached.

    A position is reached where all before it were accepted. None where none was.
    """
    n_reached, n_accepted = [0] * width, [0] * width
    for text in texts:
        for cycle, n in enumerate(text.accepted):
            is_cut = text.is_cut and cycle == len(text.accepted) - 1
            for position in range(1, min(n if is_cut else n + 1, width - 1) + 1):
                n_reached[position] += 1
                n_accepted[position] += position <= n
    both = list(zip(n_accepted, n_reached, strict=True))[1:]
    return [a / r if r else None for a, r in both], n_reached[1:]


def distinct_trigrams(tokens: Sequence[int]) -> float:
    """Different trigrams over all of a text's: 1 never repeats itself."""
    pairs = pairwise(tokens)
    trigrams = [(a, b, c) for (a, b), (_, c) in pairwise(pairs)]
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
