"""The part that puts all ways to run side by side: runners and torch.compile's modes.

Each combination runs in a process of its own: one that crashes, or leaves the compiler in some
state, does not touch the others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

from orthrus_fast.bench.common import REPOSITORY, Result, tell
from orthrus_fast.bench.kept import Kept
from orthrus_fast.errors import RequestError

LONGEST = 1800  # seconds of one combination
WAYS = (
    "eager",
    "compiled:default",
    "compiled:reduce-overhead",
    "compiled:max-autotune",
    "compiled:max-autotune-no-cudagraphs",
    "graph",
)


class Combination(NamedTuple):
    """One way to run."""

    runner: str
    compile_mode: str | None  # None where nothing is compiled
    attention: str
    slots: int

    def __str__(self) -> str:
        mode = f" {self.compile_mode}" if self.runner == "compiled" else ""
        return f"{self.runner}{mode}, attention {self.attention}, slots {self.slots}"


def ways(text: str) -> list[str]:
    """Those of ``WAYS`` that are named, in their order. "compiled" is all of its modes."""
    names = text.split(",")
    known = {*WAYS, "compiled"}
    if not set(names) <= known:
        raise argparse.ArgumentTypeError(f"not of {', '.join(WAYS)}")
    return [way for way in WAYS if way in names or way.partition(":")[0] in names]


def modes(args: argparse.Namespace, kept: Kept) -> Result:
    """Times, memory, start and identity of each combination, one after another."""
    for combination in combinations(args):
        if kept.find("modes", asked=list(combination)) is None:
            tell(f"modes: {combination}")
            found = next((e["ceiling"] for e in kept.of("modes") if e["ceiling"]), None)
            kept.add("modes", run_apart(args, combination, found))
    entries = kept.of("modes")
    measured = [entry["ceiling"] for entry in entries if entry["ceiling"]]
    if not measured:
        problems = {entry["problem"] for entry in entries}
        raise RequestError(f"modes: nothing could be run: {'; '.join(sorted(problems))}")
    hidden = ("asked", "ceiling")
    return {
        "ceiling": measured[0],
        "combinations": [
            {name: value for name, value in entry.items() if name not in hidden}
            for entry in entries
        ],
    }


def combinations(args: argparse.Namespace) -> list[Combination]:
    """What was asked for, as far as the device has it: graph needs CUDA."""
    from orthrus_fast.decoder import parse_device

    on_gpu = parse_device(args.device).type == "cuda"
    attentions, slots = args.modes_attention or [args.attention], args.modes_slots or [args.slots]
    chosen = [way.partition(":") for way in args.ways if way != "graph" or on_gpu]
    if not chosen:
        raise RequestError("ways: graph needs a CUDA device")
    return [
        Combination(runner, mode or (None if runner == "eager" else "default"), attention, n)
        for attention, n, (runner, _, mode) in product(attentions, slots, chosen)
    ]


def run_apart(args: argparse.Namespace, combination: Combination, ceiling: Result | None) -> Result:
    """One combination's entry; ``ceiling`` is the one to take shares of, if there is one yet."""
    runner, compile_mode, attention, n_slots = combination
    arguments = {**vars(args), **combination._asdict(), "compile_mode": compile_mode or "default"}
    with tempfile.TemporaryDirectory() as name:
        request, result, log = (Path(name) / file for file in ("request", "result", "log"))
        request.write_text(json.dumps({"arguments": arguments, "ceiling": ceiling}))
        with log.open("wb") as errors:
            ended = end_of(command(request, result, combination), errors.fileno())
        found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
        problem = ended or found.get("problem")
        if problem:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            print(f"{combination}: {problem}", *tail, sep="\n  ", file=sys.stderr)
    configuration = found.get("configuration")
    return {
        "asked": list(combination),
        "runner": runner,
        "compile_mode": compile_mode,
        "attention": configuration["attention"] if configuration else attention,
        "slots": n_slots,
        "configuration": configuration,
        "ceiling": found.get("ceiling"),
        "startup_seconds": found.get("startup_seconds", {}),
        "peak_allocated_bytes": found.get("peak_allocated_bytes"),
        "problem": problem,
        "at": found.get("at", []),
    }


def command(request: Path, result: Path, combination: Combination) -> list[str]:
    """The process that measures ``combination``."""
    program = [sys.executable, "-m", "orthrus_fast.bench.combination"]
    return [*program, str(request), str(result)]


def end_of(program: list[str], errors: int) -> str | None:
    """How it ended, if not well. Our own interruption ends it, too."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            program,
            stdout=errors,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": path},
            timeout=LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {LONGEST} seconds"
    if done.returncode < 0:
        return f"ended by signal {-done.returncode}"
    return f"ended with exit status {done.returncode}" if done.returncode else None
