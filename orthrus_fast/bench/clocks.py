"""Clocks: how long steps and cycles take, and the state they are timed in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from orthrus_fast.bench.common import WARM_UP

if TYPE_CHECKING:
    import torch

    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.runners import EagerRunner


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """What the decoder's own calls run under; the compiler would compile anew without it."""
    import torch

    from orthrus_fast.runners import compiler_limits, plain_arithmetic

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(plain_arithmetic(device))
        stack.enter_context(compiler_limits())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of some measurements, in their own unit."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    median = statistics.median(ordered)
    return {"median": median, "p10": at(0.1), "p90": at(0.9), "n": len(ordered)}


def time_steps(
    steps: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[dict[str, float]]:
    """Milliseconds of each of ``steps``, which run in turn, as in a cycle.

    On a GPU between events, all launched ahead: the host's own time shows only where the device
    waits for it.
    """
    import torch

    for _ in range(WARM_UP):
        for step in steps:
            step()
    n_runs = repeats * len(steps)
    if device.type == "cuda":
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(n_runs + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for i in range(n_runs):
            steps[i % len(steps)]()
            events[i + 1].record()
        torch.cuda.synchronize(device)
        spans = [begin.elapsed_time(end) for begin, end in pairwise(events)]
    else:
        marks = [time.perf_counter()]
        for i in range(n_runs):
            steps[i % len(steps)]()
            marks.append(time.perf_counter())
        spans = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return [summary(spans[i :: len(steps)]) for i in range(len(steps))]


def time_cycles(
    runner: EagerRunner, width: int, drafting: bool, repeats: int, sampling: bool = False
) -> dict[str, float]:
    """Milliseconds of a whole cycle, from one report's arrival at the host to the next's."""
    return summary(cycle_spans(runner, width, drafting, repeats, sampling))


def cycle_spans(
    runner: EagerRunner, width: int, drafting: bool, repeats: int, sampling: bool
) -> list[float]:
    marks = []
    for _ in range(WARM_UP + repeats + 1):
        while runner.in_flight <= runner.ahead:
            runner.launch(drafting, width, sampling)
        runner.read()
        marks.append(time.perf_counter())
    runner.drain()
    return [(end - begin) * 1e3 for begin, end in pairwise(marks[WARM_UP:])]


def place(bench: Bench, context: int) -> None:
    """Every slot at ``context`` committed rows, ended, so that cycles run and nothing moves."""
    import torch

    state = bench.runner.state
    state.reset()
    state.length.fill_(context)
    state.drafting.fill_(bench.drafting)
    generator = torch.Generator(bench.device).manual_seed(bench.args.seed)
    for ids in (state.anchor, state.proposals):
        ids.random_(bench.decoder.config.vocab_size, generator=generator)


@contextmanager
def random_cache(bench: Bench) -> Iterator[None]:
    """A cache full of random rows, and afterwards a decoder as new."""
    import torch

    cache, generator = bench.runner.cache, torch.Generator(bench.device)
    for rows in (*cache.k, *cache.v):
        rows.normal_(generator=generator)
    try:
        yield
    finally:
        bench.runner.drain()
        bench.runner.state.reset()
        cache.reset()
