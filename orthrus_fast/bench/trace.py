"""``--profile``: what a cycle's time goes to, by torch's profiler, as a trace and as a list.

Comes last: graphs captured after the profiler ran have longer gaps between their kernels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orthrus_fast.bench.clocks import measuring, place, random_cache, time_cycles
from orthrus_fast.bench.common import Result, tell

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench

CYCLES = 10
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events


def profile(bench: Bench, path: Path) -> tuple[Result, list[Result]]:
    """Writes Chrome's trace format to ``path``; what was profiled, and its kernels.

    On a CPU these are operators, by their own time.
    """
    import torch
    from torch.profiler import ProfilerActivity

    tell("profile")
    on_gpu = bench.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    context = bench.contexts[len(bench.contexts) // 2]
    with measuring(bench.device), random_cache(bench):
        place(bench, context)
        time_cycles(bench.runner, bench.width, bench.drafting, 1)  # warms up
        with torch.profiler.profile(activities=activities) as profiler:
            n_cycles = run_cycles(bench)
            if on_gpu:
                torch.cuda.synchronize(bench.device)
    profiler.export_chrome_trace(str(path))
    what = {
        "context": context,
        "mode": "diffusion" if bench.drafting else "ar",
        "cycles": n_cycles,
        "of": "kernels" if on_gpu else "operators",
    }
    if not on_gpu:
        return what, by_operator(profiler.key_averages(), n_cycles)
    return what, by_kernel(json.loads(path.read_text("utf-8"))["traceEvents"], n_cycles)


def run_cycles(bench: Bench) -> int:
    """Launches and reads a number of cycles -> how many."""
    runner = bench.runner
    for _ in range(CYCLES):
        runner.launch(bench.drafting, bench.width)
        runner.read()
    return CYCLES


class Span(NamedTuple):
    """One run of a kernel, in µs."""

    start: float
    end: float
    name: str
    grid: list[int] | None


def by_kernel(events: Iterable[Any], n_cycles: int) -> list[Result]:
    """One entry for each kernel and grid, what adds the most first; times in µs.

    A kernel may start before the one before it has ended, and wait: ``us_per_cycle`` is from its
    start to its end, ``us_added_per_cycle`` what is its own of that; see ``own_times``.
    """
    spans = [
        Span(event["ts"], event["ts"] + event["dur"], event["name"], event["args"].get("grid"))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ON_GPU
    ]
    found: dict[tuple[str, str], list[tuple[Span, float]]] = {}
    for span, own in zip(spans, own_times(spans), strict=True):
        found.setdefault((span.name, str(span.grid)), []).append((span, own))
    return with_shares(
        [
            {
                "name": runs[0][0].name,
                "grid": runs[0][0].grid,
                "count_per_cycle": len(runs) / n_cycles,
                "us_per_cycle": sum(span.end - span.start for span, _ in runs) / n_cycles,
                "us_added_per_cycle": sum(own for _, own in runs) / n_cycles,
            }
            for runs in found.values()
        ]
    )


def own_times(spans: Sequence[Span]) -> list[float]:
    """µs of each that are its own. They sum up to the time in which any ran.

    A moment is that kernel's which ends first of those that run: the others wait for it.
    """
    own = [0.0] * len(spans)
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    coming = sorted(range(len(spans)), key=lambda i: -spans[i].start)
    running: list[tuple[float, int]] = []  # a heap: what ends first on top
    for begin, end in pairwise(edges):
        while coming and spans[coming[-1]].start <= begin:
            index = coming.pop()
            heappush(running, (spans[index].end, index))
        while running and running[0][0] <= begin:
            heappop(running)
        if running:
            own[running[0][1]] += end - begin
    return own


def by_operator(averages: Any, n_cycles: int) -> list[Result]:
    """One entry for each operator of a CPU, the longest first; times in µs, without its callees."""
    entries = []
    for event in averages:
        if event.device_type.name == "CPU" and event.self_cpu_time_total > 0:
            spent = event.self_cpu_time_total / n_cycles
            times = {"us_per_cycle": spent, "us_added_per_cycle": spent}
            count = event.count / n_cycles
            entries.append({"name": event.key, "grid": None, "count_per_cycle": count, **times})
    return with_shares(entries)


def with_shares(entries: list[Result]) -> list[Result]:
    """The same, each with its share of what all add; the greatest first."""
    total = sum(entry["us_added_per_cycle"] for entry in entries)
    entries.sort(key=lambda entry: -entry["us_added_per_cycle"])
    return [{**entry, "share": entry["us_added_per_cycle"] / total} for entry in entries]
