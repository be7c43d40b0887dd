"""The pages' generated places: tables and pictures between markers, made from result files.

    <!-- table: passes h100 h200 -->      from the first of these folders that has the part
    …
    <!-- end -->

Whatever stands between the markers is replaced. The rest of a page is written by hand and quotes
no result file's figures.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orthrus_fast.bench_report.embedded import demo_table
from orthrus_fast.bench_report.files import RESULTS, ResultFile, read_folder, surroundings
from orthrus_fast.bench_report.joined import JOINED
from orthrus_fast.bench_report.pictures import CHARTS, PICTURES, Chart, chart_of
from orthrus_fast.bench_report.tables import markdown
from orthrus_fast.errors import RequestError

PAGES = ("README.md", "benchmarks/README.md")
PLACE = re.compile(r"(<!-- (\w+): ([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARKER = re.compile(r"<!-- (?:\w+: |end )[^\n]*-->")
MODEL = "model"  # as a device: the embedded checkpoint's own figures


@dataclass(frozen=True)
class Place:
    """One generated place of a page: as it stands, and as it should."""

    page: str
    line: int
    kind: str  # table or picture
    name: str
    devices: tuple[str, ...]
    old: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.kind} {self.name} {' '.join(self.devices)}"


@dataclass
class Site:
    """The repository's pages, and what they show of its results."""

    root: Path
    folders: dict[str, list[ResultFile]] = field(default_factory=dict)
    charts: dict[str, Chart] = field(default_factory=dict)  # shown by the pages, by file name

    def files_with(self, part: str, devices: tuple[str, ...]) -> tuple[str, list[ResultFile]]:
        """Those of the first device that has the part. Raises RequestError without any folder."""
        present = [d for d in devices if (self.root / RESULTS / d).is_dir()]
        if not present:
            wanted = " or ".join(f"{RESULTS}/{device}" for device in devices)
            raise RequestError(f"there is no folder {wanted}")
        for device in present:
            if device not in self.folders:
                self.folders[device] = read_folder(self.root, device)
            files = [file for file in self.folders[device] if part in file.parts]
            if files:
                return device, files
        return present[0], []


def render(site: Site, page: str) -> tuple[str, str, list[tuple[Place, str]]]:
    """The page as it stands and as it should, and its places with what each should hold."""
    path = site.root / page
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from None
    shown: set[object] = set()
    places = []
    for place in find_places(page, text):
        try:
            places.append((place, body(site, place, shown)))
        except RequestError as error:
            raise RequestError(f"{place}: {error}") from None
    bodies = iter(places)
    return text, PLACE.sub(lambda found: found[1] + next(bodies)[1] + found[5], text), places


def find_places(page: str, text: str) -> Iterator[Place]:
    """Raises RequestError for a marker without its counterpart, or that cannot be read."""
    if lone := MARKER.search(PLACE.sub("", text)):
        raise RequestError(f"{page}: {lone[0]}: has no counterpart")
    for found in PLACE.finditer(text):
        line, words = text.count("\n", 0, found.start()) + 1, found[3].split()
        if MARKER.search(found[4]):
            raise RequestError(f"{page}:{line}: {found[1].strip()}: has no end")
        if len(words) < 2:
            raise RequestError(f"{page}:{line}: {found[1].strip()}: wants a name and folders")
        yield Place(page, line, found[2], words[0], tuple(words[1:]), found[4])


def body(site: Site, place: Place, shown: set[object]) -> str:
    """What belongs between the markers. ``shown``: what the page has had so far; added to."""
    if (place.kind, place.name, place.devices) == ("table", "demos", (MODEL,)):
        return markdown(demo_table(site.root / MODEL)) + "\n"
    parts = {
        "table": {name: recipe.part for name, recipe in JOINED.items()},
        "picture": {name: part for name, (part, _) in CHARTS.items()},
    }.get(place.kind, {})
    if place.name not in parts:
        raise RequestError(f"is not one of {', '.join(parts) or 'table, picture'}")
    part = parts[place.name]
    device, files = site.files_with(part, place.devices)
    if not files:
        return f"*Not measured: no file in {RESULTS}/{device} has the part {part}.*\n"
    if (place.kind, place.name, device) in shown:
        return f"*The {place.kind} above is of this device already.*\n"
    shown.add((place.kind, place.name, device))
    if place.kind == "picture":
        return picture(site, place, device, files)
    joined = JOINED[place.name].make(files)
    if not joined.tables:
        return f"*Not measured: {RESULTS}/{device} has no file with all that it takes.*\n"
    tables = [markdown(table) for table in joined.tables]
    return "\n\n".join([*tables, sources(site, place, part, joined.files, shown)])


def sources(
    site: Site, place: Place, part: str, files: list[ResultFile], shown: set[object]
) -> str:
    """Where the figures are from: files, machine, versions, and commands, once each on a page."""
    links = ", ".join(f"[{f.path.stem}]({relative(site, place.page, f.path)})" for f in files)
    said = f"From {links}: {surroundings(files, part)}"
    commands = [file.command() for file in files if file.path not in shown]
    if not commands:
        return f"{said}; commands above.\n"
    shown.update(file.path for file in files)
    block = "\n".join(["```bash", *commands, "```"])
    return f"{said}.\n\n<details><summary>Commands</summary>\n\n{block}\n\n</details>\n"


def picture(site: Site, place: Place, device: str, files: list[ResultFile]) -> str:
    name = f"{device}-{place.name}.png"
    chart = chart_of(place.name, files)
    if not any(series.x for panel in chart.panels for series in panel.series):
        return f"*Not measured: {RESULTS}/{device} has nothing that the picture shows.*\n"
    site.charts[name] = chart
    where = relative(site, place.page, site.root / PICTURES / name)
    return f"![{chart.title}: {chart.caption}]({where})\n"


def relative(site: Site, page: str, path: Path) -> str:
    return Path(os.path.relpath(path, (site.root / page).parent)).as_posix()
