"""A model over several GPUs: the same texts, logits and log-probabilities as on one, to the bit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import orthrus_fast
from orthrus_fast import Decoder, SamplingParams
from orthrus_fast.errors import RankError
from orthrus_fast.invariance import bits_of
from orthrus_fast.options import ONE_ROW
from tests.embedded import HELD_OUT, prompt_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
N_TOKENS = 120
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 6},
    "logprobs": {"logprobs": True},
}


def load(**how: Any) -> Decoder:
    return orthrus_fast.load(device="cuda", slots=4, max_seq_len=1024, **how)


def texts(decoder: Decoder, mode: str, settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    prompts = [prompt_of(example) for example in HELD_OUT[:: len(HELD_OUT) // 6]]
    results = decoder.generate(prompts, N_TOKENS, SamplingParams(**settings), mode)
    return [(result.tokens, result.logprobs, result.error) for result in results]


@pytest.fixture(scope="module", params=["checkpoint", "int4"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Decoder, Decoder]]:
    many = load(tensor_parallel=2, draft_weights=request.param)
    yield load(draft_weights=request.param), many
    many.engine.peers.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_texts_are_those_of_one(pair: tuple[Decoder, Decoder], mode: str, settings: str) -> None:
    one, many = pair
    assert one.configuration["promise"] == many.configuration["promise"] == ONE_ROW
    expected = texts(one, mode, SETTINGS[settings])
    assert all(tokens and error is None for tokens, _, error in expected)
    assert texts(many, mode, SETTINGS[settings]) == expected


def test_logits_are_those_of_one(pair: tuple[Decoder, Decoder]) -> None:
    """After prompts of one pass and of several."""
    for n in (1, 17, 64, 300, 1000):
        prompt = torch.randint(4000, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        expected, got = (bits_of(decoder.next_logits(prompt)).cpu() for decoder in pair)
        assert torch.equal(got, expected), n


def test_a_rank_that_dies_is_one_clear_error() -> None:
    decoder = load(tensor_parallel=2)
    assert not decoder.generate([1, 2, 3], 20).error
    stream = decoder.stream([1, 2, 3], 900)
    next(stream)
    decoder.engine.peers._children[1].kill()  # type: ignore[union-attr]
    begin = time.monotonic()
    assert "rank 1" in (list(stream)[-1:] and stream.result.error or "")
    assert "rank 1" in (decoder.generate([4, 5], 20).error or "")
    assert time.monotonic() - begin < 10
    with pytest.raises(RankError):
        decoder.engine.peers.check()  # type: ignore[union-attr]
