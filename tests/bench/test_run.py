"""Whole runs on a CPU: the JSON file, what it takes to repeat a run, interruptions and failures."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from orthrus_fast.bench import passes, results, streaming
from orthrus_fast.bench import run as module
from orthrus_fast.bench.__main__ import main
from orthrus_fast.bench.common import REPOSITORY
from orthrus_fast.bench.flags import PARTS, build_parser
from tests.bench.runs import TINY, check_times, run
from tests.checkpoints import write_checkpoint

SHORT = ("--contexts", "70,200", "--new-tokens", "24", "--slots-list", "1,2", "--slots", "2")


def test_the_commit_is_the_packages_own_not_that_of_a_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reported(place: Path) -> tuple[str | None, bool | None]:
        monkeypatch.setattr(results, "REPOSITORY", place)
        found = results.environment({"device": "cpu", "hardware": "x"})
        return found["commit"], found["dirty"]

    inside = tmp_path / "venv" / "site-packages"
    inside.mkdir(parents=True)
    assert reported(tmp_path) == (None, None)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    name = ("-c", "user.name=x", "-c", "user.email=x@example.com")
    commit = ("git", "-C", str(tmp_path), *name, "commit", "-q", "--allow-empty", "-m", "x")
    subprocess.run(commit, check=True)
    own, dirty = reported(tmp_path)
    assert own is not None and len(own) == 40 and dirty is False
    (tmp_path / "new").write_text("")
    assert reported(tmp_path) == (own, True)
    assert reported(inside) == (None, None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All parts."""
    return run(tmp_path_factory.mktemp("bench") / "whole.json", *TINY, *SHORT)


def test_the_file_holds_every_part_and_what_it_takes_to_repeat_it(whole: Any) -> None:
    assert list(whole) == ["command", "environment", "arguments", "parts", "failed"]
    assert list(whole["parts"]) == PARTS
    assert whole["failed"] == {}
    words = shlex.split(whole["command"])
    assert words[:4] == ["OMP_NUM_THREADS=1", "python", "-m", "orthrus_fast.bench"]
    args = vars(build_parser().parse_args(words[4:]))
    assert {**args, "json": None} == {**whole["arguments"], "json": None}
    environment = whole["environment"]
    assert environment["configuration"]["slots"] == 2 and environment["gpu"] is None
    assert environment["torch"] == torch.__version__ and environment["hardware"]
    assert {"date", "driver", "cuda", "triton", "python", "commit", "dirty"} <= set(environment)
    assert all(part["part_seconds"] > 0 for part in whole["parts"].values())
    startup = whole["parts"]["startup"]
    assert startup["seconds"]["weights"] > 0
    rows = startup["memory"]["cache_bytes"] // (2 * 2 * 2 * 2 * 16 * 4)  # slots, K/V, layers, heads
    assert rows >= 300 + 8 and startup["memory"]["peak_allocated_bytes"] is None


def test_passes_are_timed_against_a_ceiling_of_their_own(whole: Any) -> None:
    part = whole["parts"]["passes"]
    rates = [part["ceiling"][f"{name}_bytes_per_s"] for name in ("product", "amax", "sum")]
    assert part["ceiling"]["bytes_per_s"] == max(rates) > 0
    assert [at["context"] for at in part["at"]] == [70, 200]
    for at in part["at"]:
        for name in ("draft", "verify"):
            check_times(at[name]["ms"])
            seconds = at[name]["ms"]["median"] / 1e3
            rate = at[name]["weights_bytes"] / seconds / part["ceiling"]["bytes_per_s"]
            assert at[name]["share_by_weights"] == pytest.approx(rate)
            assert at[name]["share_by_weights_and_cache"] > at[name]["share_by_weights"]
            assert at[name]["cache_bytes"] == 2 * (at["context"] + 8) * 2 * 2 * 2 * 16 * 4
        both = at["draft"]["ms"]["median"] + at["verify"]["ms"]["median"]
        over = at["cycle"]["ms"]["median"] - both
        assert at["cycle"]["over_passes_ms"] == pytest.approx(over)
        assert at["cycle"]["over_passes_share"] == pytest.approx(over / both)
        for ms in at["ar"].values():
            check_times(ms)


def test_sampled_cycles_are_timed_beside_greedy_ones(whole: Any) -> None:
    part = whole["parts"]["sampling"]
    assert part["mode"] == "diffusion" and part["settings"] == passes.CYCLE_SETTINGS
    for at in part["at"]:
        assert list(at["cycle_ms"]) == ["greedy", "sampled", "filtered"]
        for ms in at["cycle_ms"].values():
            check_times(ms)
            assert ms["n"] == 2 * 3  # repeats, rounds
        for name, share in at["over_greedy_share"].items():
            medians = at["cycle_ms"][name]["median"], at["cycle_ms"]["greedy"]["median"]
            assert share == pytest.approx(medians[0] / medians[1] - 1)


def test_an_existing_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "build_session", lambda *_: pytest.fail("loaded"))
    path = tmp_path / "r.json"
    path.write_text("{}")
    assert main([*TINY, "--json", str(path)]) == 2
    assert f"json: {path}: exists" in capsys.readouterr().err and path.read_text() == "{}"


def test_an_interrupted_run_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(module.MEASURES, "passes", interrupt)
    content = run(tmp_path / "r.json", *TINY, *SHORT, expected=130)
    assert list(content["parts"]) == ["startup", "ceiling"]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
    assert capsys.readouterr().err.startswith("interrupted; ")


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setitem(module.MEASURES, "ceiling", fail)
    flags = ("--contexts", "70", "--new-tokens", "8", "--parts", "startup,ceiling,prefill")
    content = run(tmp_path / "r.json", *TINY, *flags, expected=1)
    assert list(content["parts"]) == ["startup", "prefill"]
    assert content["failed"] == {"ceiling": "RuntimeError: no memory"}


def test_a_plain_qwen3_has_no_drafts_to_time(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False)
    flags = ("--device", "cpu", "--contexts", "30", "--new-tokens", "8", "--repeats", "1")
    flags += ("--parts", "passes,cycles,sampling,slots,acceptance", "--accept", "7.75")
    content = run(tmp_path / "r.json", "--checkpoint", str(directory), *flags)
    assert content["failed"] == {}
    for name in ("cycles", "slots", "acceptance"):
        assert content["parts"][name]["skipped"] == "no draft view"
    assert "draft" not in content["parts"]["passes"]["at"][0]
    assert content["parts"]["sampling"]["mode"] == "ar"


def test_time_to_first_token(tmp_path: Path) -> None:
    flags = ("--shape", "tiny", "--device", "cpu", "--repeats", "1", "--contexts", "20")
    flags += ("--max-seq-len", "1100", "--new-tokens", "8", "--parts", "prefill")
    part = run(tmp_path / "r.json", *flags)["parts"]["prefill"]
    (first,) = part["at"]
    assert first["prompt_tokens"] == 1024 and part["left_out"] == [8192]
    check_times(first["ms"])
    assert first["tokens_per_second"] == pytest.approx(1024e3 / first["ms"]["median"])


@pytest.mark.slow
def test_nothing_is_compiled_while_the_clock_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(clock: Any) -> Any:
        def run_and_compare(*args: Any) -> Any:
            before = counters["stats"]["unique_graphs"]
            times = clock(*args)
            assert counters["stats"]["unique_graphs"] == before > 0
            return times

        return run_and_compare

    for owner, name in ((passes, "time_steps"), (passes, "cycle_spans"), (streaming, "time_steps")):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    flags = ("--contexts", "70", "--new-tokens", "24", "--runner", "compiled")
    content = run(tmp_path / "r.json", *TINY, *flags, "--parts", "startup,passes,cycles")
    assert list(content["parts"]) == ["startup", "passes", "cycles"] and content["failed"] == {}
    assert content["parts"]["startup"]["seconds"]["compile"] > 0
    assert content["parts"]["cycles"]["at"][0]["tokens_equal_to_ar"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_that_a_signal_ends_leaves_a_whole_file(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    flags = [*TINY, "--contexts", "40", "--new-tokens", "200", "--parts", "startup,cycles,slots"]
    program = [sys.executable, "-m", "orthrus_fast.bench", *flags, "--json", str(path)]
    process = subprocess.Popen(program, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while process.poll() is None and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in error
    assert "startup" in json.loads(path.read_text())["parts"]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
