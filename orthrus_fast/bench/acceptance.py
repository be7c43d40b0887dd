"""The part of real acceptance: what a checkpoint's own drafts yield on a file of prompts."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from orthrus_fast.bench.common import Result
from orthrus_fast.bench.decoding import decode
from orthrus_fast.bench.flags import prompts_path
from orthrus_fast.bench.session import Session, choose_prompts, chosen_lines


class Text(NamedTuple):
    """One prompt's answer."""

    tokens: list[int]
    accepted: list[int]  # drafts, by cycle
    equal_to_ar: bool

    @property
    def tokens_per_cycle(self) -> float | None:
        return (len(self.tokens) - 1) / len(self.accepted) if self.accepted else None

    @property
    def summary(self) -> Result:
        counts = {"tokens": len(self.tokens), "cycles": len(self.accepted)}
        return counts | {"tokens_per_cycle": self.tokens_per_cycle, "equal_to_ar": self.equal_to_ar}

    @property
    def is_cut(self) -> bool:
        """Whether the text ended within its last block's drafts: no one judged those after it."""
        return sum(self.accepted) + len(self.accepted) > len(self.tokens) - 1


def acceptance(session: Session) -> Result:
    """Measure tokens per cycle, acceptance by position in the block, equality with AR's texts."""
    path = prompts_path(session.args)
    if not session.drafting:
        return {"skipped": "no draft view"}
    if session.args.shape:
        return {"skipped": "random weights have no trained draft view"}
    if path is None:
        return {"skipped": "no --prompts-file"}
    decoder, n_tokens, width = session.decoder, session.args.new_tokens, session.width
    prompts = choose_prompts(session)
    each = session.seeded(len(prompts), **session.sampling)
    ar = decode(decoder, prompts, n_tokens, False, decoder.ar_width, each)
    diffusion = decode(decoder, prompts, n_tokens, True, width, each)
    answers = zip(diffusion.tokens, diffusion.accepted_by_prompt, ar.tokens, strict=True)
    texts = [Text(tokens, accepted, tokens == expected) for tokens, accepted, expected in answers]
    return {
        "prompts_file": path.name,
        "sampling": session.sampling,
        "sequences": len(texts),
        "new_tokens": n_tokens,
        "tokens_per_cycle": averages(texts),
        "by_kind": by_kind([line.extra.get("kind") for line in chosen_lines(session)], texts),
        **by_position(texts, width),
        "distinct_trigrams": statistics.fmean(distinct_trigrams(text.tokens) for text in texts),
        "texts_equal_to_ar": sum(text.equal_to_ar for text in texts),
        "by_prompt": [text.summary for text in texts],
    }


def averages(texts: Sequence[Text]) -> Result:
    """Return the means over cycles and over prompts, and the latter's standard error, or None."""
    each = [text.tokens_per_cycle for text in texts if text.tokens_per_cycle is not None]
    n_cycles = sum(len(text.accepted) for text in texts)
    return {
        "token_weighted": sum(len(t.tokens) - 1 for t in texts) / n_cycles if n_cycles else None,
        "mean_over_prompts": statistics.fmean(each) if each else None,
        "standard_error": statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
    }


def by_kind(kinds: Sequence[object], texts: Sequence[Text]) -> Result:
    """Return the averages of each kind of text, where the file's lines have a field "kind"."""
    each: dict[str, list[Text]] = {}
    for kind, text in zip(kinds, texts, strict=True):
        if isinstance(kind, str):
            each.setdefault(kind, []).append(text)
    return {kind: {"sequences": len(some), **averages(some)} for kind, some in each.items()}


def by_position(texts: Sequence[Text], width: int) -> Result:
    """Return, of draft positions 1 … width - 1, the share accepted and how many were reached.

    A position is reached where all before it were accepted. The share is None where none was.
    """
    n_reached, n_accepted = [0] * width, [0] * width
    for text in texts:
        for cycle, n in enumerate(text.accepted):
            is_cut = text.is_cut and cycle == len(text.accepted) - 1
            for position in range(1, min(n if is_cut else n + 1, width - 1) + 1):
                n_reached[position] += 1
                n_accepted[position] += position <= n
    shares = [a / r if r else None for a, r in zip(n_accepted, n_reached, strict=True)]
    return {"accepted_at_position": shares[1:], "reached_position": n_reached[1:]}


def distinct_trigrams(tokens: Sequence[int]) -> float:
    """Return the share of a text's trigrams that are distinct: 1 where it never repeats itself."""
    trigrams = [(a, b, c) for (a, b), (_, c) in pairwise(pairwise(tokens))]
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
