"""The command line, and the parts one after another."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.common import Result, tell
from orthrus_fast.bench.cycles import cycles
from orthrus_fast.bench.identity import identity
from orthrus_fast.bench.passes import eager, passes, prefill, sampled_cycles, startup
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.streaming import ceiling
from orthrus_fast.bench.subject import CONTEXTS, build
from orthrus_fast.bench.temperatures import temperatures
from orthrus_fast.errors import OrthrusError, RequestError

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench

PARTS: dict[str, Callable[[Bench], Result]] = {
    "startup": startup,
    "ceiling": ceiling,
    "passes": passes,
    "cycles": cycles,
    "sampling": sampled_cycles,
    "eager": eager,
    "identity": identity,
    "temperatures": temperatures,
    "prefill": prefill,
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (--help lists the flags)")


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def acceptance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def parts(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(PARTS):
        raise ValueError
    return [name for name in PARTS if name in names]


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m orthrus_fast.bench",
        description="Time a decoder, pass by pass and end to end, and check its identity.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR_OR_REPO", help="directory or Hub repository (default: model/)")
    shape = "random weights in the shape of a public model (tiny: for tests); no download"
    add("--shape", choices=("1.7B", "4B", "8B", "tiny"), help=shape)
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    add("--runner", choices=("auto", "eager", "compiled", "graph"), default="auto")
    add("--attention", choices=("auto", "sdpa", "triton", "flash"), default="auto")
    add("--slots", type=positive, default=1, metavar="B", help="decoded at once (default: 1)")
    width = "rows of a block (default and most: the model's own)"
    add("--block-size", type=positive, metavar="K", help=width)
    contexts = f"committed tokens (default: {','.join(map(str, CONTEXTS))}, as far as they fit)"
    add("--contexts", type=integers, metavar="N,…", help=contexts)
    add("--max-seq-len", type=positive, metavar="N", help="(default: room for every part)")
    everything = list(PARTS)
    add("--parts", type=parts, default=everything, metavar="LIST", help=",".join(everything))
    accept = "replayed acceptance: the share of drafts that are right (default: 0.85), "
    accept += "or, above 1, tokens per cycle"
    add("--accept", type=acceptance, default=0.85, metavar="P", help=accept)
    sequences = "of identity and temperatures (default: 4)"
    add("--sequences", type=positive, default=4, metavar="N", help=sequences)
    new_tokens = "of cycles, identity and temperatures, a sequence (default: 512)"
    add("--new-tokens", type=positive, default=512, metavar="N", help=new_tokens)
    prompts = 'of identity and temperatures: JSON lines with "ids", "messages" or "text"'
    add("--prompts-file", metavar="FILE", help=prompts)
    temperature = "of identity (default: 0, greedy), whose sequences have seeds of their own"
    add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    add("--top-k", type=positive, metavar="K", help="of identity, where sampled (default: off)")
    add("--top-p", type=probability, metavar="P", help="of identity, where sampled (default: off)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--repeats", type=positive, default=20, metavar="N", help="of each timing (default: 20)")
    add("--json", metavar="FILE", help="results; the same command again goes on where it ended")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """0: all parts done; 1: a part failed; 2: bad input; 130: interrupted, the file is whole."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from orthrus_fast import bench_report

        return bench_report.main(arguments[1:])
    try:
        args = build_parser().parse_args(arguments)
        check_flags(args)
        return run(args)
    except OrthrusError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; run: pip install -e . in the repository")
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the parts that were done stay in --json's file", file=sys.stderr)
        return 130


def check_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other."""
    if args.shape is not None and args.checkpoint is not None:
        raise RequestError("--shape does not go with --checkpoint")
    if args.shape is not None and args.prompts_file is not None:
        raise RequestError("--shape does not go with --prompts-file: random weights read no text")
    if args.new_tokens < 2:
        raise RequestError(f"new_tokens: {args.new_tokens} is below 2: the first comes by prefill")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise RequestError for settings that cannot be meant, before weights are loaded."""
    from orthrus_fast.sampling import SamplingParams

    SamplingParams(args.temperature, args.top_k, args.top_p)
    if args.temperature == 0 and (args.top_k, args.top_p) != (None, None):
        raise RequestError("--top-k and --top-p need a --temperature above 0: greedy ignores them")


def _fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    """Measure the parts that the file does not hold yet, and show them all."""
    report = Report(args)
    missing = [name for name in args.parts if name not in report.parts]
    from rich.console import Console

    from orthrus_fast.bench_report import show

    if sys.stderr.isatty():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("orthrus_fast").setLevel(logging.INFO)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    bench = None
    if missing:
        check_sampling(args)
        bench = build(args)
        report.begin_run(bench.decoder)
    for name in args.parts:
        if bench is not None and name in missing:
            measure(name, bench, report)
        if name in report.parts:
            show(console, name, report.parts[name])
    return 1 if report.content["failed"] else 0


def measure(name: str, bench: Bench, report: Report) -> None:
    """One part, into the report. A fault in one part leaves the others to be measured."""
    tell(name)
    begin = time.perf_counter()
    try:
        with measuring(bench.device):
            result = PARTS[name](bench)
    except OrthrusError:
        raise
    except Exception as error:
        traceback.print_exc()
        report.fail(name, f"{type(error).__name__}: {error}")
    else:
        report.add(name, result, time.perf_counter() - begin)
