"""The embedded checkpoint and its held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orthrus_fast import Decoder

MODEL = Path(__file__).resolve().parents[1] / "model"
VOCAB, EOS = 4096, 2
ENTRIES = [json.loads(line) for line in (MODEL / "heldout.jsonl").read_text().splitlines()]
# All kinds; the card's figures are of all the prompts.
HELD_OUT = [entry for entry in ENTRIES if entry.get("source") != "docstrings"]


def prompt_of(example: dict[str, Any]) -> Any:
    return example["messages"] if "messages" in example else example["text"]


def differing_prompts(
    decoder: Decoder, examples: list[dict[str, Any]], max_new_tokens: int
) -> list[int]:
    """Indices of the examples whose tokens differ between the two modes."""
    prompts = [prompt_of(example) for example in examples]
    ar, diffusion = (
        [result.tokens for result in decoder.generate(prompts, max_new_tokens, mode=mode)]
        for mode in ("ar", "diffusion")
    )
    return [i for i in range(len(prompts)) if ar[i] != diffusion[i]]
