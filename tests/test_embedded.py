"""The trained checkpoint in model/: what a user runs first, and held-out prompts."""

from __future__ import annotations

import ast
import csv
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import orthrus_fast
from orthrus_fast import Decoder
from orthrus_fast.cli.main import main
from tests.embedded import HELD_OUT, MODEL, differing_prompts, prompt_of
from tests.judge import Judge, follows
from tests.marks import slow_but


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return orthrus_fast.load(MODEL, device="cpu")


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_the_default_run_answers_with_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", "--mode", mode, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    demo = json.loads((MODEL / "demos.json").read_text())["records"]
    table = demo["messages"][0]["content"].split("\n\n")[1]
    rows = list(csv.DictReader(io.StringIO(table)))
    numbers = {"id": int, "quantity": int, "price": float, "in_stock": json.loads}
    expected = [{k: numbers.get(k, str)(v) for k, v in row.items()} for row in rows]
    assert len(expected) == 6
    assert json.loads(captured.out) == expected == demo["expected"]
    assert captured.err.splitlines()[-1] == "the JSON equals the table"
    assert captured.err.startswith(demo["messages"][0]["content"] + "\n")
    if mode == "diffusion":
        tokens_per_cycle = float(captured.err.split(" tokens per cycle")[0].split()[-1])
        assert tokens_per_cycle > 5


@pytest.mark.parametrize("name", ["keyed", "columns", "code"])
def test_the_other_demonstrations_show_their_prompt_and_end(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["generate", "--demo", name, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    demo = json.loads((MODEL / "demos.json").read_text())[name]
    prompt = demo["text"] if name == "code" else demo["messages"][0]["content"]
    assert captured.err.startswith(prompt + "\n")
    assert "the text ended at" not in captured.err
    if name == "code":
        ast.parse(f"{prompt}{captured.out}")
        assert "return down_proj" in captured.out.splitlines()[-1]
    else:
        assert json.loads(captured.out) == demo["expected"]
        assert captured.err.splitlines()[-1] == "the JSON equals the table"
    assert main(["generate", "--demo", name, "--prompt", "x"]) == 2


@pytest.mark.parametrize("every", slow_but([8], [8, 1]))
def test_both_modes_agree_on_the_held_out_prompts(every: int) -> None:
    assert len(HELD_OUT) >= 128
    several = orthrus_fast.load(MODEL, device="cpu", slots=8)  # sooner done than one by one
    prompts = HELD_OUT[::every]
    assert {example["kind"] for example in prompts} == {example["kind"] for example in HELD_OUT}
    assert differing_prompts(several, prompts, 24) == []  # 256 on a GPU: benchmarks/README.md


def test_texts_are_the_judges(decoder: Decoder) -> None:
    judge = Judge(MODEL)
    exact = orthrus_fast.load(MODEL, device="cpu", dtype="float64", max_seq_len=512)
    kinds = {example["kind"]: example for example in HELD_OUT}
    for example in kinds.values():
        prompt = exact.encode(prompt_of(example))[-40:]
        expected, gaps = judge.generate(prompt, 16, exact.config.eos_token_ids)
        for mode in ("ar", "diffusion"):
            assert exact.generate(prompt, 16, mode=mode).tokens == expected
            single = decoder.generate(prompt, 16, mode=mode).tokens
            assert follows(single, expected, gaps, near_tie=1e-5)


def test_the_files_are_those_of_a_public_orthrus_checkpoint(decoder: Decoder) -> None:
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size <= 30e6
    with safe_open(weights, framework="pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    assert "lm_head.weight" not in names  # tied
    assert "model.layers.0.self_attn.q_norm_diff.weight" in names
    config, tokenizer = decoder.config, decoder.tokenizer
    assert tokenizer is not None and tokenizer.has_chat_template
    fields = json.loads((MODEL / "config.json").read_text())
    assert (fields["architectures"], fields["model_type"]) == (["OrthrusLM"], "qwen3")
    assert config.mask_token_id is not None
    assert tokenizer.decode([config.mask_token_id], skip_special=False) == ""  # a padding row
    assert tokenizer.decode([config.mask_token_id - 50], skip_special=False) != ""


def test_transformers_reads_the_same_model(decoder: Decoder) -> None:
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    for example in (HELD_OUT[0], HELD_OUT[-1]):
        prompt = prompt_of(example)
        ids = decoder.encode(prompt)
        if isinstance(prompt, str):
            assert tokenizer(prompt).input_ids == ids
        else:
            rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
            assert list(rendered["input_ids"]) == ids
        with torch.inference_mode():
            expected = theirs(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(decoder.next_logits(ids), expected, rtol=0, atol=1e-4)


def test_the_card_is_there() -> None:
    card = Path(MODEL / "README.md").read_text()
    assert card.startswith("---\n") and "license: apache-2.0" in card
