"""orthrus bench: the benchmark, which has a command line of its own."""

from collections.abc import Sequence


def run(arguments: Sequence[str], prog: str) -> int:
    """Run ``python -m orthrus_fast.bench``; return its exit code."""
    from orthrus_fast.bench.__main__ import main

    return main(list(arguments), prog)
