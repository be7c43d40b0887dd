"""The part that compares the combinations of runner and compile mode.

Each runs the parts startup, passes and identity in a process of its own: one that crashes, or
leaves the compiler in some state, does not touch the others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from orthrus_fast.bench.common import REPOSITORY, Result, log
from orthrus_fast.bench.flags import build_parser, flags_of
from orthrus_fast.errors import RequestError
from orthrus_fast.loading import parse_device

PROGRAM = (sys.executable, "-m", "orthrus_fast.bench")
TIME_LIMIT = 1800  # seconds of one combination
IDENTITY_TOKENS = 64  # a slot, at most


def modes(args: argparse.Namespace) -> Result:
    """Run each combination that the device has, one after another."""
    on_gpu = parse_device(args.device).type == "cuda"
    chosen = [name for name in args.modes_runners if name != "graph" or on_gpu]
    if not chosen:
        raise RequestError("modes_runners: graph needs a CUDA device")
    entries = []
    for name in chosen:
        log(f"modes: {name}")
        runner, _, mode = name.partition(":")
        asked = {**vars(args), "runner": runner, "compile_mode": mode or "default"}
        asked |= {"parts": ["startup", "passes", "identity"], "sequences": args.slots}
        asked["new_tokens"] = min(args.new_tokens, IDENTITY_TOKENS)
        found = run_apart(argparse.Namespace(**asked))
        entries.append(
            {"runner": runner, "compile_mode": mode or None, "slots": args.slots} | found
        )
    if all(entry["configuration"] is None for entry in entries):
        problems = sorted({str(entry["problem"]) for entry in entries})
        raise RequestError(f"modes: nothing could be run: {'; '.join(problems)}")
    return {"combinations": entries}


def run_apart(args: argparse.Namespace) -> Result:
    """Run the parts of ``args`` in a process; return these, and how it failed, if it did."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "result.json"
        command = [*PROGRAM, *flags_of(build_parser(), args), "--json", str(file)]
        try:
            done = subprocess.run(  # an interruption of this process ends that one, too
                command, capture_output=True, errors="replace", env=environment, timeout=TIME_LIMIT
            )
            lines, status = done.stderr.splitlines(), f"ended with exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            lines, status = [], f"did not end within {TIME_LIMIT} seconds"
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    parts = content.get("parts", {})
    problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    problems += content.get("failed", {}).values()
    problems += [status] if len(parts) < len(args.parts) and not problems else []
    if problems:
        print(f"{args.runner} {args.compile_mode}:", *lines[-20:], sep="\n  ", file=sys.stderr)
    configuration = content.get("environment", {}).get("configuration")
    return {"configuration": configuration, "problem": "; ".join(problems) or None, **parts}
