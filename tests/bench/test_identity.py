"""The comparison of AR with diffusion to the bit: that it holds, and the faults it must see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast import steps
from orthrus_fast.bench import identity as module
from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.identity import identity
from tests.bench.runs import EMBEDDED, TINY, session
from tests.checkpoints import write_checkpoint

SAMPLED = ("--temperature", "0.9", "--top-k", "20", "--top-p", "0.95")


def part(*flags: str) -> Any:
    built = session(*flags)
    with measuring(built.device):
        return identity(built)


def test_both_modes_are_identical_to_the_bit() -> None:
    found = part(*TINY, "--new-tokens", "50", "--slots", "3", "--sequences", "5")
    assert found["drafts"] == "replayed, 0.85 right"
    assert (found["sequences"], found["sequences_equal"]) == (5, 5)
    assert (found["rows"], found["rows_differing"]) == (5 * 49, 0)
    prompts = [verdict["prompt_tokens"] for verdict in found["by_sequence"]]
    assert len(set(prompts)) == 5
    assert found["cache_rows"] == 2 * 2 * sum(n + 49 for n in prompts)
    assert found["cache_rows_differing"] == 0
    assert found["distinct_tokens"] > 20 and found["tokens_per_cycle"] > 3
    alone = part(*TINY, "--new-tokens", "50", "--slots", "1", "--sequences", "5")
    assert alone["tokens_sha256"] == found["tokens_sha256"]


def accept_one_too_many(block: Tensor, target: Tensor) -> Tensor:
    agreeing = (block[:, 1:] == target[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)
    return (agreeing + 1).clamp(max=block.shape[1] - 1)


def logits_that_see_the_drafts(model: Any, cache: Any, state: Any, block: Tensor) -> Any:
    greedy, logits = true_verify(model, cache, state, block)
    sees = (block[:, -1] != block[:, 0])[:, None, None]
    return greedy, torch.where(sees, logits * (1 + 2**-20), logits)


def cache_that_sees_the_drafts(model: Any, cache: Any, state: Any, block: Tensor) -> Any:
    out = true_verify(model, cache, state, block)
    cache.v[-1][0, :, int(state.length[0])] += 1e-3 * bool(block[0, -1] != block[0, 0])
    return out


true_verify = steps.verify


@pytest.mark.parametrize(
    ("step", "fault", "seen"),
    [
        ("accept", accept_one_too_many, "cache_rows_differing"),
        ("verify", logits_that_see_the_drafts, "rows_differing"),
        ("verify", cache_that_sees_the_drafts, "cache_rows_differing"),
    ],
)
def test_a_planted_fault_is_seen(
    step: str, fault: Any, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, step, fault)
    assert part(*TINY, "--new-tokens", "40", "--sequences", "2")[seen] > 0


@pytest.mark.parametrize("slots", [pytest.param("1", marks=pytest.mark.slow), "3"])
def test_sampled_identity_with_replayed_drafts(slots: str) -> None:
    flags = (*TINY, "--new-tokens", "24", "--slots", slots, "--sequences", "3")
    found = part(*flags, *SAMPLED)
    assert found["sampling"] == {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    assert [verdict["seed"] for verdict in found["by_sequence"]] == [0, 1, 2]
    assert (found["sequences"], found["sequences_equal"]) == (3, 3)
    differing = (found["rows_differing"], found["cache_rows_differing"])
    assert (found["rows"], differing) == (3 * 23, (0, 0))
    assert found["tokens_per_cycle"] > 2
    assert part(*flags)["tokens_sha256"] != found["tokens_sha256"]
    other = part(*flags, *SAMPLED, "--seed", "1")
    assert [verdict["seed"] for verdict in other["by_sequence"]] == [1, 2, 3]


@pytest.mark.parametrize("more", [SAMPLED, ("--block-size", "4")])
def test_the_checkpoint_drafts_for_itself(more: tuple[str, ...]) -> None:
    found = part(*EMBEDDED, *more)
    assert found["drafts"] == "the checkpoint's own" and found["accept"] is None
    assert found["sequences_equal"] == found["sequences"] == 3
    assert found["rows_differing"] == found["cache_rows_differing"] == 0
    assert found["tokens_per_cycle"] > 1.5  # sampled, the draft has the same noise
    assert found["tokens_per_cycle"] <= (4 if "--block-size" in more else 16)


def test_other_noise_in_one_mode_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_seed_in_diffusion(*args: Any) -> Any:
        decoder, prompts, n_tokens, drafting, width, each = args
        each = [*each[1:], each[0]] if drafting else each
        return true_decode(decoder, prompts, n_tokens, drafting, width, each)

    true_decode = module.decode
    monkeypatch.setattr(module, "decode", with_another_seed_in_diffusion)
    flags = ("--new-tokens", "24", "--sequences", "3", "--slots", "3", "--temperature", "1")
    assert part(*TINY, *flags)["sequences_equal"] == 0


def test_texts_that_end_at_once_have_no_cycles(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", eos_token_id=list(range(257)))
    flags = ("--device", "cpu", "--contexts", "30", "--new-tokens", "8", "--sequences", "2")
    found = part("--checkpoint", str(directory), *flags)
    assert found["sequences_equal"] == 2 and found["rows"] == found["cycles"] == 0
    assert found["tokens_per_cycle"] is None


def test_a_plain_qwen3_has_no_drafts(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False)
    found = part("--checkpoint", str(directory), "--device", "cpu", "--new-tokens", "8")
    assert found == {"skipped": "no draft view"}
