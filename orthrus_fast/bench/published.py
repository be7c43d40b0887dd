"""Published tokens per cycle of trained models, for ``--accept``: by size and task."""

from __future__ import annotations

import argparse
import math
from typing import Any, NamedTuple


class Published(NamedTuple):
    """Greedy, a mean over a benchmark's answers, with its source."""

    tokens_per_cycle: float
    source: str


_NEUKIRU = "github.com/Neukiru/orthrus_vllm"
_ZARYA = "huggingface.co/ai-forever/ZaryaOrthrus-1.7B"
PUBLISHED: dict[str, Published] = {
    "1.7B/GSM8K": Published(7.75, _NEUKIRU),
    "4B/GSM8K": Published(9.95, _NEUKIRU),
    "8B/MATH-500": Published(11.7, "arXiv 2605.12825"),
    "1.7B/maths": Published(8.13, _ZARYA),
    "1.7B/code": Published(3.26, _ZARYA),
    "1.7B/QA": Published(2.00, _ZARYA),
    "1.7B/poetry": Published(1.60, _ZARYA),
}


def find(name: str) -> str:
    """The table's own spelling of a name. Raises ArgumentTypeError."""
    for known in PUBLISHED:
        if known.lower() == name.lower():
            return known
    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(PUBLISHED)}")


def acceptance(text: str) -> float | str:
    """A share, tokens per cycle, or a name of the table."""
    if "/" in text:
        return find(text)
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


class Accept(argparse.Action):
    """Stores the number in ``accept`` and where it comes from in ``accept_source``."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        found = PUBLISHED[value] if isinstance(value, str) else None
        namespace.accept = found.tokens_per_cycle if found else value
        namespace.accept_source = {"name": value, **found._asdict()} if found else None


class ListAccept(argparse.Action):
    """Prints the table and ends the program, as --help does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        for name, (tokens_per_cycle, source) in PUBLISHED.items():
            print(f"{name:12} {tokens_per_cycle:5.2f} tokens per cycle  {source}")
        parser.exit()


def add_accept(parser: argparse.ArgumentParser) -> None:
    """The flags of replayed acceptance."""
    text = "replayed acceptance: the share of drafts that are right (default: 0.85), above 1 "
    text += f"tokens per cycle, or what was published: {', '.join(PUBLISHED)}"
    parser.add_argument(
        "--accept", type=acceptance, action=Accept, default=0.85, metavar="P", help=text
    )
    parser.set_defaults(accept_source=None)
    text = "show the published tokens per cycle with their sources, and exit"
    nothing = argparse.SUPPRESS  # no argument of a result
    parser.add_argument("--list-accept", action=ListAccept, nargs=0, default=nothing, help=text)
