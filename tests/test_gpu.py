"""The eager runner on a CUDA device: the same texts as the judge's and as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import orthrus_fast
from orthrus_fast.attention import find_backend
from tests.checkpoints import write_checkpoint
from tests.judge import Judge, follows
from tests.test_attention import dense, make_inputs
from tests.test_embedded import MODEL, differing_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 511, 512, 1083])
def test_attention_matches_dense_attention(causal: bool, start: int) -> None:
    _, attend = find_backend("sdpa")
    q, k, v = make_inputs(1, 5, 1, torch.float64)
    at, slot = torch.tensor([start], device="cuda"), torch.tensor([0], device="cuda")
    got = attend(q.cuda(), k.cuda(), v.cuda(), at, slot, causal=causal)
    assert torch.allclose(got[0].cpu(), dense(q[0], k[0], v[0], start, causal), atol=1e-12)


@pytest.mark.parametrize("dtype, near_tie", [("float64", 0.0), ("float32", 1e-5)])
@pytest.mark.parametrize("slots", [1, 4])
def test_both_modes_decode_what_the_judge_decodes(
    tmp_path: Path, dtype: str, near_tie: float, slots: int
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, block_size=16, eos_token_id=[])
    decoder = orthrus_fast.load(directory, device="cuda", dtype=dtype, slots=slots)
    judge = Judge(directory)
    prompts = [[5, 6, 7], [1] * 70, [9], list(range(100)), [3, 1]]
    expected = [judge.generate(prompt, 60, ()) for prompt in prompts]
    results: dict[str, list[Any]] = {}
    for mode in ("ar", "diffusion"):
        results[mode] = [result.tokens for result in decoder.generate(prompts, 60, mode=mode)]
        for tokens, (wanted, gaps) in zip(results[mode], expected, strict=True):
            assert follows(tokens, wanted, gaps, near_tie=near_tie)
    assert results["ar"] == results["diffusion"]


def test_both_modes_agree_on_every_held_out_prompt() -> None:
    decoder = orthrus_fast.load(MODEL, device="cuda", dtype="float32", slots=8)
    assert differing_prompts(decoder, 128) == []


def test_tensors_go_to_the_device_and_the_default_dtype_is_the_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, torch_dtype="bfloat16")
    decoder = orthrus_fast.load(directory)
    assert decoder.configuration["device"] == "cuda:0"
    assert decoder.configuration["dtype"] == "bfloat16"
    weights = list(decoder._runner.model.parameters())
    assert {weight.device.type for weight in weights} == {"cuda"}
    assert decoder._runner.model.lm_head.weight is decoder._runner.model.embed_tokens.weight
