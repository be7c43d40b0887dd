"""``python -m orthrus_fast.bench report``: the pages and pictures from the result files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from orthrus_fast.errors import OrthrusError, RequestError

if TYPE_CHECKING:
    from orthrus_fast.bench_report.pages import Place

REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (--help lists the flags)")


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m orthrus_fast.bench report",
        description="Write the pages' tables and pictures anew from benchmarks/results/.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("files", nargs="*", type=Path, metavar="FILE", help="print its tables as Markdown instead")
    add("--check", action="store_true", help="write nothing; 1 where a page and its files disagree")
    root = "the repository whose pages are meant (default: the one this program is in)"
    add("--repository", type=Path, default=REPOSITORY, metavar="DIR", help=root)
    return parser


def main(arguments: list[str]) -> int:
    """0: written, or all agree; 1: --check found what disagrees; 2: bad input."""
    try:
        args = build_parser().parse_args(arguments)
        if args.files and args.check:
            raise RequestError("--check is of the pages: it goes with no FILE")
        if args.files:
            print("\n".join(map(file_as_markdown, args.files)), end="")
            return 0
        return check(args.repository) if args.check else write(args.repository)
    except (OrthrusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def file_as_markdown(path: Path) -> str:
    """Every table of one result file, and how it was made."""
    from orthrus_fast.bench_report import files, tables

    file = files.read_result(path)
    lines, said = [f"# {path.stem}", "", f"`{file.command()}`", ""], ""
    for name, part in file.parts.items():
        if name != "peers" and name not in tables.TABLES:
            raise RequestError(f"{path}: {name}: is no part that this version knows")
        made_on = files.surroundings([file], name)
        if made_on != said:
            said = made_on
            lines += [f"{said}.", ""]
        for make in tables.PEER_TABLES if name == "peers" else (tables.TABLES[name],):
            table = files.guarded(file, name, make, part)
            lines += [f"## {name}: {table.title}", "", tables.markdown(table), ""]
    return "\n".join(lines)


def check(root: Path) -> int:
    """Name each place where a page or a picture and the files disagree."""
    from orthrus_fast.bench_report.pages import PAGES, Site, render
    from orthrus_fast.bench_report.pictures import PICTURES, digest, held_digest

    site, problems = Site(root), []
    for page in PAGES:
        for place, new in render(site, page)[2]:
            if place.old != new:
                problems.append(difference(place, new))
    held = {path.name for path in (root / PICTURES).glob("*.png")}
    for name, chart in site.charts.items():
        if name not in held:
            problems.append(f"{PICTURES}/{name}: is missing")
        elif held_digest(root / PICTURES / name) != digest(chart):
            problems.append(f"{PICTURES}/{name}: was drawn from other figures")
    problems += [f"{PICTURES}/{name}: no page shows it" for name in sorted(held - set(site.charts))]
    for problem in problems:
        print(problem)
    if problems:
        print("python -m orthrus_fast.bench report writes them anew", file=sys.stderr)
    return 1 if problems else 0


def difference(place: Place, new: str) -> str:
    """The first line that differs, as it stands and as it should."""
    old_lines, new_lines = place.old.splitlines(), new.splitlines()
    length = max(len(old_lines), len(new_lines))
    pairs = zip(
        old_lines + [""] * (length - len(old_lines)),
        new_lines + [""] * (length - len(new_lines)),
        strict=True,
    )
    for old, wanted in pairs:
        if old != wanted:
            return f"{place}: reads {old!r}, the files say {wanted!r}"
    return f"{place}: ends otherwise than the files say"


def write(root: Path) -> int:
    """The pages and the pictures they show; pictures that no page shows any more go."""
    from orthrus_fast.bench_report.pages import PAGES, Site, render
    from orthrus_fast.bench_report.pictures import PICTURES, digest, draw, held_digest

    site = Site(root)
    rendered = {page: render(site, page) for page in PAGES}  # all, before anything is written
    (root / PICTURES).mkdir(exist_ok=True)
    for name, chart in site.charts.items():
        path = root / PICTURES / name
        if not path.exists() or held_digest(path) != digest(chart):
            draw(chart, path)
            print(f"drew {PICTURES}/{name}")
    for path in (root / PICTURES).glob("*.png"):
        if path.name not in site.charts:
            path.unlink()
            print(f"removed {PICTURES}/{path.name}: no page shows it")
    for page, (old, new, _) in rendered.items():
        if old != new:
            (root / page).write_text(new, encoding="utf-8")
            print(f"wrote {page}")
    return 0
