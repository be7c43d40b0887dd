"""Writes the tables and pictures of README.md and benchmarks/README.md from benchmarks/results/.

    python benchmarks/report.py

A page says what it wants between two markers, and what stands between them is replaced:

    <!-- table: passes h100 -->    of the files in benchmarks/results/h100/ with the part passes
    …
    <!-- end -->
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # from a checkout that is not installed, too
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orthrus_fast.bench.common import REPOSITORY, Result
from orthrus_fast.bench.flags import PUBLISHED
from orthrus_fast.bench.tables import short, spread

PAGES = ("README.md", "benchmarks/README.md")
PLACE = re.compile(r"(<!-- (table|picture): (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
RESULTS = "benchmarks/results"
MODELS = ("1.7B", "4B", "8B")  # the order of rows; others follow by name
CONTEXT = 1024  # tokens; of what shows one context
RENAMED = {"padded_ms": "ms", "one_row_ms": "baseline_ms", "ar_padded": "ar"}
RENAMED |= {"ar_one_row": "ar_baseline"}  # from before AR with the promise ran one row a pass


class ResultFile:
    """One JSON file of the benchmark or of a program beside it.

    ``model``: a shape, a checkpoint's name or "embedded"; ``label``: it, and what is not the rule.
    """

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.as_filed = json.loads(text)["parts"]
        content = json.loads(text, object_hook=lambda of: {RENAMED.get(k, k): of[k] for k in of})
        self.path, self.command, parts = path, content["command"], content["parts"].items()
        self.parts = {n: of for n, of in parts if not isinstance(of.get("skipped"), str)}
        self.environment, asked = content["environment"], content["arguments"]
        self.machine = self.environment["gpu"] or self.environment["hardware"]
        name = str(asked["shape"] or asked["checkpoint"] or "model").rstrip("/").split("/")[-1]
        self.model = "embedded" if name == "model" else name
        words = [f"{asked['slots']} slots"] if asked["slots"] != 1 else []
        words += [f"width {asked['block_size']}"] if asked.get("block_size") else []
        others = (asked.get(name) for name in ("runner", "attention", "compile_mode", "dtype"))
        words += [other for other in others if other not in (None, "auto", "default")]
        of = self.environment.get("configuration") or {}  # "auto" has been resolved there
        weights, drafter = (of.get(name, "checkpoint") for name in ("weights", "draft_weights"))
        words += [f"{weights} weights"] if weights != "checkpoint" else []
        words += [f"{drafter} drafter"] if drafter != weights else []
        self.label = ", ".join([self.model, *words])


def read_folder(root: Path, device: str, part: str) -> list[ResultFile]:
    """Read a device's files that hold a part: models by size, later files after earlier ones."""
    files = [ResultFile(path) for path in sorted((root / RESULTS / device).glob("*.json"))]
    files = [file for file in files if part in file.parts]
    if not files:
        raise SystemExit(f"error: {RESULTS}/{device}: no file has the part {part}")
    return sorted(files, key=lambda f: (order([f.model]), f.label, f.environment["date"]))


def order(key: Sequence[str]) -> list[Any]:
    """Return a key for sorting: models by size, and "4096" after "128"."""
    model = key[0].split(",")[0]
    found: list[Any] = [MODELS.index(model) if model in MODELS else len(MODELS)]
    for cell in key:
        pieces = re.split(r"(\d+(?:\.\d+)?)", cell)
        found += [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(pieces)]
    return found


def machines(files: Sequence[ResultFile]) -> str:
    """Return hardware, versions, dates and commits of some files, in a line."""
    said: dict[str, dict[str, None]] = {}
    for file in files:
        of = file.environment
        words = [file.machine, *([f"driver {of['driver']}"] if of["gpu"] else [])]
        words += [f"torch {of['torch']}", *([f"Triton {of['triton']}"] if of["gpu"] else [])]
        if "peers" in file.parts:
            words.append(f"transformers {file.parts['peers']['transformers']}")
        when = f"{of['date'][:10]} at commit {of['commit'][:8]}{' with changes' * of['dirty']}"
        said.setdefault(", ".join(words), {})[when] = None
    return "; ".join(f"{machine}; {', '.join(when)}" for machine, when in said.items())


def median(values: dict[str, float] | None) -> str:
    return short(values["median"]) if values else "–"


def gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f} GB"


def share(read: Result, rate: float, *names: str) -> str:
    """Return the bytes of ``names`` over a timed pass, as a share of ``rate`` in bytes/s."""
    return f"{sum(read[name] for name in names) / read['ms']['median'] * 1e3 / rate:.1%}"


def in_words(settings: Result) -> str:
    """Return temperature and filters in words."""
    if not settings.get("temperature"):
        return "greedy"
    return ", ".join(f"{name} {value:g}" for name, value in settings.items() if value is not None)


def to_start(seconds: dict[str, float]) -> str:
    """Return the seconds that a start takes once the weights are there."""
    return f"{sum(seconds.get(name, 0.0) for name in ('compile', 'capture', 'check')):.1f}"


def combination(of: Result) -> str:
    """Return runner, compile mode where something is compiled with one, and attention."""
    mode = f" {of['compile_mode']}" if of["runner"] == "compiled" else ""
    return f"{of['runner']}{mode}, {(of['configuration'] or {}).get('attention', '–')}"


Row = dict[str, str]  # heading -> cell; what follows makes these of one file's part


def startup(file: ResultFile) -> tuple[str, Row]:
    """Return a column, headed by the model and for how many tokens it was set up."""
    part, room = file.parts["startup"], file.environment["configuration"]["max_seq_len"]
    seconds = {stage: f"{seconds:.2f} s" for stage, seconds in part["seconds"].items()}
    row = {"draw or read the weights": seconds.pop("weights"), **seconds}
    if found := part["invariance"]:
        verdict = "holds" if found["holds"] else "DOES NOT HOLD"
        row["row invariance"] = f"{verdict}, checked in {found['seconds']:.2f} s"
    for name, size in part["memory"].items():
        row[name.removesuffix("_bytes").replace("_", " ")] = gigabytes(size)
    return f"{file.label}, {room} tokens", row


def acceptance(file: ResultFile) -> tuple[str, Row]:
    part = file.parts["acceptance"]
    found, n = part["tokens_per_cycle"], part["sequences"]
    mean, error = (f"{found[name]:.2f}" for name in ("mean_over_prompts", "standard_error"))
    return file.label, {
        "prompts": str(n),
        "sampling": in_words(part.get("sampling", {})),
        "new tokens, at most": str(part["new_tokens"]),
        "tokens/cycle, token-weighted": f"{found['token_weighted']:.2f}",
        "tokens/cycle, mean over prompts": f"{mean} ±{error}",
        **{
            f"the same, {of['sequences']} of {kind}": f"{of['mean_over_prompts']:.2f}"
            for kind, of in part.get("by_kind", {}).items()
        },
        "distinct trigrams, mean over prompts": f"{part['distinct_trigrams']:.1%}",
        "texts equal to AR's": f"{part['texts_equal_to_ar']} of {n}",
    }


def by_position(part: Result) -> dict[str, list[float]]:
    """Return the share of drafts accepted at each position reached, by what it is a share of."""
    # Of all cycles, the product counts one that its text's end cut off as far as it went.
    reached = list(takewhile(lambda share: share is not None, part["accepted_at_position"]))
    of_all = list(accumulate(reached, operator.mul))
    return {"of all cycles": of_all, "of the cycles that reached it": reached}


def positions(part: Result) -> Iterator[Row]:
    for what, shares in by_position(part).items():
        yield {"%": what} | {str(i): f"{100 * share:.0f}" for i, share in enumerate(shares, 1)}


def ceiling(part: Result) -> Iterator[Row]:
    kinds = {"product": "product", "read, amax": "amax", "read, sum": "sum"}
    yield {name: f"{part[f'{kind}_bytes_per_s'] / 1e9:.0f}" for name, kind in kinds.items()}


def passes(part: Result) -> Iterator[Row]:
    product, best = (part["ceiling"][name] for name in ("product_bytes_per_s", "bytes_per_s"))
    for at in part["at"]:
        verify, cycle, both = at["verify"], at["cycle"], ("weights_bytes", "cache_bytes")
        yield {
            "context": str(at["context"]),
            "verify": spread(verify["ms"]),
            "w/product": share(verify, product, "weights_bytes"),
            "(w+c)/product": share(verify, product, *both),
            "w/best": share(verify, best, "weights_bytes"),
            "(w+c)/best": share(verify, best, *both),
            "draft": median(at["draft"]["ms"]),
            "cycle": median(cycle["ms"]),
            "over passes": f"{cycle['over_passes_share']:.1%}",
            "AR": median(at["ar"]["ms"]),
            "AR baseline": median(at["ar"]["baseline_ms"]) if "baseline_ms" in at["ar"] else "–",
        }


def cycles(part: Result, key: str = "context") -> Iterator[Row]:
    names = ("tokens_per_cycle", "tokens_per_cycle_standard_error", "tokens_per_cycle_expected")
    several = len({at.get("width") for at in part["at"]}) > 1
    for at in part["at"]:
        (found, error, expected), rates = (f"{at[n]:.2f}" for n in names), at["tokens_per_second"]
        yield {
            key: f"{at[key]}, width {at['width']}" if several else str(at[key]),
            "tokens/cycle, REPLAYED": f"{found} ±{error} (of {expected})",
            "drafting": spread(rates["diffusion"]),
            **({"width by load": spread(rates["adaptive"])} if "adaptive" in rates else {}),
            "AR": spread(rates["ar"]),
            "AR baseline": spread(rates["ar_baseline"]) if "ar_baseline" in rates else "–",
            "speed-up": f"{at['speedup_over_faster_ar']:.2f}",
            "text": "equal" if at["tokens_equal_to_ar"] else "DIFFERENT",
        }


def slots(part: Result) -> Iterator[Row]:
    yield from cycles(part, "slots")
    for of in part["left_out"]:
        yield {"slots": str(of["slots"]), "tokens/cycle, REPLAYED": f"left out: {of['why']}"}


def sampling(part: Result) -> Iterator[Row]:
    for at in part["at"]:
        row = {"context": str(at["context"])}
        for name, settings in part["settings"].items():
            row[in_words(settings)] = spread(at["cycle_ms"][name])
            if name in at["over_greedy_share"]:
                row[f"over greedy, {name}"] = f"{at['over_greedy_share'][name]:+.1%}"
        yield row


def identity(part: Result) -> Iterator[Row]:
    yield {
        "sampling": in_words(part.get("sampling", {})),
        "drafts": part["drafts"],
        "texts equal": f"{part['sequences_equal']} of {part['sequences']}",
        "logit rows differ": f"{part['rows_differing']} of {part['rows']}",
        "cache rows differ": f"{part['cache_rows_differing']} of {part['cache_rows']}",
        "ties": str(part["ties_for_first_place"]),
        "tokens/cycle": short(part["tokens_per_cycle"]),
    }


def prefill(part: Result) -> Iterator[Row]:
    for at in part["at"]:
        yield {"prompt": str(at["prompt_tokens"]), "ms": spread(at["ms"])}


def engine(file: ResultFile) -> tuple[str, Row]:
    """Return a column of times in ms: of a prompt beside another request, and of a next turn."""
    part, row = file.parts["engine"], Row()
    for at in part["at"]:
        prompt = f"{at['prompt_tokens']} tokens"
        row[f"{prompt}: first token, alone"] = spread(at["first_token_ms"])
        row[f"{prompt}: first token, beside a text being written"] = spread(
            at["first_token_beside_ms"]
        )
        row[f"{prompt}: that text's gaps between cycles, before"] = spread(at["gap_before_ms"])
        row[f"{prompt}: its longest gap meanwhile"] = spread(at["longest_gap_ms"])
    turn = part["next_turn"]
    said = f"{turn['new']} tokens after {turn['history']}, {turn['reused']} reused: first token"
    return file.label, {**row, said: spread(turn["first_token_ms"])}


def modes(part: Result) -> Iterator[Row]:
    for of in part["combinations"]:
        head = {"combination": combination(of), "slots": str(of["slots"])}
        if of["problem"] is not None:
            yield {**head, "context": of["problem"]}
        for at in of["passes"]["at"] if {"startup", "passes", "identity"} <= set(of) else ():
            start, same = of["startup"], of["identity"]
            texts = "" if same["sequences_equal"] == same["sequences"] else ", TEXTS TOO"
            yield {
                **head,
                "context": str(at["context"]),
                "verify": median(at["verify"]["ms"]),
                "draft": median(at["draft"]["ms"]),
                "AR": median(at["ar"]["cycle_ms"]),
                "drafting": median(at["cycle"]["ms"]),
                "w+c": f"{at['verify']['share_by_weights_and_cache']:.0%}",
                "rows differ": f"{same['rows_differing']} of {same['rows']}{texts}",
                "start, s": to_start(start["seconds"]),
                "GB": gigabytes(start["memory"]["peak_allocated_bytes"]).removesuffix(" GB"),
            }


def peers(part: Result) -> Iterator[Row]:
    drafts = part["label"].replace("replayed acceptance", "REPLAYED ACCEPTANCE")
    names = {"ar": "orthrus-fast, AR", "ar_baseline": "orthrus-fast, AR baseline"}
    for at in part["at"]:
        programs = at["tokens_per_second_of"]
        drafting = programs["diffusion"]["tokens_per_second"]["median"]
        names["diffusion"] = f"orthrus-fast, {at['tokens_per_cycle']:.2f} tokens a cycle: {drafts}"
        for name, row in programs.items():
            equal = row["texts_equal_share_by_dtype"].items()
            yield {
                "context": str(at["context"]),
                "program": names.get(name, name),
                "tokens/s": spread(row["tokens_per_second"]),
                "drafting over it": f"{drafting / row['tokens_per_second']['median']:.2f}",
                "texts equal to AR's": ", ".join(f"{dtype} {of:.0%}" for dtype, of in equal),
            }
    for name, why in part["skipped"].items():
        yield {"context": "–", "program": name, "tokens/s": f"skipped: {why}"}


def first_token(part: Result) -> Iterator[Row]:
    for at in part["first_token"]:
        for name, ms in at["ms"].items():
            name = "orthrus-fast, any mode" if name == "orthrus_fast" else name
            yield {"prompt": str(at["prompt_tokens"]), "program": name, "ms": spread(ms)}


def serving(part: Result) -> Iterator[Row]:
    """Yield loops of clients; times as median and 95th percentile."""
    for at in [*part["at"], {"clients": "open loop, a third leave", **part["open_loop"]}]:
        times = {name: at[f"{name}_ms"] for name in ("first_token", "gap", "request")}
        ms = {f"{n.replace('_', ' ')}, ms": of for n, of in times.items()}
        yield {
            "clients": str(at["clients"]),
            "requests/s": short(at["requests_per_second"]),
            "tokens/s": short(at["tokens_per_second"]),
            **{name: f"{short(of['median'])}, {short(of['p95'])}" for name, of in ms.items()},
            "of the engine's tokens/s": median(at.get("server_over_engine")),
            "by its thread's own clock": median(at.get("server_over_engine_by_cpu_time")),
            "texts that differ": str(at["texts_that_differ"]),
        }


def headline(file: ResultFile) -> tuple[str, Row]:
    """Return what a reader wants first of the public models' shapes."""
    if file.model not in MODELS or not {"startup", "passes", "identity"} <= set(file.parts):
        return file.label, {}
    (at,) = (at for at in file.parts["cycles"]["at"] if at["context"] == CONTEXT)
    (timed,) = (row for row in passes(file.parts["passes"]) if row["context"] == str(CONTEXT))
    same, start = file.parts["identity"], file.parts["startup"]
    rates = {mode: median(values) for mode, values in at["tokens_per_second"].items()}
    rows = {n: f"{same[n]} of {same['rows']}" for n in ("rows_differing", "ties_for_first_place")}
    return file.label, {
        "tokens per cycle (REPLAYED ACCEPTANCE)": f"{at['tokens_per_cycle']:.2f}",
        "tokens/s: drafting": rates["diffusion"],
        "tokens/s: AR, AR baseline": "{ar}, {ar_baseline}".format(**rates),
        "drafting over the faster AR": f"{at['speedup_over_faster_ar']:.2f}",
        "verify pass, ms": timed["verify"].split()[0],
        "its weights over its time, of the output head's rate": timed["w/product"],
        "its weights over its time, of the best rate seen": timed["w/best"],
        "AR against drafting: logit rows that differ in a bit": rows["rows_differing"],
        "logit rows with an exact tie for first place": rows["ties_for_first_place"],
        "compile, capture, check": f"{to_start(start['seconds'])} s",
        "memory beyond weights and cache": gigabytes(start["memory"]["over_allocated_bytes"]),
    }


Joined = tuple[list[Row], list[ResultFile]]  # a table of several files, and those that it shows
Join = Callable[[Sequence[ResultFile]], Joined]


def as_rows(
    part: str, make: Callable[[Any], Iterator[Row]], n_keys: int, as_filed: bool = False
) -> Join:
    """Put the rows of all files below each other, the model first; sorted, or ``as_filed``.

    Of rows of one model with the same first ``n_keys`` cells, the latest file's stands.
    """

    def join(files: Sequence[ResultFile]) -> Joined:
        rows: dict[tuple[str, ...], tuple[ResultFile, Row]] = {}
        for file in files:
            for row in make(file.parts[part]):
                rows[(file.label, *[*row.values()][:n_keys])] = file, {"": file.label, **row}
        if not as_filed:
            rows = {key: rows[key] for key in sorted(rows, key=order)}
        used = {id(file) for file, _ in rows.values()}
        return [row for _, row in rows.values()], [file for file in files if id(file) in used]

    return join


def as_columns(make: Callable[[ResultFile], tuple[str, Row]], heading: str = "") -> Join:
    """Put each file's fields, if any, into a column; of files with one label the latest stands."""

    def join(files: Sequence[ResultFile]) -> Joined:
        columns = {label: (file, row) for file in files for label, row in [make(file)] if row}
        fields = dict.fromkeys(field for _, row in columns.values() for field in row)
        rows = [
            {heading: field} | {label: row.get(field, "–") for label, (_, row) in columns.items()}
            for field in fields
        ]
        return rows, [file for file, _ in columns.values()]

    return join


TABLES: dict[str, tuple[str, Join]] = {  # the part that a file must have; the table
    "headline": ("cycles", as_columns(headline, f"one sequence after {CONTEXT} tokens")),
    "startup": ("startup", as_columns(startup)),
    "ceiling": ("ceiling", as_rows("ceiling", ceiling, 0)),
    "passes": ("passes", as_rows("passes", passes, 1)),
    "modes": ("modes", as_rows("modes", modes, 3, as_filed=True)),
    "cycles": ("cycles", as_rows("cycles", cycles, 1)),
    "slots": ("slots", as_rows("slots", slots, 1)),
    "sampling": ("sampling", as_rows("sampling", sampling, 1)),
    "identity": ("identity", as_rows("identity", identity, 2)),
    "acceptance": ("acceptance", as_columns(acceptance)),
    "positions": ("acceptance", as_rows("acceptance", positions, 1, as_filed=True)),
    "prefill": ("prefill", as_rows("prefill", prefill, 1)),
    "engine": ("engine", as_columns(engine, "ms")),
    "peers": ("peers", as_rows("peers", peers, 2, as_filed=True)),
    "first-token": ("peers", as_rows("peers", first_token, 2, as_filed=True)),
    "serving": ("serving", as_rows("serving", serving, 1, as_filed=True)),
}


def domains(root: Path) -> Iterator[Row]:
    """Yield how many tokens a cycle must give for drafting to pay, and how many texts give."""
    found: list[tuple[str, str, float, str, float]] = []
    for file in map(ResultFile, sorted((root / RESULTS / "h100").glob("[0-9]*B.json"))):
        where, known = f"{file.label}, {file.machine.split()[1]}", PUBLISHED.items()
        for at in (at for at in file.parts["passes"]["at"] if at["context"] == CONTEXT):
            passes = at["ar"]["ms"]["median"], at["ar"]["baseline_ms"]["median"]
            pays, head = at["cycle"]["ms"]["median"] / min(passes), f"{file.label}/"
            reported = [(n.removeprefix(head), *of) for n, of in known if n.startswith(head)]
            found += [(where, text, of, f"reported: {by}", pays) for text, of, by in reported]
    figures = json.loads((root / "model/figures.json").read_text("utf-8"))
    for row in figures["speed"]["rows"]:
        if (row["runner"], row["prompt"]) == ("eager", "records"):
            where, pays = f"embedded, CPU ({row['threads']})", row["tokens_per_cycle"] / row["gain"]
            for text in ("records", "code", "prose"):
                of = figures["kinds"][text]
                said = f"measured, distinct trigrams {of['distinct_trigram_share']:.1%}"
                found.append((where, text, of["tokens_per_cycle"], said, pays))
    heads = "model, hardware|text|tokens per cycle|drafting pays from|over the faster AR".split("|")
    for where, text, n, said, pays in found:
        gain = f"{n / pays:.2f}" + " (slower)" * (n < pays)
        cells = (where, text, f"{n:.2f} ({said})", f"{pays:.2f}", gain)
        yield dict(zip(heads, cells, strict=True))


def markdown(rows: Sequence[Row]) -> str:
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    lines = [headings, *([row.get(heading, "–") for heading in headings] for row in rows)]
    texts = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([texts[0], "|" + "---|" * len(headings), *texts[1:]])


COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito's
MODES = {"diffusion": "drafting", "ar": "AR", "ar_baseline": "AR baseline"}


def draw_speed(figure: Any, files: Sequence[ResultFile]) -> None:
    """Tokens/s by mode and model."""
    every = ((file.label, at) for file in files for at in file.parts["cycles"]["at"])
    found = {label: at for label, at in every if at["context"] == CONTEXT}
    groups = [
        f"{label}\n{at['tokens_per_cycle']:.2f} tokens a cycle\n"
        f"{at['speedup_over_faster_ar']:.2f} × the faster AR"
        for label, at in found.items()
    ]
    rates = [at["tokens_per_second"] for at in found.values()]
    ax = figure.subplots()
    bars(ax, groups, {name: [of[mode] for of in rates] for mode, name in MODES.items()})
    ax.set(ylabel="tokens/s", ylim=(0, None))


def draw_ceiling(figure: Any, files: Sequence[ResultFile]) -> None:
    """The verify pass as a share of the best rate of its run, against the context."""
    ax, shares = figure.subplots(), dict[str, dict[int, Result]]()  # label -> context -> verify
    for file in files:
        for at in file.parts["passes"]["at"]:
            shares.setdefault(file.label, {})[at["context"]] = at["verify"]
    for i, (label, of) in enumerate(shares.items()):
        for what, dash in (("weights and cache", "-"), ("weights", "--")):
            y = [of[n][f"share_by_{what.replace(' ', '_')}"] for n in sorted(of)]
            ax.plot(sorted(of), y, f"C{i}o{dash}", ms=4, label=f"{label}, {what}")
    logarithmic(ax, {n for of in shares.values() for n in of})
    ax.set(xlabel="committed tokens", ylabel="share of the streaming ceiling", ylim=(0, 1))


def draw_acceptance(figure: Any, files: Sequence[ResultFile]) -> None:
    """Acceptance by position in the block, a panel for each way to count."""
    panels = figure.subplots(1, 2)
    for file in files:
        of_parts = by_position(file.parts["acceptance"]).items()
        for ax, (what, shares) in zip(panels, of_parts, strict=True):
            ax.plot(range(1, len(shares) + 1), shares, "o-", ms=4, label=file.label)
            ax.set(title=f"share {what}", xlabel="position in the block", ylim=(0, 1))
    panels[0].set(ylabel="share accepted")


def draw_slots(figure: Any, files: Sequence[ResultFile]) -> None:
    """Tokens/s of all slots together: where drafting stops paying."""
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    for ax, file in zip(panels, files, strict=True):
        part = file.parts["slots"]
        widest = max(of.get("width", 0) for of in part["at"])
        at = [of for of in part["at"] if of.get("width", 0) == widest]
        x, rates = ([of[key] for of in at] for key in ("slots", "tokens_per_second"))
        for style, (mode, name) in zip(("C0o-", "C1o--", "C2o:"), MODES.items(), strict=True):
            y, low, high = ([of[mode][key] for of in rates] for key in ("median", "p10", "p90"))
            ax.plot(x, y, style, ms=4, label=name)
            ax.fill_between(x, low, high, color=style[:2], alpha=0.15, linewidth=0)
        logarithmic(ax, x)
        title = f"{file.model}, {part['accept_asked']:g} tokens a cycle asked\n"
        ax.set(title=title + verdict(at), xlabel="slots", ylim=(0, None))
    panels[0].set(ylabel="tokens/s, all slots")


def verdict(at: Sequence[Result]) -> str:
    """Return up to how many slots drafting was faster than the faster AR, in a few words."""
    n_ahead = len(list(takewhile(lambda of: of["speedup_over_faster_ar"] > 1, at)))
    if n_ahead == len(at):
        return f"drafting ahead at all measured, 1 to {at[-1]['slots']}"
    return f"drafting ahead up to {at[n_ahead - 1]['slots']} slots" if n_ahead else "AR ahead"


def draw_modes(figure: Any, files: Sequence[ResultFile]) -> None:
    """Milliseconds of a cycle by runner and compile mode."""
    for ax, file in zip(figure.subplots(len(files), 1, squeeze=False)[:, 0], files, strict=True):
        found: Result = {}
        for of in file.parts["modes"]["combinations"]:
            different = of.get("identity", {}).get("rows_differing")
            name = f"{combination(of)} (not identical)" if different else combination(of)
            for at in of.get("passes", {"at": []})["at"]:
                found |= {name: at} if at["context"] == CONTEXT else {}
        both = {"drafting": [at["cycle"]["ms"] for at in found.values()]}
        bars(ax, [*found], both | {"AR": [at["ar"]["cycle_ms"] for at in found.values()]}, lie=True)
        ax.set(title=file.label, xlabel="ms a cycle", xlim=(0, 1.1 * ax.get_xlim()[1]))
        ax.invert_yaxis()


def bars(ax: Any, groups: list[str], values: dict[str, list[Result]], lie: bool = False) -> None:
    """Draw groups of bars, which stand or lie, with lines from the 10th to the 90th percentile."""
    thick, ticks = 0.8 / len(values), range(len(groups))
    for i, (name, of) in enumerate(values.items()):
        at = [group + (i - (len(values) - 1) / 2) * thick for group in ticks]
        ends = [[v["median"] - v["p10"] for v in of], [v["p90"] - v["median"] for v in of]]
        style: dict[str, Any] = {"label": name, "xerr" if lie else "yerr": ends}
        drawn = (ax.barh if lie else ax.bar)(at, [v["median"] for v in of], thick * 0.94, **style)
        ax.bar_label(drawn, labels=[median(values) for values in of], fontsize=8, padding=2)
    (ax.set_yticks if lie else ax.set_xticks)(ticks, groups)


def logarithmic(ax: Any, ticks: Iterable[int]) -> None:
    labels = {n: f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n) for n in sorted(ticks)}
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(labels), list(labels.values()))
    ax.minorticks_off()


SPREAD = "medians, from the 10th to the 90th percentile"
AT = f"after {CONTEXT} tokens; {SPREAD}"
PICTURES: dict[str, tuple[str, str, str, Callable[[Any, Sequence[ResultFile]], None]]] = {
    # name: the part that a file must have, title, note, and what draws the files on a figure
    "speed": ("cycles", "Tokens/s, REPLAYED ACCEPTANCE", AT, draw_speed),
    "ceiling": ("passes", "Verify pass: share of the streaming ceiling", "", draw_ceiling),
    "acceptance": ("acceptance", "Accepted drafts by position in the block", "", draw_acceptance),
    "slots": ("slots", "Tokens/s of all slots, REPLAYED ACCEPTANCE", SPREAD, draw_slots),
    "modes": ("modes", "Cycles by runner and compile mode, one slot", AT, draw_modes),
}


def caption(files: Sequence[ResultFile], note: str) -> str:
    days = sorted(file.environment["date"][:10] for file in files)
    words = [note, *(file.machine for file in files), " to ".join(sorted({days[0], days[-1]}))]
    return "; ".join(filter(None, dict.fromkeys(words)))


def refresh(name: str, files: Sequence[ResultFile], path: Path) -> None:
    """Draw the PNG, unless it holds the digest of the same data."""
    part, title, note, draw = PICTURES[name]
    data = json.dumps([title, note, [[file.label, file.as_filed[part]] for file in files]])
    digest = hashlib.sha256(data.encode()).hexdigest()
    if path.exists() and digest.encode() in path.read_bytes():
        return
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    with rc_context({"axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(8.0, 4.2), dpi=150, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)  # no display, whatever the user's settings say
        draw(figure, files)
        for ax in figure.axes:
            ax.title.set_fontsize(10)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False, fontsize=8)
        figure.suptitle(title, fontsize=12, fontweight="bold")
        figure.supxlabel(caption(files, note), fontsize=8, color="#444444")
        figure.savefig(path, format="png", metadata={"Software": None, "orthrus-fast data": digest})


def render(root: Path, page: str) -> str:
    """Return the page with every place filled; pictures whose data changed are drawn anew."""
    shown: set[Path] = set()  # files whose commands the page has

    def fill(found: re.Match[str]) -> str:
        begin, kind, name, device, end = found.groups()
        if device == "model":
            return f"{begin}{markdown(list(domains(root)))}\n{end}"
        known = TABLES if kind == "table" else PICTURES
        if name not in known:
            raise SystemExit(f"error: {page}: {kind} {name}: is not one of {', '.join(known)}")
        files = read_folder(root, device, known[name][0])
        if kind == "table":
            rows, files = TABLES[name][1](files)
            return f"{begin}{markdown(rows)}\n\n{sources(files)}{end}"
        if name in ("speed", "ceiling"):
            files = [file for file in files if file.label in MODELS]  # run as is the rule
        path, (_, title, note, _) = root / RESULTS / f"pictures/{device}-{name}.png", PICTURES[name]
        refresh(name, files, path)
        return f"{begin}![{title}: {caption(files, note)}]({link(path)})\n{end}"

    def link(path: Path) -> str:
        return Path(os.path.relpath(path, (root / page).parent)).as_posix()

    def sources(files: Sequence[ResultFile]) -> str:
        """Say where the figures are from: files, machine, versions; commands once a page."""
        links = ", ".join(f"[{file.path.stem}]({link(file.path)})" for file in files)
        said = f"From {links}: {machines(files)}"
        commands = [file.command for file in files if file.path not in shown]
        shown.update(file.path for file in files)
        if not commands:
            return f"{said}; commands above.\n"
        block = "\n".join(["```bash", *commands, "```"])
        return f"{said}.\n\n<details><summary>Commands</summary>\n\n{block}\n\n</details>\n"

    return PLACE.sub(fill, (root / page).read_text(encoding="utf-8"))


def main(root: Path = REPOSITORY) -> None:
    for page in PAGES:
        (root / page).write_text(render(root, page), encoding="utf-8")


if __name__ == "__main__":
    main()
