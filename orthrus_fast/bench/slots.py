"""The part of throughput: tokens/s of all slots together, against how many there are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orthrus_fast.bench.common import Result, release_memory, tell
from orthrus_fast.bench.cycles import cycles_at
from orthrus_fast.bench.decoding import endless
from orthrus_fast.bench.subject import with_room
from orthrus_fast.errors import RequestError, is_out_of_memory, one_line

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench

COPIED = (
    "tokens_per_second",
    "tokens_per_cycle",
    "tokens_per_cycle_expected",
    "tokens_per_cycle_standard_error",
    "speedup_over_faster_ar",
    "tokens_equal_to_ar",
)


def slots(bench: Bench) -> Result:
    """Tokens/s at replayed acceptance by number of slots, all of them busy, over the same weights.

    A number that memory has no room for is left out, with the reason.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    n_tokens, limit = bench.args.new_tokens, bench.decoder.max_seq_len
    context = choose_context(bench.contexts, n_tokens, limit)
    if context is None:
        return {"skipped": f"max_seq_len {limit} has no room for {n_tokens} tokens after a context"}
    for n in bench.args.slots_list:
        if bench.kept.find("slots", slots=n) is None:
            bench.kept.add("slots", slots_at(bench, n, context))
    entries = bench.kept.of("slots")
    return {
        "label": "replayed acceptance",
        "accept": bench.accept,
        "accept_asked": bench.args.accept,
        "accept_source": bench.args.accept_source,
        "context": context,
        "new_tokens": n_tokens,
        "at": [entry for entry in entries if "why" not in entry],
        "left_out": [entry for entry in entries if "why" in entry],
    }


def choose_context(contexts: Sequence[int], n_tokens: int, max_seq_len: int) -> int | None:
    """The middle one of those that leave room, if there is one."""
    fitting = with_room(contexts, n_tokens, max_seq_len)
    return fitting[len(fitting) // 2] if fitting else None


def slots_at(bench: Bench, n: int, context: int) -> Result:
    tell(f"{n} slots")
    try:
        configuration, at = with_slots(bench, n, context)
        copied = {name: at[name] for name in COPIED}
        entry = {"slots": n, **copied, "configuration": configuration}
    except (RequestError, RuntimeError) as error:  # drivers and captures have errors of their own
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        entry = {"slots": n, "why": one_line(str(error))}
    release_memory()  # out here, where no exception holds on to the decoder
    return entry


def with_slots(bench: Bench, n: int, context: int) -> tuple[Result, Result]:
    """Another decoder's configuration and ``cycles_at``. Raises RequestError.

    Its weights are the same: the model is copied without them, for tables of positions and the
    choice of products are a decoder's own.
    """
    from orthrus_fast.decoder import Decoder, check_memory, memory_needed

    of, weight = bench.decoder.configuration, bench.runner.model.lm_head.weight
    max_seq_len = context + bench.args.new_tokens
    need = memory_needed(bench.decoder.config, weight.dtype, bench.device, max_seq_len, n)
    check_memory(need._replace(weights=0), bench.device)  # these are there
    decoder = Decoder(
        bench.decoder.name,
        copy.copy(bench.runner.model),
        None,
        max_seq_len=max_seq_len,
        slots=n,
        runner=of["runner"],
        attention=of["attention"],
        compile_mode=of["compile_mode"] or "default",
    )
    with endless(decoder._runner):
        return decoder.configuration, cycles_at(replace(bench, decoder=decoder), context)
