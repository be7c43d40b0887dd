"""The benchmark's ways to run side by side, its throughput by slots: crashes, memory, faults."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus_fast import bench
from orthrus_fast.bench import modes, slots
from orthrus_fast.bench.kept import Kept
from orthrus_fast.errors import RequestError

TINY = ["--shape", "tiny", "--device", "cpu", "--repeats", "2", "--max-seq-len", "300"]


def run(path: Path, *flags: str, expected: int = 0) -> Any:
    """The JSON of a run."""
    assert bench.main([*TINY, *flags, "--json", str(path)]) == expected
    return json.loads(path.read_text())


def parsed(*flags: str) -> Any:
    return bench.build_parser().parse_args([*TINY, *flags])


# --- which ways there are ---


def test_ways_are_taken_in_their_order_and_compiled_is_all_of_its_modes() -> None:
    assert parsed().ways == list(modes.WAYS)
    assert parsed("--ways", "graph,eager").ways == ["eager", "graph"]
    assert parsed("--ways", "compiled").ways == [f"compiled:{m}" for m in bench.COMPILE_MODES]
    assert parsed("--ways", "compiled:max-autotune").ways == ["compiled:max-autotune"]


def test_each_way_meets_each_backend_and_number_of_slots() -> None:
    flags = ("--ways", "eager,compiled:default,graph", "--modes-slots", "1,4")
    found = modes.combinations(parsed(*flags, "--modes-attention", "sdpa,triton"))
    assert len(found) == len(set(found)) == 8  # no graph on a CPU
    assert modes.Combination("eager", None, "triton", 4) in found
    assert modes.Combination("compiled", "default", "sdpa", 1) in found
    assert {c.slots for c in modes.combinations(parsed("--slots", "3"))} == {3}
    with pytest.raises(RequestError, match="graph needs a CUDA device"):
        modes.combinations(parsed("--ways", "graph"))


def test_our_list_of_compile_modes_is_the_runners() -> None:
    from orthrus_fast.runners import COMPILE_MODES

    assert bench.COMPILE_MODES == COMPILE_MODES


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--ways", "eager,warp"], "--ways: not of eager, compiled:default"),
        (["--modes-attention", "sdpa,none"], "--modes-attention: invalid"),
        (["--modes-slots", "0"], "--modes-slots: invalid"),
        (["--slots-list", "1,x"], "--slots-list: invalid"),
        (["--compile-mode", "fast"], "invalid choice"),
        (["--compile-mode", "max-autotune"], "runner 'eager' has none; use runner 'compiled'"),
        (["--parts", "modes", "--ways", "graph"], "graph needs a CUDA device"),
        (["--parts", "modes", "--contexts", "300"], "not below max_seq_len"),
        (["--parts", "modes", "--accept", "9"], "below 8"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*TINY, "--new-tokens", "8", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


# --- each in a process of its own ---

CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
CRASH_LATER = """
import os, sys
from orthrus_fast.bench import combination
times_at = combination.times_at
combination.times_at = lambda b, at, rate: os.abort() if at == 90 else times_at(b, at, rate)
sys.exit(combination.main(*sys.argv[1:]))
"""
RAISE = """
import sys
from orthrus_fast.bench import combination
def fail(*_): raise RuntimeError("no\\nluck")
combination.place = fail
sys.exit(combination.main(*sys.argv[1:]))
"""
ACCEPT_TOO_MUCH = """
import sys
from orthrus_fast import steps
from orthrus_fast.bench import combination
accept = steps.accept
steps.accept = lambda block, target: (accept(block, target) + 1).clamp(max=block.shape[1] - 1)
sys.exit(combination.main(*sys.argv[1:]))
"""
PLANTED = {2: CRASH, 3: CRASH_LATER, 4: RAISE, 5: ACCEPT_TOO_MUCH}  # by slots


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same way to run five times; by the number of slots some have a planted fault."""
    true_command = modes.command

    def command(request: Path, result: Path, combination: Any) -> list[str]:
        program = PLANTED.get(combination.slots)
        if program is None:
            return true_command(request, result, combination)
        return [sys.executable, "-c", program, str(request), str(result)]

    flags = ("--parts", "modes", "--ways", "eager", "--modes-slots", "1,2,3,4,5")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modes, "command", command)
        path = tmp_path_factory.mktemp("modes") / "r.json"
        return run(path, *flags, "--contexts", "40,90", "--new-tokens", "24")


def test_a_crash_is_named_and_touches_no_other(side_by_side: Any) -> None:
    combinations = {c["slots"]: c for c in side_by_side["parts"]["modes"]["combinations"]}
    problems = {n: c["problem"] for n, c in combinations.items()}
    assert problems == {
        1: None,
        2: "ended by signal 11",
        3: "ended by signal 6",
        4: "RuntimeError: no luck",
        5: None,
    }
    contexts = {n: [at["context"] for at in c["at"]] for n, c in combinations.items()}
    assert contexts == {1: [40, 90], 2: [], 3: [40], 4: [], 5: [40, 90]}
    assert combinations[3]["startup_seconds"] and not combinations[2]["startup_seconds"]
    assert side_by_side["failed"] == side_by_side["unfinished"] == {}


def test_what_each_way_to_run_reports(side_by_side: Any) -> None:
    part = side_by_side["parts"]["modes"]
    assert side_by_side["runs"][0]["configuration"]["slots"] == 1
    for combination in part["combinations"]:
        n_slots = combination["slots"]
        for at in combination["at"]:
            assert 0 < at["share_by_weights"] < at["share_by_weights_and_cache"]
            both = at["draft_ms"]["n"], at["cycle_ms"]["diffusion"]["n"]
            assert both == (2, 2) and at["cycle_ms"]["ar"]["median"] > 0
            if n_slots == 1:
                equal = {"tokens_equal": True, "rows": 23, "rows_differing": 0}
                assert at["identity"] == equal
            if n_slots == 5:  # accepts what was not right
                assert not at["identity"]["tokens_equal"] and at["identity"]["rows_differing"] > 0
    assert "asked" not in part["combinations"][0]
    rate = part["ceiling"]["bytes_per_s"]
    assert rate == max(part["ceiling"][f"{n}_bytes_per_s"] for n in ("product", "amax", "sum"))


def test_where_nothing_can_be_run_the_reason_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--parts", "modes", "--ways", "eager", "--modes-attention", "triton"]
    flags += ["--contexts", "40", "--new-tokens", "8"]
    assert bench.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: modes: nothing could be run: attention 'triton': needs a CUDA")


def test_an_interrupted_comparison_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_apart(args: Any, combination: Any, ceiling: Any) -> Any:
        if combination.slots == stop_at:
            raise KeyboardInterrupt
        begun.append((combination.slots, ceiling))
        entry = dict.fromkeys(("problem", "peak_allocated_bytes"), None)
        entry |= {"asked": list(combination), **combination._asdict(), "at": []}
        rates = {f"{name}_bytes_per_s": 1.0 for name in ("product", "amax", "sum")}
        entry["ceiling"] = {**rates, "bytes_per_s": 1.0, "best": "sum"}
        return {**entry, "startup_seconds": {}, "configuration": CONFIGURATION}

    begun: list[Any] = []
    monkeypatch.setattr(modes, "run_apart", run_apart)
    path, flags = tmp_path / "r.json", ("--parts", "modes", "--ways", "eager")
    flags += ("--modes-slots", "1,2,3", "--contexts", "40", "--new-tokens", "8")
    stop_at = 3
    content = run(path, *flags, expected=130)
    assert [entry["slots"] for entry in content["unfinished"]["modes"]] == [1, 2]
    assert content["parts"] == {}
    stop_at = 0
    content = run(path, *flags)
    assert [c["slots"] for c in content["parts"]["modes"]["combinations"]] == [1, 2, 3]
    assert content["unfinished"] == {} and [n for n, _ in begun] == [1, 2, 3]
    assert begun[0][1] is None and begun[2][1]["bytes_per_s"] == 1.0  # measured once


CONFIGURATION = {"device": "cpu", "hardware": "a CPU", "attention": "sdpa"}


def test_sigterm_ends_the_process_of_its_own_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate() -> None:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    pid = tmp_path / "pid"
    sleeper = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    monkeypatch.setattr(modes, "command", lambda *_: [sys.executable, "-c", sleeper])
    thread = threading.Thread(target=terminate)
    thread.start()
    flags = ["--parts", "modes", "--ways", "eager", "--contexts", "40", "--new-tokens", "8"]
    assert bench.main([*TINY, *flags]) == 143
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# --- throughput by slots ---

SLOTS = ("--parts", "slots", "--contexts", "40", "--new-tokens", "25")


def test_throughput_is_measured_at_each_number_of_slots_that_fits(tmp_path: Path) -> None:
    flags = (*SLOTS, "--slots-list", "1,3,1000000000", "--accept", "1")
    part = run(tmp_path / "r.json", *flags)["parts"]["slots"]
    assert part["label"] == "replayed acceptance" and part["context"] == 40
    assert [at["slots"] for at in part["at"]] == [1, 3]
    for at in part["at"]:
        assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == 8.0
        assert at["tokens_equal_to_ar"]
        rates = {name: rate["median"] for name, rate in at["tokens_per_second"].items()}
        faster = max(rates["ar_padded"], rates["ar_one_row"])
        assert at["speedup_over_faster_ar"] == pytest.approx(rates["diffusion"] / faster)
    (left_out,) = part["left_out"]
    assert left_out["slots"] == 10**9 and "lower max_seq_len or slots" in left_out["why"]


def test_running_out_of_memory_is_recorded_and_each_decoder_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cycles_at(other: Any, context: int) -> Any:
        decoders.append(weakref.ref(other.decoder))
        assert other.decoder._runner.eos.tolist() == [-1] * len(other.decoder._runner.eos)
        assert other.runner.model.lm_head.weight is built.runner.model.lm_head.weight
        if other.decoder.slots == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return true_cycles_at(other, context)

    decoders: list[Any] = []
    true_cycles_at = slots.cycles_at
    monkeypatch.setattr(slots, "cycles_at", cycles_at)
    built = bench.build(parsed(*SLOTS, "--slots-list", "1,2,4"))
    capacity = built.runner.model.rope_cos.shape[0]
    with bench.measuring(built.device):
        part = slots.slots(built)
    assert [at["slots"] for at in part["at"]] == [1, 4]
    assert part["left_out"] == [{"slots": 2, "why": "CUDA out of memory. Tried to allocate"}]
    assert len(decoders) == 3 and all(decoder() is None for decoder in decoders)
    assert built.runner.model.rope_cos.shape[0] == capacity  # the first decoder's is its own
    assert built.decoder.slots == 1


def test_another_fault_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("wrong shape")

    monkeypatch.setattr(slots, "cycles_at", fail)
    built = bench.build(parsed(*SLOTS, "--slots-list", "1"))
    with pytest.raises(RuntimeError, match="wrong shape"):
        slots.slots(built)


def test_numbers_of_slots_that_were_measured_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = bench.build(parsed(*SLOTS, "--slots-list", "1,2"), Kept())
    built.kept.add("slots", {"slots": 1, "tokens_per_cycle": 3.0})
    monkeypatch.setattr(slots, "slots_at", lambda bench, n, context: {"slots": n, "new": True})
    part = slots.slots(built)
    assert part["at"] == [{"slots": 1, "tokens_per_cycle": 3.0}, {"slots": 2, "new": True}]
