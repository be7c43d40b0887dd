"""What the card says: measured on the held-out prompts, with the weights as saved, in float32."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from scripts.embedded.decode import Decoded, SequenceDecoder
from scripts.embedded.net import OrthrusLM
from scripts.embedded.tokens import end_tokens, render_chat

Entry = dict[str, Any]
log = logging.getLogger(__name__)
MAX_NEW = {"records": 900, "code": 128, "prose": 128}


def prompt_ids(tokenizer: Tokenizer, entry: Entry) -> list[int]:
    """Messages go through the chat template, text stands as it is."""
    text = render_chat(entry["messages"]) if "messages" in entry else entry["text"]
    ids: list[int] = tokenizer.encode(text).ids
    return ids


def is_exact(answer: str, expected: Any) -> bool:
    """Whether the answer is JSON and equals what was expected, types included (1 is not true, 1.0
    is 1).
    """
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return bool(value == expected) and json.dumps(_marked(value)) == json.dumps(_marked(expected))


def _marked(value: Any) -> Any:
    """Booleans made unlike numbers, numbers unlike their spelling, keys sorted: for comparison
    alone.
    """
    if isinstance(value, dict):
        return {key: _marked(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def measure_kind(net: OrthrusLM, tokenizer: Tokenizer, entries: Sequence[Entry]) -> Entry:
    """Decode entries of one kind in both modes -> the figures of that kind."""
    kind = entries[0]["kind"]
    ends = end_tokens(tokenizer)
    decoder = SequenceDecoder(net, net.shape.max_positions + net.shape.block_size)
    pairs: list[tuple[Decoded, Decoded]] = []
    wrong: list[int] = []
    for index, entry in enumerate(entries):
        ids = prompt_ids(tokenizer, entry)
        max_new = min(MAX_NEW[kind], net.shape.max_positions - len(ids))
        ar, blocks = (decoder.decode(ids, max_new, ends, drafted) for drafted in (False, True))
        pairs.append((ar, blocks))
        if len(pairs) % 32 == 0:
            log.info("%s: %d of %d prompts", kind, len(pairs), len(entries))
        if "expected" in entry and not is_exact(tokenizer.decode(ar.tokens), entry["expected"]):
            wrong.append(index)
    figures = _figures([blocks for _, blocks in pairs], net.shape.block_size)
    figures["same_tokens_in_both_modes"] = sum(ar.tokens == blocks.tokens for ar, blocks in pairs)
    if kind == "records":
        figures |= {
            "exact": len(entries) - len(wrong),
            "exact_share": _round(1 - len(wrong) / len(entries)),
        }
        figures["not_exact"] = wrong
    return figures


def _figures(decoded: Sequence[Decoded], block_size: int) -> Entry:
    generated = sum(len(d.tokens) for d in decoded)
    cycles = sum(d.cycles for d in decoded)
    ratios = [(len(d.tokens) - 1) / d.cycles for d in decoded if d.cycles]
    return {
        "prompts": len(decoded),
        "tokens": generated,
        "cycles": cycles,
        "tokens_per_cycle": _round((generated - len(decoded)) / cycles),
        "tokens_per_cycle_mean_over_prompts": _round(sum(ratios) / len(ratios)),
        "agreement_by_position": agreement(decoded, block_size),
        "distinct_trigram_share": _round(
            _mean(map(distinct_trigrams, (d.tokens for d in decoded)))
        ),
    }


def agreement(decoded: Sequence[Decoded], block_size: int) -> list[float]:
    """Share of cycles whose draft at each position equals the token that the AR view went on to
    write there.
    """
    right, seen = [0] * (block_size - 1), [0] * (block_size - 1)
    for one in decoded:
        for anchor, draft in one.drafts:
            for i, (drafted, wrote) in enumerate(
                zip(draft, one.tokens[anchor + 1 :], strict=False)
            ):
                right[i] += drafted == wrote
                seen[i] += 1
    return [_round(r / s) if s else 0.0 for r, s in zip(right, seen, strict=True)]


def distinct_trigrams(tokens: Sequence[int]) -> float:
    """Different trigrams over all trigrams: 1 never repeats itself."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


@torch.no_grad()
def answer_loss(net: OrthrusLM, pairs: Iterable[tuple[list[int], list[int]]]) -> Entry:
    """AR loss of (prompt, answer) pairs, nats a token of the answer."""
    total, count = 0.0, 0
    for prompt, answer in pairs:
        tokens = torch.tensor(
            (prompt + answer)[: net.shape.max_positions], device=next(net.parameters()).device
        )
        hidden, _ = net.ar(tokens[None, :-1])
        nats = F.cross_entropy(net.logits(hidden[0]), tokens[1:], reduction="none")[
            max(0, len(prompt) - 1) :
        ]
        total, count = total + float(nats.sum()), count + len(nats)
    return {"nats_per_token": _round(total / count), "tokens": count}


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _round(value: float) -> float:
    return round(value, 4)
