"""Tables across result files: one part, models and settings side by side or below each other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orthrus_fast.bench_report.files import MODELS, ResultFile, guarded
from orthrus_fast.bench_report.tables import (
    TABLES,
    Result,
    Table,
    by_position,
    gigabytes,
    median,
    peer_first_tokens,
    peer_rates,
    seconds_to_start,
    shares_of,
    short,
)

PartTable = Callable[[Result], Table]


@dataclass(frozen=True)
class Joined:
    """Tables and the files whose figures they show."""

    tables: list[Table]
    files: list[ResultFile]


@dataclass(frozen=True)
class Recipe:
    """How a table is made, and the part that its files must have."""

    part: str
    make: Callable[[list[ResultFile]], Joined]


def below(part: str, table: PartTable, n_keys: int, as_filed: bool = False) -> Recipe:
    """Rows of all files below each other, the model first; sorted, or ``as_filed``.

    Of rows of one model and the same first ``n_keys`` cells, the latest file's stands. Files whose
    columns differ get a table for each kind.
    """

    def make(files: list[ResultFile]) -> Joined:
        rows: dict[tuple[str, ...], tuple[ResultFile, tuple[str, ...], tuple[str, ...]]] = {}
        notes: dict[str, None] = {}
        for file in files:
            one = guarded(file, part, table, file.parts[part])
            for row in one.rows:
                key = (file.label, *row[:n_keys])
                rows[key] = (file, one.columns, (file.label, *row))
            notes.update({f"{file.label}: {note}": None for note in one.notes})
        if not as_filed:
            rows = {key: rows[key] for key in sorted(rows, key=natural)}
        kinds = dict.fromkeys(columns for _, columns, _ in rows.values())
        tables = [
            Table("", ("", *kind), [row for _, columns, row in rows.values() if columns == kind])
            for kind in kinds
        ]
        if tables:
            last = tables[-1]
            tables[-1] = Table(last.title, last.columns, last.rows, tuple(notes))
        used = {id(file) for file, _, _ in rows.values()}
        return Joined(tables, [file for file in files if id(file) in used])

    return Recipe(part, make)


def natural(key: tuple[str, ...]) -> list[Any]:
    """An order in which models go by size and "4096" comes after "128"."""
    model = key[0].split(",")[0]
    order: list[Any] = [MODELS.index(model) if model in MODELS else len(MODELS)]
    for cell in key:
        pieces = re.split(r"(\d+(?:\.\d+)?)", cell)
        order += [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(pieces)]
    return order


def beside(part: str, label: Callable[[ResultFile], str] = lambda file: file.label) -> Recipe:
    """Tables of "what" and a value, a column for each model; the latest file's."""

    def make(files: list[ResultFile]) -> Joined:
        table, latest = TABLES[part], {guarded(file, part, label, file): file for file in files}
        columns = {
            label: {
                what: value for what, value in guarded(file, part, table, file.parts[part]).rows
            }
            for label, file in latest.items()
        }
        what = dict.fromkeys(name for cells in columns.values() for name in cells)
        rows = [(name, *(cells.get(name, "–") for cells in columns.values())) for name in what]
        return Joined([Table("", ("", *columns), rows)], list(latest.values()))

    return Recipe(part, make)


def with_room(file: ResultFile) -> str:
    """The model, and for how many tokens it was set up."""
    return f"{file.label}, {file.run_of('startup')['configuration']['max_seq_len']} tokens"


def _headline(files: list[ResultFile]) -> Joined:
    """What a reader wants first, of the models alone: a column for each."""
    models = {f.label: f for f in files if guarded(f, "headline", has_headline, f)}
    columns = {
        label: dict(guarded(file, "headline", headline_rows, file))
        for label, file in models.items()
    }
    what = dict.fromkeys(name for cells in columns.values() for name in cells)
    rows = [(name, *(cells.get(name, "–") for cells in columns.values())) for name in what]
    table = Table("", ("one sequence after 1024 tokens", *columns), rows)
    return Joined([table] if rows else [], list(models.values()))


HEADLINE_CONTEXT = 1024  # tokens


def has_headline(file: ResultFile) -> bool:
    parts = file.parts
    return (
        file.model in MODELS
        and all(
            name in parts and any(at["context"] == HEADLINE_CONTEXT for at in parts[name]["at"])
            for name in ("cycles", "passes")
        )
        and "identity" in parts
    )


def headline_rows(file: ResultFile) -> list[tuple[str, str]]:
    cycles, passes, identity = (file.parts[name] for name in ("cycles", "passes", "identity"))
    (at,) = (at for at in cycles["at"] if at["context"] == HEADLINE_CONTEXT)
    (timed,) = (at for at in passes["at"] if at["context"] == HEADLINE_CONTEXT)
    rates, ceiling = at["tokens_per_second"], passes["ceiling"]
    verify = timed["verify"]
    of_product, _ = shares_of(ceiling["product_bytes_per_s"], verify)
    of_best, _ = shares_of(ceiling["bytes_per_s"], verify)
    rows = [
        ("tokens per cycle (REPLAYED ACCEPTANCE)", f"{at['tokens_per_cycle']:.2f}"),
        ("tokens/s: drafting", median(rates["diffusion"])),
        (
            "tokens/s: AR by one row, AR by the same pass",
            f"{median(rates['ar_one_row'])}, {median(rates['ar_padded'])}",
        ),
        ("drafting over the faster AR", f"{at['speedup_over_faster_ar']:.2f}"),
        ("verify pass, ms", short(verify["ms"]["median"])),
        (
            "its weights over its time: share of the output head's rate, of the best rate seen",
            f"{of_product}, {of_best}",
        ),
        (
            "AR against drafting: logit rows that differ in a bit",
            f"{identity['rows_differing']} of {identity['rows']}",
        ),
        (
            "logit rows with an exact tie for first place",
            f"{identity['ties_for_first_place']} of {identity['rows']}",
        ),
    ]
    return rows + startup_rows(file.parts.get("startup"))


def startup_rows(startup: Result | None) -> list[tuple[str, str]]:
    if startup is None:
        return []
    seconds = seconds_to_start(startup["seconds"])
    over = startup["memory"]["over_allocated_bytes"]
    return [
        ("compile, capture, check", f"{seconds:.1f} s"),
        ("memory beyond weights and cache", gigabytes(over)),
    ]


def _positions(files: list[ResultFile]) -> Joined:
    """Acceptance by position in the block, in percent."""
    latest = {file.label: file for file in files}
    rows: list[tuple[str, ...]] = []
    for label, file in latest.items():
        shares = guarded(file, "acceptance", by_position, file.parts["acceptance"])
        for name, values in shares.items():
            rows.append((f"{label}, {name}", *(f"{100 * value:.0f}" for value in values)))
    width = max(len(row) for row in rows)
    rows = [(*row, *("",) * (width - len(row))) for row in rows]
    return Joined([Table("", ("%", *map(str, range(1, width))), rows)], list(latest.values()))


JOINED: dict[str, Recipe] = {
    "headline": Recipe("cycles", _headline),
    "startup": beside("startup", with_room),
    "ceiling": below("ceiling", TABLES["ceiling"], 0),
    "passes": below("passes", TABLES["passes"], 1),
    "modes": below("modes", TABLES["modes"], 3, as_filed=True),
    "cycles": below("cycles", TABLES["cycles"], 1),
    "slots": below("slots", TABLES["slots"], 1),
    "sampling": below("sampling", TABLES["sampling"], 1),
    "eager": below("eager", TABLES["eager"], 2),
    "identity": below("identity", TABLES["identity"], 2),
    "acceptance": beside("acceptance"),
    "positions": Recipe("acceptance", _positions),
    "temperatures": below("temperatures", TABLES["temperatures"], 1),
    "prefill": below("prefill", TABLES["prefill"], 1),
    "kernels": below("kernels", TABLES["kernels"], 2, as_filed=True),
    "peers": below("peers", peer_rates, 2, as_filed=True),
    "first-token": below("peers", peer_first_tokens, 2, as_filed=True),
}
