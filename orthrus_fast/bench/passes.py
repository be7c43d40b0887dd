"""Parts that time passes and cycles without text; times in ms unless named otherwise."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from orthrus_fast.bench.clocks import cycle_spans, random_cache, set_position, summary, time_steps
from orthrus_fast.bench.common import LONGEST_PROMPT, PREFILL_LENGTHS, ROUNDS, Result, log
from orthrus_fast.bench.session import Session, random_prompts
from orthrus_fast.bench.streaming import bytes_read, ceiling, shares
from orthrus_fast.decoder import Decoder

CYCLE_SETTINGS: dict[str, dict[str, Any]] = {  # of the part sampling
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's own recommendation
}


def startup(session: Session) -> Result:
    """Return the seconds until ready, and the memory that decoding took besides weights and cache.

    Peaks are those of torch's allocator since before the weights; None without a GPU.
    """
    decoder, device, cache = session.decoder, session.device, session.runner.cache
    prompt = random_prompts(session, [min(LONGEST_PROMPT, decoder.max_seq_len // 2)])[0]
    for mode in ("ar", "diffusion") if session.drafting else ("ar",):
        decoder.generate(prompt, min(32, decoder.max_seq_len - len(prompt)), mode=mode)
    weights = sum(weight.nbytes for weight in session.runner.model.parameters())
    rows = sum(tensor.nbytes for tensor in (*cache.k, *cache.v))
    memory: Result = {"weights_bytes": weights, "cache_bytes": rows}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory["device_used_bytes"] = total - free
    for name in ("allocated", "reserved"):
        read_peak = getattr(torch.cuda, f"max_memory_{name}")
        peak = read_peak(device) if device.type == "cuda" else None
        memory[f"peak_{name}_bytes"] = peak
        memory[f"over_{name}_bytes"] = None if peak is None else peak - weights - rows
    invariance = asdict(decoder.invariance) if decoder.invariance else None
    return {"seconds": dict(decoder.startup), "invariance": invariance, "memory": memory}


def passes(session: Session) -> Result:
    """Time draft, verify and the whole cycle at each context, and AR beside its baseline."""
    measured = ceiling(session)
    with random_cache(session):
        at = [passes_at(session, context, measured["bytes_per_s"]) for context in session.contexts]
    return {"ceiling": measured, "at": at}


def passes_at(session: Session, context: int, rate: float) -> Result:
    """Measure at one context; ``rate``: the ceiling in bytes/s."""
    log(f"passes at {context} committed tokens")
    runner, width, repeats = session.runner, session.width, session.args.repeats
    set_position(session, context)
    steps: dict[str, Callable[[], object]] = {"verify": lambda: runner.verify(width)}
    if session.drafting:
        steps = {"draft": lambda: runner.draft(width), **steps}
    times = time_steps(list(steps.values()), session.device, repeats)
    result: Result = {"context": context}
    for name, ms in zip(steps, times, strict=True):
        stack = runner.model.drafter if name == "draft" else runner.model.verifier
        assert stack is not None
        read = bytes_read(session, stack, context)
        result[name] = {"ms": ms, **read, **shares(read, ms["median"], rate)}
    if session.drafting:
        cycle = summary(cycle_spans(runner, width, True, repeats))
        both = sum(ms["median"] for ms in times)
        over = cycle["median"] - both
        result["cycle"] = {"ms": cycle, "over_passes_ms": over, "over_passes_share": over / both}
    runner.state.drafting.fill_(False)
    of_ar = session.decoder.ar_width
    both_ar: dict[str, Callable[[], object]] = {"ms": lambda: runner.verify(of_ar)}
    if session.ranks is None:
        both_ar["baseline_ms"] = partial(session.baseline.verify, 1)
    times = time_steps(list(both_ar.values()), session.device, repeats)
    cycle = summary(cycle_spans(runner, of_ar, False, repeats))
    return {**result, "ar": {**dict(zip(both_ar, times, strict=True)), "cycle_ms": cycle}}


def sampling(session: Session) -> Result:
    """Time greedy, sampled and filtered cycles in turn."""
    session.runner.prepare(session.width, sampling=True)
    with random_cache(session):
        at = [sampling_at(session, context) for context in session.contexts]
    mode = "diffusion" if session.drafting else "ar"
    return {"mode": mode, "settings": CYCLE_SETTINGS, "at": at}


def sampling_at(session: Session, context: int) -> Result:
    """``over_greedy_share``: the median's excess over the greedy one, as a share of the latter."""
    log(f"sampling at {context} committed tokens")
    runner, repeats = session.runner, session.args.repeats
    set_position(session, context)
    spans: dict[str, list[float]] = {name: [] for name in CYCLE_SETTINGS}
    for name, settings in [*CYCLE_SETTINGS.items()] * ROUNDS:
        for slot, params in enumerate(session.seeded(session.decoder.slots, **settings)):
            runner.state.settings.put(slot, params)
        samples = bool(settings)
        spans[name] += cycle_spans(runner, session.width, session.drafting, repeats, samples)
    ms = {name: summary(values) for name, values in spans.items()}
    greedy = ms["greedy"]["median"]
    over = {name: of["median"] / greedy - 1 for name, of in ms.items() if name != "greedy"}
    return {"context": context, "cycle_ms": ms, "over_greedy_share": over}


def prefill(session: Session) -> Result:
    """Return the milliseconds from ids to the first token, by the host's clock."""
    at = []
    for length in PREFILL_LENGTHS:
        if length < session.decoder.max_seq_len:
            log(f"prefill of {length} tokens")
            prompt = random_prompts(session, [length])[0]
            ms = first_token_ms(session.decoder, prompt, min(5, session.args.repeats))
            rate = length / (ms["median"] / 1e3)
            at.append({"prompt_tokens": length, "ms": ms, "tokens_per_second": rate})
    return {"at": at, "left_out": [*PREFILL_LENGTHS[len(at) :]]}


def first_token_ms(decoder: Decoder, prompt: list[int], repeats: int) -> Result:
    spans = []
    for _ in range(1 + repeats):
        stats = decoder.generate(prompt, 1, mode="ar").stats
        assert stats is not None
        spans.append(stats.time_to_first_token * 1e3)
    return summary(spans[1:])  # the first one warms up
