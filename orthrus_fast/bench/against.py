"""A result against an older one: which medians moved beyond their spread, and whether any is worse.

A median has moved where the two spans from 10th to 90th percentile don't meet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from orthrus_fast.bench.common import Result
from orthrus_fast.errors import RequestError

LABELS = (  # what names an entry of a list
    "context",
    "slots",
    "prompt_tokens",
    "temperature",
    "runner",
    "compile_mode",
    "attention",
)
OTHER_FILES = ("json", "prompts_file")  # may differ between two results that are compared
LEAST_SAMPLES = 3  # fewer have no spread to speak of


class Moved(NamedTuple):
    """One median, then and now."""

    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after / self.before - 1

    @property
    def loss(self) -> float:
        """The change for the worse, as a share: of times upwards, of rates downwards."""
        return -self.change if "per_second" in self.name else self.change

    def __str__(self) -> str:
        verdict = "worse" if self.loss > 0 else "better"
        return f"{self.name}: {self.before:.4g} -> {self.after:.4g} ({self.change:+.1%}, {verdict})"


def read_older(path: Path) -> Result:
    """Raises RequestError for what is no result."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(content[name], dict) for name in ("arguments", "parts")):
            raise TypeError
        content["runs"][0]["configuration"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        raise RequestError(f"against: {path}: is no result of this program") from None
    return dict(content)


def check_comparable(older: Result, arguments: Result, path: Path) -> None:
    """Raise RequestError where the older one was asked for something else.

    Arguments that only one of the two programs knew have no say.
    """
    names = [name for name in older["arguments"] if name in arguments and name not in OTHER_FILES]
    differing = [name for name in names if older["arguments"][name] != arguments[name]]
    if differing:
        of = "; ".join(f"{n} {older['arguments'][n]} then, {arguments[n]} now" for n in differing)
        raise RequestError(f"against: {path}: was made with other arguments: {of}")


def check_hardware(older: Result, newer: Result, path: Path) -> None:
    """Raise RequestError where the two were measured on different machines."""
    then, now = (hardware(content) for content in (older, newer))
    if then != now:
        raise RequestError(f"against: {path}: was measured on {then}, this on {now}")


def hardware(content: Result) -> str:
    names = {run["configuration"]["hardware"] for run in content["runs"] if run["configuration"]}
    return " and ".join(sorted(names))


def moved(older: Result, newer: Result) -> list[Moved]:
    """The medians of two results' parts that are beyond each other's spread."""
    before, after = (dict(summaries(content["parts"])) for content in (older, newer))
    found = []
    for name in before:
        if name in after and min(before[name]["n"], after[name]["n"]) >= LEAST_SAMPLES:
            a, b = before[name], after[name]
            if a["p90"] < b["p10"] or b["p90"] < a["p10"]:
                found.append(Moved(name, a["median"], b["median"]))
    return found


def summaries(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """Every median with its spread, under a name that says where it stands."""
    if isinstance(value, dict) and {"median", "p10", "p90", "n"} <= set(value):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from summaries(part, f"{name} {key}".strip())
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict):
                labels = [f"{key}={entry[key]}" for key in LABELS if entry.get(key) is not None]
                yield from summaries(entry, f"{name}[{', '.join(labels)}]")
