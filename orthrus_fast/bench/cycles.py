"""The part of whole decodes: tokens/s at replayed acceptance against AR."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from orthrus_fast.bench.clocks import summary
from orthrus_fast.bench.common import DRAWS, ROUNDS, Result, tell
from orthrus_fast.bench.decoding import decode, endless
from orthrus_fast.bench.replay import Replay, expected_tokens_per_cycle, replaced
from orthrus_fast.bench.subject import random_prompts, with_room

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench


def cycles(bench: Bench) -> Result:
    """Tokens/s at replayed acceptance against both ARs, end to end, prefill excepted."""
    if not bench.drafting:
        return {"skipped": "no draft view"}
    n_tokens, limit = bench.args.new_tokens, bench.decoder.max_seq_len
    fitting = with_room(bench.contexts, n_tokens, limit)
    with endless(bench.runner):
        at = [cycles_at(bench, context) for context in fitting]
    return {
        "label": "replayed acceptance",
        "accept": bench.accept,
        "accept_asked": bench.args.accept,
        "accept_source": bench.args.accept_source,
        "new_tokens": n_tokens,
        "at": at,
        "left_out": [context for context in bench.contexts if context not in fitting],
    }


def cycles_at(bench: Bench, context: int) -> Result:
    decoder, n_tokens, width = bench.decoder, bench.args.new_tokens, bench.width
    prompts = random_prompts(bench, [context] * decoder.slots, salt=context)
    replay = Replay(bench, salt=context)
    rates: dict[str, list[float]] = {"diffusion": [], "ar_padded": [], "ar_one_row": []}
    accepted: list[int] = []
    n_emitted, equal = 0, True
    for n in range(min(ROUNDS, bench.args.repeats)):
        tell(f"cycles at {context} committed tokens, round {n + 1}")
        padded = decode(decoder, prompts, n_tokens, False, width)
        known = bench.runner.state.tokens.clone()
        one_row = decode(decoder, prompts, n_tokens, False, 1)
        rates["ar_padded"].append(padded.tokens_per_second)
        rates["ar_one_row"].append(one_row.tokens_per_second)
        for _ in range(-(-DRAWS // decoder.slots)):
            for slot, text in enumerate(known):
                replay.know(slot, text)
            with replaced(bench.runner, draft=replay.draft):
                diffusion = decode(decoder, prompts, n_tokens, True, width)
            rates["diffusion"].append(diffusion.tokens_per_second)
            accepted += diffusion.accepted
            n_emitted += sum(len(tokens) - 1 for tokens in diffusion.tokens)
            equal = equal and diffusion.tokens == padded.tokens
    faster = max(statistics.median(rates[name]) for name in ("ar_padded", "ar_one_row"))
    return {
        "context": context,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "speedup_over_faster_ar": statistics.median(rates["diffusion"]) / faster,
        "tokens_per_cycle": n_emitted / len(accepted),
        "tokens_per_cycle_expected": expected_tokens_per_cycle(bench.accept, width),
        "tokens_per_cycle_standard_error": statistics.pstdev(accepted) / len(accepted) ** 0.5,
        "cycles": len(accepted),
        "tokens_equal_to_ar": equal,
        "one_row_tokens_equal_to_ar": one_row.tokens == padded.tokens,
    }
