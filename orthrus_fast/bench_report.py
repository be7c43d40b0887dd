"""The benchmark's tables: each part of its JSON file as it is shown on a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


def show(console: Console, name: str, part: Result) -> None:
    """One table."""
    from rich.table import Table

    if "skipped" in part:
        console.print(f"{name}: left out, {part['skipped']}")
        return
    title, columns, rows = TABLES[name](part)
    table = Table(*columns, title=title, title_justify="left", title_style="bold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.file.flush()  # what follows may take minutes, and be cut off


Rows = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, columns, rows


def _spread(values: dict[str, float]) -> str:
    half = (values["p90"] - values["p10"]) / 2
    return f"{_short(values['median'])} ±{half / values['median']:.0%}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f} GB"


def _startup_table(part: Result) -> Rows:
    rows: list[tuple[str, ...]] = [
        (stage, f"{seconds:.2f} s") for stage, seconds in part["seconds"].items()
    ]
    found = part["invariance"]
    if found:
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        rows.append(("row invariance", f"{verdict}, checked in {found['seconds']:.2f} s"))
        rows.append(("own products", ", ".join(found["replaced"]) or "none"))
    for name, size in part["memory"].items():
        rows.append((name.removesuffix("_bytes").replace("_", " "), _gigabytes(size)))
    return "startup", ("what", "took"), rows


def _ceiling_row(part: Result) -> tuple[str, ...]:
    return tuple(f"{part[f'{kind}_bytes_per_s'] / 1e9:.0f}" for kind in ("product", "amax", "sum"))


def _ceiling_table(part: Result) -> Rows:
    return "streaming ceiling, GB/s", ("product", "read, amax", "read, sum"), [_ceiling_row(part)]


def _passes_table(part: Result) -> Rows:
    rows = []
    for at in part["at"]:
        row = [str(at["context"])]
        for name in ("verify", "draft"):
            one = at.get(name)
            row.append(_spread(one["ms"]) if one else "–")
            row += [
                _percent(one[f"share_by_{what}"]) if one else "–"
                for what in ("weights", "weights_and_cache")
            ]
        cycle, ar = at.get("cycle"), at["ar"]
        row.append(_short(cycle["ms"]["median"]) if cycle else "–")
        row.append(_percent(cycle["over_passes_share"]) if cycle else "–")
        row += [_short(ar[f"{kind}_ms"]["median"]) for kind in ("padded", "one_row")]
        rows.append(tuple(row))
    gigabytes = part["ceiling"]["bytes_per_s"] / 1e9
    title = f"passes, ms ± half of 10–90%; shares of {gigabytes:.0f} GB/s: weights, with the cache"
    columns = ("context", "verify", "w", "w+c", "draft", "w", "w+c", "cycle", "over", "AR", "1 row")
    return title, columns, rows


def _cycles_table(part: Result) -> Rows:
    rows = []
    for at in part["at"]:
        rates = at["tokens_per_second"]
        rows.append(
            (
                str(at["context"]),
                f"{at['tokens_per_cycle']:.2f} (of {at['tokens_per_cycle_expected']:.2f})",
                *(_short(rates[n]["median"]) for n in ("diffusion", "ar_padded", "ar_one_row")),
                f"{at['speedup_over_faster_ar']:.2f}",
                "equal" if at["tokens_equal_to_ar"] else "DIFFERENT",
            )
        )
    title = f"tokens/s, REPLAYED ACCEPTANCE: drafts {part['accept']:.0%} right"
    if part["accept"] != part["accept_asked"]:
        title += f", for {part['accept_asked']:g} tokens/cycle"
    columns = ("context", "tokens/cycle", "diffusion", "AR", "AR 1 row", "speed-up", "text")
    return title, columns, rows


def _eager_table(part: Result) -> Rows:
    row = (_spread(part["cycle_ms"]), _spread(part["eager_cycle_ms"]), f"{part['speedup']:.2f}")
    title = f"a {part['mode']} cycle at {part['context']}, ms"
    return title, (part["runner"], "eager", "ratio"), [row]


def _settings(settings: Result) -> str:
    """Temperature and filters in words."""
    if not settings.get("temperature"):
        return "greedy"
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if value is not None)


def _sampling_table(part: Result) -> Rows:
    rows = []
    for at in part["at"]:
        row = [str(at["context"])]
        for name, ms in at["cycle_ms"].items():
            row.append(_spread(ms))
            if name in at["over_greedy_share"]:
                row.append(f"{at['over_greedy_share'][name]:+.1%}")
        rows.append(tuple(row))
    columns = ["context"]
    for name, settings in part["settings"].items():
        columns += (
            [_settings(settings)] if name == "greedy" else [_settings(settings), "over greedy"]
        )
    return f"a {part['mode']} cycle, ms ± half of 10–90%", tuple(columns), rows


def _temperatures_table(part: Result) -> Rows:
    rows: list[tuple[str, ...]] = []
    for at in part["at"]:
        row = [f"{at['temperature']:g}", _mean(at["served"])]
        if at["temperature"] > 0:
            row += [_mean(at["uncut"]), _mean(at["rejection_sampling"])]
            row += [_mean(at["uncut_over_rejection_sampling"]), str(at["uncut"]["n"])]
        rows.append((*row, *("–",) * (6 - len(row))))
    columns = ("temperature", "served", "uncut", "rejection sampling", "ratio", "blocks")
    title = "tokens/cycle ± standard error; REJECTION SAMPLING COMPUTED on the same blocks"
    return title, columns, rows


def _mean(values: Result) -> str:
    if values["mean"] is None:
        return "–"
    return f"{values['mean']:.3f} ±{values['standard_error']:.3f}"


def _identity_table(part: Result) -> Rows:
    row = (
        f"{part['sequences_equal']} of {part['sequences']}",
        f"{part['rows_differing']} of {part['rows']}",
        f"{part['cache_rows_differing']} of {part['cache_rows']}",
        str(part["ties_for_first_place"]),
        _short(part["tokens_per_cycle"] or 0),
    )
    columns = ("texts equal", "logit rows differ", "cache rows differ", "ties", "tokens/cycle")
    title = f"AR and diffusion to the bit, {_settings(part['sampling'])}, drafts: {part['drafts']}"
    return title, columns, [row]


def _prefill_table(part: Result) -> Rows:
    rows: list[tuple[str, ...]] = [
        (str(at["prompt_tokens"]), _spread(at["ms"]), _short(at["tokens_per_second"]))
        for at in part["at"]
    ]
    return "time to first token", ("prompt", "ms", "tokens/s"), rows


TABLES: dict[str, Callable[[Result], Rows]] = {
    "startup": _startup_table,
    "ceiling": _ceiling_table,
    "passes": _passes_table,
    "cycles": _cycles_table,
    "sampling": _sampling_table,
    "eager": _eager_table,
    "identity": _identity_table,
    "temperatures": _temperatures_table,
    "prefill": _prefill_table,
}
