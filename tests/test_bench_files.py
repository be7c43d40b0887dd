"""What the benchmark makes of its files: comparison, interruption, profile; acceptance by name."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from orthrus_fast import bench, steps
from orthrus_fast.bench import against, command
from orthrus_fast.bench.acceptance import Text, averages, by_position, distinct_trigrams
from orthrus_fast.bench.decoding import decode
from orthrus_fast.bench.interruption import Terminated, heeding_sigterm
from orthrus_fast.bench.published import PUBLISHED
from orthrus_fast.bench.trace import by_kernel
from orthrus_fast.errors import RequestError

TINY = ["--shape", "tiny", "--device", "cpu", "--repeats", "3", "--max-seq-len", "300"]
SHORT = ["--contexts", "40,90", "--new-tokens", "24"]


def run(path: Path, *flags: str, expected: int = 0) -> Any:
    """The JSON of a run."""
    assert bench.main([*flags, "--json", str(path)]) == expected
    return json.loads(path.read_text())


# --- against an older result ---


def scaled(value: Any, times: float, rates: float, spread: float) -> Any:
    """A result with every median and its spread anew: times and rates by these factors."""

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, dict) and "median" in value:
            factor = rates if "per_second" in name else times
            median = 10.0 * factor
            below, above = median * (1 - spread), median * (1 + spread)
            return {"median": median, "p10": below, "p90": above, "n": 20}
        if isinstance(value, dict):
            return {key: walk(part, f"{name} {key}") for key, part in value.items()}
        return [walk(part, name) for part in value] if isinstance(value, list) else value

    return {**value, "parts": walk(value["parts"], "")}


class Pair:
    """Two files of one finished command, to be changed at will."""

    def __init__(self, directory: Path) -> None:
        self.flags = [*TINY, *SHORT, "--parts", "passes,cycles"]
        self.older, self.newer = directory / "older.json", directory / "newer.json"
        self.content = run(self.newer, *self.flags)

    def compare(self, older: Any, newer: Any, *flags: str) -> int:
        self.older.write_text(json.dumps(older))
        self.newer.write_text(json.dumps(newer))
        files = ["--json", str(self.newer), "--against", str(self.older)]
        return bench.main([*self.flags, *files, *flags])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def test_a_loss_of_a_tenth_is_seen(
    pair: Pair, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "build", lambda *_: pytest.fail("all is measured"))
    older = scaled(pair.content, 1.0, 1.0, 0.01)
    for slower in (scaled(pair.content, 1.1, 1.0, 0.01), scaled(pair.content, 1.0, 0.9, 0.01)):
        capsys.readouterr()
        assert pair.compare(older, slower) == 1
        printed = capsys.readouterr().out
        assert "%, worse)" in printed and "better)" not in printed
        assert pair.compare(older, slower, "--loss", "0.2") == 0
    assert "cycles at[context=40] tokens_per_second diffusion: 10 -> 9 (-10.0%, worse)" in printed
    faster = scaled(pair.content, 0.9, 1.1, 0.01)
    assert pair.compare(older, faster) == 0
    printed = capsys.readouterr().out
    assert "passes at[context=90] verify ms: 10 -> 9 (-10.0%, better)" in printed
    assert "0 got worse by more than 5%" in printed


@pytest.mark.parametrize(("times", "spread"), [(1.0, 0.01), (1.1, 0.06), (1.5, 0.3), (1.03, 0.01)])
def test_noise_is_no_loss(
    times: float, spread: float, pair: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spans that meet, and a real change below the share that is asked about."""
    older, newer = (scaled(pair.content, t, 1.0, spread) for t in (1.0, times))
    assert pair.compare(older, newer) == 0
    n_moved = 0 if times != 1.03 else len([*against.summaries(older["parts"])]) - 6  # not rates
    assert f"{n_moved} medians moved beyond their spread" in capsys.readouterr().out


def test_one_sample_has_no_spread(pair: Pair) -> None:
    older, newer = (scaled(pair.content, t, 1.0, 0.01) for t in (1.0, 2.0))
    assert len(against.moved(older, newer)) > 5
    for _, value in against.summaries(newer["parts"]):
        value["n"] = 2
    assert against.moved(older, newer) == []


def test_entries_are_met_by_what_names_them(pair: Pair) -> None:
    """Not by their place: a context more in one file shifts nothing."""
    older = scaled(pair.content, 1.0, 1.0, 0.01)
    newer = copy.deepcopy(older)
    newer["parts"]["passes"]["at"].reverse()
    newer["parts"]["passes"]["at"][0]["verify"]["ms"] = dict(median=20.0, p10=19, p90=21, n=20)
    (found,) = against.moved(older, newer)
    assert (found.name, found.loss) == ("passes at[context=90] verify ms", 1.0)


@pytest.mark.parametrize(
    ("where", "name", "value", "problem"),
    [
        ("arguments", "shape", "8B", "other arguments: shape 8B then, tiny now"),
        ("arguments", "accept", 0.5, "other arguments: accept 0.5 then, 0.85 now"),
        ("configuration", "hardware", "NVIDIA H100", "was measured on NVIDIA H100, this on"),
        ("arguments", "device", None, "other arguments: device None then, cpu now"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    where: str,
    name: str,
    value: Any,
    problem: str,
    pair: Pair,
    capsys: pytest.CaptureFixture[str],
) -> None:
    older = copy.deepcopy(pair.content)
    holder = older if where == "arguments" else older["runs"][0]
    holder[where][name] = value
    assert pair.compare(older, pair.content) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: against: ") and problem in error and error.count("\n") == 1


def test_an_argument_that_the_older_program_did_not_have_says_nothing(pair: Pair) -> None:
    older = scaled(pair.content, 1.0, 1.0, 0.01)
    newer = copy.deepcopy(older)
    del older["arguments"]["slots_list"]
    older["arguments"]["prompts_file"] = "elsewhere.jsonl"
    older["format"] = 1
    assert pair.compare(older, newer) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arguments": {}, "parts": {}, "runs": []}'])
def test_a_file_that_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(RequestError, match="is no result of this program"):
        against.read_older(path)
    with pytest.raises(RequestError, match="is no result of this program"):
        against.read_older(tmp_path / "absent.json")


def test_the_results_in_the_repository_can_be_read() -> None:
    paths = sorted((bench.REPOSITORY / "benchmarks" / "results").glob("*/[148]*B.json"))
    assert len(paths) >= 3
    for path in paths:
        older = against.read_older(path)
        assert against.hardware(older) and len([*against.summaries(older["parts"])]) > 10


# --- interruption ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_leaves_a_whole_file_and_goes_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    flags = [*TINY, *SHORT, "--parts", "startup,slots", "--slots-list", "1,2,3,4,5,6,7,8"]
    program = [sys.executable, "-m", "orthrus_fast.bench", *flags, "--json", str(path)]
    process = subprocess.Popen(
        program, cwd=bench.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and json.loads(path.read_text())["unfinished"]:
            process.send_signal(number)
            break
        time.sleep(0.01)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert error.splitlines()[-1].endswith("; what was measured stays in --json's file")
    assert "Traceback" not in error

    before = json.loads(path.read_text())
    held = [entry["slots"] for entry in before["unfinished"]["slots"]]
    assert list(before["parts"]) == ["startup"] and 1 <= len(held) < 8
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
    if number == signal.SIGTERM:
        return  # what follows is the same
    after = run(path, *flags)
    assert after["parts"]["startup"] == before["parts"]["startup"]
    at = after["parts"]["slots"]["at"]
    assert [entry["slots"] for entry in at] == list(range(1, 9))
    assert at[: len(held)] == before["unfinished"]["slots"]
    assert after["unfinished"] == {} and len(after["runs"]) == 2


def test_sigterm_is_heeded_only_within() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), heeding_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []

    def elsewhere() -> None:
        with heeding_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]  # another thread may not set handlers, and does not try


# --- rates ---


def test_a_rate_is_of_the_time_in_which_all_decode() -> None:
    """The first ends after two cycles, at 5 s; what the other does alone does not count."""

    def request(accepted: list[int], n_tokens: int, first_at: float, last_at: float) -> Any:
        named = {"accepted": accepted, "tokens": [0] * n_tokens}
        return SimpleNamespace(**named, first_at=first_at, last_at=last_at)

    def decoded(*requests: Any) -> Any:
        waiting = iter(requests)
        decoder: Any = SimpleNamespace(
            _runner=SimpleNamespace(state=SimpleNamespace(reset=lambda: None)),
            _request=lambda *_: next(waiting),
            _run=lambda *_: [],
        )
        return decode(decoder, [[1]] * len(requests), 9, True, 16)

    both = decoded(request([3, 2], 7, 1.0, 5.0), request([0, 1, 4], 9, 2.0, 9.0))
    assert both.tokens_per_second == (6 + 3) / (5.0 - 2.0)  # of 7 the last is past the budget
    assert both.accepted == [3, 2, 0, 1, 4] and both.tokens_per_cycle == 14 / 5
    assert decoded(request([1, 1], 5, 1.0, 3.0)).tokens_per_second == 2.0
    one_after_another = decoded(request([1], 3, 1.0, 2.0), request([1], 3, 3.0, 4.0))
    assert one_after_another.tokens_per_second == 0.0


# --- profile ---


def test_a_profile_comes_last_and_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profile(*args: Any) -> Any:
        held = json.loads((tmp_path / "r.json").read_text())
        assert list(held["parts"]) == ["startup", "passes"]  # nothing is timed after it
        return true_profile(*args)

    true_profile = command.profile
    monkeypatch.setattr(command, "profile", profile)
    path, trace = tmp_path / "r.json", tmp_path / "trace.json"
    flags = [*TINY, *SHORT, "--parts", "startup,passes", "--profile", str(trace)]
    content = run(path, *flags)
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    kernels = {kernel["name"]: kernel for kernel in content["kernels"]}
    assert "aten::mm" in kernels and set(kernels) <= names
    assert sum(kernel["share"] for kernel in kernels.values()) == pytest.approx(1)
    spent = [kernel["us_per_cycle"] for kernel in content["kernels"]]
    assert spent == sorted(spent, reverse=True) and spent[-1] > 0
    # Two views of two layers of four products, and the head for each.
    assert kernels["aten::mm"]["count_per_cycle"] == pytest.approx(2 * (2 * 4 + 1), abs=1)
    assert content["profile"]["cycles"] == 10 and content["profile"]["of"] == "operators"
    assert "aten::mm" in capsys.readouterr().out
    monkeypatch.setattr(command, "build", lambda *_: pytest.fail("the trace is there"))
    assert run(path, *flags) == content


def test_what_a_kernel_waits_for_another_is_not_its_own() -> None:
    """Times in µs, of two cycles: a norm waits for its product, a copy runs inside another."""
    on_gpu = [
        ("kernel", "product", 0.0, 10.0, {"grid": [1, 304, 1]}),
        ("kernel", "norm", 4.0, 8.0, {"grid": [32, 1, 1]}),  # to 12, of which 2 past the product
        ("kernel", "product", 11.0, 4.0, {"grid": [1, 40, 1]}),  # to 15
        ("gpu_memcpy", "copy", 13.0, 1.0, {"stream": 7}),  # to 14, within the product
        ("kernel", "product", 20.0, 6.0, {"grid": [1, 304, 1]}),  # after a gap
    ]
    events = [
        {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}
        for cat, name, ts, dur, args in (*on_gpu, ("cpu_op", "aten::mm", 0.0, 99.0, {}))
    ]
    events += [{"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 1.0}]
    entries = by_kernel(events, 2)
    assert [(entry["name"], entry["grid"]) for entry in entries] == [
        ("product", [1, 304, 1]),
        ("norm", [32, 1, 1]),
        ("product", [1, 40, 1]),
        ("copy", None),
    ]
    assert [entry["us_added_per_cycle"] for entry in entries] == [8.0, 1.0, 1.0, 0.5]
    assert [entry["us_per_cycle"] for entry in entries] == [8.0, 4.0, 2.0, 0.5]
    assert [entry["count_per_cycle"] for entry in entries] == [1.0, 0.5, 0.5, 0.5]
    assert sum(entry["share"] for entry in entries) == 1
    assert 2 * sum(entry["us_added_per_cycle"] for entry in entries) == 15 + 6  # the time it ran


def test_a_trace_needs_its_directory(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, "--profile", "/nowhere/trace.json"]) == 2
    assert "profile: /nowhere/trace.json: there is no such directory" in capsys.readouterr().err


# --- acceptance by name ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_acceptance_by_name(name: str) -> None:
    for spelled in (name, name.upper(), name.lower()):
        args = bench.build_parser().parse_args(["--accept", spelled])
        assert args.accept == PUBLISHED[name].tokens_per_cycle
        source = {"name": name, "tokens_per_cycle": args.accept, "source": PUBLISHED[name].source}
        assert args.accept_source == source
    args = bench.build_parser().parse_args(["--accept", spelled, "--accept", "0.5"])
    assert (args.accept, args.accept_source) == (0.5, None)


def test_published_acceptance_is_shown_and_unknown_names_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--list-accept"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PUBLISHED)
    assert any("8B/MATH-500" in line and "11.70" in line and "arXiv" in line for line in lines)
    help_text = " ".join(bench.build_parser().format_help().split())
    assert all(name in help_text.replace(" ", "") for name in ("8B/MATH-500", "1.7B/poetry"))
    assert bench.main(["--accept", "8B/GSM8K"]) == 2
    error = capsys.readouterr().err
    assert "'8B/GSM8K' is not one of 1.7B/GSM8K, 4B/GSM8K" in error and error.count("\n") == 1


def test_the_source_is_in_the_file_and_the_acceptance_is_had(tmp_path: Path) -> None:
    flags = ["--contexts", "20", "--parts", "cycles,slots", "--slots-list", "2"]
    flags += ["--new-tokens", "270", "--accept", "1.7B/code", "--repeats", "1"]
    content = run(tmp_path / "r.json", *TINY, *flags)
    parts = content["parts"]
    for part in (parts["cycles"], parts["slots"]):
        assert part["accept_source"] == content["arguments"]["accept_source"]
        assert part["accept_source"]["source"].endswith("ZaryaOrthrus-1.7B")
        (at,) = part["at"]
        assert at["tokens_per_cycle_expected"] == pytest.approx(3.26)
        error = at["tokens_per_cycle_standard_error"]
        assert 0 < error < 0.3 and abs(at["tokens_per_cycle"] - 3.26) < 4.9 * error


# --- real acceptance ---


def text(n_tokens: int, accepted: list[int], equal: bool = True) -> Text:
    return Text(list(range(n_tokens)), accepted, equal)


def test_acceptance_by_position_by_hand() -> None:
    # 1 + (2+1) + (0+1) + (3+1) tokens: the block of four ends with a verified token each time.
    whole = text(9, [2, 0, 3])
    assert not whole.is_cut
    accepted, reached = by_position([whole], 4)
    assert reached == [3, 2, 2] and accepted == [2 / 3, 1.0, 0.5]
    # One token fewer: the last block's third draft ended the text, and nothing was refused.
    cut = text(8, [2, 0, 3])
    assert cut.is_cut and by_position([cut], 4) == ([2 / 3, 1.0, 0.5], [3, 2, 2])
    cut = text(5, [2, 1])  # 1 + 3 + 1: the second draft of the last block had no judge
    assert cut.is_cut and by_position([cut], 4) == ([1.0, 1.0, 0.0], [2, 1, 1])
    assert by_position([text(1, [])], 3) == ([None, None], [0, 0])


def test_both_averages_by_hand() -> None:
    found = averages([text(9, [2, 0, 3]), text(5, [3]), text(1, [])])
    assert found["token_weighted"] == (8 + 4) / 4
    assert found["mean_over_prompts"] == pytest.approx((8 / 3 + 4) / 2)
    assert found["standard_error"] == pytest.approx((4 - 8 / 3) / 2)
    assert averages([text(1, [])])["token_weighted"] is None
    assert averages([text(5, [3])])["standard_error"] is None


def test_distinct_trigrams_by_hand() -> None:
    assert distinct_trigrams([1, 2, 3, 4]) == 1.0
    assert distinct_trigrams([1, 1, 1, 1, 1]) == 1 / 3
    assert distinct_trigrams([1, 2]) == 1.0


EMBEDDED = ["--device", "cpu", "--parts", "acceptance,identity", "--sequences", "3"]
EMBEDDED += ["--new-tokens", "24", "--max-seq-len", "1100", "--contexts", "64"]


def test_acceptance_of_the_embedded_checkpoint(tmp_path: Path) -> None:
    parts = run(tmp_path / "r.json", *EMBEDDED, "--slots", "2")["parts"]
    part, identity = parts["acceptance"], parts["identity"]
    assert part["prompts_file"] == "heldout.jsonl"
    assert part["texts_equal_to_ar"] == part["sequences"] == len(part["by_prompt"]) == 3
    found = part["tokens_per_cycle"]
    assert found["token_weighted"] == pytest.approx(identity["tokens_per_cycle"])
    by_prompt = [prompt["tokens_per_cycle"] for prompt in part["by_prompt"]]
    assert found["mean_over_prompts"] == pytest.approx(sum(by_prompt) / 3)
    assert len(part["accepted_at_position"]) == len(part["reached_position"]) == 15
    assert part["reached_position"] == sorted(part["reached_position"], reverse=True)
    n_cycles = sum(prompt["cycles"] for prompt in part["by_prompt"])
    assert n_cycles - 3 <= part["reached_position"][0] <= n_cycles
    assert part["accepted_at_position"][0] > 0.5  # a trained draft view
    assert 0 < part["distinct_trigrams"] <= 1


def accept_one_too_many(block: Tensor, target: Tensor) -> Tensor:
    agreeing = (block[:, 1:] == target[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)
    return (agreeing + 1).clamp(max=block.shape[1] - 1)


def test_texts_that_differ_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "accept", accept_one_too_many)
    part = run(tmp_path / "r.json", *EMBEDDED, "--parts", "acceptance")["parts"]["acceptance"]
    assert part["texts_equal_to_ar"] < 3
    assert [p["equal_to_ar"] for p in part["by_prompt"]].count(True) == part["texts_equal_to_ar"]


def test_without_prompts_acceptance_is_left_out(tmp_path: Path) -> None:
    part = run(tmp_path / "r.json", *TINY, *SHORT, "--parts", "acceptance")["parts"]["acceptance"]
    assert part["skipped"] == "random weights have no trained draft view"
    flags = [*EMBEDDED, "--parts", "acceptance", "--checkpoint", str(bench.EMBEDDED)]
    part = run(tmp_path / "c.json", *flags)["parts"]["acceptance"]
    assert part["skipped"] == "no --prompts-file"
