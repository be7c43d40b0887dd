"""The model card's figures: a table made from figures.json, between two markers in README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures_section(figures: dict[str, Any]) -> str:
    """The card's section of figures, markers included."""
    kinds: dict[str, dict[str, Any]] = figures["kinds"]
    rows: dict[str, Callable[[str, dict[str, Any]], str]] = {
        "prompts": lambda _, k: str(k["prompts"]),
        "tokens written": lambda _, k: str(k["tokens"]),
        "tokens per cycle, token-weighted": lambda _, k: f"{k['tokens_per_cycle']:.2f}",
        "tokens per cycle, mean over prompts": lambda _, k: (
            f"{k['tokens_per_cycle_mean_over_prompts']:.2f}"
        ),
        "same tokens in both modes": lambda _, k: (
            f"{k['same_tokens_in_both_modes']} of {k['prompts']}"
        ),
        "distinct trigrams": lambda _, k: _percent(k["distinct_trigram_share"]),
        "answer equals the expected JSON": lambda _, k: _exact(k),
        "AR loss, nats a token": lambda name, _: _loss(figures["ar_loss"], name),
    }
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    for label, cell in rows.items():
        lines.append(f"| {label} | {' | '.join(cell(*item) for item in kinds.items())} |")
    lines += [""]
    for name, kind in kinds.items():
        if "by_source" in kind:
            lines += [_by_source(name, kind["by_source"]), ""]
    lines += [*_agreement_table(kinds), ""]
    lines.append(
        f"Measured by `{figures['command']}` on: {figures['machine']}{_settings(figures)}."
    )
    if "speed" in figures:
        lines += ["", *_speed_section(figures["speed"])]
    return "\n".join([BEGIN, *lines, END])


def _agreement_table(kinds: dict[str, dict[str, Any]]) -> list[str]:
    """Agreement by block position, in percent of cycles."""
    places = range(1, 1 + len(next(iter(kinds.values()))["agreement_by_position"]))
    lines = [
        "Draft equals what the AR view goes on to write, by position in the block, % of cycles:",
        "",
        f"| | {' | '.join(map(str, places))} |",
        f"|---|{'---|' * len(places)}",
    ]
    for name, kind in kinds.items():
        cells = (f"{100 * share:.0f}" for share in kind["agreement_by_position"])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _by_source(name: str, parts: dict[str, dict[str, Any]]) -> str:
    """A sentence on the parts of a kind."""
    said = (
        f"{part['prompts']} {source}: {part['tokens_per_cycle']:.2f} tokens per cycle, "
        f"{_percent(part['distinct_trigram_share'])} distinct trigrams"
        for source, part in parts.items()
    )
    return f"Of {name}, by where the prompts are from: {'; '.join(said)}."


def _settings(figures: dict[str, Any]) -> str:
    settings = figures.get("configuration")
    if settings is None:
        return ""
    slots = "one sequence at a time" if settings["slots"] == 1 else f"{settings['slots']} slots"
    return f"; {settings['dtype']}, runner {settings['runner']}, {slots}"


def _speed_section(speed: dict[str, Any]) -> list[str]:
    """Gain of diffusion over the faster AR for each demonstration, and what it is made of."""
    rows = speed["rows"]
    demos = list(dict.fromkeys(row["demo"] for row in rows))
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for row in rows:
        low, high = row["gain_range"]
        cell = f"{row['gain']:.2f} ({low:.2f} … {high:.2f})"
        cells.setdefault((row["threads"], row["runner"]), {})[row["demo"]] = cell
    lines = [
        "Tokens/s of diffusion over the faster of AR by the same pass and AR by one row, on the",
        f"demonstrations: median of {speed['runs']} rounds, in brackets the lowest and highest.",
        "",
        f"| threads | runner | {' | '.join(demos)} |",
        f"|---|---|{'---|' * len(demos)}",
    ]
    for (threads, runner), gains in cells.items():
        lines.append(f"| {threads} | {runner} | {' | '.join(gains.get(d, '–') for d in demos)} |")
    lines += [
        "",
        "Median tokens/s (diffusion / AR by the same pass / AR by one row):",
        "",
        f"| threads | runner | {' | '.join(demos)} |",
        f"|---|---|{'---|' * len(demos)}",
    ]
    for threads, runner in cells:
        rates = {
            row["demo"]: " / ".join(f"{v:.0f}" for v in row["tokens_per_second"].values())
            for row in rows
            if (row["threads"], row["runner"]) == (threads, runner)
        }
        lines.append(f"| {threads} | {runner} | {' | '.join(rates.get(d, '–') for d in demos)} |")
    loads = [load for row in rows for load in row["load_average"]]
    lines += [
        "",
        f"Measured by `{speed['command']}` (and with 2) on: {speed['machine']}; up to "
        f"{speed['max_new_tokens']} tokens; load average {min(loads):.1f} to {max(loads):.1f}, of "
        "which the measurement itself is one for each thread.",
    ]
    return lines


def _exact(kind: dict[str, Any]) -> str:
    if "exact" not in kind:
        return "–"
    return f"{kind['exact']} of {kind['prompts']} ({_percent(kind['exact_share'])})"


def _loss(losses: dict[str, Any], name: str) -> str:
    return f"{losses[name]['nats_per_token']:.3f}" if name in losses else "–"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def update_card(directory: Path) -> None:
    """Put the section made from figures.json into README.md, in place of the old one."""
    figures = json.loads((directory / "figures.json").read_text(encoding="utf-8"))
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(before + figures_section(figures) + after, encoding="utf-8")
