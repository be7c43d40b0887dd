"""The benchmark, whole, on a CPU: its files, its clocks' fields, and the faults it must see."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from orthrus_fast import bench, steps
from orthrus_fast.bench import command, passes, streaming
from orthrus_fast.bench import cycles as cycles_part
from orthrus_fast.bench.prompts import read_prompts
from orthrus_fast.checkpoint import _build_on_meta
from orthrus_fast.errors import RequestError
from orthrus_fast.model import View, plain_kernels
from tests.checkpoints import write_checkpoint

TINY = ["--shape", "tiny", "--device", "cpu", "--repeats", "2", "--max-seq-len", "1100"]
QUICK = ["--ways", "eager", "--slots-list", "1,2"]
SHORT = ["--contexts", "70,300", "--new-tokens", "24", *QUICK]


def run(path: Path, *flags: str, expected: int = 0) -> Any:
    """The JSON of a run; every test names its own file."""
    assert bench.main([*flags, "--json", str(path)]) == expected
    return json.loads(path.read_text())


def identity(path: Path, *flags: str) -> Any:
    return run(path, *TINY, "--parts", "identity", *flags)["parts"]["identity"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All parts at the tiny shape, two slots."""
    return run(tmp_path_factory.mktemp("bench") / "whole.json", *TINY, *SHORT, "--slots", "2")


def check_schema(content: Any) -> None:
    schema = json.loads(Path(__file__).with_name("bench_schema.json").read_text())
    jsonschema.validate(content, schema, jsonschema.Draft202012Validator)


def check_times(values: dict[str, float]) -> None:
    assert 0 < values["p10"] <= values["median"] <= values["p90"]
    assert values["n"] >= 1


def test_the_file_holds_every_part_and_what_it_takes_to_repeat_it(whole: Any) -> None:
    assert list(whole["parts"]) == list(bench.NAMES)
    assert whole["failed"] == {}
    assert whole["arguments"]["shape"] == "tiny" and whole["arguments"]["seed"] == 0
    (start,) = whole["runs"]
    assert start["configuration"]["slots"] == 2
    assert start["torch"] == torch.__version__
    assert {"date", "gpu", "driver", "triton", "commit", "dirty"} <= set(start)
    for part in whole["parts"].values():
        assert part["run"] == 0 and part["part_seconds"] > 0
    assert whole["parts"]["startup"]["seconds"]["draw weights"] > 0
    memory = whole["parts"]["startup"]["memory"]
    assert memory["cache_bytes"] == 2 * 1216 * 2 * 2 * 2 * 16 * 4  # slots, S, K/V, layers, heads
    assert memory["peak_allocated_bytes"] is None


def test_the_file_follows_its_schema(whole: Any, tmp_path: Path) -> None:
    check_schema(whole)
    flags = ["--parts", "startup", "--profile", str(tmp_path / "trace.json"), "--accept", "1.7B/QA"]
    check_schema(run(tmp_path / "r.json", *TINY, *SHORT, *flags))
    for faulty in (
        {**whole, "parts": {**whole["parts"], "lunch": {}}},
        {**whole, "runs": []},
        {**whole, "parts": {"slots": {**whole["parts"]["slots"], "label": "acceptance"}}},
        {name: value for name, value in whole.items() if name != "format"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check_schema(faulty)


def test_passes_are_timed_against_a_ceiling_of_their_own(whole: Any) -> None:
    part = whole["parts"]["passes"]
    rates = [part["ceiling"][f"{name}_bytes_per_s"] for name in ("product", "amax", "sum")]
    assert part["ceiling"]["bytes_per_s"] == max(rates) > 0
    assert [at["context"] for at in part["at"]] == [70, 300]
    for at in part["at"]:
        for name in ("draft", "verify"):
            check_times(at[name]["ms"])
            seconds = at[name]["ms"]["median"] / 1e3
            rate = at[name]["weights_bytes"] / seconds / part["ceiling"]["bytes_per_s"]
            assert at[name]["share_by_weights"] == pytest.approx(rate)
            assert at[name]["share_by_weights_and_cache"] > at[name]["share_by_weights"]
            rows = at["context"] + 8
            assert at[name]["cache_bytes"] == 2 * rows * 2 * 2 * 2 * 16 * 4
        both = at["draft"]["ms"]["median"] + at["verify"]["ms"]["median"]
        over = at["cycle"]["ms"]["median"] - both
        assert at["cycle"]["over_passes_ms"] == pytest.approx(over)
        for ms in at["ar"].values():
            check_times(ms)


def test_speeds_are_labelled_and_over_the_faster_ar(whole: Any) -> None:
    part = whole["parts"]["cycles"]
    assert part["label"] == "replayed acceptance" and part["accept"] == 0.85
    for at in part["at"]:
        rates = {name: value["median"] for name, value in at["tokens_per_second"].items()}
        faster = max(rates["ar_padded"], rates["ar_one_row"])
        assert at["speedup_over_faster_ar"] == pytest.approx(rates["diffusion"] / faster)
        assert at["tokens_equal_to_ar"]
    eager = whole["parts"]["eager"]
    check_times(eager["cycle_ms"])
    check_times(eager["eager_cycle_ms"])
    (first,) = whole["parts"]["prefill"]["at"]
    assert first["prompt_tokens"] == 1024 and whole["parts"]["prefill"]["left_out"] == [8192]
    check_times(first["ms"])


def test_both_modes_are_identical_to_the_bit(tmp_path: Path) -> None:
    part = identity(tmp_path / "r.json", "--new-tokens", "50", "--slots", "3", "--sequences", "5")
    assert part["drafts"] == "replayed, 0.85 right"
    assert (part["sequences"], part["sequences_equal"]) == (5, 5)
    assert (part["rows"], part["rows_differing"]) == (5 * 49, 0)
    prompts = [verdict["prompt_tokens"] for verdict in part["by_sequence"]]
    assert len(set(prompts)) == 5
    assert part["cache_rows"] == 2 * 2 * sum(n + 49 for n in prompts)
    assert part["cache_rows_differing"] == 0
    assert part["distinct_tokens"] > 20 and part["tokens_per_cycle"] > 3


def accept_one_too_many(block: Tensor, target: Tensor) -> Tensor:
    agreeing = (block[:, 1:] == target[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)
    return (agreeing + 1).clamp(max=block.shape[1] - 1)


def logits_that_see_the_drafts(model: Any, cache: Any, state: Any, block: Tensor) -> Any:
    greedy, logits = true_verify(model, cache, state, block)
    sees = (block[:, 1] != block[:, 0])[:, None, None]
    return greedy, torch.where(sees, logits * (1 + 2**-20), logits)


def cache_that_sees_the_drafts(model: Any, cache: Any, state: Any, block: Tensor) -> Any:
    out = true_verify(model, cache, state, block)
    cache.v[-1][0, :, int(state.length[0])] += 1e-3 * bool(block[0, 1] != block[0, 0])
    return out


true_verify = steps.verify


@pytest.mark.parametrize(
    ("step", "fault", "seen"),
    [
        ("accept", accept_one_too_many, "cache_rows_differing"),
        ("verify", logits_that_see_the_drafts, "rows_differing"),
        ("verify", cache_that_sees_the_drafts, "cache_rows_differing"),
    ],
)
def test_a_planted_fault_is_seen(
    step: str, fault: Any, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, step, fault)
    part = identity(tmp_path / "r.json", "--new-tokens", "40", "--sequences", "2")
    assert part[seen] > 0


def cycles(path: Path, *flags: str) -> Any:
    part = run(path, *TINY, "--contexts", "20", "--parts", "cycles", *flags)["parts"]["cycles"]
    (at,) = part["at"]
    return at


@pytest.mark.parametrize(("accept", "exactly"), [("1", 8.0), ("0", 1.0)])
def test_replayed_drafts_that_are_all_right_or_all_wrong(
    accept: str, exactly: float, tmp_path: Path
) -> None:
    at = cycles(tmp_path / "r.json", "--accept", accept, "--new-tokens", "81")
    assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == exactly


@pytest.mark.parametrize("block_size", ["2", "5"])
def test_a_narrower_block(block_size: str, tmp_path: Path) -> None:
    """Its rows are the most tokens of a cycle; texts are equal in both modes."""
    path, flags = tmp_path / "r.json", ["--new-tokens", "41", "--block-size", block_size]
    parts = ["--parts", "cycles,identity", "--contexts", "20", "--accept", "1"]
    content = run(path, *TINY, *flags, *parts)
    assert content["runs"][0]["configuration"]["block_size"] == int(block_size)
    (at,) = content["parts"]["cycles"]["at"]
    assert at["tokens_per_cycle"] == at["tokens_per_cycle_expected"] == int(block_size)
    assert at["tokens_equal_to_ar"]
    identity = content["parts"]["identity"]
    assert identity["sequences_equal"] == identity["sequences"] == 4
    assert (identity["rows_differing"], identity["cache_rows_differing"]) == (0, 0)


def test_another_block_size_is_another_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, flags = tmp_path / "r.json", [*TINY, "--parts", "startup", "--new-tokens", "8"]
    run(path, *flags, "--block-size", "4")
    assert bench.main([*flags, "--json", str(path)]) == 2
    assert "was made with other arguments (block_size)" in capsys.readouterr().err


def test_the_embedded_checkpoint_with_a_narrower_block(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--new-tokens", "16", "--sequences", "2", "--block-size", "4")
    content = run(tmp_path / "r.json", *flags, "--parts", "identity")
    assert content["runs"][0]["configuration"]["block_size"] == 4
    part = content["parts"]["identity"]
    assert part["sequences_equal"] == part["sequences"] == 2
    assert 1 < part["tokens_per_cycle"] <= 4


def test_replayed_acceptance_is_what_was_asked(tmp_path: Path) -> None:
    at = cycles(tmp_path / "r.json", "--accept", "0.6", "--new-tokens", "401")
    expected = sum(0.6**n for n in range(8))
    assert at["tokens_per_cycle_expected"] == pytest.approx(expected)
    error = at["tokens_per_cycle_standard_error"]
    assert 0 < error < 0.2 and at["cycles"] > 200
    assert abs(at["tokens_per_cycle"] - expected) < 4 * error


# Every matrix that a token passes through, counted by hand: qkv, o, gate and up, down; the head.
@pytest.mark.parametrize(
    ("shape", "layer", "n_layers", "head", "gigabytes"),
    [
        ("1.7B", 4096 * 2048 + 2048 * 2048 + 3 * 2048 * 6144, 28, 151936 * 2048, 3.44),
        ("4B", 6144 * 2560 + 4096 * 2560 + 3 * 2560 * 9728, 36, 151936 * 2560, 8.04),
        ("8B", 6144 * 4096 + 4096 * 4096 + 3 * 4096 * 12288, 36, 151936 * 4096, 15.14),
    ],
)
def test_streamed_bytes_are_those_counted_by_hand(
    shape: str, layer: int, n_layers: int, head: int, gigabytes: float
) -> None:
    config = bench.shape_config(shape)
    nothing: Any = None
    model = _build_on_meta(config, plain_kernels(nothing), True).to(torch.bfloat16)
    for view in View:
        n_bytes = streaming.streamed_bytes(model, view)
        assert n_bytes == 2 * (n_layers * layer + head)
        assert round(n_bytes / 1e9, 2) == gigabytes
    assert streaming.cache_bytes(config, 1000, 2) == 2 * n_layers * 8 * 128 * 1000 * 2


def test_random_weights_follow_the_seed() -> None:
    def weights(seed: str) -> dict[str, Tensor]:
        args = bench.build_parser().parse_args([*TINY, "--seed", seed, "--new-tokens", "8"])
        return dict(bench.build(args).runner.model.named_parameters())

    first, again, other = weights("1"), weights("1"), weights("2")
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert torch.equal(weight, other[name]) == ("norm" in name)
        assert float(weight.float().std()) == pytest.approx(0.0 if "norm" in name else 0.2, rel=0.1)


def test_the_embedded_checkpoint_with_its_own_drafts(tmp_path: Path) -> None:
    flags = ("--device", "cpu", "--contexts", "64", "--new-tokens", "8", "--repeats", "1")
    flags += ("--max-seq-len", "1100")
    content = run(tmp_path / "r.json", *flags, *QUICK, "--sequences", "3", "--slots", "2")
    assert list(content["parts"]) == list(bench.NAMES) and content["failed"] == {}
    check_schema(content)
    part = content["parts"]["identity"]
    assert part["drafts"] == "the checkpoint's own"
    assert part["sequences_equal"] == part["sequences"] == 3
    assert part["tokens_per_cycle"] > 1.5  # a trained draft view
    (at,) = content["parts"]["cycles"]["at"]
    assert at["tokens_equal_to_ar"] and content["parts"]["startup"]["seconds"]["load"] > 0


def test_nothing_is_compiled_while_the_clock_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watched(clock: Any) -> Any:
        def run_and_compare(*args: Any) -> Any:
            before = counters["stats"]["unique_graphs"]
            times = clock(*args)
            assert counters["stats"]["unique_graphs"] == before > 0
            return times

        return run_and_compare

    for module, name in (
        (passes, "time_steps"),
        (passes, "time_cycles"),
        (streaming, "time_steps"),
    ):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    flags = ("--contexts", "70", "--new-tokens", "24", "--runner", "compiled")
    content = run(tmp_path / "r.json", *TINY, *flags, "--parts", "startup,passes,cycles,eager")
    assert list(content["parts"]) == ["startup", "passes", "cycles", "eager"]
    assert content["failed"] == {}
    assert content["parts"]["startup"]["seconds"]["compile"] > 0
    assert content["parts"]["cycles"]["at"][0]["tokens_equal_to_ar"]


def test_a_plain_qwen3_has_no_drafts_to_time(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False)
    flags = ("--device", "cpu", "--contexts", "30", "--new-tokens", "8", "--repeats", "1")
    content = run(tmp_path / "r.json", "--checkpoint", str(directory), *flags, *QUICK)
    assert content["failed"] == {}
    assert content["parts"]["cycles"]["skipped"] == "no draft view"
    assert content["parts"]["identity"]["skipped"] == "no draft view"
    assert "draft" not in content["parts"]["passes"]["at"][0]
    assert content["parts"]["eager"]["mode"] == "ar"


def test_a_rerun_measures_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, flags = tmp_path / "r.json", [*TINY, *SHORT]
    before = run(path, *flags, "--parts", "prefill,startup")
    assert list(before["parts"]) == ["startup", "prefill"]
    monkeypatch.setitem(bench.PARTS, "startup", lambda _: pytest.fail("measured again"))
    after = run(path, *flags, "--parts", "startup,ceiling,prefill")
    assert after["parts"]["startup"] == before["parts"]["startup"]
    assert after["parts"]["ceiling"]["run"] == 1 and len(after["runs"]) == 2
    monkeypatch.setattr(command, "build", lambda *_: pytest.fail("nothing is missing"))
    capsys.readouterr()
    assert run(path, *flags, "--parts", "startup,ceiling,prefill") == after
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("draw weights", "ceiling", "time to first token"))
    assert max(map(len, printed.splitlines())) <= 100

    text = path.read_text()
    assert bench.main([*flags, "--seed", "5", "--json", str(path)]) == 2
    error = capsys.readouterr().err
    assert "was made with other arguments (seed)" in error and error.count("\n") == 1
    assert path.read_text() == text


def test_an_interrupted_run_keeps_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: bench.Bench) -> bench.Result:
        raise KeyboardInterrupt

    path = tmp_path / "r.json"
    with monkeypatch.context() as patch:
        patch.setitem(bench.PARTS, "passes", interrupt)
        content = run(path, *TINY, *SHORT, expected=130)
    assert list(content["parts"]) == ["startup", "ceiling"]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
    assert list(run(path, *TINY, *SHORT)["parts"]) == list(bench.NAMES)


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: bench.Bench) -> bench.Result:
        raise RuntimeError("no memory")

    path, parts = tmp_path / "r.json", ("--parts", "startup,ceiling,prefill")
    with monkeypatch.context() as patch:
        patch.setitem(bench.PARTS, "ceiling", fail)
        content = run(path, *TINY, *SHORT, *parts, expected=1)
    assert list(content["parts"]) == ["startup", "prefill"]
    assert content["failed"] == {"ceiling": "RuntimeError: no memory"}
    assert run(path, *TINY, *SHORT, *parts)["failed"] == {}


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=True, eos_token_id=[])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [1, 2, 3]}\n{"text": "ab"}\n{"ids": [9], "kind": "x"}\n')
    flags = ["--checkpoint", str(directory), "--device", "cpu", "--parts", "identity"]
    flags += ["--contexts", "30", "--new-tokens", "20", "--prompts-file", str(prompts)]
    part = run(tmp_path / "r.json", *flags)["parts"]["identity"]
    assert [verdict["prompt_tokens"] for verdict in part["by_sequence"]] == [3, 2, 1]
    assert part["sequences_equal"] == 3


def test_ends_of_text_hold_again_after_the_cycles_part(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=2)
    flags = ["--checkpoint", str(directory), "--device", "cpu", "--contexts", "30"]
    flags += ["--new-tokens", "20", "--repeats", "1"]
    built = bench.build(bench.build_parser().parse_args(flags))
    assert cycles_part.cycles(built)["at"][0]["cycles"] > 0
    assert built.runner.eos.tolist() == [256]
    assert "draft" not in vars(built.runner)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--shape", "3B"], "invalid choice"),
        (["--shape", "tiny", "--checkpoint", "model"], "does not go with --checkpoint"),
        (["--accept", "-0.5"], "--accept: invalid"),
        (["--block-size", "0"], "--block-size: invalid"),
        (["--shape", "tiny", "--device", "cpu", "--block-size", "1"], "from 2 to 8"),
        (["--shape", "tiny", "--device", "cpu", "--block-size", "9"], "from 2 to 8"),
        (["--device", "cpu", "--block-size", "17"], "from 2 to 16"),
        (["--slots", "0"], "--slots: invalid"),
        (["--contexts", "12,-1"], "--contexts: invalid"),
        (["--parts", "passes,lunch"], "--parts: invalid"),
        (["--new-tokens", "1"], "below 2"),
        (["--device", "tpu"], "device"),
        (["--shape", "tiny", "--device", "cpu", "--runner", "graph"], "needs a CUDA device"),
        (["--shape", "tiny", "--device", "cpu", "--contexts", "5000"], "not below max_seq_len"),
        (["--shape", "tiny", "--device", "cpu", "--new-tokens", "5000"], "no room for a prompt"),
        (["--shape", "tiny", "--device", "cpu", "--max-seq-len", "9999999"], "max_seq_len"),
        (["--checkpoint", "/nowhere"], "no such directory"),
        (["--shape", "tiny", "--json", "/nowhere/r.json"], "no such directory"),
        (["--json", str(Path(__file__))], "no result of this program"),
        (["--speed"], "--speed"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}\n", "[]\n", '{"text": "a"}\nnonsense\n'])
def test_a_file_without_prompts_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(RequestError, match="prompts_file"):
        read_prompts(path)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from orthrus_fast import bench; bench.build_parser().format_help(); "
    code += "sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=bench.REPOSITORY)
