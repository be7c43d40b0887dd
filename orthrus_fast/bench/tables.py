"""A table for each part on the terminal: a column an entry, such as a context, a row a field."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orthrus_fast.bench.common import Result

HEADINGS = ("combination", "slots", "context", "prompt_tokens")  # the first that an entry has
HIDDEN = ("part_seconds", "label", "configuration", "settings", "tokens_sha256", "invariance")


def show(console: Console, name: str, part: Result) -> None:
    """Print the table of one part."""
    if "skipped" in part:
        console.print(f"{name}: left out, {part['skipped']}")
        return
    console.print(f"{name}, REPLAYED ACCEPTANCE" if "label" in part else name, style="bold")
    rest = {key: value for key, value in part.items() if key not in ("at", "combinations")}
    print_table(console, "", [rest])
    entries = part.get("at", [])
    for of in part.get("combinations", []):
        head = {"combination": f"{of['runner']} {of['compile_mode'] or ''}".strip()}
        at = of.get("passes", {}).get("at", [{}])
        entries = [*entries, *({**head, **each, **of, "passes": None} for each in at)]
    if entries:
        print_table(console, next(name for name in HEADINGS if name in entries[0]), entries)
    console.file.flush()  # what follows may take minutes, and be cut off


def print_table(console: Console, heading: str, entries: Sequence[Result]) -> None:
    """Print the fields of entries; the field ``heading``, if any, heads the columns."""
    columns = [dict(fields(entry)) for entry in entries]
    labels = dict.fromkeys(label for column in columns for label in column)
    head = heading.replace("_", " ")
    style: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    headings = [column.get(head, "") for column in columns]
    drawn = Table(head, *headings, show_header=bool(heading), **style)
    for rich_column in drawn.columns:
        rich_column.overflow = "fold"  # a long word is broken, never cut off
    for label in labels:
        if label != head:
            drawn.add_row(label, *(column.get(label, "–") for column in columns))
    if labels:
        console.print(drawn)


def fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield label and text of every field that has something to show, also of nested objects."""
    label = name.replace("_bytes_per_s", "").replace("_bytes", "").replace("_", " ")
    if isinstance(value, dict) and "median" in value:
        yield label, spread(value)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key not in HIDDEN:
                yield from fields(inner, f"{name} {key}".strip())
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for entry in value if "why" in value[0] else ():  # others are details, for the file alone
            yield f"{label}: {entry['slots']} slots", entry["why"]
    elif value not in (None, []):
        yield label, cell(name, value)


def cell(name: str, value: Any) -> str:
    """Return the text of a value in the unit that its name tells."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, list):
        return " ".join(cell(name, each) for each in value)
    if value is None:
        return "–"
    if name.endswith(("bytes", "bytes_per_s")):
        return f"{value / 1e9:.3g} GB{'/s' if name.endswith('_s') else ''}"
    if "share" in name or name in ("accepted_at_position", "distinct_trigrams", "accept"):
        return f"{value:.1%}"
    return short(value) if isinstance(value, float) else str(value)


def short(value: float) -> str:
    """Return three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def spread(values: dict[str, float]) -> str:
    """Return the median ± half of the distance from the 10th to the 90th percentile."""
    share = (values["p90"] - values["p10"]) / 2 / values["median"]
    return f"{short(values['median'])} ±{share:{'.0%' if share >= 0.01 else '.1%'}}"
