"""How long steps and cycles take, and the state in which they are timed."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch

from orthrus_fast.bench.common import Result
from orthrus_fast.bench.session import Session
from orthrus_fast.runners import EagerRunner, compiler_limits, full_precision_matmul

WARM_UP = 3  # runs before the timed ones


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """Set what the decoder's own calls run under; without it the compiler would compile anew."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.inference_mode(), full_precision_matmul(device), compiler_limits(), current:
        yield


def summary(values: Sequence[float]) -> Result:
    """Return the median, 10th and 90th percentile and number of measurements, in their unit."""
    ordered = sorted(values)
    p10, p90 = (ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": p10, "p90": p90, "n": len(ordered)}


def time_steps(
    steps: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[Result]:
    """Return the milliseconds of each of ``steps``, which run in turn, as in a cycle.

    On a GPU they are timed between events and all launched ahead, so that the host's own time
    shows only where the device waits for it.
    """
    for step in [*steps] * WARM_UP:
        step()
    in_turn = [*steps] * repeats
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(in_turn) + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for step, event in zip(in_turn, events[1:], strict=True):
            step()
            event.record()
        torch.cuda.synchronize(device)
        spans = [begin.elapsed_time(end) for begin, end in pairwise(events)]
    else:
        marks = [time.perf_counter()]
        for step in in_turn:
            step()
            marks.append(time.perf_counter())
        spans = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return [summary(spans[i :: len(steps)]) for i in range(len(steps))]


def cycle_spans(
    runner: EagerRunner, width: int, drafting: bool, repeats: int, sampling: bool = False
) -> list[float]:
    """Return the milliseconds of cycles, each from one report's arrival at the host to the next."""
    marks = []
    for _ in range(WARM_UP + repeats + 1):
        while runner.in_flight <= runner.lookahead:
            runner.launch(drafting, width, sampling)
        runner.read()
        marks.append(time.perf_counter())
    runner.drain()
    return [(end - begin) * 1e3 for begin, end in pairwise(marks[WARM_UP:])]


def set_position(session: Session, context: int) -> None:
    """Set every slot to ``context`` committed rows and ended: cycles then run and move nothing."""
    state = session.runner.state
    state.reset()
    state.length.fill_(context)
    state.drafting.fill_(session.drafting)
    generator = torch.Generator(session.device).manual_seed(session.args.seed)
    for ids in (state.anchor, state.proposals):
        ids.random_(session.decoder.config.vocab_size, generator=generator)


@contextmanager
def random_cache(session: Session) -> Iterator[None]:
    """Fill the cache with random rows; afterwards cache and state are as new."""
    cache, generator = session.runner.cache, torch.Generator(session.device)
    for rows in (*cache.k, *cache.v):
        rows.normal_(generator=generator)
    try:
        yield
    finally:
        session.runner.drain()
        session.runner.state.reset()
        cache.reset()
