"""Each part of a result as one table, for a terminal or for Markdown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells are text; ``notes`` are lines under the table, such as what was left out."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()


def show(console: Console, name: str, part: Result) -> None:
    """One part's table on a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Drawn

    if "skipped" in part:
        console.print(f"{name}: left out, {part['skipped']}")
        return
    table = TABLES[name](part)
    narrow: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    left: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}
    drawn = Drawn(*table.columns, title=table.title, **left, **narrow)
    for column in drawn.columns:
        column.overflow = "fold"  # a long word is broken, never cut off
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)
    for note in table.notes:
        console.print(note, markup=False, highlight=False)
    console.file.flush()  # what follows may take minutes, and be cut off


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown, without its title."""
    lines = [_line(table.columns), "|" + "---|" * len(table.columns)]
    lines += map(_line, table.rows)
    for note in table.notes:
        lines += ["", note]
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# Cells.


def spread(values: dict[str, float]) -> str:
    half = (values["p90"] - values["p10"]) / 2
    share = half / values["median"]
    return f"{short(values['median'])} ±{share:{'.0%' if share >= 0.01 else '.1%'}}"


def median(values: dict[str, float] | None) -> str:
    return "–" if values is None else short(values["median"])


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def percent(share: float) -> str:
    return f"{share:.1%}"


def gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f} GB"


def mean(values: Result) -> str:
    if values["mean"] is None:
        return "–"
    return f"{values['mean']:.3f} ±{values['standard_error']:.3f}"


def settings_in_words(settings: Result) -> str:
    """Temperature and filters in words."""
    if not settings.get("temperature"):
        return "greedy"
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if value is not None)


def shares_of(rate: float, of: Result) -> tuple[str, str]:
    """A timed pass as a share of ``rate``, in bytes/s: weights alone, and with the cache."""
    per_second = 1e3 / of["ms"]["median"]
    weights = of["weights_bytes"]
    return tuple(  # type: ignore[return-value]
        percent(n_bytes * per_second / rate) for n_bytes in (weights, weights + of["cache_bytes"])
    )


# Parts.


def _startup(part: Result) -> Table:
    rows: list[tuple[str, ...]] = [
        (stage, f"{seconds:.2f} s") for stage, seconds in part["seconds"].items()
    ]
    found = part["invariance"]
    if found:
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        rows.append(("row invariance", f"{verdict}, checked in {found['seconds']:.2f} s"))
        rows.append(("library products replaced", ", ".join(found["replaced"]) or "none"))
    for name, size in part["memory"].items():
        rows.append((name.removesuffix("_bytes").replace("_", " "), gigabytes(size)))
    return Table("startup", ("what", "took"), rows)


def _ceiling(part: Result) -> Table:
    row = tuple(f"{part[f'{kind}_bytes_per_s'] / 1e9:.0f}" for kind in ("product", "amax", "sum"))
    return Table("streaming ceiling, GB/s", ("product", "read, amax", "read, sum"), [row])


def _passes(part: Result) -> Table:
    ceiling = part["ceiling"]
    rates = (ceiling["product_bytes_per_s"], ceiling["bytes_per_s"])
    rows = []
    for at in part["at"]:
        verify, draft, cycle = at["verify"], at.get("draft"), at.get("cycle")
        row = [str(at["context"]), spread(verify["ms"])]
        row += [share for rate in rates for share in shares_of(rate, verify)]
        row.append(median(draft["ms"]) if draft else "–")
        row.append(median(cycle["ms"]) if cycle else "–")
        row.append(percent(cycle["over_passes_share"]) if cycle else "–")
        row += [median(at["ar"][f"{kind}_ms"]) for kind in ("padded", "one_row")]
        rows.append(tuple(row))
    products, best = (f"{rate / 1e9:.0f}" for rate in rates)
    title = f"passes, ms ± half of 10–90%; shares of {products} GB/s (product), {best} (best); "
    title += "w: weights, c: cache"
    columns: tuple[str, ...] = ("context", "verify", "w of product", "w+c", "w of best", "w+c")
    columns += ("draft", "cycle", "over passes", "AR", "AR 1 row")
    return Table(title, columns, rows)


def _cycles(part: Result) -> Table:
    rows = []
    for at in part["at"]:
        rates = at["tokens_per_second"]
        rows.append(
            (
                str(at["context"]),
                f"{at['tokens_per_cycle']:.2f} ±{at['tokens_per_cycle_standard_error']:.2f}"
                f" (of {at['tokens_per_cycle_expected']:.2f})",
                *(spread(rates[name]) for name in ("diffusion", "ar_padded", "ar_one_row")),
                f"{at['speedup_over_faster_ar']:.2f}",
                equal(at["tokens_equal_to_ar"]),
            )
        )
    title = f"tokens/s, REPLAYED ACCEPTANCE: drafts {part['accept']:.0%} right"
    if part["accept"] != part["accept_asked"]:
        title += f", for {part['accept_asked']:g} tokens/cycle"
    columns = (
        "context",
        "tokens/cycle, REPLAYED",
        "drafting",
        "AR",
        "AR 1 row",
        "speed-up",
        "text",
    )
    return Table(title, columns, rows)


def equal(same: bool) -> str:
    return "equal" if same else "DIFFERENT"


def _slots(part: Result) -> Table:
    rows = []
    for at in part["at"]:
        rates = at["tokens_per_second"]
        rows.append(
            (
                str(at["slots"]),
                f"{at['tokens_per_cycle']:.2f}",
                *(spread(rates[name]) for name in ("diffusion", "ar_padded", "ar_one_row")),
                f"{at['speedup_over_faster_ar']:.2f}",
                equal(at["tokens_equal_to_ar"]),
            )
        )
    title = f"tokens/s of all slots, REPLAYED ACCEPTANCE: {part['accept_asked']:g} asked, "
    title += f"after {part['context']} tokens"
    columns = ("slots", "tokens/cycle, REPLAYED", "drafting", "AR", "AR 1 row", "speed-up", "text")
    left_out = tuple(f"{at['slots']} slots left out: {at['why']}" for at in part["left_out"])
    return Table(title, columns, rows, left_out)


def combination(of: Result) -> str:
    """A way to run in words: runner, compile mode where something is compiled, attention."""
    mode = of["compile_mode"] if of["runner"] == "compiled" else None
    return f"{of['runner']}{f' {mode}' if mode else ''}, {of['attention']}"


def _modes(part: Result) -> Table:
    rows, problems = [], []
    for of in part["combinations"]:
        how, slots = combination(of), of["slots"]
        if of["problem"] is not None:
            problems.append(f"{how}, slots {slots}: {of['problem']}")
        start, peak = seconds_to_start(of["startup_seconds"]), of["peak_allocated_bytes"]
        for at in of["at"]:
            rows.append(
                (
                    how,
                    str(slots),
                    str(at["context"]),
                    *(median(ms) for ms in (at["verify_ms"], at["draft_ms"])),
                    *(median(at["cycle_ms"][mode]) for mode in ("ar", "diffusion")),
                    f"{at['share_by_weights_and_cache']:.0%}",
                    _differing(at["identity"]),
                    f"{start:.1f}",
                    "–" if peak is None else f"{peak / 1e9:.2f}",
                )
            )
    best = f"{part['ceiling']['bytes_per_s'] / 1e9:.0f} GB/s"
    columns: tuple[str, ...] = ("how", "slots", "context", "verify", "draft", "AR", "drafting")
    columns += ("w+c", "rows differ", "start, s", "GB")
    title = f"ways to run: passes and cycles, ms; w+c: share of {best}"
    return Table(title, columns, rows, tuple(problems))


def seconds_to_start(seconds: dict[str, float]) -> float:
    """What comes on top of the weights."""
    return sum(seconds.get(name, 0.0) for name in ("compile", "capture", "check"))


def _differing(identity: Result | None) -> str:
    if identity is None:
        return "–"
    rows = f"{identity['rows_differing']} of {identity['rows']}"
    return rows if identity["tokens_equal"] else f"{rows}, TEXTS TOO"


def _acceptance(part: Result) -> Table:
    found = part["tokens_per_cycle"]
    rows = [
        ("prompts", str(part["sequences"])),
        ("sampling", settings_in_words(part.get("sampling", {}))),
        ("new tokens, at most", str(part["new_tokens"])),
        ("tokens/cycle, token-weighted", _two_digits(found["token_weighted"])),
        (
            "tokens/cycle, mean over prompts",
            f"{_two_digits(found['mean_over_prompts'])} ±{_two_digits(found['standard_error'])}",
        ),
        ("distinct trigrams, mean over prompts", percent(part["distinct_trigrams"])),
        ("texts equal to AR's", f"{part['texts_equal_to_ar']} of {part['sequences']}"),
    ]
    title = "acceptance of the checkpoint's own drafts"
    of_reached = " ".join(f"{100 * share:.0f}" for share in by_position(part)[REACHED])
    note = f"accepted at position 1, 2, … of the block, % {REACHED}: {of_reached}"
    return Table(title, ("what", "found"), rows, (note,))


def _two_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


REACHED = "of the cycles that reached it"


def by_position(part: Result) -> dict[str, list[float]]:
    """The share of drafts accepted at each position in the block, by what it is a share of.

    As far as any cycle reached. Of all cycles: the product of the shares so far, which counts a
    cycle that its text's end cut off as far as it went.
    """
    of_reached = list(takewhile(lambda share: share is not None, part["accepted_at_position"]))
    return {"of all cycles": list(accumulate(of_reached, operator.mul)), REACHED: of_reached}


def _eager(part: Result) -> Table:
    row = (
        part["mode"],
        str(part["context"]),
        spread(part["cycle_ms"]),
        spread(part["eager_cycle_ms"]),
        f"{part['speedup']:.2f}",
    )
    title = f"a cycle by the {part['runner']} runner and by the eager one, ms"
    return Table(title, ("mode", "context", part["runner"], "eager", "ratio"), [row])


def _sampling(part: Result) -> Table:
    rows = []
    for at in part["at"]:
        row = [str(at["context"])]
        for name, ms in at["cycle_ms"].items():
            row.append(spread(ms))
            if name in at["over_greedy_share"]:
                row.append(f"{at['over_greedy_share'][name]:+.1%}")
        rows.append(tuple(row))
    columns = ["context"]
    for name, settings in part["settings"].items():
        words = settings_in_words(settings)
        columns += [words] if name == "greedy" else [words, "over greedy"]
    return Table(f"a {part['mode']} cycle, ms ± half of 10–90%", tuple(columns), rows)


def _temperatures(part: Result) -> Table:
    rows: list[tuple[str, ...]] = []
    for at in part["at"]:
        row = [f"{at['temperature']:g}", mean(at["served"])]
        if at["temperature"] > 0:
            row += [mean(at["uncut"]), mean(at["rejection_sampling"])]
            row += [mean(at["uncut_over_rejection_sampling"]), str(at["uncut"]["n"])]
        rows.append((*row, *("–",) * (6 - len(row))))
    columns = ("temperature", "served", "uncut", "rejection sampling", "ratio", "blocks")
    title = "tokens/cycle ± standard error; REJECTION SAMPLING COMPUTED on the same blocks"
    return Table(title, columns, rows)


def _identity(part: Result) -> Table:
    row = (
        settings_in_words(part["sampling"]) if "sampling" in part else "greedy",
        part["drafts"],
        f"{part['sequences_equal']} of {part['sequences']}",
        f"{part['rows_differing']} of {part['rows']}",
        f"{part['cache_rows_differing']} of {part['cache_rows']}",
        str(part["ties_for_first_place"]),
        short(part["tokens_per_cycle"] or 0),
    )
    columns: tuple[str, ...] = (
        "sampling",
        "drafts",
        "texts equal",
        "logit rows differ",
        "cache rows differ",
    )
    columns += ("ties", "tokens/cycle")
    return Table("AR and diffusion to the bit", columns, [row])


def _prefill(part: Result) -> Table:
    rows: list[tuple[str, ...]] = [
        (str(at["prompt_tokens"]), spread(at["ms"]), short(at["tokens_per_second"]))
        for at in part["at"]
    ]
    return Table("time to first token", ("prompt", "ms", "tokens/s"), rows)


KERNELS_SHOWN = 16  # at most, and
WORTH_A_ROW = 0.001  # of what all add


def _kernels(part: Result) -> Table:
    kernels = part["kernels"]  # what adds the most first
    n_shown = sum(of["share"] >= WORTH_A_ROW for of in kernels[:KERNELS_SHOWN])
    shown, rest = kernels[:n_shown], kernels[n_shown:]
    rows = [
        (
            f"`{of['name'] if len(of['name']) <= 60 else of['name'][:59] + '…'}`",
            " × ".join(map(str, of["grid"])) if of["grid"] else "–",
            f"{of['count_per_cycle']:g}",
            short(of["us_per_cycle"]),
            short(of["us_added_per_cycle"]),
            percent(of["share"]),
        )
        for of in shown
    ]
    share = percent(sum(of["share"] for of in rest))
    notes = (f"{len(rest)} more kernels: {share} together",) if rest else ()
    total = short(sum(of["us_added_per_cycle"] for of in kernels))
    columns = ("kernel", "grid", "a cycle", "µs from start to end", "µs it adds", "share")
    return Table(f"kernels of a cycle, {total} µs", columns, rows, notes)


TABLES: dict[str, Callable[[Result], Table]] = {
    "startup": _startup,
    "ceiling": _ceiling,
    "passes": _passes,
    "modes": _modes,
    "cycles": _cycles,
    "slots": _slots,
    "sampling": _sampling,
    "eager": _eager,
    "identity": _identity,
    "acceptance": _acceptance,
    "temperatures": _temperatures,
    "prefill": _prefill,
    "kernels": _kernels,  # of {"kernels": [...]}, which a file has beside its parts
}


# Other programs beside ours: benchmarks/peers.py.


def peer_rates(content: Result) -> Table:
    rows = []
    replayed = content["label"] == "replayed acceptance"
    drafts = content["label"].upper() if replayed else content["label"]
    for at in content["at"]:
        programs = at["tokens_per_second_of"]
        drafting = programs["diffusion"]["tokens_per_second"]["median"]
        names = {
            "diffusion": f"ours, {at['tokens_per_cycle']:.2f} tokens a cycle: {drafts}",
            "ar_padded": "ours, AR",
            "ar_one_row": "ours, AR 1 row",
        }
        for name, row in programs.items():
            rows.append(
                (
                    str(at["context"]),
                    names.get(name, name),
                    spread(row["tokens_per_second"]),
                    f"{drafting / row['tokens_per_second']['median']:.2f}",
                    _texts_equal(row),
                )
            )
    skipped = tuple(f"{name}: skipped, {why}" for name, why in content["skipped"].items())
    columns = ("context", "program", "tokens/s", "drafting over it", "texts equal to our AR's")
    return Table(f"tokens/s, drafts: {drafts}", columns, rows, skipped)


def _texts_equal(row: Result) -> str:
    """The share of texts equal to our AR's, in each dtype where there are several."""
    by_dtype = row.get("texts_equal_share_by_dtype", {})
    if not by_dtype:
        return f"{row['texts_equal_share']:.0%}"
    return ", ".join(f"{dtype} {share:.0%}" for dtype, share in by_dtype.items())


def peer_first_tokens(content: Result) -> Table:
    rows = [
        (str(at["prompt_tokens"]), name.replace("orthrus_fast", "ours, any mode"), spread(ms))
        for at in content["first_token"]
        for name, ms in at["ms"].items()
    ]
    return Table("time to first token", ("prompt", "program", "ms"), rows)


PEER_TABLES: tuple[Callable[[Result], Table], ...] = (peer_rates, peer_first_tokens)
