"""Combinations of runner and compile mode, each in a process of its own: crashes and faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import modes
from orthrus_fast.bench.common import REPOSITORY
from orthrus_fast.bench.flags import build_parser
from tests.bench.runs import TINY

SHORT = (*TINY, "--contexts", "40,90", "--new-tokens", "24")
EAGER = (*SHORT, "--combinations", "eager")
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
CRASH_LATER = """
import os, sys
from orthrus_fast.bench import __main__ as command, run
run.MEASURES["identity"] = lambda session: os.abort()
sys.exit(command.main(sys.argv[1:]))
"""
RAISE = """
import sys
from orthrus_fast.bench import __main__ as command, run
def fail(session): raise RuntimeError("no luck")
run.MEASURES["passes"] = fail
sys.exit(command.main(sys.argv[1:]))
"""
ACCEPT_TOO_MUCH = """
import sys
from orthrus_fast import steps
from orthrus_fast.bench import __main__ as command
accept = steps.accept
steps.accept = lambda block, target: (accept(block, target) + 1).clamp(max=block.shape[1] - 1)
sys.exit(command.main(sys.argv[1:]))
"""

pytestmark = pytest.mark.slow


def run(path: Path, *flags: str) -> Any:
    """The JSON of a run; every test names its own file."""
    assert modes.main([*flags, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def combination(path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Any:
    """The eager combination, run by ``code``, beside one that runs as it should."""
    monkeypatch.setattr(modes, "PROGRAM", (sys.executable, "-c", code))
    (entry,) = run(path, *EAGER)["parts"]["modes"]["combinations"]
    return entry


def test_what_each_combination_reports(tmp_path: Path) -> None:
    content = run(tmp_path / "r.json", *EAGER)
    assert content["environment"]["configuration"]["runner"] == "eager"
    (entry,) = content["parts"]["modes"]["combinations"]
    assert entry["problem"] is None and entry["slots"] == 1 and entry["compile_mode"] is None
    assert entry["startup"]["seconds"]["weights"] > 0
    assert [at["context"] for at in entry["passes"]["at"]] == [40, 90]
    for at in entry["passes"]["at"]:
        assert 0 < at["verify"]["share_by_weights"] < at["verify"]["share_by_weights_and_cache"]
        assert at["cycle"]["ms"]["n"] == at["ar"]["cycle_ms"]["n"] == 2
    identity = entry["identity"]
    assert (identity["sequences_equal"], identity["rows"], identity["rows_differing"]) == (1, 23, 0)


def test_a_crash_leaves_the_parts_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = combination(tmp_path / "r.json", monkeypatch, CRASH_LATER)
    assert entry["problem"] == "ended with exit status -6"
    assert "passes" in entry and "identity" not in entry


def test_a_part_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = combination(tmp_path / "r.json", monkeypatch, RAISE)
    assert entry["problem"] == "RuntimeError: no luck"
    assert "startup" in entry and "identity" in entry


def test_a_fault_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = combination(tmp_path / "r.json", monkeypatch, ACCEPT_TOO_MUCH)
    assert entry["problem"] is None
    assert entry["identity"]["sequences_equal"] == 0 and entry["identity"]["rows_differing"] > 0


def test_a_crash_touches_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flags_of(parser: Any, args: Any) -> list[str]:
        crash = ["-c", CRASH] if args.runner == "compiled" else ["-m", "orthrus_fast.bench"]
        return [*crash, *true_flags_of(parser, args)]

    true_flags_of = modes.flags_of
    monkeypatch.setattr(modes, "flags_of", flags_of)
    monkeypatch.setattr(modes, "PROGRAM", (sys.executable,))
    flags = ("--combinations", "eager,compiled:default")
    found = run(tmp_path / "r.json", *SHORT, *flags)["parts"]["modes"]["combinations"]
    assert [entry["problem"] for entry in found] == [None, "ended with exit status -11"]
    assert found[1]["configuration"] is None and "passes" not in found[1]


def test_where_nothing_can_be_run_the_reason_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert modes.main([*EAGER, "--attention", "triton"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: modes: nothing could be run: attention 'triton': needs a CUDA")


def test_compiled_is_all_of_its_modes(capsys: pytest.CaptureFixture[str]) -> None:
    def chosen(text: str) -> list[str]:
        parser = modes.add_combinations(build_parser())
        names: list[str] = parser.parse_args(["--combinations", text]).combinations
        return names

    assert chosen("graph,eager") == ["eager", "graph"]
    assert chosen("compiled") == [name for name in modes.COMBINATIONS if "compiled" in name]
    assert chosen("compiled:max-autotune") == ["compiled:max-autotune"]
    for flags, problem in (
        ((*TINY, "--combinations", "graph"), "combinations: graph needs a CUDA device"),
        (("--combinations", "eager,warp"), "--combinations: not of eager, compiled:default"),
    ):
        assert modes.main([*flags]) == 2
        assert problem in capsys.readouterr().err


def test_sigterm_ends_the_process_of_its_own_too(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = "import signal, sys; from benchmarks import modes; "
    code += f"modes.PROGRAM = (sys.executable, '-c', {sleeper!r}); "
    code += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); modes.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *EAGER], cwd=REPOSITORY)
    deadline = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
