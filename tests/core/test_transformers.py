"""Greedy texts against transformers' Qwen3, on checkpoints that transformers itself saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import orthrus_fast
from tests.marks import slow_but

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 32


def save(directory: Path, max_shard_size: str, **fields: Any) -> Any:
    """A small random Qwen3 whose greedy text does not accept_and_commit on one token."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(4)
    config = Qwen3Config(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.4,
        **fields,
    )
    model = Qwen3ForCausalLM(config).eval()
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize("max_shard_size", slow_but(["20KB"], ["20KB", "1GB"]))
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
def test_greedy_text_is_that_of_transformers(
    tmp_path: Path, max_shard_size: str, tied: bool, rope: dict[str, Any] | None
) -> None:
    fields: dict[str, Any] = {"tie_word_embeddings": tied}
    if rope:
        fields["rope_parameters"] = dict(rope)
    theirs = save(tmp_path, max_shard_size, **fields)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    prompt = [3, 14, 15, 9, 65]
    ours = orthrus_fast.load(tmp_path, device="cpu", dtype="float32")
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=80, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    got = ours.generate(prompt, 80, mode="ar")
    tokens = expected.sequences[0, len(prompt) :].tolist()
    gaps = [float(-row.topk(2).values.diff()) for row in expected.logits]
    assert len(set(tokens)) > 5
    first = next((i for i in range(80) if got.tokens[i] != tokens[i]), None)
    assert first is None or gaps[first] < 1e-5
    logits = ours.next_logits(prompt)
    assert torch.allclose(logits, expected.logits[0][0], rtol=0, atol=1e-5)
