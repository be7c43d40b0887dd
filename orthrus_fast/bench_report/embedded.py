"""The README's table of the embedded checkpoint, from model/figures.json."""

from __future__ import annotations

import json
from pathlib import Path

from orthrus_fast.bench_report.tables import Table
from orthrus_fast.errors import RequestError, one_line

KINDS = {"records": "records to JSON", "code": "Python code", "prose": "prose"}
SPEEDS = {  # threads and runner -> row
    (1, "eager"): "tokens/s over the faster AR, `--demo …`, one thread, runner eager",
    (1, "compiled"): "the same, runner compiled",
    (2, "eager"): "the same, two threads, runner eager",
}


def demo_table(directory: Path) -> Table:
    """Raises RequestError for a file that is missing or of another form."""
    path = directory / "figures.json"
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        kinds = [figures["kinds"][name] for name in KINDS]
        rows = [
            (
                "tokens per cycle, held-out prompts ([figures.json](model/figures.json))",
                *(f"{kind['tokens_per_cycle']:.2f}" for kind in kinds),
            ),
            (
                "distinct trigrams in those texts (loops are easy to draft)",
                *(f"{kind['distinct_trigram_share']:.1%}" for kind in kinds),
            ),
        ]
        speeds = {(r["threads"], r["runner"], r["demo"]): r for r in figures["speed"]["rows"]}
        yielded = [speeds[1, "eager", demo]["tokens_per_cycle"] for demo in KINDS]
        rows.append(("tokens per cycle, `--demo …`", *(f"{each:.2f}" for each in yielded)))
        for (threads, runner), label in SPEEDS.items():
            gains = [speeds[threads, runner, demo]["gain"] for demo in KINDS]
            rows.append((label, *(f"{gain:.2f}" for gain in gains)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{path}: {one_line(repr(error))}") from None
    return Table("", ("greedy", *KINDS.values()), rows)
