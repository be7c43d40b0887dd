"""The report: tables and pictures from result files, each figure in its place."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from orthrus_fast.bench.common import REPOSITORY
from orthrus_fast.bench.flags import PARTS
from tests.bench.runs import EMBEDDED, TINY, run

H100 = REPOSITORY / report.RESULTS / "h100"
ABSENT = ("prefill", "serving", "engine")  # no file of the H100 has these
PAGE = "".join(
    [f"<!-- table: {name} card -->\n<!-- end -->\n" for name in report.TABLES if name not in ABSENT]
    + [f"<!-- picture: {name} card -->\n<!-- end -->\n" for name in report.PICTURES]
)


def content(name: str) -> Any:
    return json.loads((H100 / f"{name}.json").read_text(encoding="utf-8"))


def rows(table: str, *contents: Any) -> list[dict[str, str]]:
    """A table of these results."""
    found, _ = report.TABLES[table][1]([file_of(one) for one in contents])
    return found


def file_of(one: Any) -> report.ResultFile:
    path = Path("made.json")

    class Made(type(path)):  # type: ignore[misc]
        def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
            return json.dumps(one)

    return report.ResultFile(Made(path))


def changed(one: Any, change: Callable[[Any], object]) -> Any:
    new = copy.deepcopy(one)
    change(new)
    return new


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small repository whose pages have every table and picture; drawn once."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(H100, root / report.RESULTS / "card")
    (root / report.RESULTS / "pictures").mkdir()
    (root / "model").mkdir()
    shutil.copy(REPOSITORY / "model/figures.json", root / "model")
    (root / "README.md").write_text("Before.\n<!-- table: demos model -->\n<!-- end -->\nAfter.\n")
    (root / "benchmarks/README.md").write_text(PAGE, encoding="utf-8")
    report.main(root)
    return root


@pytest.fixture
def site(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


def held(site: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_every_place_is_filled_and_a_second_report_changes_nothing(site: Path) -> None:
    before = held(site)
    report.main(site)
    assert held(site) == before
    front = (site / "README.md").read_text(encoding="utf-8")
    assert front.startswith("Before.\n") and front.endswith("<!-- end -->\nAfter.\n")
    assert "| model, hardware | text | tokens per cycle | drafting pays from |" in front
    page = (site / "benchmarks/README.md").read_text(encoding="utf-8")
    assert "-->\n<!-- end" not in page
    command = content("1.7B")["command"]
    assert page.count(command) == 1 and page.count("commands above.") > 5
    assert "](results/card/1.7B.json)" in page and "](results/pictures/card-speed.png)" in page
    assert "NVIDIA H100 80GB HBM3, driver 580.159.04, torch 2.11.0+cu130, Triton 3.6.0;" in page


def test_a_changed_figure_changes_its_table_and_its_picture_alone(site: Path) -> None:
    path = site / report.RESULTS / "card/1.7B.json"
    new = json.loads(path.read_text())
    new["parts"]["cycles"]["at"][1]["tokens_per_second"]["diffusion"]["median"] = 2111.0
    path.write_text(json.dumps(new))
    before = held(site)
    report.main(site)
    after = held(site)
    different = {path.name for path in before if before[path] != after[path]}
    assert different == {"README.md", "card-speed.png"}
    assert "| 2111 ±" in (site / "benchmarks/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("table: passes card", "table: lunch card", "table lunch: is not one of headline"),
        ("table: passes card", "table: prefill card", "no file has the part prefill"),
        ("table: passes card", "table: passes moon", "results/moon: no file has the part"),
    ],
)
def test_a_place_that_cannot_be_filled_is_named(
    old: str, new: str, problem: str, site: Path
) -> None:
    page = site / "benchmarks/README.md"
    page.write_text(page.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(SystemExit, match=problem):
        report.main(site)


def test_a_picture_has_one_look_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    files = report.read_folder(REPOSITORY, "h100", "slots")
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for path in paths:
        report.refresh("slots", files, path)
    assert dict(matplotlib.rcParams) == before
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("file", "table", "key", "value", "said"),
    [
        ("1.7B", "cycles", "tokens_equal_to_ar", False, "DIFFERENT"),
        ("1.7B-slots", "slots", "tokens_equal_to_ar", False, "DIFFERENT"),
        ("1.7B-modes", "modes", "sequences_equal", 0, "0 of 63, TEXTS TOO"),
        ("1.7B", "startup", "holds", False, "DOES NOT HOLD, checked in 0.56 s"),
        ("1.7B", "identity", "rows_differing", 3, "3 of 766"),
        ("1.7B", "headline", "rows_differing", 3, "3 of 766"),
        ("acceptance", "acceptance", "texts_equal_to_ar", 127, "127 of 128"),
    ],
)
def test_a_broken_promise_is_shown(
    file: str, table: str, key: str, value: object, said: str
) -> None:
    def plant(of: Any) -> None:
        for inner in of.values() if isinstance(of, dict) else of:
            if isinstance(inner, (dict, list)):
                plant(inner)
        if isinstance(of, dict) and key in of:
            of[key] = value

    found = rows(table, changed(content(file), plant))
    assert said in [cell for row in found for cell in row.values()]


def test_both_shares_of_a_pass_are_derived_from_its_bytes() -> None:
    def plain(one: Any) -> None:
        one["parts"]["passes"]["ceiling"] |= {"product_bytes_per_s": 1e12, "bytes_per_s": 2e12}
        for at in one["parts"]["passes"]["at"]:
            summary = {"median": 2.0, "p10": 2.0, "p90": 2.0, "n": 1}
            at["verify"] |= {"ms": summary, "weights_bytes": 10**9, "cache_bytes": 5 * 10**8}

    row = rows("passes", changed(content("1.7B"), plain))[0]
    names = ("w/product", "(w+c)/product", "w/best", "(w+c)/best")
    assert [row[name] for name in names] == ["50.0%", "75.0%", "25.0%", "37.5%"]


def test_models_go_by_size_and_of_two_runs_of_one_thing_the_later_counts() -> None:
    def earlier(one: Any) -> None:
        one["environment"]["date"] = "2000-01-01T00:00:00+00:00"
        for at in one["parts"]["passes"]["at"]:
            at["verify"]["ms"]["median"] = 9.0
        one["parts"]["passes"]["at"][0]["context"] = 4096

    old, new, big = changed(content("1.7B"), earlier), content("1.7B"), content("8B")
    found = rows("passes", big, old, new)
    assert [(row[""], row["context"]) for row in found] == [
        *(("1.7B", context) for context in ("128", "1024", "4096")),
        *(("8B", context) for context in ("128", "1024")),
    ]
    assert [row["verify"].split()[0] for row in found[:3]] == ["1.73", "1.76", "9.00"]


def test_what_is_not_the_rule_is_in_the_label() -> None:
    def otherwise(one: Any) -> None:
        one["arguments"] |= {"slots": 4, "block_size": 16, "runner": "eager", "dtype": "float32"}

    file = file_of(changed(content("1.7B"), otherwise))
    assert file.label == "1.7B, 4 slots, width 16, eager, float32" and file.model == "1.7B"
    assert file_of(content("embedded")).label == "embedded"
    for weights, drafter, label in (
        ("checkpoint", "int4", "1.7B, int4 drafter"),
        ("fp8", "fp8", "1.7B, fp8 weights"),
        ("checkpoint", "checkpoint", "1.7B"),
    ):
        of = {"weights": weights, "draft_weights": drafter}
        made = changed(
            content("1.7B"), lambda one, of=of: one["environment"]["configuration"].update(of)
        )
        assert file_of(made).label == label
    (row,) = rows("headline", content("embedded"), content("4B"))[:1]
    assert list(row) == ["one sequence after 1024 tokens", "4B"]  # the public shapes alone


def test_what_was_left_out_and_what_failed_is_said() -> None:
    left_out = [{"slots": 64, "why": "no memory"}]
    slots = changed(content("8B-slots"), lambda c: c["parts"]["slots"].update(left_out=left_out))
    assert rows("slots", slots)[-1]["tokens/cycle, REPLAYED"] == "left out: no memory"

    def crash(one: Any) -> None:
        of = one["parts"]["modes"]["combinations"][0]
        of |= {"configuration": None, "problem": "ended with exit status -6"}
        del of["passes"]

    found = rows("modes", changed(content("1.7B-modes"), crash))
    assert found[0]["context"] == "ended with exit status -6" and len(found) == 6
    skipped = changed(content("peers-8B"), lambda c: c["parts"]["peers"]["skipped"].update(x="why"))
    assert rows("peers", skipped)[-1]["tokens/s"] == "skipped: why"


def test_several_widths_of_one_number_of_slots_are_told_apart() -> None:
    def narrow(one: Any) -> None:
        at = one["parts"]["slots"]["at"]
        at[:] = [{**of, "width": width} for of in at[:1] for width in (32, 8)]

    found = rows("slots", changed(content("8B-slots"), narrow))
    assert [row["slots"] for row in found] == ["1, width 8", "1, width 32"]


def test_acceptance_by_position_in_both_ways() -> None:
    found = report.by_position({"accepted_at_position": [0.9, 0.6, 0.5, None]})
    of_all, of_reached = found.values()
    assert of_all == pytest.approx([0.9, 0.54, 0.27]) and of_reached == [0.9, 0.6, 0.5]


def test_the_slots_chart_says_where_drafting_stops_paying() -> None:
    def at(speedup: float, n: int) -> Any:
        return {"slots": n, "speedup_over_faster_ar": speedup}

    assert report.verdict([at(3, 1), at(2, 4), at(0.9, 8)]) == "drafting ahead up to 4 slots"
    assert report.verdict([at(3, 1), at(2, 4)]) == "drafting ahead at all measured, 1 to 4"
    assert report.verdict([at(1, 1), at(2, 4)]) == "AR ahead"


def test_files_of_before_have_the_keys_of_today() -> None:
    before = {"ar": {"padded_ms": 1, "one_row_ms": 2}, "of": [{"ar_padded": 3, "ar_one_row": 4}]}
    today = {"ar": {"ms": 1, "baseline_ms": 2}, "of": [{"ar": 3, "ar_baseline": 4}]}
    file = file_of(changed(content("1.7B"), lambda c: c.update(parts={"passes": before})))
    assert file.parts == {"passes": today}


def test_rows_of_different_columns_share_a_table_and_bars_are_escaped() -> None:
    text = report.markdown([{"a": "1|2"}, {"b": "3"}])
    assert text.splitlines() == ["| a | b |", "|---|---|", "| 1\\|2 | – |", "| – | 3 |"]


def test_what_the_benchmark_writes_the_report_reads(tmp_path: Path) -> None:
    flags = ("--contexts", "20", "--new-tokens", "12", "--slots-list", "1", "--repeats", "1")
    kinds = [name for name in PARTS if name not in ("acceptance", "prefill", "engine")]
    tiny = run(tmp_path / "tiny.json", *TINY, *flags, "--parts", ",".join(kinds))
    own = run(tmp_path / "own.json", *EMBEDDED, "--parts", "acceptance")
    for name in kinds:
        assert rows(name, tiny)
    found = own["parts"]["acceptance"]["tokens_per_cycle"]["token_weighted"]
    assert {"": "tokens/cycle, token-weighted", "embedded, 3 slots": f"{found:.2f}"} in rows(
        "acceptance", own
    )


def test_gaps_and_first_tokens_stand_by_the_prompts_length() -> None:
    path = REPOSITORY / report.RESULTS / "h100-drafters" / "8B-int4.json"
    one = json.loads(path.read_text(encoding="utf-8"))
    gap, turn = one["parts"]["engine"]["at"][-1]["longest_gap_ms"], "32 tokens after 4096"
    gap.update(median=43.0, p10=43.0, p90=43.0)
    one["parts"]["engine"]["next_turn"]["reused"] = 7
    found = {row["ms"]: row["8B, int4 drafter"] for row in rows("engine", one)}
    assert found["8192 tokens: its longest gap meanwhile"].startswith("43.0 ")
    assert f"{turn}, 7 reused: first token" in found and len(found) == 9
