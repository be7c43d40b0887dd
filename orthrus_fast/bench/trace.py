"""``--profile``: what a cycle's time goes to, by torch's profiler, as a trace and as a list.

Comes last: graphs captured after the profiler ran have longer gaps between their kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus_fast.bench.clocks import measuring, place, random_cache, time_cycles
from orthrus_fast.bench.common import Result, tell

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench

CYCLES = 10


def profile(bench: Bench, path: Path) -> tuple[Result, list[Result]]:
    """Writes Chrome's trace format to ``path``; what was profiled, and its kernels.

    On a CPU these are operators, by their own time. ``share``: of the sum of all.
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
    return what, breakdown(profiler.key_averages(), n_cycles, on_gpu)


def run_cycles(bench: Bench) -> int:
    """Launches and reads a number of cycles -> how many."""
    runner = bench.runner
    for _ in range(CYCLES):
        runner.launch(bench.drafting, bench.width)
        runner.read()
    return CYCLES


def breakdown(averages: Any, n_cycles: int, on_gpu: bool) -> list[Result]:
    """One entry a kernel, the longest first; times in µs."""
    wanted = "CUDA" if on_gpu else "CPU"
    spent = {}
    for event in averages:
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type.name == wanted and time > 0:
            spent[event.key] = (event.count, time)
    total = sum(time for _, time in spent.values())
    return [
        {
            "name": name,
            "count_per_cycle": count / n_cycles,
            "us_per_cycle": time / n_cycles,
            "share": time / total,
        }
        for name, (count, time) in sorted(spent.items(), key=lambda item: -item[1][1])
    ]
