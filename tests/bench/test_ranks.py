"""The benchmark of a model on several ranks: the same parts on each, of which the first one tells.

Ranks are threads here, or processes where it is about these.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import report
from orthrus_fast import steps
from orthrus_fast.bench import run as module
from orthrus_fast.bench.__main__ import main
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.common import REPOSITORY
from orthrus_fast.bench.flags import build_parser
from orthrus_fast.bench.identity import identity
from orthrus_fast.bench.results import Report
from orthrus_fast.bench.session import NO_SIBLING, Session, build_session
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.invariance import bits_of
from orthrus_fast.loading import Options, build_decoder
from orthrus_fast.tensor_parallel import Ranks
from tests.bench.runs import EMBEDDED, TINY, check_times, run
from tests.processes import children_of, wait_for_end
from tests.ranks import ThreadRanks, on_ranks

FLAGS = (*TINY, "--new-tokens", "24", "--slots", "2", "--sequences", "3")
TWO = ("--tensor-parallel", "2")
TIMED = ("--contexts", "70", "--parts", "startup,ceiling,passes,cycles,sampling,prefill")
SLOW = pytest.mark.slow


def identity_of(ranks: ThreadRanks) -> Any:
    """What a rank finds; of one, with the same products as several have."""
    args = build_parser().parse_args(FLAGS)
    options = Options("cpu", max_seq_len=300, slots=2, prefix_reuse=False)
    options = Options(**{**vars(options), "tensor_parallel": ranks.size})
    make = partial(random_model, seed=0)
    of: Any = ranks
    decoder = build_decoder("tiny", shape_config("tiny"), make, options, ranks=of)
    session = Session(args, options, decoder, [])
    session.ranks = of
    with measuring(session.device):
        return identity(session)


def test_identity_counts_the_cache_rows_of_all_ranks() -> None:
    [one], many = on_ranks(1, identity_of), on_ranks(2, identity_of)
    assert many[0] == many[1]
    assert many[0]["tokens_sha256"] == one["tokens_sha256"]
    assert (many[0]["rows"], many[0]["rows_differing"]) == (one["rows"], 0)
    assert (many[0]["cache_rows"], many[0]["cache_rows_differing"]) == (2 * one["cache_rows"], 0)
    assert many[0]["sequences_equal"] == 3


def with_another_bit_on_rank_one(model: Any, cache: Any, state: Any, block: Tensor) -> Any:
    """A verify pass over drafts that leaves a value of one cache row another in its last bit."""
    out = true_verify(model, cache, state, block)
    if model.config.rank == 1 and bool(block[0, -1] != block[0, 0]):
        bits_of(cache.v[-1])[0, 0, int(state.length[0]), 0] ^= 1
    return out


true_verify = steps.verify


def test_another_bit_in_a_cache_row_of_one_rank_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "verify", with_another_bit_on_rank_one)
    first, second = on_ranks(2, identity_of)
    assert first == second and first["cache_rows_differing"] > 0
    assert first["sequences_equal"] == 3


# Processes


class Planting:
    """``build_session``, where the other rank's process calls ``function`` in place of ``run``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.built = function, list[Session]()

    def __call__(self, args: argparse.Namespace, _: Any) -> Session:
        self.built.append(build_session(args, partial(self.function, args)))
        return self.built[0]

    @property
    def ranks(self) -> Ranks:
        ranks = self.built[0].ranks
        assert ranks is not None
        return ranks


class NoFile(Report):
    """A report that ends its process where it would write a file."""

    def add(self, section: str, name: str, value: Any) -> None:
        if self.path is not None:
            os._exit(9)


def spoiled(args: argparse.Namespace) -> None:
    steps.verify, module.Report = with_another_bit_on_rank_one, NoFile  # type: ignore[misc]
    module.run(args)


def failing(args: argparse.Namespace) -> None:
    def fail(_: Session) -> Any:
        raise RuntimeError("a fault\nof two lines")

    module.MEASURES["cycles"] = fail
    module.run(args)


def failing_at_last(args: argparse.Namespace) -> None:
    def fail(_: Session) -> Any:
        raise OSError("which the first rank does not wait for")

    module.MEASURES["prefill"] = fail
    module.run(args)


def dying(args: argparse.Namespace) -> None:
    module.MEASURES["cycles"] = lambda _: os._exit(7)
    module.run(args)


def asking_otherwise(args: argparse.Namespace) -> None:
    args.seed += 1
    module.run(args)


@SLOW
def test_a_whole_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ("--contexts", "70", "--parts", "startup,ceiling,passes,cycles,sampling,identity")
    content = run(tmp_path / "two.json", *FLAGS, *TWO, *flags[:3], flags[3] + ",engine,slots")
    printed = capfd.readouterr()
    assert printed.out.count("tokens per second diffusion") == 1
    lines = [line for line in printed.out.splitlines() if "a share of the model on each" in line]
    assert len(lines) == 1 and lines[0].startswith("2 × ")
    assert "Traceback" not in printed.err
    parts = content["parts"]
    assert list(parts) == [*flags[3].split(","), "engine", "slots"] and content["failed"] == {}
    assert all(NO_SIBLING.items() <= parts[name].items() for name in ("engine", "slots"))
    assert content["environment"]["configuration"]["tensor_parallel"] == 2
    assert content["environment"]["hardware"].startswith("2 × ")
    assert "--tensor-parallel 2" in content["command"]
    (at,) = parts["passes"]["at"]
    for name in ("draft", "verify", "cycle", "ar"):
        check_times(at[name]["ms"])
    assert list(at["ar"]) == ["ms", "cycle_ms"]
    (at,) = parts["cycles"]["at"]
    assert list(at["tokens_per_second"]) == ["diffusion", "adaptive", "ar"]
    assert at["tokens_equal_to_ar"] and at["baseline_tokens_equal_to_ar"] is None
    assert [row["AR baseline"] for row in report.passes(parts["passes"])] == ["–"]
    assert [row["AR baseline"] for row in report.cycles(parts["cycles"])] == ["–"]
    one = run(tmp_path / "one.json", *FLAGS, "--parts", "identity")["parts"]["identity"]
    two = parts["identity"]
    assert two["tokens_sha256"] == one["tokens_sha256"]
    assert two["cache_rows"] == 2 * one["cache_rows"] > 0 == two["cache_rows_differing"]
    assert two["rows"] == one["rows"] > 0 == two["rows_differing"]


@SLOW
def test_a_checkpoint_on_ranks(tmp_path: Path) -> None:
    flags = (*EMBEDDED, *TWO, "--parts", "identity,acceptance")
    parts = run(tmp_path / "r.json", *flags)["parts"]
    assert parts["identity"]["sequences_equal"] == parts["acceptance"]["texts_equal_to_ar"] == 3
    assert parts["identity"]["cache_rows_differing"] == parts["identity"]["rows_differing"] == 0


@SLOW
def test_a_fault_of_another_rank_is_in_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which has no file of its own, and ends when the first one has written the last part."""
    plant, failures = Planting(spoiled), []

    def show_late(*of: Any) -> None:
        time.sleep(1)
        failures.append(plant.ranks.failure)

    monkeypatch.setattr(module, "build_session", plant)
    monkeypatch.setattr(module, "show", show_late)
    parts = run(tmp_path / "r.json", *FLAGS, *TWO, "--parts", "startup,identity")["parts"]
    assert parts["identity"]["cache_rows_differing"] > 0 and failures == [None, None]
    assert plant.ranks._children[1].wait(10) == 0


@SLOW
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (failing, "rank 1: RuntimeError: a fault of two lines"),
        (failing_at_last, "rank 1: OSError: which the first rank does not wait for"),
        (dying, "rank 1 has ended with exit code 7"),
        (asking_otherwise, "rank 1: it was asked for other texts than the first rank"),
    ],
)
def test_an_error_on_one_rank_ends_the_run_in_one_line(
    fault: Any,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "build_session", Planting(fault))
    path = tmp_path / "r.json"
    assert main([*FLAGS, *TWO, *TIMED, "--json", str(path)]) == 2
    assert capfd.readouterr().err == f"error: tensor_parallel: {said}; load the model again\n"
    content = json.loads(path.read_text()) if path.exists() else {"parts": [], "failed": {}}
    assert "prefill" not in content["parts"] and content["failed"] == {}


@SLOW
def test_an_error_on_the_first_rank_ends_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Session) -> Any:
        raise RuntimeError("no memory")

    plant = Planting(module.run)
    monkeypatch.setitem(module.MEASURES, "cycles", fail)
    monkeypatch.setattr(module, "build_session", plant)
    assert run(tmp_path / "r.json", *FLAGS, *TWO, *TIMED, expected=2)["failed"] == {}
    assert "error: RuntimeError: no memory" in capfd.readouterr().err
    assert plant.ranks._children[1].wait(10) is not None


@SLOW
@pytest.mark.parametrize("when", ["starting", "measuring"])
def test_ctrl_c(when: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    flags = (*FLAGS, *TWO, "--contexts", "70", "--parts", "startup,cycles,identity")
    program = [sys.executable, "-m", "orthrus_fast.bench", *flags, "--json", str(path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    how: Any = {"cwd": REPOSITORY, "env": variables, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, **how)
    while process.poll() is None and not children_of(process.pid):
        time.sleep(0.05)
    (child,) = children_of(process.pid)
    while process.poll() is None and when == "measuring" and not path.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    lines = [line for line in error.splitlines() if "tensor_parallel 2" not in line]
    assert lines == ["interrupted; the finished parts are in --json's file"]
    assert path.exists() == (when == "measuring")
    wait_for_end(child)
