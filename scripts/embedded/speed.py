"""Times a prompt of each kind on this machine's CPU in both modes: how much faster is drafting?"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import orthrus_fast
from orthrus_fast import Decoder, Generation
from orthrus_fast.bench.baseline import make_baseline
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.decoding import decode, patched

Figures = dict[str, Any]
log = logging.getLogger(__name__)
RUNNERS = ("eager", "compiled")
RUNS, MAX_NEW = 5, 200
PROMPTS = {  # besides the demo of records; they run on to MAX_NEW tokens, in loops in the end
    "code": 'class Stack:\n    """A last-in, first-out collection."""\n\n'
    "    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
    "prose": "The purpose of this document is to describe how",
}
COMMAND = "OMP_NUM_THREADS=1 python -m scripts.train_embedded speed"


def measure(directory: Path, before: Figures | None) -> Iterator[Figures]:
    """Time every prompt with every runner, with the threads that torch has now; yield after each
    the figures so far.

    `before` holds what was measured earlier, for example with another number of threads; a row
    stays until it is measured again.
    """
    threads = torch.get_num_threads()
    demo = json.loads((directory / "demos.json").read_text("utf-8"))["records"]
    prompts = {"records": demo["messages"], **PROMPTS}
    rows = {_key(row): row for row in (before or {}).get("rows", [])}
    for runner in RUNNERS:
        decoder = orthrus_fast.load(directory, device="cpu", runner=runner)
        for name, prompt in prompts.items():
            load = [os.getloadavg()[0]]
            figures = time_modes(decoder, decoder.encode(prompt))
            load.append(os.getloadavg()[0])
            row = {"threads": threads, "runner": runner, "prompt": name, **figures}
            row["load_average"] = [round(value, 2) for value in load]
            log.info("%s", row)
            rows[_key(row)] = row
            yield {
                "command": COMMAND,
                "machine": machine(torch.device("cpu")),
                "runs": RUNS,
                "max_new_tokens": MAX_NEW,
                "rows": sorted(rows.values(), key=lambda row: int(row["threads"])),
            }


def _key(row: Figures) -> tuple[Any, ...]:
    return row["threads"], row["runner"], row["prompt"]


def time_modes(decoder: Decoder, ids: list[int]) -> Figures:
    """Decode RUNS rounds in both modes and by AR's baseline; return the median speed-up of
    diffusion over the faster AR, and tokens/s, with the lowest and highest.

    The speed-up is a ratio within a round, because other work on the machine slows all three then.
    """
    rates: dict[str, list[float]] = {"diffusion": [], "ar": [], "ar_baseline": []}
    baseline = make_baseline(decoder)
    for run in range(RUNS + 1):
        results = [decoder.generate(ids, MAX_NEW, mode=mode) for mode in ("diffusion", "ar")]
        with measuring(decoder.runner.device), patched(decoder.runner, verify=baseline.verify):
            one_row = decode(decoder, [ids], MAX_NEW, False, 1).tokens_per_second
        if run:  # the first warms up
            found = [*map(_rate, results), one_row]
            for kept, rate in zip(rates.values(), found, strict=True):
                kept.append(rate)
    medians = {name: statistics.median(kept) for name, kept in rates.items()}
    rounds = [d / max(ar) for d, *ar in zip(*rates.values(), strict=True)]
    spread = {name: [round(v, 1) for v in (min(k), max(k))] for name, k in rates.items()}
    stats = results[0].stats  # as in every round: nothing in it is left to chance
    assert stats is not None and stats.tokens_per_cycle is not None
    return {
        "tokens_per_cycle": round(stats.tokens_per_cycle, 4),
        "gain": round(statistics.median(rounds), 3),
        "gain_range": [round(min(rounds), 3), round(max(rounds), 3)],
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "tokens_per_second_range": spread,
    }


def _rate(result: Generation) -> float:
    assert result.stats is not None and result.stats.tokens_per_second is not None
    return result.stats.tokens_per_second


def machine(device: torch.device) -> str:
    """Return the hardware and torch's version in words."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{os.cpu_count()}-core {_cpu_name()}, torch {torch.__version__}"


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else f"{platform.machine()} CPU"
