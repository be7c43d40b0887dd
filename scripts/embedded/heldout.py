"""The held-out prompts: records by their own seed, code from packages kept out of training, prose
written for this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.embedded import records

SPLIT = "held-out"
N_RECORDS, N_CODE = 256, 128  # measured
N_RECORDS_KEPT, N_CODE_KEPT = 96, 24  # committed, the first of each; all prose is
CODE_LINES = (8, 32)
PROSE = (
    "The river rises in the hills north of the town and",
    "There are two ways to keep bread fresh. The first is",
    "A good map leaves things out. The question for the person who draws it is",
    "In winter the harbour freezes over, and the boats",
    "Before the railway came, the journey took three days. Travellers would",
    "The library opens at nine. Anyone may borrow a book for",
    "Most people think of a desert as hot and dry, but",
    "To plant a tree, dig a hole twice as wide as the roots and",
    "This report describes what was measured, how it was measured, and",
    "The old clock in the square has never shown the right time. One reason is",
    "When two rivers meet, the water of the smaller one",
    "It is often said that practice makes perfect. In truth,",
    "The museum keeps most of its collection in the cellar, because",
    "Salt was once so valuable that",
    "A letter from the coast takes a week to arrive. If the road is closed,",
    "The first thing to check, when a lamp does not light, is",
)


def held_out_digests() -> frozenset[str]:
    """Digests of the held-out records: training leaves out any sample that equals one."""
    return frozenset(sample.digest for sample in records.stream(SPLIT, 0, N_RECORDS))


def record_prompts(count: int = N_RECORDS) -> list[dict[str, Any]]:
    """`{"kind": "records", "messages": …, "expected": …}`, the first `count` of the split."""
    samples = records.stream(SPLIT, 0, count)
    return [{"kind": "records", "messages": s.messages, "expected": s.expected} for s in samples]


def code_prompts(texts: Sequence[str], count: int = N_CODE) -> list[dict[str, Any]]:
    """`{"kind": "code", "text": …}`: openings of held-out files and of places in them, cut at the
    end of a line.
    """
    prompts: list[dict[str, Any]] = []
    for turn in range(count):
        text = texts[turn % len(texts)].rstrip()
        lines = text.split("\n")
        roll = hashlib.sha256(f"{turn}/{text}".encode()).digest()
        length = CODE_LINES[0] + roll[0] % (CODE_LINES[1] - CODE_LINES[0] + 1)
        starts = [
            i
            for i, line in enumerate(lines)
            if line.startswith(("def ", "class ", "import ", "from ", "@"))
        ]
        start = starts[int.from_bytes(roll[1:3], "big") % len(starts)] if starts else 0
        prompts.append({"kind": "code", "text": "\n".join(lines[start : start + length]).rstrip()})
    return prompts


def prose_prompts() -> list[dict[str, Any]]:
    """`{"kind": "prose", "text": …}`."""
    return [{"kind": "prose", "text": text} for text in PROSE]


def write_held_out(texts: Sequence[str], path: Path) -> None:
    """The committed part of the held-out prompts, as JSON Lines."""
    kept = record_prompts(N_RECORDS_KEPT) + code_prompts(texts, N_CODE_KEPT) + prose_prompts()
    path.write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8"
    )
