"""The report: tables and pictures from fixed files, and every way in which a page can be wrong."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orthrus_fast import bench, bench_report
from orthrus_fast.bench_report import pictures
from orthrus_fast.bench_report.command import REPOSITORY
from orthrus_fast.bench_report.files import ResultFile, read_result
from orthrus_fast.bench_report.joined import JOINED
from orthrus_fast.bench_report.pages import PAGES
from orthrus_fast.errors import RequestError

FIXTURES = Path(__file__).parent / "fixtures" / "bench"
RESULT = json.loads((FIXTURES / "result.json").read_text(encoding="utf-8"))
PEERS = json.loads((FIXTURES / "peers.json").read_text(encoding="utf-8"))
FRONT = """# Front
Before.
<!-- table: headline card -->
<!-- end -->
Between.
<!-- picture: speed card -->
<!-- end -->
After.
"""
PAGE = FRONT + "".join(
    [f"<!-- table: {name} card -->\n<!-- end -->\n" for name in JOINED]
    + [f"<!-- picture: {name} card -->\n<!-- end -->\n" for name in pictures.CHARTS]
)


def changed(change: Callable[[Any], object], content: Any = RESULT) -> Any:
    """A copy of the fixed result with a change."""
    new = copy.deepcopy(content)
    change(new)
    return new


def put(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def fill(root: Path) -> Path:
    put(root / "benchmarks/results/card/1.7B.json", RESULT)
    put(root / "benchmarks/results/card/peers-1.7B.json", PEERS)
    (root / "README.md").write_text(FRONT, encoding="utf-8")
    (root / "benchmarks/README.md").write_text(PAGE, encoding="utf-8")
    return root


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A small repository whose pages have every table and picture, not yet written."""
    return fill(tmp_path)


def report(site: Path, *flags: str) -> int:
    return bench_report.main([*flags, "--repository", str(site)])


@pytest.fixture(scope="session")
def once_written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn once: most of a test's time would be pictures."""
    root = fill(tmp_path_factory.mktemp("site"))
    assert report(root) == 0
    return root


@pytest.fixture
def written(once_written: Path, tmp_path: Path) -> Path:
    """The small repository after a report."""
    return Path(shutil.copytree(once_written, tmp_path, dirs_exist_ok=True))


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


# The committed pages.


def test_a_run_that_was_ended_shows_the_slots_it_came_to() -> None:
    part = RESULT["parts"]["slots"]
    numbers = [at["slots"] for at in part["at"]]

    def cut(content: Any) -> None:
        content["arguments"] |= {"contexts": [part["context"]], "slots_list": numbers}
        content["arguments"]["accept"] = part["accept_asked"]
        content["runs"][-1]["configuration"]["max_seq_len"] = 4096
        del content["parts"]["slots"]
        content["unfinished"] = {"slots": part["at"][:2]}

    file = ResultFile(Path("cut.json"), changed(cut))
    whole, got = ResultFile(Path("whole.json"), RESULT), file.parts["slots"]
    assert got["at"] == part["at"][:2]
    assert got["left_out"] == [{"slots": n, "why": "the run ended before"} for n in numbers[2:]]
    for name in ("accept_asked", "context"):
        assert got[name] == whole.parts["slots"][name]
    assert ",slots" in file.command()
    del file.content["arguments"]["contexts"]
    with pytest.raises(RequestError, match="cut.json: unfinished: has no 'contexts'"):
        _ = file.parts


def test_the_pages_of_this_repository_agree_with_their_files(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert bench_report.main(["--check"]) == 0, capsys.readouterr().out
    pages = "".join((REPOSITORY / page).read_text(encoding="utf-8") for page in PAGES)
    assert pages.count("<!-- table: ") >= 10 and pages.count("<!-- picture: ") >= 3


# One file.


def test_a_result_as_markdown_is_the_golden_text(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(FIXTURES / "result.json"), str(FIXTURES / "peers.json")]
    assert bench_report.main(files) == 0
    assert capsys.readouterr().out == (FIXTURES / "report.md").read_text(encoding="utf-8")


def test_the_fixed_result_has_every_part_that_the_benchmark_measures() -> None:
    assert set(bench.NAMES) <= set(bench_report.TABLES)
    assert {*RESULT["parts"], "kernels"} == set(bench_report.TABLES)


@pytest.mark.parametrize("name", bench_report.TABLES)
def test_a_terminal_shows_every_cell_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    part = RESULT["parts"].get(name, RESULT)
    bench_report.show(Console(width=100), name, part)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown.replace("1, 2, …", "")
    rows = bench_report.TABLES[name](part).rows
    squeezed = "".join(shown.split())
    assert rows and all(cell.split()[0][:3] in squeezed for row in rows for cell in row)


def test_a_part_that_was_left_out_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    bench_report.show(Console(width=100), "cycles", {"skipped": "no draft view"})
    assert capsys.readouterr().out == "cycles: left out, no draft view\n"
    skipped = changed(lambda c: c["parts"].update(cycles={"skipped": "no draft view"}))
    assert "cycles" not in ResultFile(Path("r.json"), skipped).parts


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("cycles", "tokens_equal_to_ar", False, "DIFFERENT"),
        ("slots", "tokens_equal_to_ar", False, "DIFFERENT"),
        ("modes", "tokens_equal", False, "0 of 100, TEXTS TOO"),
        ("startup", "holds", False, "DOES NOT HOLD, checked in 0.50 s"),
        ("identity", "rows_differing", 3, "3 of 766"),
        ("acceptance", "texts_equal_to_ar", 127, "127 of 128"),
    ],
)
def test_a_broken_promise_is_shown(part: str, key: str, value: object, said: str) -> None:
    def plant(content: Any) -> None:
        for held in content.values() if isinstance(content, dict) else content:
            if isinstance(held, (dict, list)):
                plant(held)
        if isinstance(content, dict) and key in content:
            content[key] = value

    table = bench_report.TABLES[part](changed(plant, RESULT["parts"][part]))
    assert said in [cell for row in table.rows for cell in row]


def test_of_many_kernels_the_small_ones_are_summed_up() -> None:
    times = {"us_per_cycle": 7.0, "us_added_per_cycle": 5.0, "share": 0.05}
    one = {"name": "k" * 80, "grid": None, "count_per_cycle": 2.0, **times}
    table = bench_report.TABLES["kernels"]({"kernels": [one] * 20})
    assert len(table.rows) == 16
    assert table.rows[0] == (f"`{'k' * 59}…`", "–", "2", "7.00", "5.00", "5.0%")
    assert table.notes == ("4 more kernels: 20.0% together",)
    assert table.title == "kernels of a cycle, 100 µs"
    small = one | {"us_added_per_cycle": 0.05, "share": 0.0005}
    table = bench_report.TABLES["kernels"]({"kernels": [one, small, small]})
    assert len(table.rows) == 1 and table.notes == ("2 more kernels: 0.1% together",)


def test_both_shares_of_a_pass_are_derived_from_its_bytes() -> None:
    part = changed(
        lambda c: c["ceiling"].update(product_bytes_per_s=1e12), RESULT["parts"]["passes"]
    )
    _, row = bench_report.TABLES["passes"](part).rows
    assert row[2:6] == ("100.0%", "125.0%", "40.0%", "50.0%")  # 2 (2.5) GB in 2 ms


def test_the_command_beside_a_table_parses_to_the_files_arguments() -> None:
    words = shlex.split(read_result(FIXTURES / "result.json").command())
    assert words[:3] == ["python", "-m", "orthrus_fast.bench"]
    at = words.index("--parts")
    assert words[at + 1] == ",".join(RESULT["parts"])
    del words[at : at + 2]
    args = vars(bench.build_parser().parse_args(words[3:]))
    asked = {name: value for name, value in RESULT["arguments"].items() if name != "list_accept"}
    assert {name: args[name] for name in asked} == asked
    assert args["profile"] == "trace.json"  # the result has a breakdown by kernel


def test_the_command_of_a_cpus_file_has_its_number_of_threads() -> None:
    hardware = {"hardware": "x86_64 CPU, 2 threads"}
    content = changed(lambda c: c["runs"][-1].update(gpu=None, configuration=hardware))
    command = ResultFile(Path("r.json"), content).command()
    assert command.startswith("OMP_NUM_THREADS=2 python -m orthrus_fast.bench ")


def test_a_published_acceptance_is_named_in_the_command() -> None:
    source = {"name": "1.7B/GSM8K", "tokens_per_cycle": 7.75, "source": "somewhere"}
    content = changed(lambda c: c["arguments"].update(accept_source=source))
    assert " --accept 1.7B/GSM8K " in ResultFile(Path("r.json"), content).command()


def test_what_the_benchmark_writes_the_report_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, own = str(tmp_path / "tiny.json"), str(tmp_path / "own.json")
    flags = ["--device", "cpu", "--repeats", "1", "--contexts", "20", "--new-tokens", "12"]
    shape = ["--shape", "tiny", "--max-seq-len", "64", "--slots-list", "1,2"]
    assert bench.main([*flags, *shape, "--parts", "passes,cycles,slots", "--json", tiny]) == 0
    parts = ["--parts", "identity,acceptance", "--sequences", "2"]
    assert bench.main([*flags, *parts, "--json", own]) == 0
    capsys.readouterr()
    assert bench_report.main([tiny, own]) == 0
    printed = capsys.readouterr().out
    held = {path: json.loads(Path(path).read_text(encoding="utf-8")) for path in (tiny, own)}
    (at, _) = held[tiny]["parts"]["slots"]["at"]
    assert f"| 1 | {at['tokens_per_cycle']:.2f} | " in printed
    found = held[own]["parts"]["acceptance"]["tokens_per_cycle"]
    assert f"| tokens/cycle, token-weighted | {found['token_weighted']:.2f} |" in printed
    for name, path in (("slots", tiny), ("ceiling", tiny), ("acceptance", own)):
        assert chart(name, held[path]).panels[0].series[0].y


# Pages.


def test_report_fills_every_place_and_check_is_then_silent(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(site, "--check") == 1
    assert "table headline card" in capsys.readouterr().out
    assert report(site) == 0
    assert report(site, "--check") == 0
    front = (site / "README.md").read_text(encoding="utf-8")
    assert front.startswith("# Front\nBefore.\n") and front.endswith("<!-- end -->\nAfter.\n")
    assert "| tokens/s: drafting | 2000 |" in front
    assert "| drafting over the faster AR | 3.33 |" in front
    assert "](benchmarks/results/pictures/card-speed.png)" in front
    assert "From [1.7B](benchmarks/results/card/1.7B.json): Imagined GPU, driver 1.2.3" in front
    assert ResultFile(Path("r.json"), RESULT).command() in front  # beside its figures, once
    assert front.count("python -m orthrus_fast.bench --shape 1.7B") == 1
    page = (site / "benchmarks/README.md").read_text(encoding="utf-8")
    assert "](results/pictures/card-speed.png)" in page and "Not measured" not in page
    assert page.count("python -m orthrus_fast.bench --shape 1.7B") == 1  # beside its first table
    assert page.count("python benchmarks/peers.py --shape 1.7B") == 1


def test_a_second_report_changes_nothing(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    assert report(written) == 0
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in written.rglob("*") if path.is_file()} == held


def test_a_wrong_figure_in_a_page_is_found_and_named(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(written / "README.md", "| 2000 |", "| 2001 |")
    assert report(written, "--check") == 1
    (problem,) = capsys.readouterr().out.splitlines()
    assert problem.startswith(
        "README.md:3: table headline card: reads '| tokens/s: drafting | 2001 "
    )
    assert "the files say '| tokens/s: drafting | 2000 |'" in problem
    assert report(written) == 0 and report(written, "--check") == 0


def test_a_wrong_figure_in_this_repositorys_own_pages_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each page's every table, one digit at a time."""
    for name in ("README.md", "benchmarks/README.md", "model/figures.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(REPOSITORY / "benchmarks/results", tmp_path / "benchmarks/results")
    assert report(tmp_path, "--check") == 0
    planted = 0
    for page in PAGES:
        text = (tmp_path / page).read_text(encoding="utf-8")
        for place in text.split("<!-- table: ")[1:]:
            body = place.partition("-->\n")[2].partition("<!-- end -->")[0]
            digits = [i for i, character in enumerate(body) if character.isdigit()]
            if not digits or not body.startswith("|"):
                continue
            at = text.index(body) + digits[len(digits) // 2]
            digit = "1" if text[at] != "1" else "2"
            (tmp_path / page).write_text(text[:at] + digit + text[at + 1 :], encoding="utf-8")
            capsys.readouterr()
            assert report(tmp_path, "--check") == 1
            assert f"table {place.partition(' -->')[0]}: reads" in capsys.readouterr().out
            planted += 1
        (tmp_path / page).write_text(text, encoding="utf-8")
    assert planted >= 8


def test_a_changed_result_is_found_in_tables_and_pictures(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def faster(content: Any) -> None:
        content["parts"]["cycles"]["at"][0]["tokens_per_second"]["diffusion"]["median"] = 2100.0

    put(written / "benchmarks/results/card/1.7B.json", changed(faster))
    assert report(written, "--check") == 1
    found = capsys.readouterr().out
    assert "README.md:3: table headline card" in found and ": table cycles card" in found
    assert "benchmarks/results/pictures/card-speed.png: was drawn from other figures" in found
    assert "card-ceiling.png" not in found  # of another part


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda held: held.unlink(), "card-speed.png: is missing"),
        (lambda held: held.write_bytes(b"no picture"), "card-speed.png: was drawn from other"),
        (lambda held: held.with_name("old-speed.png").touch(), "old-speed.png: no page shows it"),
        (
            lambda held: held.write_bytes(held.with_name("card-slots.png").read_bytes()),
            "card-speed.png: was drawn from other",
        ),
    ],
)
def test_a_picture_that_is_not_its_data_is_found_and_drawn_anew(
    spoil: Callable[[Path], None],
    problem: str,
    written: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(written / pictures.PICTURES / "card-speed.png")
    assert report(written, "--check") == 1
    (found,) = capsys.readouterr().out.splitlines()
    assert problem in found
    assert report(written) == 0 and report(written, "--check") == 0


def test_the_first_folder_that_has_a_part_is_taken(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    front = written / "README.md"
    front.write_text(front.read_text().replace(" card -->", " new card -->"), encoding="utf-8")
    assert report(written) == 0 and "2000" in front.read_text()

    def slower(content: Any) -> None:
        content["parts"]["cycles"]["at"][0]["tokens_per_second"]["diffusion"]["median"] = 1900.0

    put(written / "benchmarks/results/new/1.7B.json", changed(slower))
    assert report(written) == 0
    assert "1900" in front.read_text() and "2000" not in front.read_text()
    assert "pictures/new-speed.png" in front.read_text()


def test_a_part_that_nobody_measured_is_said_so(written: Path) -> None:
    put(
        written / "benchmarks/results/card/1.7B.json",
        changed(lambda c: c["parts"].pop("slots")),
    )
    assert report(written) == 0
    page = (written / "benchmarks/README.md").read_text(encoding="utf-8")
    said = "*Not measured: no file in benchmarks/results/card has the part slots.*\n"
    assert page.count(said) == 2  # table and picture
    assert not (written / pictures.PICTURES / "card-slots.png").exists()


def test_a_picture_of_a_context_that_nobody_measured_is_said_so(written: Path) -> None:
    def elsewhere(content: Any) -> None:
        content["parts"]["cycles"]["at"][0]["context"] = 64

    put(written / "benchmarks/results/card/1.7B.json", changed(elsewhere))
    assert report(written) == 0
    front = (written / "README.md").read_text(encoding="utf-8")
    assert front.count("*Not measured: benchmarks/results/card has ") == 2  # headline, picture
    assert not (written / pictures.PICTURES / "card-speed.png").exists()


def test_models_stand_side_by_side_by_size(site: Path) -> None:
    for shape in ("8B", "4B"):
        content = changed(lambda c, shape=shape: c["arguments"].update(shape=shape))
        put(site / f"benchmarks/results/card/{shape}.json", content)
    embedded = changed(lambda c: c["arguments"].update(shape=None, slots=8))
    put(site / "benchmarks/results/card/embedded.json", embedded)
    assert report(site) == 0
    files = [ResultFile(Path("r.json"), content) for content in (RESULT, embedded)]
    (panel,) = pictures.chart_of("speed", files).panels
    assert [str(name).splitlines()[0] for name in panel.series[0].x] == ["1.7B"]  # not embedded
    front = (site / "README.md").read_text(encoding="utf-8")
    assert "| one sequence after 1024 tokens | 1.7B | 4B | 8B |" in front
    page = (site / "benchmarks/README.md").read_text(encoding="utf-8")
    identity = page.partition("<!-- table: identity")[2].partition("<!-- end -->")[0]
    labels = [line.split(" | ")[0] for line in identity.splitlines() if "greedy" in line]
    assert labels == ["| 1.7B", "| 4B", "| 8B", "| embedded, 8 slots"]


def test_a_start_with_more_room_has_a_column_of_its_own() -> None:
    roomy = changed(lambda c: c["runs"][0]["configuration"].update(max_seq_len=33000))
    files = [ResultFile(Path("r.json"), content) for content in (RESULT, roomy, RESULT)]
    (table,) = JOINED["startup"].make(files).tables
    assert table.columns == ("", "1.7B, 4096 tokens", "1.7B, 33000 tokens")


def test_of_two_runs_of_one_thing_the_later_one_counts(site: Path) -> None:
    def earlier(content: Any) -> None:
        content["runs"][0]["date"] = "2000-01-01T00:00:00+00:00"
        for at in content["parts"]["passes"]["at"]:
            at["verify"]["ms"]["median"] = 9.0
        content["parts"]["passes"]["at"][0]["context"] = 4096

    put(site / "benchmarks/results/card/0-long.json", changed(earlier))
    assert report(site) == 0
    page = (site / "benchmarks/README.md").read_text(encoding="utf-8")
    passes = page.partition("<!-- table: passes")[2].partition("<!-- end -->")[0]
    rows = [line.split(" | ")[1:3] for line in passes.splitlines() if line.startswith("| 1.7B")]
    assert [context for context, _ in rows] == ["128", "1024", "4096"]
    assert [ms.split()[0] for _, ms in rows] == ["1.60", "2.00", "9.00"]
    assert "[1.7B](results/card/1.7B.json)" in passes and "[0-long]" in passes


# Pictures.


def chart(name: str, content: Any = RESULT) -> pictures.Chart:
    return pictures.chart_of(name, [ResultFile(Path("r.json"), content)])


@pytest.mark.parametrize("name", pictures.CHARTS)
def test_a_chart_is_drawn_with_its_digest_and_leaves_matplotlib_as_it_was(
    name: str, tmp_path: Path
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    path = tmp_path / "picture.png"
    pictures.draw(chart(name), path)
    assert dict(matplotlib.rcParams) == before
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000
    assert pictures.held_digest(path) == pictures.digest(chart(name))
    again = tmp_path / "again.png"
    pictures.draw(chart(name), again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", pictures.CHARTS)
def test_a_charts_caption_names_the_device_and_the_day(name: str) -> None:
    made = chart(name)
    assert "Imagined GPU" in made.caption and "2001-02-03" in made.caption
    assert ("REPLAYED ACCEPTANCE" in made.title) == (name in ("speed", "slots"))


@pytest.mark.parametrize("name", pictures.CHARTS)
def test_a_charts_axes_start_at_zero_and_are_labelled(name: str) -> None:
    from matplotlib.figure import Figure

    made = chart(name)
    for panel in made.panels:
        ax = Figure().subplots()
        pictures.DRAWERS[made.kind](ax, panel, made)
        labels = {"bars": [ax.get_ylabel()], "rows": [ax.get_xlabel()]}
        assert all(labels.get(made.kind, [ax.get_xlabel(), ax.get_ylabel()]))
        assert (ax.get_xlim() if made.kind == "rows" else ax.get_ylim())[0] == 0
        assert len(ax.get_legend().get_texts()) == len(panel.series) > 0


def numbers(content: Any) -> list[tuple[Any, str]]:
    """Every object in a JSON value that holds a number, with the key."""
    if isinstance(content, dict):
        own = [(content, k) for k, v in content.items() if type(v) in (int, float) and k != "run"]
        return own + [pair for value in content.values() for pair in numbers(value)]
    return (
        [pair for value in content for pair in numbers(value)] if isinstance(content, list) else []
    )


@pytest.mark.parametrize(
    ("name", "part", "n_read"),
    [
        ("speed", "cycles", 12),
        ("ceiling", "passes", 6),
        ("slots", "slots", 31),
        ("modes", "modes", 26),
    ],
)
def test_a_digest_changes_with_each_number_that_is_drawn(name: str, part: str, n_read: int) -> None:
    """``n_read``: numbers of the part that the chart depends on, counted by hand."""
    content = copy.deepcopy(RESULT)
    digest = pictures.digest(chart(name, content))
    n_changed = 0
    for holder, key in numbers(content["parts"][part]):
        old = holder[key]
        holder[key] = old + 1
        try:
            n_changed += pictures.digest(chart(name, content)) != digest
        finally:
            holder[key] = old
    assert n_changed == n_read
    assert pictures.digest(chart(name, content)) == digest


def test_acceptance_by_position_in_both_ways() -> None:
    of_all, of_reached = chart("acceptance").panels
    assert of_all.series[0].y == pytest.approx((0.9, 0.54, 0.27))
    assert of_reached.series[0].y == pytest.approx((0.9, 0.6, 0.5))  # none reached the fourth
    assert of_all.series[0].x == (1, 2, 3)


def test_the_slots_chart_says_where_drafting_stops_paying() -> None:
    assert chart("slots").panels[0].title.endswith("drafting ahead up to 4 slots")
    ahead = changed(lambda c: c["parts"]["slots"]["at"].pop())
    assert chart("slots", ahead).panels[0].title.endswith("at all measured, 1 to 4")

    def behind(content: Any) -> None:
        content["parts"]["slots"]["at"][0]["tokens_per_second"]["diffusion"]["median"] = 1.0

    assert chart("slots", changed(behind)).panels[0].title.endswith("one-row AR ahead")


def test_the_models_charts_leave_out_what_was_run_otherwise() -> None:
    narrow = changed(lambda c: c["arguments"].update(block_size=16))
    files = [ResultFile(Path("r.json"), content) for content in (RESULT, narrow)]
    for name in ("speed", "ceiling"):
        assert pictures.chart_of(name, files) == chart(name)


def test_lines_beyond_the_colours_get_another_mark() -> None:
    from matplotlib.figure import Figure

    n_models = 3 * len(pictures.COLOURS)
    made = [
        changed(lambda c, n=n: c["arguments"].update(shape=None, checkpoint=f"model-{n}"))
        for n in range(n_models)
    ]
    drawn = pictures.chart_of("ceiling", [ResultFile(Path("r.json"), one) for one in made])
    ax = Figure().subplots()
    pictures.draw_lines(ax, drawn.panels[0], drawn)
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in ax.lines}
    assert len(looks) == len(drawn.panels[0].series) == 2 * n_models


def test_a_way_to_run_that_is_not_identical_is_marked() -> None:
    (panel,) = chart("modes").panels
    assert [str(name) for name in panel.series[0].x] == [
        "eager, sdpa",
        "compiled max-autotune-no-cudagraphs, triton (not identical)",
        "graph, triton",
    ]


# What a user can get wrong.


def spoiled_page(old: str, new: str) -> Callable[[Path], None]:
    return lambda site: replace(site / "README.md", old, new)


def spoiled_result(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda site: put(site / "benchmarks/results/card/1.7B.json", changed(change))


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoiled_page("headline card", "headline a b"), "README.md:3: table headline a b: there is "
         "no folder benchmarks/results/a or benchmarks/results/b"),
        (spoiled_page("headline card", "lunch card"), "README.md:3: table lunch card: is not"),
        (spoiled_page("table: headline card", "song: headline card"), "not one of table, picture"),
        (spoiled_page("headline card", "headline"), "wants a name and folders"),
        (spoiled_page("<!-- end -->\nBetween.", "Between."), "has no end"),
        (spoiled_page("After.", "<!-- end -->"), "<!-- end -->: has no counterpart"),
        (spoiled_page("After.", "<!-- table: speed card -->"), "has no counterpart"),
        (lambda site: (site / "README.md").unlink(), "README.md: No such file"),
        (lambda site: (site / "benchmarks/results/card/x.json").write_text("{"), "x.json: "),
        (lambda site: (site / "benchmarks/results/card/x.json").write_text("[]"), "is no result"),
        (lambda site: put(site / "benchmarks/results/card/x.json", {"parts": {}}), "is no result"),
        (spoiled_result(lambda c: c["parts"]["cycles"].pop("at")), "1.7B.json"),
        (spoiled_result(lambda c: c["parts"]["passes"]["ceiling"].clear()), "product_bytes_per_s"),
        (spoiled_result(lambda c: c["parts"].update(slots=3)), "is no result of the benchmark"),
        (spoiled_result(lambda c: c["runs"].clear()), "1.7B.json: runs"),
        (spoiled_result(lambda c: c["runs"][0].pop("torch")), "1.7B.json: runs: has no 'torch'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_bad_input_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], None],
    problem: str,
    flags: list[str],
    site: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(site)
    held = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    assert report(site, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1
    assert {path: path.read_bytes() for path in site.rglob("*") if path.is_file()} == held


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["/nowhere/r.json"], "/nowhere/r.json: there is no such file"),
        ([__file__], "test_bench_report.py: "),
        (["r.json", "--check"], "--check is of the pages"),
        (["--speed"], "--speed"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_report.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


def test_a_part_of_a_later_version_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "r.json", changed(lambda c: c["parts"].update(lunch={})))
    assert bench_report.main([str(tmp_path / "r.json")]) == 2
    assert "lunch: is no part that this version knows" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(
    site: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report(site) == 2
    error = capsys.readouterr().err
    assert 'run: pip install -e ".[bench]"' in error and error.count("\n") == 1
    assert (site / "README.md").read_text(encoding="utf-8") == FRONT


def test_check_needs_neither_matplotlib_nor_torch(written: Path) -> None:
    code = "import sys; from orthrus_fast import bench_report; "
    code += f"code = bench_report.main(['--check', '--repository', {str(written)!r}]); "
    code += "sys.exit(code or 'matplotlib' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_benchmarks_own_command_reports(written: Path) -> None:
    assert bench.main(["report", "--check", "--repository", str(written)]) == 0
    replace(written / "README.md", "| 2000 |", "| 2001 |")
    assert bench.main(["report", "--check", "--repository", str(written)]) == 1
