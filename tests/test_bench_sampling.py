"""The benchmark of sampling: what is asked of it, what its parts report, and the rejection rule."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast import bench
from orthrus_fast.bench import identity, passes, temperatures
from orthrus_fast.bench.prompts import chosen_prompts
from tests.checkpoints import write_checkpoint

TINY = ["--shape", "tiny", "--device", "cpu", "--repeats", "2", "--max-seq-len", "1100"]
EMBEDDED = ["--device", "cpu", "--repeats", "1", "--sequences", "3", "--contexts", "64"]
BOUND = (
    4.9  # standard errors: a right mean is further off once in a million seeds, and ours is fixed
)


def run(path: Path, *flags: str, expected: int = 0) -> Any:
    """The JSON of a run."""
    assert bench.main([*flags, "--json", str(path)]) == expected
    return json.loads(path.read_text())


def build(*flags: str) -> bench.Bench:
    return bench.build(bench.build_parser().parse_args(flags))


# --- the share of right drafts from tokens per cycle ---


@pytest.mark.parametrize("width", [2, 8, 16, 32])
@pytest.mark.parametrize("part", [0.001, 0.2, 0.75, 0.999])
def test_a_share_gives_the_tokens_per_cycle_that_were_asked(width: int, part: float) -> None:
    asked = 1 + part * (width - 1)
    share = bench.share_of_right_drafts(asked, width)
    assert 0 < share < 1
    assert bench.expected_tokens_per_cycle(share, width) == pytest.approx(asked, rel=1e-12)
    again = bench.share_of_right_drafts(bench.expected_tokens_per_cycle(share, width), width)
    assert again == pytest.approx(share, rel=1e-9)


def test_up_to_one_it_is_the_share_itself() -> None:
    assert [bench.share_of_right_drafts(p, 8) for p in (0.0, 0.85, 1.0)] == [0.0, 0.85, 1.0]


@pytest.mark.parametrize("asked", ["8", "31.5"])
def test_more_than_a_block_can_give_is_refused_with_the_range(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*TINY, "--accept", asked]) == 2
    error = capsys.readouterr().err
    assert f"accept: {asked} tokens per cycle is not above 1 and below 8" in error
    assert error.count("\n") == 1


def test_replayed_tokens_per_cycle_are_those_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*TINY, "--contexts", "20", "--new-tokens", "401", "--accept", "3.5")
    content = run(tmp_path / "r.json", *flags, "--parts", "cycles,identity", "--sequences", "2")
    part, identity = content["parts"]["cycles"], content["parts"]["identity"]
    assert content["arguments"]["accept"] == part["accept_asked"] == 3.5
    assert bench.expected_tokens_per_cycle(part["accept"], 8) == pytest.approx(3.5)
    (at,) = part["at"]
    assert at["tokens_per_cycle_expected"] == pytest.approx(3.5)
    error = at["tokens_per_cycle_standard_error"]
    assert error < 0.25 and abs(at["tokens_per_cycle"] - 3.5) < BOUND * error
    assert (identity["accept"], identity["accept_asked"]) == (part["accept"], 3.5)
    assert identity["drafts"] == f"replayed, {part['accept']:.3g} right"
    printed = capsys.readouterr().out
    assert "REPLAYED ACCEPTANCE" in printed and "for 3.5 tokens/cycle" in printed


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--accept", "-1"], "--accept: invalid"),
        (["--accept", "inf"], "--accept: invalid"),
        (["--accept", "nan"], "--accept: invalid"),
        (["--temperature", "-1"], "temperature=-1.0 is not"),
        (["--temperature", "hot"], "--temperature: invalid"),
        (["--temperature", "1", "--top-k", "0"], "--top-k: invalid"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p: invalid"),
        (["--temperature", "1", "--top-p", "0"], "top_p=0.0 is not"),
        (["--top-k", "20"], "need a --temperature above 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(
    flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and problem in error and error.count("\n") == 1


# --- identity ---

SAMPLED = ["--temperature", "0.9", "--top-k", "20", "--top-p", "0.95"]


@pytest.mark.parametrize("slots", ["1", "3"])
def test_sampled_identity_with_replayed_drafts(
    slots: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--parts", "identity", "--new-tokens", "40", "--slots", slots, "--sequences", "5")
    part = run(tmp_path / "r.json", *TINY, *SAMPLED, *flags)["parts"]["identity"]
    assert part["sampling"] == {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
    assert [verdict["seed"] for verdict in part["by_sequence"]] == [0, 1, 2, 3, 4]
    assert (part["sequences"], part["sequences_equal"]) == (5, 5)
    assert (part["rows"], part["rows_differing"], part["cache_rows_differing"]) == (5 * 39, 0, 0)
    assert part["tokens_per_cycle"] > 3 and part["cycles"] < 5 * 39
    printed = " ".join(capsys.readouterr().out.split())
    assert "0.9" in printed and "top_p" in printed  # a folded column
    greedy = run(tmp_path / "g.json", *TINY, *flags)["parts"]["identity"]
    assert greedy["tokens_sha256"] != part["tokens_sha256"]
    other = run(tmp_path / "o.json", *TINY, *SAMPLED, *flags, "--seed", "1")["parts"]["identity"]
    assert [verdict["seed"] for verdict in other["by_sequence"]] == [1, 2, 3, 4, 5]


def test_sampled_identity_with_the_checkpoints_own_drafts(tmp_path: Path) -> None:
    flags = ("--parts", "identity", "--new-tokens", "16")
    part = run(tmp_path / "r.json", *EMBEDDED, *SAMPLED, *flags)["parts"]["identity"]
    assert part["drafts"] == "the checkpoint's own" and part["accept"] is None
    assert part["sequences_equal"] == part["sequences"] == 3
    assert part["rows_differing"] == part["cache_rows_differing"] == 0
    assert part["tokens_per_cycle"] > 1.5  # the draft has the same noise


def test_other_noise_in_one_mode_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_seed_in_diffusion(*args: Any) -> Any:
        decoder, prompts, n_tokens, drafting, width, each = args
        if drafting:
            each = [*each[1:], each[0]]
        return true_decode(decoder, prompts, n_tokens, drafting, width, each)

    true_decode = identity.decode
    monkeypatch.setattr(identity, "decode", with_another_seed_in_diffusion)
    flags = ("--parts", "identity", "--new-tokens", "24", "--sequences", "3")
    part = run(tmp_path / "r.json", *TINY, "--temperature", "1", *flags)["parts"]["identity"]
    assert part["sequences_equal"] == 0


# --- what sampling costs ---


def test_cycles_are_timed_greedy_sampled_and_filtered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--contexts", "30,70", "--parts", "sampling", "--slots", "2")
    part = run(tmp_path / "r.json", *TINY, *flags)["parts"]["sampling"]
    assert part["mode"] == "diffusion" and part["settings"] == passes.CYCLE_SETTINGS
    assert [at["context"] for at in part["at"]] == [30, 70]
    for at in part["at"]:
        assert list(at["cycle_ms"]) == ["greedy", "sampled", "filtered"]
        for ms in at["cycle_ms"].values():
            assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] and ms["n"] == 2 * bench.ROUNDS
        assert list(at["over_greedy_share"]) == ["sampled", "filtered"]
        for name, share in at["over_greedy_share"].items():
            medians = at["cycle_ms"][name]["median"], at["cycle_ms"]["greedy"]["median"]
            assert share == pytest.approx(medians[0] / medians[1] - 1)
    printed = capsys.readouterr().out
    assert "over greedy" in printed and max(map(len, printed.splitlines())) <= 100


def test_each_timing_has_its_settings_and_the_slots_are_left_as_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note(runner: Any, width: int, drafting: bool, repeats: int, sampling: bool) -> list[float]:
        settings = runner.state.settings
        names = ("temperature", "top_k", "top_p")
        values = [[round(v, 3) for v in getattr(settings, name).tolist()] for name in names]
        seen.append((sampling, drafting, *values, runner.state.length.tolist()))
        return [1.0]

    seen: list[Any] = []
    monkeypatch.setattr(passes, "cycle_spans", note)
    built = build(*TINY, "--contexts", "40", "--slots", "2", "--new-tokens", "8")
    with bench.measuring(built.device):
        passes.sampled_cycles(built)
    greedy = (False, True, [0.0, 0.0], [0, 0], [1.0, 1.0], [40, 40])
    sampled = (True, True, [0.7, 0.7], [0, 0], [1.0, 1.0], [40, 40])
    filtered = (True, True, [0.6, 0.6], [20, 20], [0.95, 0.95], [40, 40])
    assert seen == [greedy, sampled, filtered] * bench.ROUNDS
    assert built.runner.state.settings.temperature.tolist() == [0.0, 0.0]


def test_the_runner_is_ready_to_sample_before_the_clock_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def note_timing(*_: Any) -> list[float]:
        events.append("timed")
        return [1.0]

    def note_preparation(width: int, sampling: bool = False) -> None:
        events.append((width, sampling))

    events: list[Any] = []
    monkeypatch.setattr(passes, "cycle_spans", note_timing)
    built = build(*TINY, "--contexts", "40", "--new-tokens", "8")
    monkeypatch.setattr(built.runner, "prepare", note_preparation)
    passes.sampled_cycles(built)
    assert events == [(8, True), *["timed"] * 3 * bench.ROUNDS]


# --- rejection sampling ---


def tables() -> tuple[Tensor, Tensor, float]:
    """Draft logits [3, V], target logits [V, V, 3, V] by the first two drafts; a temperature."""
    generator = torch.Generator().manual_seed(4)
    draft = torch.randn(3, 5, generator=generator)
    target = torch.randn(5, 5, 3, 5, generator=generator) + draft
    target[:, :, 0] = target[0, 0, 0]  # the first row has seen no draft, the second one
    target[:, :, 1] = target[:, :1, 1]
    return draft, target, 0.7


def reject(draft: Any, target: Any, generator: torch.Generator) -> tuple[int, int]:
    """One block of rejection sampling by the book: drafts accepted, and the first token emitted.

    ``draft[j]`` and ``target(drafts)[j]`` are lists of probabilities. Leviathan et al. 2023,
    algorithm 1.
    """
    drawn = [int(torch.multinomial(torch.tensor(q), 1, generator=generator)) for q in draft]
    rows = target(drawn)
    for j, token in enumerate(drawn):
        if float(torch.rand((), generator=generator)) > rows[j][token] / draft[j][token]:
            rest = [max(0.0, p - q) for p, q in zip(rows[j], draft[j], strict=True)]
            instead = int(torch.multinomial(torch.tensor(rest), 1, generator=generator))
            return j, instead if j == 0 else drawn[0]
    return len(drawn), drawn[0]


def test_expected_acceptance_is_that_of_rejection_sampling() -> None:
    draft, target, temperature = tables()
    draft_p = (draft.double() / temperature).softmax(-1)
    target_p = (target.double() / temperature).softmax(-1)

    blocks = torch.tensor(list(itertools.product(range(5), repeat=3)))  # all of them, [125, 3]
    rows = target[blocks[:, 0], blocks[:, 1]]
    accepted = temperatures.expected_accepted(draft.expand_as(rows), rows, blocks, temperature)
    weight = draft_p.gather(1, blocks.T).prod(dim=0)
    exact = float((weight * accepted).sum())
    at_first = float((target_p[0, 0, 0].minimum(draft_p[0])).sum())
    assert at_first < exact < 3 * at_first

    generator, n = torch.Generator().manual_seed(5), 8000
    q, p = draft_p.tolist(), target_p.tolist()
    drawn = [reject(q, lambda x: p[x[0]][x[1]], generator) for _ in range(n)]
    counts = torch.tensor([float(k) for k, _ in drawn])
    error = float(counts.std()) / math.sqrt(n)
    assert error < 0.02 and abs(float(counts.mean()) - exact) < BOUND * error
    for token, expected in enumerate(p[0][0][0]):  # and what it emits is the target's
        share = sum(first == token for _, first in drawn) / n
        assert abs(share - expected) < BOUND * math.sqrt(expected * (1 - expected) / n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draft_that_is_the_target_is_accepted_whole(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    drafts = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(2))
    assert temperatures.expected_accepted(logits, logits, drafts, 0.3).tolist() == [7.0, 7.0]


def test_what_the_target_never_says_ends_the_block() -> None:
    draft, target = torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)
    target[0, 1, 2] = -math.inf
    assert temperatures.expected_accepted(
        draft, target, torch.tensor([[0, 2, 1]]), 1.0
    ).tolist() == [1.0]


# --- the temperatures part ---


def test_temperatures_of_the_embedded_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--parts", "temperatures", "--new-tokens", "24")
    part = run(tmp_path / "r.json", *EMBEDDED, *flags, "--slots", "2")["parts"]["temperatures"]
    assert (part["sequences"], part["new_tokens"], part["filters"]) == (3, 24, None)
    assert "eager steps" in part["judged_by"] and "not served" in part["rejection_sampling"]
    assert [at["temperature"] for at in part["at"]] == [0, 0.3, 0.7, 1.0]
    greedy, *sampled = part["at"]
    assert list(greedy) == ["temperature", "served"] and greedy["served"]["mean"] > 1.5
    for at in sampled:
        ours, theirs = at["uncut"], at["rejection_sampling"]
        assert ours["n"] == theirs["n"] == at["served"]["n"] > 3
        assert 16 >= ours["mean"] >= at["served"]["mean"] > 1 and 1 < theirs["mean"] <= 16
        ratio = at["uncut_over_rejection_sampling"]
        assert ratio["mean"] == pytest.approx(ours["mean"] / theirs["mean"])
        for values in (ours, theirs, ratio):
            assert 0 < values["standard_error"] < values["mean"]
    printed = capsys.readouterr().out
    assert "REJECTION SAMPLING COMPUTED" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_the_judge_sees_the_blocks_that_are_served() -> None:
    built = build(*EMBEDDED, "--new-tokens", "24")
    prompts = chosen_prompts(built)
    each = bench.seeded(built, len(prompts), 0.7)
    judge = temperatures.BlockJudge(built, 0.7)
    with bench.measuring(built.device):
        served = bench.decode(built.decoder, prompts, 24, True, built.width, each)
        with bench.served_by(built.decoder, judge.runner):
            again = bench.decode(built.decoder, prompts, 24, True, built.width, each)
    assert again.tokens == served.tokens
    assert built.decoder._runner is not judge.runner
    cut = [ours - 1 - n for ours, n in zip(judge.ours, served.accepted, strict=True)]
    assert min(cut) >= 0 and sum(n > 0 for n in cut) <= len(prompts)  # only at a text's end


def test_the_ratios_error_knows_of_pairs() -> None:
    values = [1.0, 2.0, 4.0, 3.0]
    half = temperatures.ratio_of(values, [2 * value for value in values])
    assert half == {"mean": 0.5, "standard_error": 0.0, "n": 4}
    assert temperatures.ratio_of([], []) == {"mean": None, "standard_error": None, "n": 0}
    # By hand: ratio 1, rests -1, 1 over a mean of 2; deviation 1/2, over the root of 2.
    by_hand = {"mean": 1.0, "standard_error": pytest.approx(0.5 / 2**0.5), "n": 2}
    assert temperatures.ratio_of([1.0, 3.0], [2.0, 2.0]) == by_hand


def test_where_no_trained_draft_is_the_part_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run(tmp_path / "r.json", *TINY, "--parts", "temperatures")
    why = content["parts"]["temperatures"]["skipped"]
    assert why == "random weights have no trained draft view"
    assert f"temperatures: left out, {why}" in capsys.readouterr().out
    directory = write_checkpoint(tmp_path / "model", draft=False)
    flags = ["--device", "cpu", "--contexts", "30", "--new-tokens", "8", "--repeats", "1"]
    flags += ["--parts", "sampling,temperatures", "--accept", "7.75"]
    content = run(tmp_path / "p.json", "--checkpoint", str(directory), *flags)
    assert content["parts"]["temperatures"]["skipped"] == "no draft view"
    assert content["parts"]["sampling"]["mode"] == "ar" and content["failed"] == {}


def test_a_text_without_a_cycle_has_no_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = list(range(257))
    directory = write_checkpoint(tmp_path / "model", eos_token_id=everything)
    flags = ("--device", "cpu", "--contexts", "30", "--new-tokens", "8", "--sequences", "2")
    content = run(
        tmp_path / "r.json", "--checkpoint", str(directory), *flags, "--parts", "temperatures"
    )
    assert content["failed"] == {}
    for at in content["parts"]["temperatures"]["at"]:
        assert at["served"] == {"mean": None, "standard_error": None, "n": 0}
    assert "REJECTION" in capsys.readouterr().out
