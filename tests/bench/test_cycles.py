"""Replayed acceptance: that it is what was asked for; throughput by number of slots."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus_fast.bench import cycles as module
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.cycles import cycles, slots
from orthrus_fast.bench.decoding import expected_tokens_per_cycle
from tests.bench.runs import BOUND, TINY, check_times, run, session
from tests.checkpoints import write_checkpoint

SHORT = (*TINY, "--contexts", "20")


def part(*flags: str) -> Any:
    built = session(*SHORT, *flags)
    with measuring(built.device):
        return cycles(built)


@pytest.mark.parametrize(("accept", "exactly"), [("1", 8.0), ("0", 1.0)])
def test_replayed_drafts_that_are_all_right_or_all_wrong(accept: str, exactly: float) -> None:
    (at,) = part("--accept", accept, "--new-tokens", "41", "--repeats", "1")["at"]
    assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == exactly


@pytest.mark.parametrize("block_size", ["2", "5"])
def test_a_narrower_block(block_size: str) -> None:
    """Its rows are the most tokens of a cycle."""
    flags = ("--new-tokens", "41", "--block-size", block_size, "--accept", "1", "--repeats", "1")
    (at,) = part(*flags)["at"]
    assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == int(block_size)
    assert at["tokens_equal_to_ar"]


@pytest.mark.parametrize(
    ("accept", "asked", "expected"),
    [
        pytest.param("0.6", 0.6, sum(0.6**n for n in range(8)), marks=pytest.mark.slow),
        pytest.param("3.5", 3.5, 3.5, marks=pytest.mark.slow),
        ("1.7B/code", 3.26, 3.26),
    ],
)
def test_replayed_acceptance_is_what_was_asked(accept: str, asked: float, expected: float) -> None:
    found = part("--accept", accept, "--new-tokens", "140", "--repeats", "1")
    assert found["label"] == "replayed acceptance" and found["accept_asked"] == asked
    assert expected_tokens_per_cycle(found["accept"], 8) == pytest.approx(expected)
    source = found["accept_source"]
    assert source is None or source["source"].endswith("ZaryaOrthrus-1.7B")
    (at,) = found["at"]
    assert at["tokens_per_cycle_expected"] == pytest.approx(expected)
    error = at["tokens_per_cycle_standard_error"]
    assert 0 < error < 0.4 and at["cycles"] > 100
    assert abs(at["tokens_per_cycle"] - expected) < BOUND * error


def test_speeds_are_over_the_faster_ar_where_there_is_room() -> None:
    found = part("--new-tokens", "24", "--contexts", "20,290", "--slots", "2")
    assert found["left_out"] == [290]
    (at,) = found["at"]
    rates = {name: value["median"] for name, value in at["tokens_per_second"].items()}
    faster = max(rates["ar"], rates["ar_baseline"])
    assert at["speedup_over_faster_ar"] == pytest.approx(rates["diffusion"] / faster)
    assert at["tokens_equal_to_ar"] and at["baseline_tokens_equal_to_ar"]
    for values in at["tokens_per_second"].values():
        check_times(values)


def test_ends_of_text_hold_again_after_the_part(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=2)
    flags = ("--checkpoint", str(directory), "--device", "cpu", "--contexts", "30")
    built = session(*flags, "--new-tokens", "20", "--repeats", "1")
    assert cycles(built)["at"][0]["cycles"] > 0
    assert built.runner.eos.tolist() == [256] and "draft" not in vars(built.runner)


# --- slots ---

SLOTS = (*TINY, "--contexts", "40", "--new-tokens", "25")


def test_throughput_is_measured_at_each_number_of_slots_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--parts", "slots", "--slots-list", "1,3,1000000000", "--accept", "1")
    flags += ("--widths", "8,4", "--repeats", "1")
    found = run(tmp_path / "r.json", *SLOTS, *flags)["parts"]["slots"]
    assert found["label"] == "replayed acceptance" and found["context"] == 40
    asked = [(at["slots"], at["width"]) for at in found["at"]]
    assert asked == [(1, 8), (1, 4), (3, 8), (3, 4)]
    for at in found["at"]:
        assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == at["width"]
        assert at["tokens_equal_to_ar"] and at["configuration"]["slots"] == at["slots"]
        assert at["configuration"]["max_seq_len"] == 65
    (left_out,) = found["left_out"]
    assert left_out["slots"] == 10**9 and "lower max_seq_len or slots" in left_out["why"]
    printed = capsys.readouterr().out
    assert "REPLAYED ACCEPTANCE" in printed and "left out: 1000000000 slots" in printed


def test_running_out_of_memory_is_recorded_and_each_decoder_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cycles_at(other: Any, context: int) -> Any:
        decoders.append(weakref.ref(other.decoder))
        assert other.runner.eos.tolist() == [-1] * len(other.runner.eos)
        assert other.runner.model.verifier is built.runner.model.verifier
        if other.decoder.slots == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return true_cycles_at(other, context)

    decoders: list[Any] = []
    true_cycles_at = module.cycles_at
    monkeypatch.setattr(module, "cycles_at", cycles_at)
    built = session(*SLOTS, "--slots-list", "1,2,4")
    capacity = built.runner.model.rope_cos.shape[0]
    with measuring(built.device):
        found = slots(built)
    assert [at["slots"] for at in found["at"]] == [1, 4]
    assert found["left_out"] == [{"slots": 2, "why": "CUDA out of memory. Tried to allocate"}]
    assert len(decoders) == 3 and all(decoder() is None for decoder in decoders)
    assert built.runner.model.rope_cos.shape[0] == capacity  # the first decoder's is its own
    assert built.decoder.slots == 1


def test_another_fault_is_no_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("wrong shape")

    monkeypatch.setattr(module, "cycles_at", fail)
    with pytest.raises(RuntimeError, match="wrong shape"):
        slots(session(*SLOTS, "--slots-list", "1"))


def test_without_room_the_part_is_left_out() -> None:
    found = slots(session(*SLOTS, "--contexts", "290"))
    assert found["skipped"] == "max_seq_len 300 has no room for 25 tokens after a context"
