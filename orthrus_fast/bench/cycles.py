"""The parts of whole decodes: tokens/s at replayed acceptance against AR, also by slots."""

import statistics
from dataclasses import replace

from orthrus_fast.bench.clocks import summary
from orthrus_fast.bench.common import ROUNDS, Result, log
from orthrus_fast.bench.decoding import decode, expected_tokens_per_cycle, ignore_eos, patched
from orthrus_fast.bench.session import NO_SIBLING, Session, random_prompts, release_memory, sibling
from orthrus_fast.errors import RequestError, is_out_of_memory, one_line

DRAWS = 4  # of replayed drafts for each prompt: acceptance varies far more than time does


def cycles(session: Session) -> Result:
    """Measure tokens/s at replayed acceptance against AR and its baseline, prefill excepted."""
    if not session.drafting:
        return {"skipped": "no draft view"}
    with ignore_eos(session.runner):
        at = [cycles_at(session, context) for context in session.contexts_with_room]
    left_out = [n for n in session.contexts if n not in session.contexts_with_room]
    n_tokens = session.args.new_tokens
    return {**session.acceptance, "new_tokens": n_tokens, "at": at, "left_out": left_out}


def cycles_at(session: Session, context: int) -> Result:
    decoder, n_tokens, width = session.decoder, session.args.new_tokens, session.width
    prompts = random_prompts(session, [context] * decoder.slots, salt=context)
    replay = session.replay(salt=context)
    modes = ["diffusion", "adaptive", "ar"] + ["ar_baseline"] * (session.ranks is None)
    rates: dict[str, list[float]] = {mode: [] for mode in modes}
    accepted: list[int] = []
    n_emitted, equal, baseline = 0, True, None
    for n in range(min(ROUNDS, session.args.repeats)):
        log(f"cycles at {context} committed tokens, round {n + 1}")
        ar = decode(decoder, prompts, n_tokens, False, decoder.ar_width)
        known = session.runner.state.tokens.clone()
        rates["ar"].append(ar.tokens_per_second)
        if session.ranks is None:
            with patched(session.runner, verify=session.baseline.verify):
                baseline = decode(decoder, prompts, n_tokens, False, 1)
            rates["ar_baseline"].append(baseline.tokens_per_second)
        for _ in range(-(-DRAWS // decoder.slots)):
            for slot, text in enumerate(known):
                replay.set_text(slot, text)
            with patched(session.runner, draft=replay.draft):
                diffusion = decode(decoder, prompts, n_tokens, True, width)
                adaptive = diffusion
                if width == decoder.block_width:  # so that there are drafts for every width
                    adaptive = decode(decoder, prompts, n_tokens, True, None)
            rates["adaptive"].append(adaptive.tokens_per_second)
            rates["diffusion"].append(diffusion.tokens_per_second)
            accepted += diffusion.accepted
            n_emitted += diffusion.n_emitted
            equal = equal and diffusion.tokens == adaptive.tokens == ar.tokens
    faster = max(statistics.median(rates[name]) for name in modes[2:])
    return {
        "context": context,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "speedup_over_faster_ar": statistics.median(rates["diffusion"]) / faster,
        "tokens_per_cycle": n_emitted / len(accepted),
        "tokens_per_cycle_expected": expected_tokens_per_cycle(replay.accept, width),
        "tokens_per_cycle_standard_error": statistics.pstdev(accepted) / len(accepted) ** 0.5,
        "cycles": len(accepted),
        "tokens_equal_to_ar": equal,
        "baseline_tokens_equal_to_ar": baseline and baseline.tokens == ar.tokens,
    }


def slots(session: Session) -> Result:
    """Measure ``cycles_at`` the middle context by number of slots, all busy, and width of blocks.

    A number of slots that memory has no room for is left out, with the reason.
    """
    n_tokens, fitting = session.args.new_tokens, session.contexts_with_room
    if not session.drafting:
        return {"skipped": "no draft view"}
    if session.ranks is not None:
        return NO_SIBLING
    if not fitting:
        limit = session.decoder.max_seq_len
        return {"skipped": f"max_seq_len {limit} has no room for {n_tokens} tokens after a context"}
    context = fitting[len(fitting) // 2]
    entries = [entry for n in session.args.slots_list for entry in slots_at(session, n, context)]
    return {
        **session.acceptance,
        "context": context,
        "new_tokens": n_tokens,
        "at": [entry for entry in entries if "why" not in entry],
        "left_out": [entry for entry in entries if "why" in entry],
    }


def slots_at(session: Session, n: int, context: int) -> list[Result]:
    log(f"{n} slots")
    try:
        entries = with_slots(session, n, context)
    except (RequestError, RuntimeError) as error:  # drivers and captures have errors of their own
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        entries = [{"slots": n, "why": one_line(str(error))}]
    release_memory()  # out here, where no exception holds on to the decoder
    return entries


def with_slots(session: Session, n: int, context: int) -> list[Result]:
    """Run ``cycles_at`` on another decoder over the same weights. Raises RequestError."""
    of = session.decoder.configuration
    more = {"slots": n, "max_seq_len": context + session.args.new_tokens}
    options = replace(session.options, **more, draft_weights=of["draft_weights"])
    decoder = sibling(session, options)
    other, entries = Session(session.args, options, decoder, [context]), []
    with ignore_eos(decoder.runner):
        for width in session.args.widths or [other.width]:
            other.width = width
            found = {"slots": n, "width": width, **cycles_at(other, context)}
            entries.append({**found, "configuration": decoder.configuration})
    return entries
