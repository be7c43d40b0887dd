"""Measures the figures of the card: the package decodes the held-out prompts in both modes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from orthrus_fast import Decoder, Generation
from scripts.embedded.net import OrthrusLM
from scripts.embedded.train import block_tokens, dense_mask

Entry = dict[str, Any]
log = logging.getLogger(__name__)
MAX_NEW = {"records": 900, "code": 128, "prose": 128}
AT_ONCE = 32  # prompts handed to the decoder in one call


def is_exact(answer: str, expected: Any) -> bool:
    """Return whether the answer is JSON and equals what was expected, types included (1 is not
    true, 1.0 is 1).
    """
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return bool(value == expected) and json.dumps(_marked(value)) == json.dumps(_marked(expected))


def _marked(value: Any) -> Any:
    """Return the value in a form to compare: keys sorted, numbers as floats, so that they differ
    from booleans and not by their spelling.
    """
    if isinstance(value, dict):
        return {key: _marked(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_marked(item) for item in value]
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def measure_kind(decoder: Decoder, net: OrthrusLM, entries: Sequence[Entry]) -> Entry:
    """Decode entries of one kind in both modes -> the figures of that kind.

    `net` is the same checkpoint in training form; it computes what each cycle drafted.
    """
    kind = entries[0]["kind"]
    prompts = [decoder.encode(entry.get("messages") or entry["text"]) for entry in entries]
    max_new = min(MAX_NEW[kind], decoder.max_seq_len - max(map(len, prompts)))
    ar, blocks = (decode_all(decoder, prompts, max_new, mode, kind) for mode in ("ar", "diffusion"))
    figures = _figures(blocks)
    figures |= agreement(net, prompts, blocks)
    figures["same_tokens_in_both_modes"] = sum(
        one.tokens == other.tokens for one, other in zip(ar, blocks, strict=True)
    )
    sources = [entry.get("source") for entry in entries]
    if any(sources):
        figures["by_source"] = {
            str(name): _figures([b for b, s in zip(blocks, sources, strict=True) if s == name])
            for name in dict.fromkeys(sources)
        }
    if kind == "records":
        pairs = zip(ar, entries, strict=True)
        wrong = [i for i, (a, e) in enumerate(pairs) if not is_exact(a.text, e["expected"])]
        figures["exact"] = len(entries) - len(wrong)
        figures["exact_share"] = _round(1 - len(wrong) / len(entries))
        figures["not_exact"] = wrong
    return figures


def decode_all(
    decoder: Decoder, prompts: Sequence[list[int]], max_new: int, mode: str, what: str
) -> list[Generation]:
    """Return the results of prompts, in their order."""
    results: list[Generation] = []
    for start in range(0, len(prompts), AT_ONCE):
        results += decoder.generate(list(prompts[start : start + AT_ONCE]), max_new, mode=mode)
        log.info("%s: %s of %d of %d prompts", what, mode, len(results), len(prompts))
    return results


def _figures(results: Sequence[Generation]) -> Entry:
    generated = sum(len(r.tokens) for r in results)
    stats = [r.stats for r in results if r.stats is not None]
    assert len(stats) == len(results), [r.error for r in results if r.error]
    cycles = sum(s.cycles for s in stats)
    ratios = [s.tokens_per_cycle for s in stats if s.tokens_per_cycle is not None]
    return {
        "prompts": len(results),
        "tokens": generated,
        "cycles": cycles,
        "tokens_per_cycle": _round((generated - len(results)) / cycles),
        "tokens_per_cycle_mean_over_prompts": _round(_mean(ratios)),
        "distinct_trigram_share": _round(_mean(distinct_trigrams(r.tokens) for r in results)),
    }


def agreement(net: OrthrusLM, prompts: Sequence[list[int]], results: Sequence[Generation]) -> Entry:
    """Return the share of cycles whose proposal at each position equals the token that the AR view
    then wrote there, and in how many cycles the package accepted exactly the prefix that agrees.
    """
    right, seen = [0] * (net.shape.block_size - 1), [0] * (net.shape.block_size - 1)
    alike = 0
    for prompt, result in zip(prompts, results, strict=True):
        assert result.stats is not None
        anchors = [0]
        for n_accepted in result.stats.accepted[:-1]:
            anchors.append(anchors[-1] + n_accepted + 1)
        if not result.stats.accepted:
            continue
        drafts = drafts_at(net, prompt + result.tokens, [len(prompt) + a for a in anchors])
        for anchor, draft, n_accepted in zip(anchors, drafts, result.stats.accepted, strict=True):
            pairs = zip(draft, result.tokens[anchor + 1 :], strict=False)
            agrees = [drafted == wrote for drafted, wrote in pairs]
            alike += [*agrees, False].index(False) == n_accepted
            for i, agreed in enumerate(agrees):
                right[i] += agreed
                seen[i] += 1
    return {
        "agreement_by_position": [
            _round(r / s) if s else 0.0 for r, s in zip(right, seen, strict=True)
        ],
        "cycles_accepted_as_agreeing": alike,
    }


@torch.no_grad()
def drafts_at(net: OrthrusLM, tokens: list[int], anchors: list[int]) -> list[list[int]]:
    """Return what the draft view proposes after each anchor (an index into `tokens`); as in
    training, all blocks are computed in one pass.
    """
    shape, device = net.shape, next(net.parameters()).device
    ids = torch.tensor([tokens], device=device)
    starts = torch.tensor([anchors], device=device)
    room = F.pad(ids, (0, shape.block_size))  # a block may reach past the end
    blocks, positions = block_tokens(room, starts, shape.block_size, shape.mask_token_id)
    mask = dense_mask(starts, len(tokens), shape.block_size)
    hidden = net.draft(blocks, positions, net.ar(ids)[1], mask)
    drafts = net.logits(hidden[0]).argmax(-1).view(len(anchors), -1)[:, :-1]
    listed: list[list[int]] = drafts.tolist()
    return listed


def distinct_trigrams(tokens: Sequence[int]) -> float:
    """Return the distinct trigrams over all trigrams; 1 means that none is repeated."""
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


@torch.no_grad()
def answer_loss(net: OrthrusLM, pairs: Iterable[tuple[list[int], list[int]]]) -> Entry:
    """Return the AR loss of (prompt, answer) pairs, in nats per token of the answer."""
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
