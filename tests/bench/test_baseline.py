"""The baseline of AR: what its passes multiply and attend to, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from orthrus_fast.bench.clocks import measuring
from orthrus_fast.bench.decoding import decode, patched
from tests.bench.runs import TINY, session
from tests.checkpoints import write_checkpoint
from tests.judge import Judge
from tests.marks import slow_but


@pytest.mark.parametrize("runner", slow_but(["eager"], ["eager", "compiled"]))
def test_one_row_is_multiplied_and_follows_the_judge(
    tmp_path: Path, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=2, eos_token_id=[])
    flags = ("--checkpoint", str(directory), "--device", "cpu", "--runner", runner)
    built = session(*flags, "--dtype", "float64", "--slots", "2", "--new-tokens", "20")
    prompts = [[1, 2, 3], [4] * 9]
    baseline = built.baseline
    rows, linear = set(), F.linear

    def note(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows.add(len(x))
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", note)

    def verify(*of: Any) -> torch.Tensor:
        rows.clear()  # of the prompt
        return baseline.verify(*of)

    with measuring(built.device), patched(built.runner, verify=verify):
        found = decode(built.decoder, prompts, 20, False, 1)
    assert rows == {2}  # a row a slot: no padding
    judge = Judge(directory)
    assert found.tokens == [judge.generate(prompt, 20, ())[0] for prompt in prompts]
    assert found.tokens == [r.tokens for r in built.decoder.generate(prompts, 20, mode="ar")]


def test_it_shares_weights_state_and_cache() -> None:
    built = session(*TINY, "--new-tokens", "8")
    of, baseline = built.runner, built.baseline
    assert baseline.state is of.state and baseline.cache is of.cache and baseline.eos is of.eos
    assert baseline.model.verifier is of.model.verifier
    assert baseline.model.kernels.products != of.model.kernels.products
    assert built.baseline is baseline


def test_weights_in_fewer_bits_are_multiplied_as_the_decoder_does() -> None:
    built = session(*TINY, "--new-tokens", "8", "--weights", "int4")
    assert built.baseline.model.kernels.products is built.runner.model.kernels.products
    with measuring(built.device), patched(built.runner, verify=built.baseline.verify):
        found = decode(built.decoder, [[1, 2, 3]], 8, False, 1)
    assert found.tokens == [built.decoder.generate([1, 2, 3], 8, mode="ar").tokens]
