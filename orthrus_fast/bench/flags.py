"""The flags of the benchmark, and the command line that repeats a run; free of torch."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from orthrus_fast.bench.common import CONTEXTS, Result
from orthrus_fast.errors import RequestError
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.options import (
    ATTENTION_BACKENDS,
    COMPILE_MODES,
    DRAFT_WEIGHTS,
    DTYPES,
    PUBLIC_SHAPES,
    RANKS,
    RUNNERS,
    WEIGHTS,
)

PROGRAM = "python -m orthrus_fast.bench"
PARTS = "startup ceiling passes cycles sampling identity prefill engine slots acceptance".split()
SLOTS = [1, 2, 4, 8, 16, 32]
PUBLISHED = {  # greedy tokens per cycle of trained models, a mean over a task's answers; the source
    "1.7B/GSM8K": (7.75, "github.com/Neukiru/orthrus_vllm"),
    "4B/GSM8K": (9.95, "github.com/Neukiru/orthrus_vllm"),
    "8B/MATH-500": (11.7, "arXiv 2605.12825"),
    "1.7B/maths": (8.13, "huggingface.co/ai-forever/ZaryaOrthrus-1.7B"),
    "1.7B/code": (3.26, "huggingface.co/ai-forever/ZaryaOrthrus-1.7B"),
    "1.7B/QA": (2.00, "huggingface.co/ai-forever/ZaryaOrthrus-1.7B"),
    "1.7B/poetry": (1.60, "huggingface.co/ai-forever/ZaryaOrthrus-1.7B"),
}
_SPARK = {"8B/code": 8.7, "8B/JSON": 6.6, "8B/explanation": 4.1, "8B/creative": 2.8}
PUBLISHED |= {n: (x, "github.com/latent-data/orthrus-bench-spark") for n, x in _SPARK.items()}


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (--help lists the flags)")


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def acceptance(text: str) -> float | str:
    """Parse a share of right drafts, tokens per cycle, or a name in PUBLISHED."""
    if "/" in text:
        for name in PUBLISHED:
            if name.lower() == text.lower():
                return name
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(PUBLISHED)}")
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def number_and_source(accept: float | str) -> tuple[float, Result | None]:
    """Return the number that ``--accept`` stands for and, where it was published, its source."""
    if not isinstance(accept, str):
        return accept, None
    number, source = PUBLISHED[accept]
    return number, {"name": accept, "tokens_per_cycle": number, "source": source}


def names(*known: str) -> Callable[[str], list[str]]:
    """Return a parser of lists of names; "a" also stands for all that begin with "a:"."""

    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if not set(asked) <= {*known, *(name.partition(":")[0] for name in known)}:
            raise argparse.ArgumentTypeError(f"not of {', '.join(known)}")
        return [name for name in known if name in asked or name.partition(":")[0] in asked]

    return parse


def build_parser(prog: str = PROGRAM) -> Parser:
    description = "Time a decoder, pass by pass and end to end, and compare its modes to the bit."
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add_decoder_flags(parser)
    add = parser.add_argument
    add("--compile-mode", choices=COMPILE_MODES, default="default", help="of the runner compiled")
    add("--slots", type=positive, default=1, metavar="B", help="decoded at once (default: 1)")
    add("--block-size", type=positive, metavar="K", help="rows (default and most: the model's own)")
    text = "GPUs that hold a share of the model each (default: 1)"
    add("--tensor-parallel", type=int, choices=RANKS, default=1, help=text)
    text = f"committed tokens (default: {','.join(map(str, CONTEXTS))}, as far as they fit)"
    add("--contexts", type=positives, metavar="N,…", help=text)
    text = f"(default: {','.join(PARTS)})"
    add("--parts", type=names(*PARTS), default=PARTS, metavar="LIST", help=text)
    text = "of the parts identity and acceptance (default: 4)"
    add("--sequences", type=positive, default=4, metavar="N", help=text)
    add("--new-tokens", type=positive, default=512, metavar="N", help="of each text (default: 512)")
    text = "of identity and acceptance (default: 0, greedy); each sequence has a seed of its own"
    add("--temperature", type=float, default=0.0, metavar="T", help=text)
    add("--top-k", type=positive, metavar="K", help="with a temperature (default: off)")
    add("--top-p", type=float, metavar="P", help="with a temperature (default: off)")
    add("--repeats", type=positive, default=20, metavar="N", help="of each timing (default: 20)")
    text = f"numbers of slots of the part slots (default: {','.join(map(str, SLOTS))})"
    add("--slots-list", type=positives, default=SLOTS, metavar="B,…", help=text)
    text = "rows of a block in the part slots, K at most, each drafting in turn (default: K)"
    add("--widths", type=positives, metavar="N,…", help=text)
    return parser


def add_decoder_flags(parser: Parser) -> None:
    """Add the flags that the benchmark shares with benchmarks/peers.py."""
    add = parser.add_argument
    text = "directory or Hub repository (default: the embedded one)"
    add("--checkpoint", metavar="DIR_OR_REPO", help=text)
    text = "random weights in the shape of a public model, without a download (tiny: for tests)"
    add("--shape", choices=(*PUBLIC_SHAPES, "tiny"), help=text)
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", choices=DTYPES)
    add("--runner", choices=("auto", *RUNNERS), default="auto")
    add("--attention", choices=("auto", *ATTENTION_BACKENDS), default="auto")
    add("--weights", choices=WEIGHTS, default="checkpoint", help="of both views")
    formats = ("auto", *DRAFT_WEIGHTS)
    add("--draft-weights", choices=formats, default="auto", help="the drafter's own")
    add("--max-seq-len", type=positive, metavar="N", help="(default: room for every part)")
    text = "as orthrus generate reads (default: the embedded checkpoint's held-out prompts)"
    add("--prompts-file", metavar="FILE", help=text)
    text = "replayed acceptance: the share of right drafts (default: 0.85); above 1 the tokens per "
    text += "cycle; or a name of what was published: "
    text += "; ".join(f"{name}: {n:g}, {source}" for name, (n, source) in PUBLISHED.items())
    add("--accept", type=acceptance, default=0.85, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--json", metavar="FILE", help="where the results go; no file may be there yet")


def check_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other and for a file that exists."""
    if args.shape is not None and args.checkpoint is not None:
        raise RequestError("--shape does not go with --checkpoint")
    if args.shape is not None and args.prompts_file is not None:
        raise RequestError("--shape does not go with --prompts-file: random weights read no text")
    if args.prompts_file == "-":
        raise RequestError("--prompts-file: several parts read it; name a file")
    if args.new_tokens < 2:
        raise RequestError(f"new_tokens: {args.new_tokens} is below 2: the first comes by prefill")
    if args.json is not None and Path(args.json).exists():
        raise RequestError(f"json: {args.json}: exists; name another file, or remove it")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise RequestError(f"json: {args.json}: there is no such directory")


def prompts_path(args: argparse.Namespace) -> Path | None:
    """Return ``--prompts-file``, or the held-out prompts of the embedded checkpoint."""
    if args.prompts_file is not None:
        return Path(args.prompts_file)
    if args.shape or args.checkpoint is not None:
        return None
    return embedded_checkpoint() / "heldout.jsonl"


def flags_of(parser: Parser, args: argparse.Namespace) -> list[str]:
    """Return the flags that parse to ``args``, without those at their defaults and --json."""
    words = []
    for name, value in vars(args).items():
        if name != "json" and value != parser.get_default(name):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += ["--" + name.replace("_", "-"), text]
    return words
