"""Logits that are not finite: the request ends in an error, what came before stays, others go on.

A token whose embedding has overflowed spoils what follows it, and nothing before it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import orthrus_fast
from orthrus_fast import Decoder, Generation, SamplingParams
from orthrus_fast.text import TextPieces
from tests.checkpoints import random_tensors, tiny_config, write_byte_tokenizer, write_files
from tests.decoders import always_drafting
from tests.marks import slow_but

PROMPTS = [[104, 105], [9] * 20, [8, 7, 6]]
MODES = ("ar", "diffusion")
SETTINGS = {
    "greedy": SamplingParams(),
    "logprobs": SamplingParams(logprobs=True),
    "sampled": SamplingParams(0.8, top_k=50, seed=4, logprobs=True),
}
ERROR = "dtype: logits are not finite in float16; use bfloat16 or float32"


def write_model(directory: Path, **scales: float) -> Path:
    """A checkpoint with the tensors of some names scaled."""
    config = tiny_config(tied=False, eos_token_id=[])
    tensors = random_tensors(config, seed=3, dtype=torch.float32, agreement=0.9)
    for name, tensor in tensors.items():
        tensor *= next((scale for part, scale in scales.items() if part in name), 1.0)
    write_files(directory, config, tensors)
    write_byte_tokenizer(directory)
    return directory


def load(directory: Path, dtype: str = "float16", **options: Any) -> Decoder:
    options = always_drafting(directory, options)
    return orthrus_fast.load(directory, device="cpu", dtype=dtype, **options)


def overflow_at(decoder: Decoder, results: list[Generation], slot: int, least: int) -> int:
    """Make a token of one of the texts overflow that the others and the prompts lack; its index."""
    others = {t for i, result in enumerate(results) if i != slot for t in result.tokens}
    others |= {t for prompt in PROMPTS for t in prompt}
    tokens = results[slot].tokens
    index = next(
        i
        for i in range(least, len(tokens) - 1)
        if tokens[i] not in others and tokens[i] not in tokens[:i]
    )
    with torch.no_grad():
        decoder.runner.model.embed_tokens.weight[tokens[index]] = float("inf")
    return index


@pytest.mark.parametrize("runner", slow_but(["eager"], ["eager", "compiled"]))
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_text_ends_in_an_error_where_it_overflows_and_others_do_not(
    tmp_path: Path, settings: str, runner: str
) -> None:
    """Two slots, and a third request that takes the place of the one that failed."""
    params = SETTINGS[settings]
    directory = write_model(tmp_path / "model")
    for slot, least in ((0, 3), (0, 0), (1, 5)):
        decoder = load(directory, slots=2, runner=runner)
        whole = decoder.generate(PROMPTS, 40, params)
        index = overflow_at(decoder, whole, slot, least)
        for mode in MODES:
            results = decoder.generate(PROMPTS, 40, params, mode)
            for i, (got, wanted) in enumerate(zip(results, whole, strict=True)):
                end = index + 1 if i == slot else 40
                assert got.tokens == wanted.tokens[:end]
                assert got.logprobs == (wanted.logprobs and wanted.logprobs[:end])
                assert got.finish_reason == ("error" if i == slot else "length")
                assert got.error == (ERROR if i == slot else None)
                assert got.stats is not None and sum(got.stats.accepted) < end
                json.dumps(asdict(got), allow_nan=False)
            assert decoder.tokenizer is not None
            assert results[slot].text == decoder.tokenizer.decode(results[slot].tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_that_overflow_at_once(tmp_path: Path, settings: str, mode: str) -> None:
    directory = write_model(tmp_path / "model", lm_head=5e4)
    params = SETTINGS[settings]
    result = load(directory).generate([1, 2, 3], 20, params, mode)
    seed = params.seed
    assert result == Generation("", [], "error", seed, None, ERROR, [] if params.logprobs else None)
    wide = load(directory, "float32").generate([1, 2, 3], 20, params, mode)
    assert (len(wide.tokens), wide.error) == (20, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_overflow_in_any_dtype(tmp_path: Path, dtype: str) -> None:
    result = load(write_model(tmp_path / "model", lm_head=3e38), dtype).generate([1, 2], 5)
    expected = f"dtype: logits are not finite in {dtype}; the checkpoint may be damaged"
    assert (result.tokens, result.error) == ([], expected)


def overflowing(tmp_path: Path) -> tuple[Decoder, list[int], str]:
    """A decoder, and the tokens and the text of its first prompt up to where it overflows."""
    decoder = load(write_model(tmp_path / "model"))
    results = [decoder.generate(prompt, 40) for prompt in PROMPTS]
    assert decoder.tokenizer is not None
    tokens = results[0].tokens[: overflow_at(decoder, results, 0, 4) + 1]
    return decoder, tokens, decoder.tokenizer.decode(tokens)


@pytest.mark.parametrize("mode", MODES)
def test_text_that_was_held_back_comes_before_the_error(tmp_path: Path, mode: str) -> None:
    """Where no token comes with the error, too, as in AR."""
    decoder, tokens, text = overflowing(tmp_path)
    stop = SamplingParams(stop=(text[-2:] + "never",))
    assert decoder.tokenizer is not None
    pieces = TextPieces(decoder.tokenizer.detokenizer(), tuple(stop.stop))
    assert "".join(map(pieces.push, tokens)) != text
    stream = decoder.stream(PROMPTS[0], 40, stop, mode)
    assert "".join(chunk.text for chunk in stream) == stream.result.text == text
    assert stream.result.error == ERROR


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_that_comes_first_ends_the_text(tmp_path: Path, mode: str) -> None:
    decoder, _, text = overflowing(tmp_path)
    result = decoder.generate(PROMPTS[0], 40, SamplingParams(stop=text[-1]), mode)
    assert (result.finish_reason, result.error) == ("stop", None)
    assert result.text == text[: text.index(text[-1])]


def test_next_logits_are_what_they_are(tmp_path: Path) -> None:
    decoder = load(write_model(tmp_path / "model", lm_head=5e4))
    assert not decoder.next_logits([1, 2, 3]).isfinite().all()
