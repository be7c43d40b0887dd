"""The part that compares AR and diffusion to the bit."""

import hashlib
import json
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus_fast.bench.common import Result, log
from orthrus_fast.bench.decoding import Prompts, Replay, Settings, decode, patched
from orthrus_fast.bench.session import Session, choose_prompts
from orthrus_fast.invariance import bits_of

SUMS = "new_tokens rows rows_differing cache_rows cache_rows_differing ties_for_first_place cycles"


class Recorded(NamedTuple):
    """What a decoded sequence left behind."""

    tokens: Tensor  # [n + 1]: prompt, output, the anchor last
    n_prompt: int
    logits: Tensor  # [n - n_prompt, V]: of verification at each committed position
    cache: list[Tensor]  # [n, n_kv_heads, head_dim] a layer, K then V
    accepted: list[int]  # drafts, by cycle


def identity(session: Session) -> Result:
    """Compare tokens, logits at every emitted position and cache rows of both modes.

    Random weights get replayed drafts, a checkpoint drafts for itself. Where the command line
    says to sample, each sequence has a seed, the same in both modes.
    """
    if not session.drafting:
        return {"skipped": "no draft view"}
    args, slots, prompts = session.args, session.decoder.slots, choose_prompts(session)
    each = session.seeded(len(prompts), **session.sampling)
    replay = session.replay() if args.shape else None
    verdicts: list[Result] = []
    texts, tokens = [], []  # of AR; of diffusion, new ones of all sequences
    for begin in range(0, len(prompts), slots):
        log(f"identity: sequence {begin + 1} of {len(prompts)}")
        group = slice(begin, begin + slots)
        both = decode_both(session, prompts[group], args.new_tokens, replay, each[group])
        for ar, diffusion in both:
            verdict = of_all_ranks(session, compare(ar, diffusion))
            verdicts.append({"seed": each[len(verdicts)].seed, **verdict})
            texts.append(ar.tokens.tolist())
            tokens += diffusion.tokens[diffusion.n_prompt :].tolist()
    total = {name: sum(verdict[name] for verdict in verdicts) for name in SUMS.split()}
    n_emitted = len(tokens) - len(prompts)
    return {
        "drafts": f"replayed, {replay.accept:.3g} right" if replay else "the checkpoint's own",
        "accept": replay.accept if replay else None,
        "accept_asked": session.acceptance["accept_asked"] if replay else None,
        "sampling": session.sampling,
        "sequences": len(prompts),
        "sequences_equal": sum(verdict["tokens_equal"] for verdict in verdicts),
        **total,
        "tokens_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),  # of AR's texts
        "distinct_tokens": len(set(tokens)),
        "tokens_per_cycle": n_emitted / total["cycles"] if total["cycles"] else None,
        "by_sequence": verdicts,
    }


def decode_both(
    session: Session, prompts: Prompts, n_tokens: int, replay: Replay | None, each: Settings = None
) -> list[tuple[Recorded, Recorded]]:
    """Decode up to as many prompts as slots in AR, then in diffusion; ``replay`` has its drafts."""
    expected = record(session, prompts, n_tokens, False, each)
    if replay is not None:
        for slot, recorded in enumerate(expected):
            replay.set_text(slot, recorded.tokens)
    with patched(session.runner, **{"draft": replay.draft} if replay else {}):
        got = record(session, prompts, n_tokens, True, each)
    return list(zip(expected, got, strict=True))


def record(
    session: Session, prompts: Prompts, n_tokens: int, drafting: bool, each: Settings
) -> list[Recorded]:
    """Decode and keep, on the device, the logits at every committed position, and the cache.

    Logits are written where they belong before it is known which were accepted; the next cycle
    writes over the others, as it does in the cache. So nothing waits, and what runs is the
    decoder's own loop.
    """
    runner, state, decoder = session.runner, session.runner.state, session.decoder
    shape = (decoder.slots, n_tokens + session.width, decoder.config.vocab_size)
    logits = torch.zeros(shape, dtype=runner.model.embed_tokens.weight.dtype, device=session.device)
    offset = torch.arange(session.width, device=session.device)
    n_prompt = torch.zeros_like(state.length)
    n_prompt[: len(prompts)] = n_prompt.new_tensor([len(prompt) for prompt in prompts])

    def verify(width: int, sampling: bool = False, masked: bool = False) -> Tensor:
        at = (state.length - n_prompt)[:, None] + offset[:width]
        report = type(runner).verify(runner, width, sampling, masked)
        logits[state.slots[:, None], at] = runner.logits
        return report

    with patched(runner, verify=verify):
        width = session.width if drafting else decoder.ar_width
        decoded = decode(decoder, prompts, n_tokens, drafting, width, each)
    layers, found = (*runner.cache.k, *runner.cache.v), []
    for slot, accepted in enumerate(decoded.accepted_by_prompt):
        n, n_first = int(state.length[slot]), len(prompts[slot])
        cache = [rows[slot, :, :n].transpose(0, 1).clone() for rows in layers]
        tokens = state.tokens[slot, : n + 1].clone()
        found.append(Recorded(tokens, n_first, logits[slot, : n - n_first], cache, accepted))
    return found


def compare(expected: Recorded, got: Recorded) -> Result:
    """Count the rows of two decodes that differ in any bit; a row that one lacks differs."""
    cache = list(zip(expected.cache, got.cache, strict=True))
    n = min(len(expected.tokens), len(got.tokens))
    best = expected.logits.topk(2).values
    wrong = (expected.tokens[:n] != got.tokens[:n]).nonzero()
    return {
        "prompt_tokens": expected.n_prompt,
        "new_tokens": len(expected.tokens) - expected.n_prompt,
        "tokens_equal": torch.equal(expected.tokens, got.tokens),
        "first_difference": int(wrong[0]) - expected.n_prompt if len(wrong) else None,
        "rows": max(len(expected.logits), len(got.logits)),
        "rows_differing": n_differing(expected.logits, got.logits),
        "cache_rows": sum(max(len(a), len(b)) for a, b in cache),
        "cache_rows_differing": sum(n_differing(a, b) for a, b in cache),
        "ties_for_first_place": int((best[:, 0] == best[:, 1]).sum()),
        "cycles": len(got.accepted),
    }


def of_all_ranks(session: Session, verdict: Result) -> Result:
    """Return it with the cache rows of all ranks, each of its own heads; all have the logits."""
    every = [verdict] if session.ranks is None else session.ranks.share(verdict)
    rows = {name: sum(one[name] for one in every) for name in verdict if "cache_rows" in name}
    return {**verdict, **rows, "rows_differing": max(one["rows_differing"] for one in every)}


def n_differing(a: Tensor, b: Tensor) -> int:
    n, dims = min(len(a), len(b)), tuple(range(1, a.ndim))
    return int((bits_of(a[:n]) != bits_of(b[:n])).any(dims).sum()) + abs(len(a) - len(b))
