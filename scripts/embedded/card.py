"""Writes the figures of the model card from figures.json, between two markers in README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures_section(figures: dict[str, Any]) -> str:
    """Return the card's section of figures, markers included."""
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
        "AR loss, nats per token": lambda name, _: _loss(figures["ar_loss"], name),
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
    """Return the table of agreement by position in the block, in percent of cycles."""
    positions = range(1, 1 + len(next(iter(kinds.values()))["agreement_by_position"]))
    lines = [
        "Share of cycles, in %, in which the proposal at a position of the block equals the token",
        "that the AR view then writes there:",
        "",
        f"| | {' | '.join(map(str, positions))} |",
        f"|---|{'---|' * len(positions)}",
    ]
    for name, kind in kinds.items():
        cells = (f"{100 * share:.0f}" for share in kind["agreement_by_position"])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _by_source(name: str, parts: dict[str, dict[str, Any]]) -> str:
    """Return a sentence on a kind's figures by the source of its prompts."""
    figures = (
        f"{part['prompts']} {source}: {part['tokens_per_cycle']:.2f} tokens per cycle, "
        f"{_percent(part['distinct_trigram_share'])} distinct trigrams"
        for source, part in parts.items()
    )
    return f"By source of the prompts, {name}: {'; '.join(figures)}."


def _settings(figures: dict[str, Any]) -> str:
    """Return dtype, runner and slots in words."""
    settings = figures.get("configuration")
    if settings is None:
        return ""
    slots = "one sequence at a time" if settings["slots"] == 1 else f"{settings['slots']} slots"
    return f"; {settings['dtype']}, runner {settings['runner']}, {slots}"


def _speed_section(speed: dict[str, Any]) -> list[str]:
    """Return the speed of diffusion over the faster AR by prompt, and the tokens/s behind it."""
    rows = speed["rows"]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for row in rows:
        low, high = row["gain_range"]
        cell = f"{row['gain']:.2f} ({low:.2f} … {high:.2f})"
        cells.setdefault((row["threads"], row["runner"]), {})[row["prompt"]] = cell
    lines = [
        "Speed-up by drafting, by prompt: tokens/s in mode `diffusion` over those of the faster",
        "AR, mode `ar` or its baseline, passes of one row without the promise.",
        f"Median of {speed['runs']} rounds, with the lowest and the highest in brackets.",
        "",
        f"| threads | runner | {' | '.join(prompts)} |",
        f"|---|---|{'---|' * len(prompts)}",
    ]
    for (threads, runner), gains in cells.items():
        lines.append(f"| {threads} | {runner} | {' | '.join(gains.get(p, '–') for p in prompts)} |")
    lines += [
        "",
        "Median tokens/s (diffusion / AR / AR baseline):",
        "",
        f"| threads | runner | {' | '.join(prompts)} |",
        f"|---|---|{'---|' * len(prompts)}",
    ]
    for threads, runner in cells:
        rates = {
            row["prompt"]: " / ".join(f"{v:.0f}" for v in row["tokens_per_second"].values())
            for row in rows
            if (row["threads"], row["runner"]) == (threads, runner)
        }
        lines.append(f"| {threads} | {runner} | {' | '.join(rates.get(p, '–') for p in prompts)} |")
    loads = [load for row in rows for load in row["load_average"]]
    lines += [
        "",
        f"Measured by `{speed['command']}` (and with 2) on: {speed['machine']}; up to "
        f"{speed['max_new_tokens']} tokens; load average {min(loads):.1f} to {max(loads):.1f}, of "
        "which the measurement itself makes 1 per thread.",
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
    """Replace the section of figures in README.md by one made from figures.json."""
    figures = json.loads((directory / "figures.json").read_text(encoding="utf-8"))
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(before + figures_section(figures) + after, encoding="utf-8")
