"""The sampling kernel: against ``sampling.sample`` in Triton's interpreter; its machine code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from orthrus_fast.sampling import SamplingParams, Settings, sample
from tests.kernel_compile import CHIPS, compile_for, interpreted

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

import triton.language.random

from orthrus_fast.kernels import sample as kernel

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")
# temperature, top_k, top_p, min_p
GRID = list(itertools.product((0.7, 1.5), (None, 1, 5, 40), (None, 0.5, 0.95), (None, 0.1)))


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 64, so that a small vocabulary has several, the last of them partial."""
    monkeypatch.setattr(kernel, "BLOCK", 64)
    with interpreted(kernel), interpreted(triton.language.random):
        yield


def settings_of(*params: SamplingParams) -> Settings:
    settings = Settings.create(len(params), CPU)
    for slot, one in enumerate(params):
        settings.put(slot, one)
    return settings


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [7, 64, 150])
def test_the_kernel_draws_what_sample_draws(
    interpreting: None, dtype: torch.dtype, vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    for case, (temperature, top_k, top_p, min_p) in enumerate(GRID):
        logits = (3 * torch.randn(3, 2, vocab_size, generator=generator)).to(dtype)
        logits[0, 0, ::3] = 2.0  # ties, at a threshold or for first place
        params = SamplingParams(temperature, top_k, top_p, min_p, seed=2**63 + 7 * case)
        settings = settings_of(params, SamplingParams(), SamplingParams(temperature, seed=case))
        position = torch.randint(0, 2**20, (3, 2), generator=generator)
        expected = sample(logits, position, settings)
        assert torch.equal(kernel.sample_op(logits, position, *settings), expected), params


def test_a_greedy_row_is_the_lowest_of_the_greatest(interpreting: None) -> None:
    logits = torch.full((1, 4, 150), -2.0)
    logits[0, 0, [13, 70, 149]] = 5.0  # in three blocks
    logits[0, 1, [3, 2]] = 5.0  # in one group of four
    logits[0, 2] = -math.inf
    logits[0, 3, :] = -0.0
    logits[0, 3, 7] = 0.0  # equal to -0.0
    ids = kernel.sample_op(logits, torch.zeros(1, 4), *settings_of(SamplingParams()))
    assert ids.tolist() == [[13, 2, 0, 0]]


def test_a_row_depends_on_itself_alone(interpreting: None) -> None:
    logits = torch.randn(2, 3, 150)
    position = torch.arange(6).view(2, 3)
    params = [SamplingParams(1.0, top_k=20, top_p=0.8, seed=5), SamplingParams(2.0, seed=6)]
    both = kernel.sample_op(logits, position, *settings_of(*params))
    for slot in range(2):
        alone = settings_of(params[slot])
        for t in range(3):
            row = kernel.sample_op(
                logits[slot, None, t, None], position[slot, None, t, None], *alone
            )
            assert row.item() == both[slot, t]


def test_the_operator_says_what_it_returns(interpreting: None) -> None:
    settings = settings_of(SamplingParams(1.0, seed=3))
    arguments = (torch.randn(1, 3, 70), torch.arange(3)[None], *settings)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel.sample_op, arguments, test_utils=checks)


@pytest.mark.parametrize("chip", CHIPS)
def test_the_kernel_compiles_for_every_chip(chip: int) -> None:
    settings = {"temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32"}
    signature: dict[str, Any] = settings | {"seed": "*i64", "out": "*i64", "vocab_size": "i32"}
    signature |= {"logits": "*bf16", "position": "*i64"}
    constants = {"WIDTH": 32, "SCALE": 2.0**44, "N_BITS": 16, "BLOCK": 4096}
    compiled = compile_for(kernel._sample_kernel, signature, constants, chip, 16, 3)
    assert compiled.metadata.shared <= CHIPS[chip]
    # The noise is as good as its logarithms near 1, where the fast approximation is poor.
    assert "lg2.approx" not in compiled.asm["ptx"]
