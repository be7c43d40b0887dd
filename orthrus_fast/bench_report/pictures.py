"""Charts: first plain data, taken from result files, then drawn by matplotlib.

A picture's file carries a digest of its chart's data, so that a stale one is found without drawing
it again: a PNG's own bytes depend on matplotlib's version.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus_fast.bench_report.files import MODELS, ResultFile, guarded, hardware
from orthrus_fast.bench_report.tables import Result, by_position, combination, short
from orthrus_fast.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES = "benchmarks/results/pictures"
DIGEST = "orthrus-fast data"  # the keyword of a PNG's text chunk
REPLAYED = "REPLAYED ACCEPTANCE"
MODES = {"diffusion": "drafting", "ar_padded": "AR, same pass", "ar_one_row": "AR, one row"}
CONTEXT = 1024  # tokens; of charts that show one context
# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")  # another for each time the colours are used up


@dataclass(frozen=True)
class Series:
    """``x``: numbers for lines, names of groups for bars. ``colour`` and ``dash`` are indices."""

    name: str
    x: tuple[float, ...] | tuple[str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None  # the 10th and 90th percentiles, where there are some
    high: tuple[float, ...] | None = None
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Chart:
    """All that a picture shows. ``top`` of None: as far as the values reach."""

    kind: str  # "bars", "rows" (bars that lie) or "lines"
    title: str
    caption: str
    x_label: str
    y_label: str
    panels: tuple[Panel, ...]
    logarithmic_x: bool = False
    top: float | None = None


def digest(chart: Chart) -> str:
    return hashlib.sha256(json.dumps(asdict(chart), sort_keys=True).encode()).hexdigest()


# From files to charts.


def captioned(part: str, files: Sequence[ResultFile], *words: str) -> str:
    """Hardware and days, after what else there is to say."""
    found = dict.fromkeys(guarded(f, "runs", hardware, f, part) for f in files)
    names = dict.fromkeys(name for name, _ in found)
    days = sorted({day for _, day in found})
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return "; ".join([*words, *names, span])


def public(files: list[ResultFile]) -> list[ResultFile]:
    """Those of the public models' shapes, run as is the rule; all, where there are none."""
    return [file for file in files if file.label in MODELS] or files


def spread(name: str, x: Any, at: Sequence[dict[str, float]], **style: int) -> Series:
    """A series of summaries."""
    low, high = (tuple(of[end] for of in at) for end in ("p10", "p90"))
    return Series(name, tuple(x), tuple(of["median"] for of in at), low, high, **style)


def speed(files: list[ResultFile]) -> Chart:
    """Tokens/s by mode and model."""
    found: dict[str, Result] = {}
    files = public(files)
    for file in files:
        for at in file.parts["cycles"]["at"]:
            if at["context"] == CONTEXT:
                found[file.label] = at
    groups = [
        f"{label}\n{at['tokens_per_cycle']:.2f} tokens a cycle\n"
        f"{at['speedup_over_faster_ar']:.2f} × the faster AR"
        for label, at in found.items()
    ]
    series = tuple(
        spread(
            name, groups, [at["tokens_per_second"][mode] for at in found.values()], colour=colour
        )
        for colour, (mode, name) in enumerate(MODES.items())
    )
    note = f"after {CONTEXT} tokens; medians, lines: 10th to 90th percentile"
    return Chart(
        "bars",
        f"Tokens per second, {REPLAYED}",
        captioned("cycles", files, note),
        "",
        "tokens/s",
        (Panel("", series),),
    )


def ceiling(files: list[ResultFile]) -> Chart:
    """The verify pass as a share of the best rate of its run, against the context."""
    shares: dict[str, dict[int, tuple[float, float]]] = {}
    files = public(files)
    for file in files:
        for at in file.parts["passes"]["at"]:
            of = at["verify"]
            pair = (of["share_by_weights_and_cache"], of["share_by_weights"])
            shares.setdefault(file.label, {})[at["context"]] = pair
    series = []
    for colour, (label, by_context) in enumerate(shares.items()):
        contexts = tuple(sorted(by_context))
        for dash, what in enumerate(("weights and cache", "weights")):
            y = tuple(by_context[context][dash] for context in contexts)
            series.append(Series(f"{label}, {what}", contexts, y, colour=colour, dash=dash))
    return Chart(
        "lines",
        "Verify pass: share of the best rate at which the same run streamed bytes",
        captioned("passes", files),
        "committed tokens",
        "share of the streaming ceiling",
        (Panel("", tuple(series)),),
        logarithmic_x=True,
        top=1.0,
    )


def acceptance(files: list[ResultFile]) -> Chart:
    """Acceptance by position in the block, a panel for each way to count."""
    panels: dict[str, list[Series]] = {}
    for colour, (label, file) in enumerate({file.label: file for file in files}.items()):
        for way, shares in by_position(file.parts["acceptance"]).items():
            x = tuple(float(i) for i in range(1, len(shares) + 1))
            panels.setdefault(way, []).append(Series(label, x, tuple(shares), colour=colour))
    return Chart(
        "lines",
        "Accepted drafts by position in the block, the checkpoint's own",
        captioned("acceptance", files),
        "position in the block",
        "share accepted",
        tuple(Panel(f"share {way}", tuple(series)) for way, series in panels.items()),
        top=1.0,
    )


def slots(files: list[ResultFile]) -> Chart:
    """Tokens/s of all slots together: where drafting stops paying."""
    panels = []
    for label, file in {file.model: file for file in files}.items():
        at = file.parts["slots"]["at"]
        x = [float(of["slots"]) for of in at]
        rates = [of["tokens_per_second"] for of in at]
        series = tuple(
            spread(name, x, [rate[mode] for rate in rates], colour=colour, dash=colour)
            for colour, (mode, name) in enumerate(MODES.items())
        )
        per_cycle = file.parts["slots"]["accept_asked"]
        panels.append(Panel(f"{label}, {per_cycle:g} tokens a cycle asked\n{verdict(at)}", series))
    return Chart(
        "lines",
        f"Tokens per second of all slots, {REPLAYED}",
        captioned("slots", files, "bands: 10th to 90th percentile"),
        "slots",
        "tokens/s, all slots",
        tuple(panels),
        logarithmic_x=True,
    )


def verdict(at: Sequence[Result]) -> str:
    """Up to how many slots drafting was ahead of one-row AR, in a few words."""
    ahead = 0
    for of in at:
        rates = of["tokens_per_second"]
        if rates["diffusion"]["median"] <= rates["ar_one_row"]["median"]:
            return f"drafting ahead up to {ahead} slots" if ahead else "one-row AR ahead"
        ahead = of["slots"]
    return f"drafting ahead at all measured, 1 to {ahead}"


def modes(files: list[ResultFile]) -> Chart:
    """Milliseconds of a cycle by runner, compile mode and attention, one slot."""
    panels = []
    for label, file in {file.model: file for file in files}.items():
        found = {
            named(of, at): at
            for of in file.parts["modes"]["combinations"]
            for at in of["at"]
            if at["context"] == CONTEXT and of["slots"] == 1
        }
        series = []
        for colour, (mode, name) in enumerate((("ar", "AR"), ("diffusion", "drafting"))):
            have = {how: at["cycle_ms"][mode] for how, at in found.items() if at["cycle_ms"][mode]}
            if have:
                series.append(spread(name, have, list(have.values()), colour=1 - colour))
        panels.append(Panel(label, tuple(series)))
    return Chart(
        "rows",
        f"A cycle by way to run, one slot, {CONTEXT} committed tokens",
        captioned("modes", files, "lines: 10th to 90th percentile"),
        "ms a cycle",
        "",
        tuple(panels),
    )


def named(of: Result, at: Result) -> str:
    """A way to run, and whether AR and drafting disagreed there."""
    identity = at["identity"]
    same = identity is None or (identity["tokens_equal"] and not identity["rows_differing"])
    return combination(of) + ("" if same else " (not identical)")


CHARTS: dict[str, tuple[str, Callable[[list[ResultFile]], Chart]]] = {  # name -> part, chart
    "speed": ("cycles", speed),
    "ceiling": ("passes", ceiling),
    "acceptance": ("acceptance", acceptance),
    "slots": ("slots", slots),
    "modes": ("modes", modes),
}


def chart_of(name: str, files: list[ResultFile]) -> Chart:
    """Raises RequestError, which names the files, where one lacks what is drawn."""
    part, make = CHARTS[name]
    for file in files[:-1]:
        guarded(file, part, make, [file])
    return guarded(files[-1], part, make, files)


# From charts to pixels.

WIDTH, HEIGHT = 8.0, 4.2  # inches, at 150 dots an inch: 1200 dots, shown at about 830
PANEL = 3.8  # inches that a panel wants at least


def draw(chart: Chart, path: Path) -> None:
    """Write the PNG. Raises RequestError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise RequestError(
            f'pictures need {error.name}, which is not installed; run: pip install -e ".[bench]"'
        ) from None
    n_rows, n_columns = (1, len(chart.panels))
    if chart.kind == "rows":  # names on the left want all of the width
        n_rows, n_columns = n_columns, n_rows
    size = (max(WIDTH, PANEL * n_columns), HEIGHT * n_rows)
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)  # no display, whatever the user's settings say
    figure.suptitle(chart.title, fontsize=12, fontweight="bold")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for ax, panel in zip(axes, chart.panels, strict=True):
        DRAWERS[chart.kind](ax, panel, chart)
        ax.set_title(panel.title, fontsize=10)
        if ax is not axes[0]:
            ax.set_ylabel("")  # said once; ticks stay, since scales differ
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(chart.caption, fontsize=8, color="#444444")
    metadata = {"Software": None, DIGEST: digest(chart)}
    figure.savefig(path, format="png", metadata=metadata)


def draw_bars(ax: Axes, panel: Panel, chart: Chart) -> None:
    n_groups, thick = len(panel.series[0].x), 0.8 / len(panel.series)
    for i, series in enumerate(panel.series):
        at = [group + (i - (len(panel.series) - 1) / 2) * thick for group in range(n_groups)]
        colour = COLOURS[series.colour]
        bars = ax.bar(
            at, series.y, thick * 0.94, label=series.name, color=colour, yerr=ends(series)
        )
        ax.bar_label(bars, labels=[f"{y:.0f}" for y in series.y], fontsize=8, padding=2)
    ax.set_xticks(range(n_groups), [str(name) for name in panel.series[0].x])
    ax.set_ylabel(chart.y_label)
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False, fontsize=9)


def draw_rows(ax: Axes, panel: Panel, chart: Chart) -> None:
    names = list(dict.fromkeys(name for series in panel.series for name in series.x))
    thick = 0.8 / len(panel.series) if panel.series else 0.8
    for i, series in enumerate(panel.series):
        shift = (i - (len(panel.series) - 1) / 2) * thick
        at = [names.index(name) + shift for name in series.x]
        colour = COLOURS[series.colour]
        bars = ax.barh(
            at, series.y, thick * 0.94, label=series.name, color=colour, xerr=ends(series)
        )
        ax.bar_label(bars, labels=[short(y) for y in series.y], fontsize=8, padding=2)
    ax.set_yticks(range(len(names)), [str(name) for name in names], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(chart.x_label)
    ax.set_xlim(0, 1.1 * ax.get_xlim()[1])  # room for the figures
    ax.legend(frameon=False, fontsize=9, loc="lower right")


def draw_lines(ax: Axes, panel: Panel, chart: Chart) -> None:
    for series in panel.series:
        again, of_colour = divmod(series.colour, len(COLOURS))
        colour, marker = COLOURS[of_colour], MARKERS[again % len(MARKERS)]
        x = [float(value) for value in series.x]
        style = {"color": colour, "linestyle": DASHES[series.dash], "marker": marker}
        ax.plot(x, series.y, label=series.name, markersize=4, **style)  # type: ignore[arg-type]
        if series.low is not None and series.high is not None:
            ax.fill_between(x, series.low, series.high, color=colour, alpha=0.15, linewidth=0)
    if chart.logarithmic_x:
        ax.set_xscale("log", base=2)
        ticks = sorted({float(value) for series in panel.series for value in series.x})
        ax.set_xticks(ticks, [thousands(tick) for tick in ticks])
        ax.minorticks_off()
    ax.set_xlabel(chart.x_label)
    ax.set_ylabel(chart.y_label)
    ax.set_ylim(0, chart.top)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.legend(frameon=False, fontsize=8)


DRAWERS: dict[str, Callable[[Axes, Panel, Chart], None]] = {
    "bars": draw_bars,
    "rows": draw_rows,
    "lines": draw_lines,
}


def ends(series: Series) -> Any:
    """Lengths of the lines down and up from each bar's end; None where there is no spread."""
    if series.low is None or series.high is None:
        return None
    down = [y - low for y, low in zip(series.y, series.low, strict=True)]
    return [down, [high - y for y, high in zip(series.y, series.high, strict=True)]]


def thousands(value: float) -> str:
    whole = int(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


# What a PNG says about its data.


def held_digest(path: Path) -> str | None:
    """The digest in a picture's file; None where there is none."""
    for kind, content in chunks(path.read_bytes()):
        keyword, _, text = content.partition(b"\0")
        if kind == b"tEXt" and keyword == DIGEST.encode():
            return text.decode("latin-1")
    return None


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kinds and contents of a PNG's chunks (PNG specification, section 5)."""
    at = 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length
