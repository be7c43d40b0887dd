"""The part that holds AR and diffusion against each other, to the bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from orthrus_fast.bench.common import Result, tell
from orthrus_fast.bench.decoding import Decoded, decode, seeded
from orthrus_fast.bench.prompts import chosen_prompts
from orthrus_fast.bench.replay import Replay, replaced

if TYPE_CHECKING:
    from torch import Tensor

    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.runners import First
    from orthrus_fast.sampling import SamplingParams


class Kept(NamedTuple):
    """All that a decoded sequence left behind."""

    tokens: Tensor  # [n + 1]: prompt, output, the anchor last
    n_prompt: int
    rows: Tensor  # [n - n_prompt, V]: logits of verification at each committed position
    cache: list[Tensor]  # [n_kv_heads, n, head_dim] a layer, K then V


class Recorder:
    """Keeps, on the device, the logits of every position that a decode commits, and its cache.

    Rows are written where they belong before it is known which were accepted; the next cycle
    writes over the others, as it does in the cache. So nothing waits, and what runs is the
    decoder's own loop. A sequence is kept before its slot's next one is prefilled.
    """

    def __init__(self, bench: Bench, n_tokens: int) -> None:
        import torch

        self.runner = bench.runner
        state, head = bench.runner.state, bench.runner.model.lm_head.weight
        n_slots, n_rows = bench.decoder.slots, n_tokens + bench.width
        shape = (n_slots, n_rows, bench.decoder.config.vocab_size)
        self.rows = torch.zeros(shape, dtype=head.dtype, device=bench.device)
        self.n_prompt = torch.zeros_like(state.slots)  # [B], of the sequence in each slot
        self.offset = torch.arange(bench.width, device=bench.device)
        self.start([], None)

    def start(self, expected: list[Kept], replay: Replay | None) -> None:
        """Begin a decode; with ``expected``, sequences are compared with these, then dropped."""
        self.n_prompt.zero_()
        self.owners: dict[int, int] = {}  # slot -> sequence
        self.n_opened = 0
        self.expected, self.replay = expected, replay
        self.kept: dict[int, Kept] = {}
        self.verdicts: dict[int, Result] = {}

    def prefill(self, prompt: list[int], slot: int, limit: int, params: SamplingParams) -> First:
        self._keep(slot)
        first = type(self.runner).prefill(self.runner, prompt, slot, limit, params)
        self.owners[slot] = self.n_opened
        self.n_prompt[slot] = len(prompt)
        if self.replay is not None:
            self.replay.know(slot, self.expected[self.n_opened].tokens)
        self.n_opened += 1
        return first

    def verify(self, width: int, sampling: bool = False) -> Tensor:
        state = self.runner.state
        at = (state.length - self.n_prompt)[:, None] + self.offset[:width]
        report = type(self.runner).verify(self.runner, width, sampling)
        self.rows[state.slots[:, None], at] = self.runner.logits
        return report

    def finish(self) -> None:
        for slot in list(self.owners):
            self._keep(slot)

    def _keep(self, slot: int) -> None:
        if slot not in self.owners:
            return
        state, cache, index = self.runner.state, self.runner.cache, self.owners.pop(slot)
        n, n_prompt = int(state.length[slot]), int(self.n_prompt[slot])
        kept = Kept(
            state.tokens[slot, : n + 1].clone(),
            n_prompt,
            self.rows[slot, : n - n_prompt].clone(),
            [rows[slot, :, :n].clone() for rows in (*cache.k, *cache.v)],
        )
        if self.expected:
            self.verdicts[index] = compare(self.expected[index], kept)
        else:
            self.kept[index] = kept


def compare(expected: Kept, got: Kept) -> Result:
    """How many rows of two decodes of one sequence differ in any bit; a missing one differs."""
    import torch

    from orthrus_fast.invariance import bits_of

    def differing(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> int:
        n = min(len(a), len(b))
        return int((bits_of(a[:n]) != bits_of(b[:n])).any(dims).sum()) + abs(len(a) - len(b))

    n_rows = max(len(expected.rows), len(got.rows))
    layers = zip(expected.cache, got.cache, strict=True)
    cache = [(a.transpose(0, 1), b.transpose(0, 1)) for a, b in layers]  # positions first
    n = min(len(expected.tokens), len(got.tokens))
    wrong = (expected.tokens[:n] != got.tokens[:n]).nonzero()
    return {
        "prompt_tokens": expected.n_prompt,
        "new_tokens": len(expected.tokens) - expected.n_prompt,
        "tokens_equal": torch.equal(expected.tokens, got.tokens),
        "first_difference": int(wrong[0]) - expected.n_prompt if len(wrong) else None,
        "rows": n_rows,
        "rows_differing": differing(expected.rows, got.rows, (1,)),
        "cache_rows": sum(max(len(a), len(b)) for a, b in cache),
        "cache_rows_differing": sum(differing(a, b, (1, 2)) for a, b in cache),
    }


class Compared(NamedTuple):
    """Some prompts decoded in both modes."""

    expected: list[Kept]  # what AR left behind
    verdicts: list[Result]  # ``compare`` of each
    diffusion: Decoded


def compare_modes(
    bench: Bench,
    prompts: list[list[int]],
    n_tokens: int,
    replay: Replay | None,
    settings: Sequence[SamplingParams | None] | None = None,
) -> Compared:
    """Decode in AR, then in diffusion with replayed drafts or the model's own, and compare."""
    decoder, width = bench.decoder, bench.width
    recorder = Recorder(bench, n_tokens)
    with replaced(bench.runner, prefill=recorder.prefill, verify=recorder.verify):
        tell("identity: ar")
        decode(decoder, prompts, n_tokens, False, width, settings)
        recorder.finish()
        expected = [recorder.kept[i] for i in range(len(prompts))]
        recorder.start(expected, replay)
        tell("identity: diffusion")
        drafts = {"draft": replay.draft} if replay else {}
        with replaced(bench.runner, **drafts):
            diffusion = decode(decoder, prompts, n_tokens, True, width, settings)
        recorder.finish()
    return Compared(expected, [recorder.verdicts[i] for i in range(len(prompts))], diffusion)


def identity(bench: Bench) -> Result:
    """AR against diffusion, to the bit: tokens, logits at every emitted position, cache rows.

    Random weights get replayed drafts, a checkpoint drafts for itself. Sampled, where the command
    line says so, with a seed for each sequence, the same in both modes.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    args, prompts = bench.args, chosen_prompts(bench)
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    each = seeded(bench, len(prompts), **settings)
    replay = Replay(bench) if args.shape else None
    compared = compare_modes(bench, prompts, args.new_tokens, replay, each)
    verdicts = [
        {"seed": params.seed, **verdict}
        for params, verdict in zip(each, compared.verdicts, strict=True)
    ]
    expected, diffusion = compared.expected, compared.diffusion
    totals = ("rows", "rows_differing", "cache_rows", "cache_rows_differing")
    return {
        "drafts": f"replayed, {bench.accept:.3g} right" if replay else "the checkpoint's own",
        "accept": bench.accept if replay else None,
        "accept_asked": args.accept if replay else None,
        "sampling": settings,
        "sequences": len(prompts),
        "sequences_equal": sum(verdict["tokens_equal"] for verdict in verdicts),
        "new_tokens": sum(verdict["new_tokens"] for verdict in verdicts),
        **{name: sum(verdict[name] for verdict in verdicts) for name in totals},
        "ties_for_first_place": sum(count_ties(kept.rows) for kept in expected),
        "tokens_sha256": digest([kept.tokens.tolist() for kept in expected]),
        "distinct_tokens": len({token for tokens in diffusion.tokens for token in tokens}),
        "tokens_per_cycle": diffusion.tokens_per_cycle,
        "cycles": len(diffusion.accepted),
        "by_sequence": verdicts,
    }


def digest(tokens: list[list[int]]) -> str:
    """Of AR's texts, so that two starts can be compared."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def count_ties(rows: Tensor) -> int:
    """Rows of logits [n, V] whose two best are equal."""
    best = rows.topk(2).values
    return int((best[:, 0] == best[:, 1]).sum())
