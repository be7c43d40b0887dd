"""The held-out prompts: records of a separate split, code from packages kept out of training, and
prose, some from the docstrings of those packages and some written for this purpose.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.embedded import records

SPLIT = "held-out"
N_RECORDS, N_CODE, N_PROSE = 256, 128, 128  # measured
N_RECORDS_KEPT, N_CODE_KEPT = 96, 24  # the first of each are committed, and all of the prose
CODE_LINES = (8, 32)
PROSE_WORDS = (8, 16)  # of a prompt, which opens a paragraph of at least MIN_WORDS
MIN_WORDS, SHARED_WORDS, SAME = 20, 8, 32  # SAME: letters
WRITTEN = (
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
    """Return the digests of the held-out records; training leaves out samples equal to one."""
    return frozenset(sample.digest for sample in records.stream(SPLIT, 0, N_RECORDS))


def record_prompts(count: int = N_RECORDS) -> list[dict[str, Any]]:
    """Return `{"kind": "records", "messages": …, "expected": …}` of the split's first samples."""
    samples = records.stream(SPLIT, 0, count)
    return [{"kind": "records", "messages": s.messages, "expected": s.expected} for s in samples]


def code_prompts(texts: Sequence[str], count: int = N_CODE) -> list[dict[str, Any]]:
    """Return `{"kind": "code", "text": …}`: passages of held-out files that begin at a definition
    or an import and are cut at the end of a line.
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


def prose_prompts(
    texts: Sequence[str], trained: Iterable[str], count: int = N_PROSE
) -> list[dict[str, Any]]:
    """Return `{"kind": "prose", "source": "written" or "docstrings", "text": …}`: the openings
    written for this purpose, then openings of paragraphs in the docstrings of held-out files, none
    of which shares SHARED_WORDS words in a row with a training file.
    """
    found = {paragraph for text in texts for paragraph in _paragraphs(text)}
    # Keep one of the paragraphs that begin alike.
    openings = {_opening(p)[:SAME]: _opening(p) for p in reversed(_unseen(found, trained))}
    written = [{"kind": "prose", "source": "written", "text": text} for text in WRITTEN]
    quoted = [
        {"kind": "prose", "source": "docstrings", "text": text}
        for text in reversed(openings.values())
    ]
    return (written + quoted)[:count]


def _paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of plain English in a Python file's docstrings, each on one line."""
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in nodes:
        docstring = ast.get_docstring(node) if isinstance(node, documented) else None
        for paragraph in re.split(r"\n\s*\n", docstring or ""):
            words = paragraph.split()
            plain = re.fullmatch(r"[A-Z][\w\s,.;:'\"()`*/~-]*", paragraph)
            opens = all(re.fullmatch(r"[\w'-]+[,.;:]?", w) for w in words[: PROSE_WORDS[1]])
            if plain and opens and len(words) >= MIN_WORDS and "\n " not in paragraph:
                yield " ".join(words)


def _unseen(paragraphs: Iterable[str], trained: Iterable[str]) -> list[str]:
    """Return the paragraphs that share no run of words with training texts, ordered by hash."""
    runs: dict[str, set[str]] = {}
    for paragraph in paragraphs:
        for run in _runs(paragraph):
            runs.setdefault(run, set()).add(paragraph)
    kept = {paragraph for found in runs.values() for paragraph in found}
    for text in trained:
        for run in _runs(text):
            kept -= runs.get(run, set())
    return sorted(kept, key=lambda paragraph: hashlib.sha256(paragraph.encode()).digest())


def _runs(text: str) -> Iterator[str]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return (" ".join(words[at : at + SHARED_WORDS]) for at in range(len(words) - SHARED_WORDS + 1))


def _opening(paragraph: str) -> str:
    fewest, most = PROSE_WORDS
    length = fewest + hashlib.sha256(paragraph.encode()).digest()[0] % (most - fewest + 1)
    return " ".join(paragraph.split()[:length])


def write_held_out(texts: Sequence[str], trained: Iterable[str], path: Path) -> None:
    """Write the committed part of the held-out prompts, as JSON Lines."""
    prose = prose_prompts(texts, trained)
    kept = record_prompts(N_RECORDS_KEPT) + code_prompts(texts, N_CODE_KEPT) + prose
    path.write_text(
        "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8"
    )


def read_held_out(path: Path, kind: str) -> list[dict[str, Any]]:
    """Return the prompts of one kind that `write_held_out` wrote."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [entry for entry in entries if entry["kind"] == kind]
