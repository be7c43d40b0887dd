"""Other programs beside this one: that all do the same work on the same weights, or are skipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import peers
from orthrus_fast.bench.session import build_session
from tests.bench.runs import check_times

FLAGS = ("--shape", "tiny", "--device", "cpu", "--contexts", "40", "--new-tokens", "16")
FLAGS += ("--max-seq-len", "300")


def run(path: Path, *flags: str) -> Any:
    assert peers.main([*flags, "--json", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_peers_take_turns_on_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(tmp_path / "r.json", *FLAGS[:-2], "--max-seq-len", "1100", "--repeats", "1")
    assert content["command"].startswith("OMP_NUM_THREADS=1 python benchmarks/peers.py --shape")
    part = content["parts"]["peers"]
    assert part["skipped"] == {} and part["transformers"]
    (at,) = part["at"]
    names = ("dynamic cache", "static cache", "prompt lookup")
    theirs = [f"transformers, {name}" for name in names]
    assert list(at["tokens_per_second_of"]) == [*peers.MODES, *theirs]
    for row in at["tokens_per_second_of"].values():
        check_times(row["tokens_per_second"])
        assert row["tokens_before_difference"] == [16]  # float32, and no near tie on the way
    rates = {n: row["tokens_per_second"]["median"] for n, row in at["tokens_per_second_of"].items()}
    faster = max(rates["ar"], rates["ar_baseline"])
    for name, row in at["tokens_per_second_of"].items():
        assert row["over_faster_ar"] == pytest.approx(rates[name] / faster)
        assert row["texts_equal_share_by_dtype"] == {"float32": 1.0}
    assert list(at["diffusion_over"]) == ["the faster AR", *theirs]
    (first,) = part["first_token"]
    assert first["prompt_tokens"] == 1024 and list(first["ms"]) == ["orthrus_fast", *theirs]
    assert "REPLAYED ACCEPTANCE" in capsys.readouterr().out


def test_their_model_computes_our_logits_from_shared_memory() -> None:
    session = build_session(peers.build_parser().parse_args(FLAGS))
    theirs = peers.transformers_model(session)
    prompt = list(range(30))
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0, -1]
    assert torch.allclose(session.decoder.next_logits(prompt), expected, rtol=1e-4, atol=1e-3)
    own = session.runner.model.verifier.layers[0].attention.qkv.weight
    assert theirs.model.layers[0].self_attn.q_proj.weight.data_ptr() == own.data_ptr()


def test_their_texts_end_at_an_id_that_no_token_has() -> None:
    """Of transformers' releases some want one for prompt lookup, and none may stop at a token."""
    given: dict[str, Any] = {}

    def generate(ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        given.update(settings)
        for part in (ids, torch.tensor([7]), torch.tensor([8])):
            settings["streamer"].put(part)
        return torch.cat((ids, torch.tensor([[7, 8]])), dim=1)

    model = SimpleNamespace(device="cpu", config=SimpleNamespace(vocab_size=50), generate=generate)
    decoded = peers.transformers_peer(model, prompt_lookup_num_tokens=10)([1, 2, 3], 2)
    assert decoded.tokens == [7, 8]
    assert (given["eos_token_id"], given["prompt_lookup_num_tokens"]) == (50, 10)


def test_a_peer_that_is_absent_or_fails_is_skipped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: list[int], n_tokens: int) -> peers.Run:
        raise RuntimeError("out of\nmemory")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        absent = run(tmp_path / "a.json", *FLAGS, "--repeats", "1")["parts"]["peers"]["skipped"]
    assert len(absent) == 3 and all("transformers" in why for why in absent.values())
    assert peers.main([*FLAGS, "--json", str(tmp_path / "a.json")]) == 2  # is there
    monkeypatch.setattr(peers, "find_peers", lambda *_: {"mine": fail})
    part = run(tmp_path / "r.json", *FLAGS, "--repeats", "1")["parts"]["peers"]
    assert part["skipped"] == {"mine": "RuntimeError: out of memory"}


def test_a_checkpoint_drafts_for_itself_and_texts_are_compared_in_each_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def almost(prompt: list[int], n_tokens: int) -> peers.Run:
        text = ours["tokens"][:n_tokens]
        return peers.Run([*text[:-1], text[-1] + 1], 1.0, 100.0)

    def note(*args: Any, **named: Any) -> Any:
        decoded = true_runs(*args, **named)
        ours["tokens"] = decoded["ar"].tokens[0]
        return decoded

    ours: dict[str, list[int]] = {}
    true_runs = peers.run_modes
    monkeypatch.setattr(peers, "run_modes", note)
    monkeypatch.setattr(peers, "find_peers", lambda *_: {"almost": almost})
    monkeypatch.setattr(peers, "first_tokens", lambda *_: [])
    flags = ("--device", "cpu", "--dtypes", "float64,float32", "--sequences", "1")
    content = run(
        tmp_path / "r.json", *flags, "--new-tokens", "8", "--contexts", "64", "--max-seq-len", "400"
    )
    part = content["parts"]["peers"]
    assert part["label"] == "the checkpoint's own drafts" and part["accept"] is None
    assert list(part["by_dtype"]) == ["float64", "float32"]
    assert content["environment"]["configuration"]["dtype"] == "float64"
    (at,) = part["at"]
    assert at["prompts"] == 1 and at["tokens_per_cycle"] > 1.5  # its own drafts, on its own prompts
    row = at["tokens_per_second_of"]["almost"]
    assert row["texts_equal_share_by_dtype"] == {"float64": 0.0, "float32": 0.0}
    assert row["tokens_before_difference"] == [7]
    own = at["tokens_per_second_of"]["diffusion"]
    assert own["texts_equal_share_by_dtype"] == {"float64": 1.0, "float32": 1.0}
    assert "THE CHECKPOINT'S OWN DRAFTS" in capsys.readouterr().out


def test_a_pass_that_gives_several_tokens_is_counted_whole() -> None:
    clock = peers.Clock()
    clock.put(torch.zeros(1, 40))  # the prompt
    clock.marks, clock.counts = [0.0, 1.0, 2.0, 3.0], [40, 3, 4, 2]
    assert clock.tokens_per_second == 3.0  # 4 + 2 in two seconds; the first three came with 1.0
    clock.marks, clock.counts = [0.0, 1.0], [40, 1]
    assert clock.tokens_per_second == 0.0


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--shape", "3B"], "invalid choice"),
        (["--shape", "tiny", "--checkpoint", "model"], "does not go with --checkpoint"),
        (["--dtype", "float32", "--dtypes", "bfloat16"], "--dtype does not go with --dtypes"),
        (["--shape", "tiny", "--device", "cpu", "--dtypes", "float32,int3"], "--dtypes: not of"),
        (["--json", "/nowhere/r.json"], "no such directory"),
        (["--shape", "tiny", "--weights", "int4"], "--weights int4: others have"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert peers.main([*flags, "--new-tokens", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1
