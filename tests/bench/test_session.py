"""A session: its weights and its prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from orthrus_fast.bench.session import choose_prompts, random_prompts
from orthrus_fast.errors import PromptError
from tests.bench.runs import TINY, session
from tests.checkpoints import write_checkpoint


def test_random_weights_follow_the_seed() -> None:
    def weights(seed: str) -> dict[str, Tensor]:
        built = session(*TINY, "--seed", seed, "--new-tokens", "8")
        return dict(built.runner.model.named_parameters())

    first, again, other = weights("1"), weights("1"), weights("2")
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == ("norm" in name)
        assert float(weight.float().std()) == pytest.approx(0.0 if "norm" in name else 0.2, rel=0.1)


def test_prompts_come_from_a_file_spread_over_it(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=True, eos_token_id=[])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"ids": [1, 2, 3]}\n{"text": "ab"}\n\n{"prompt": "c", "kind": "x"}\n{"ids": [4]}\n'
    )
    flags = ("--checkpoint", str(directory), "--device", "cpu", "--contexts", "30")
    flags += ("--new-tokens", "20", "--prompts-file", str(prompts))
    assert [len(ids) for ids in choose_prompts(session(*flags))] == [3, 2, 1, 1]
    assert [len(ids) for ids in choose_prompts(session(*flags, "--sequences", "2"))] == [3, 1]


def test_random_prompts_differ_by_salt_and_fit() -> None:
    built = session(*TINY, "--new-tokens", "250", "--sequences", "20")
    assert random_prompts(built, [9], 1) == random_prompts(built, [9], 1)
    assert random_prompts(built, [9], 1) != random_prompts(built, [9], 2)
    lengths = [len(ids) for ids in choose_prompts(built)]
    assert len(set(lengths)) > 5 and max(lengths) <= 300 - 250


@pytest.mark.parametrize("text", ["", '{"text": "a"}\nnonsense\n'])
def test_a_prompts_file_is_read_as_the_command_reads_it(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    built = session("--device", "cpu", "--contexts", "30", "--prompts-file", str(path))
    with pytest.raises(PromptError, match=f"^{path}(, line 2)?: (has no prompts|not valid JSON)"):
        choose_prompts(built)
