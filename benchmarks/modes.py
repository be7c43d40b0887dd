"""Compares the combinations of runner and compile mode, with the flags of the benchmark.

    python benchmarks/modes.py --shape 1.7B --json result.json

Each runs the benchmark's parts startup, passes and identity in a process of its own: one that
crashes, or leaves the compiler in some state, does not touch the others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from orthrus_fast.bench.common import REPOSITORY, Result, log
from orthrus_fast.bench.flags import Parser, build_parser, check_flags, flags_of, names
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.tables import show
from orthrus_fast.errors import OrthrusError, RequestError
from orthrus_fast.loading import parse_device
from orthrus_fast.options import COMPILE_MODES, RUNNERS

PROGRAM = (sys.executable, "-m", "orthrus_fast.bench")
COMBINATIONS = [
    f"{runner}:{mode}" if mode else runner
    for runner in RUNNERS
    for mode in (COMPILE_MODES if runner == "compiled" else [""])
]
TIME_LIMIT = 1800  # seconds of one combination
IDENTITY_TOKENS = 64  # a slot, at most


def add_combinations(parser: Parser) -> Parser:
    """Add the flag that the benchmark itself does not have."""
    text = f"what to compare (default: {','.join(COMBINATIONS)})"
    parser.add_argument(
        "--combinations", type=names(*COMBINATIONS), default=COMBINATIONS, metavar="LIST", help=text
    )
    return parser


def modes(args: argparse.Namespace, report: Report) -> Result:
    """Run each combination that the device has, one after another."""
    on_gpu = parse_device(args.device).type == "cuda"
    chosen = [name for name in args.combinations if name != "graph" or on_gpu]
    if not chosen:
        raise RequestError("combinations: graph needs a CUDA device")
    entries: list[Result] = []
    for name in chosen:
        log(f"modes: {name}")
        runner, _, mode = name.partition(":")
        asked = {**vars(args), "runner": runner, "compile_mode": mode or "default"}
        asked |= {"parts": ["startup", "passes", "identity"], "sequences": args.slots}
        asked["new_tokens"] = min(args.new_tokens, IDENTITY_TOKENS)
        del asked["combinations"]
        entry = {"runner": runner, "compile_mode": mode or None, "slots": args.slots}
        entries.append({**entry, **run_apart(argparse.Namespace(**asked))})
        built = [of["configuration"] for of in entries if of["configuration"]]
        if built:
            report.describe(built[0])
            report.add("parts", "modes", {"combinations": entries})
    if not report.content["parts"]:
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
    if len(parts) < len(args.parts) and not problems:
        problems = [status]
    if problems:
        print(f"{args.runner} {args.compile_mode}:", *lines[-20:], sep="\n  ", file=sys.stderr)
    configuration = content.get("environment", {}).get("configuration")
    return {"configuration": configuration, "problem": "; ".join(problems) or None, **parts}


def main(arguments: list[str] | None = None) -> int:
    """Return 0: done, though combinations may have failed; 2: bad input; 130: interrupted."""
    program = "python benchmarks/modes.py"
    try:
        parser = add_combinations(build_parser(program))
        args = parser.parse_args(arguments)
        check_flags(args)
        part = modes(args, Report(program, parser, args))
        show(Console() if sys.stdout.isatty() else Console(width=100), "modes", part)
        return 0
    except (OrthrusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # children end, too
    sys.exit(main())
