"""Parts that time passes and cycles, without text: times in ms unless named otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orthrus_fast.bench.clocks import (
    cycle_spans,
    place,
    random_cache,
    summary,
    time_cycles,
    time_steps,
)
from orthrus_fast.bench.common import LONGEST_PROMPT, PREFILL_LENGTHS, ROUNDS, Result, tell
from orthrus_fast.bench.decoding import seeded
from orthrus_fast.bench.streaming import ceiling, shares
from orthrus_fast.bench.subject import random_prompts

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.decoder import Decoder

CYCLE_SETTINGS: dict[str, dict[str, Any]] = {  # of the sampling part
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's own recommendation
}


def startup(bench: Bench) -> Result:
    """Seconds until ready, and the memory that decoding took beyond weights and cache."""
    decoder = bench.decoder
    prompt = random_prompts(bench, [min(LONGEST_PROMPT, decoder.max_seq_len // 2)])[0]
    for mode in ("ar", "diffusion") if bench.drafting else ("ar",):
        decoder.generate(prompt, min(32, decoder.max_seq_len - len(prompt)), mode=mode)
    return {
        "seconds": dict(decoder.startup),
        "invariance": asdict(decoder.invariance) if decoder.invariance else None,
        "memory": memory_taken(bench),
    }


def memory_taken(bench: Bench) -> Result:
    """Bytes; peaks since before the weights, of torch's allocator (None without a GPU)."""
    import torch

    cache = bench.runner.cache
    weights = sum(weight.nbytes for weight in bench.runner.model.parameters())
    rows = sum(tensor.nbytes for tensor in (*cache.k, *cache.v))
    result: Result = {"weights_bytes": weights, "cache_bytes": rows}
    peaks: dict[str, int | None] = {"allocated": None, "reserved": None}
    if bench.device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(bench.device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(bench.device)
        free, total = torch.cuda.mem_get_info(bench.device)
        result["device_used_bytes"] = total - free
    for name, peak in peaks.items():
        result[f"peak_{name}_bytes"] = peak
        result[f"over_{name}_bytes"] = None if peak is None else peak - weights - rows
    return result


def passes(bench: Bench) -> Result:
    """Draft, verify and the whole cycle at each context; AR by the block's rows and by one."""
    bench.runner.prepare(1)
    measured = ceiling(bench)
    with random_cache(bench):
        at = [passes_at(bench, context, measured["bytes_per_s"]) for context in bench.contexts]
    return {"ceiling": measured, "at": at}


def passes_at(bench: Bench, context: int, rate: float) -> Result:
    """``rate``: the ceiling in bytes/s."""
    from orthrus_fast.model import View

    tell(f"passes at {context} committed tokens")
    runner, width, repeats = bench.runner, bench.width, bench.args.repeats
    place(bench, context)
    steps: dict[str, Callable[[], object]] = {"verify": lambda: runner.verify(width)}
    if bench.drafting:
        steps = {"draft": runner.draft, **steps}
    times = time_steps(list(steps.values()), bench.device, repeats)
    result: Result = {"context": context}
    for name, ms in zip(steps, times, strict=True):
        view = View.DRAFT if name == "draft" else View.AUTOREGRESSIVE
        result[name] = {"ms": ms, **shares(bench, view, context, ms["median"], rate)}
    if bench.drafting:
        cycle, both = time_cycles(runner, width, True, repeats), sum(t["median"] for t in times)
        over = cycle["median"] - both
        result["cycle"] = {"ms": cycle, "over_passes_ms": over, "over_passes_share": over / both}
    runner.state.drafting.fill_(False)
    padded, one_row = time_steps(
        [lambda: runner.verify(width), lambda: runner.verify(1)], bench.device, repeats
    )
    result["ar"] = {"padded_ms": padded, "one_row_ms": one_row}
    return result


def sampled_cycles(bench: Bench) -> Result:
    """What sampling adds to a cycle: greedy, sampled, and sampled with filters, in turn."""
    bench.runner.prepare(bench.width, sampling=True)
    with random_cache(bench):
        at = [sampled_cycles_at(bench, context) for context in bench.contexts]
    mode = "diffusion" if bench.drafting else "ar"
    return {"mode": mode, "settings": CYCLE_SETTINGS, "at": at}


def sampled_cycles_at(bench: Bench, context: int) -> Result:
    """``over_greedy_share``: the median's excess over greedy's, as a share of greedy's."""
    tell(f"sampling at {context} committed tokens")
    runner, repeats = bench.runner, bench.args.repeats
    place(bench, context)
    spans: dict[str, list[float]] = {name: [] for name in CYCLE_SETTINGS}
    for _ in range(ROUNDS):
        for name, settings in CYCLE_SETTINGS.items():
            each = seeded(bench, bench.decoder.slots, **settings)
            for slot, params in enumerate(each):
                runner.state.settings.put(slot, params)
            sampling = each[0].temperature > 0
            spans[name] += cycle_spans(runner, bench.width, bench.drafting, repeats, sampling)
    ms = {name: summary(values) for name, values in spans.items()}
    greedy = ms["greedy"]["median"]
    over = {name: of["median"] / greedy - 1 for name, of in ms.items() if name != "greedy"}
    return {"context": context, "cycle_ms": ms, "over_greedy_share": over}


def eager(bench: Bench) -> Result:
    """This runner's cycle against the eager runner's, over the same weights, state and cache."""
    from orthrus_fast.runners import EagerRunner

    runner, width = bench.runner, bench.width
    other = EagerRunner(runner.model, runner.state, runner.cache)
    context = bench.contexts[len(bench.contexts) // 2]
    with random_cache(bench):
        place(bench, context)
        own = time_cycles(runner, width, bench.drafting, bench.args.repeats)
        eagers = time_cycles(other, width, bench.drafting, bench.args.repeats)
    return {
        "context": context,
        "mode": "diffusion" if bench.drafting else "ar",
        "runner": bench.decoder.configuration["runner"],
        "cycle_ms": own,
        "eager_cycle_ms": eagers,
        "speedup": eagers["median"] / own["median"],
    }


def prefill(bench: Bench) -> Result:
    """Milliseconds to the first token, ids in, by the host's clock."""
    decoder = bench.decoder
    fitting = [length for length in PREFILL_LENGTHS if length < decoder.max_seq_len]
    at = []
    for length in fitting:
        tell(f"prefill of {length} tokens")
        prompt = random_prompts(bench, [length])[0]
        spans = first_token_ms(decoder, prompt, min(5, bench.args.repeats))
        rate = length / (spans["median"] / 1e3)
        at.append({"prompt_tokens": length, "ms": spans, "tokens_per_second": rate})
    left_out = [length for length in PREFILL_LENGTHS if length not in fitting]
    return {"at": at, "left_out": left_out}


def first_token_ms(decoder: Decoder, prompt: list[int], repeats: int) -> dict[str, float]:
    spans = []
    for _ in range(1 + repeats):
        stats = decoder.generate(prompt, 1, mode="ar").stats
        assert stats is not None
        spans.append(stats.time_to_first_token * 1e3)
    return summary(spans[1:])  # the first one warms up
