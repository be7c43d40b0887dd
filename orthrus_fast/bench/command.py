"""The command line, and the parts one after another."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from orthrus_fast.bench.acceptance import acceptance
from orthrus_fast.bench.against import check_comparable, check_hardware, moved, read_older
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.common import Result, tell
from orthrus_fast.bench.cycles import cycles
from orthrus_fast.bench.identity import identity
from orthrus_fast.bench.interruption import heeding_sigterm, status
from orthrus_fast.bench.modes import WAYS, modes, ways
from orthrus_fast.bench.passes import eager, passes, prefill, sampled_cycles, startup
from orthrus_fast.bench.published import add_accept
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.slots import slots
from orthrus_fast.bench.streaming import ceiling
from orthrus_fast.bench.subject import CONTEXTS, build, check_without_weights
from orthrus_fast.bench.temperatures import temperatures
from orthrus_fast.bench.trace import profile
from orthrus_fast.errors import OrthrusError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

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
    "slots": slots,
    "acceptance": acceptance,
}
NAMES = (*PARTS, "modes")  # which has decoders of its own, each in its own process


ATTENTIONS = ("auto", "sdpa", "triton", "flash")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SLOTS = (1, 2, 4, 8, 16, 32)


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


def attentions(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(ATTENTIONS):
        raise ValueError
    return names


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def parts(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(NAMES):
        raise ValueError
    return [name for name in NAMES if name in names]


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
    add("--attention", choices=ATTENTIONS, default="auto")
    text = "torch.compile's, for runner compiled"
    add("--compile-mode", choices=COMPILE_MODES, default="default", metavar="M", help=text)
    add("--slots", type=positive, default=1, metavar="B", help="decoded at once (default: 1)")
    width = "rows of a block (default and most: the model's own)"
    add("--block-size", type=positive, metavar="K", help=width)
    contexts = f"committed tokens (default: {','.join(map(str, CONTEXTS))}, as far as they fit)"
    add("--contexts", type=integers, metavar="N,…", help=contexts)
    add("--max-seq-len", type=positive, metavar="N", help="(default: room for every part)")
    everything = list(NAMES)
    add("--parts", type=parts, default=everything, metavar="LIST", help=",".join(everything))
    add_accept(parser)
    sequences = "of identity, temperatures and acceptance (default: 4)"
    add("--sequences", type=positive, default=4, metavar="N", help=sequences)
    new_tokens = "of whole decodes, a sequence (default: 512)"
    add("--new-tokens", type=positive, default=512, metavar="N", help=new_tokens)
    prompts = 'where sequences come from: JSON lines with "ids", "messages" or "text"'
    add("--prompts-file", metavar="FILE", help=prompts)
    temperature = "of identity and acceptance (default: 0, greedy); each sequence has its own seed"
    add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    add("--top-k", type=positive, metavar="K", help="where sampled (default: off)")
    add("--top-p", type=probability, metavar="P", help="where sampled (default: off)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--repeats", type=positive, default=20, metavar="N", help="of each timing (default: 20)")
    _add_lists(parser)
    _add_files(parser)
    return parser


def _add_lists(parser: Parser) -> None:
    add = parser.add_argument
    text = f"of part slots (default: {','.join(map(str, SLOTS))})"
    add("--slots-list", type=integers, default=list(SLOTS), metavar="B,…", help=text)
    text = f"of part modes: {', '.join(WAYS)}; compiled for all of its modes (default: all)"
    add("--ways", type=ways, default=list(WAYS), metavar="LIST", help=text)
    add("--modes-slots", type=integers, metavar="B,…", help="of part modes (default: --slots)")
    text = "of part modes, separated by commas (default: --attention)"
    add("--modes-attention", type=attentions, metavar="LIST", help=text)


def _add_files(parser: Parser) -> None:
    add = parser.add_argument
    add("--json", metavar="FILE", help="results; the same command again goes on where it ended")
    text = "an older result with the same arguments: shows what moved beyond the spread"
    add("--against", metavar="FILE", help=text)
    text = "exit with 1 where something got worse by more, with --against (default: 0.05)"
    add("--loss", type=share, default=0.05, metavar="SHARE", help=text)
    text = "at the end, write a trace of some cycles (Chrome's format), and list their kernels"
    add("--profile", metavar="FILE", help=text)


def main(arguments: list[str] | None = None) -> int:
    """0: all parts done; 1: a part failed, or is worse than ``--against``; 2: bad input.

    130, 143: interrupted or terminated; the file is whole, and the same command goes on.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from orthrus_fast import bench_report

        return bench_report.main(arguments[1:])
    try:
        with heeding_sigterm():
            args = build_parser().parse_args(arguments)
            check_flags(args)
            return run(args)
    except OrthrusError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; run: pip install -e . in the repository")
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt as interruption:
        return status(interruption)


def check_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other."""
    if args.shape is not None and args.checkpoint is not None:
        raise RequestError("--shape does not go with --checkpoint")
    if args.shape is not None and args.prompts_file is not None:
        raise RequestError("--shape does not go with --prompts-file: random weights read no text")
    for name in ("json", "profile"):
        path = getattr(args, name, None)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise RequestError(f"{name}: {path}: there is no such directory")
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
    older = None
    if args.against is not None:
        older = read_older(Path(args.against))
        check_comparable(older, report.content["arguments"], Path(args.against))
    missing = [name for name in args.parts if name not in report.parts]
    wants_trace = args.profile and not (Path(args.profile).exists() and report.has_profile)
    bench = None
    if missing:
        check_sampling(args)
        check_without_weights(args)
    if wants_trace or set(missing) - {"modes"}:
        bench = build(args, report.kept)
        report.begin_run(bench.decoder.configuration)
        if older is not None:
            check_hardware(older, report.content, Path(args.against))
    console = new_console()
    for name in args.parts:
        if name in missing:
            measure(name, args, bench, report)
        show_part(console, name, report.parts.get(name))
    if bench is not None and wants_trace:
        report.add_profile(*profile(bench, Path(args.profile)))
    show_part(console, "kernels", report.kernels)
    is_worse = older is not None and compare_with(older, report.content, args)
    return 1 if report.content["failed"] or is_worse else 0


def new_console() -> Console:
    from rich.console import Console

    if sys.stderr.isatty():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("orthrus_fast").setLevel(logging.INFO)
    return Console() if sys.stdout.isatty() else Console(width=100)


def show_part(console: Console, name: str, part: Result | None) -> None:
    from orthrus_fast.bench_report import show

    if part is not None:
        show(console, name, part)


def measure(name: str, args: argparse.Namespace, bench: Bench | None, report: Report) -> None:
    """One part, into the report. A fault in one part leaves the others to be measured."""
    tell(name)
    begin = time.perf_counter()
    try:
        if name == "modes":
            result = modes(args, report.kept)
            if bench is None:
                report.begin_run(some_configuration(result))
        else:
            assert bench is not None
            with measuring(bench.device):
                result = PARTS[name](bench)
    except OrthrusError:
        raise
    except Exception as error:
        traceback.print_exc()
        report.fail(name, f"{type(error).__name__}: {error}")
    else:
        report.add(name, result, time.perf_counter() - begin)


def some_configuration(result: Result) -> Result:
    """Of the first way to run that could be built."""
    found: Result = next(c["configuration"] for c in result["combinations"] if c["configuration"])
    return found


def compare_with(older: Result, newer: Result, args: argparse.Namespace) -> bool:
    """Print what moved; whether anything got worse by more than ``--loss``."""
    check_hardware(older, newer, Path(args.against))
    changes = moved(older, newer)
    for change in changes:
        print(change)
    losses = [change for change in changes if change.loss > args.loss]
    print(
        f"against {args.against}: {len(changes)} medians moved beyond their spread, "
        f"{len(losses)} got worse by more than {args.loss:.0%}"
    )
    return bool(losses)
