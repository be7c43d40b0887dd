"""Prompts from a file, results into a file: read, resumed, refused, and killed on the way."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import orthrus_fast
from orthrus_fast import Grammar, SamplingParams
from orthrus_fast import fingerprint as fingerprints
from orthrus_fast import prompts as prompts_file
from orthrus_fast.checkpoint import open_checkpoint
from orthrus_fast.cli import batch, results_file
from orthrus_fast.cli.flags import build_generate_parser
from orthrus_fast.cli.main import main
from orthrus_fast.errors import PromptError, RequestError
from orthrus_fast.prompts import PromptLine, read_prompts
from orthrus_fast.results import Generation
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
PROMPTS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "hello"},
    {"prompt": "one two three"},
    {"id": "ids", "ids": [5, 6, 7], "max_new_tokens": 30},
    {"id": 9, "prompt": "naïve 中", "max_new_tokens": 3},
    {"id": "stopped", "prompt": "x", "stop": ["qqq", "zzz"]},
    {"id": "last", "prompt": "goodbye", "logprobs": True},
]


def write_prompts(path: Path, prompts: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


def flags(checkpoint: Path, prompts: Path, output: Path | str, *more: object) -> list[str]:
    line = ["--checkpoint", checkpoint, "--prompts-file", prompts, "--output", output]
    return [*map(str, [*line, "--max-new-tokens", 12, *more]), "--device", "cpu"]


Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """generate.py in this process, with PROMPTS, into results.jsonl, unless told otherwise."""

    def run(
        *more: object,
        prompts: list[dict[str, Any]] = PROMPTS,
        checkpoint: Path = raw,
        output: Path | str = tmp_path / "results.jsonl",
    ) -> SimpleNamespace:
        file = write_prompts(tmp_path / "prompts.jsonl", prompts)
        code = main(["generate", *flags(checkpoint, file, output, *more)])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def read_results(path: Path) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """The header, and the results by id, each without what a clock says, or decides."""
    header, *results = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({result["index"] for result in results}) == len(results)
    for result in results:
        if result["stats"]:
            result["stats"] = {"prompt_tokens": result["stats"]["prompt_tokens"]}
    return header, {result["id"]: result for result in results}


def assert_one_line(got: SimpleNamespace, *parts: str) -> None:
    assert (got.code, got.out) == (2, "")
    assert got.err.startswith("error: ")
    assert got.err.count("\n") == 1
    for part in parts:
        assert part in got.err


# Reading prompts.


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    lines = [
        '\ufeff{"prompt": "a"}\r\n',
        "\n",
        '  {"messages": [{"role": "user", "content": "b"}], "id": "m", "temperature": 1}\n',
        ' \t\r\n{"ids": [1, 2], "stop": "s", "seed": 18446744073709551615, "top_k": 3}\n',
        '{"prompt": "", "stop": ["s", "t"], "id": -4, "logprobs": true}',
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("".join(lines).encode())
    first, second, third, fourth = read_prompts(path)
    assert (first.id, first.index, first.kind, first.prompt) == (1, 0, "prompt", "a")
    assert (second.id, second.kind, second.settings) == ("m", "messages", {"temperature": 1})
    assert (third.id, third.where) == (5, f"{path}, line 5")
    assert third.settings == {"stop": ("s",), "seed": 2**64 - 1, "top_k": 3}
    assert (fourth.id, fourth.prompt, fourth.settings["stop"]) == (-4, "", ("s", "t"))


def test_names_of_other_programs_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    write_prompts(path, [{"text": "a", "max_tokens": 7}, {"prompt": "a", "max_new_tokens": 7}])
    one, other = read_prompts(path)
    assert (one.kind, one.prompt, one.settings) == (other.kind, other.prompt, other.settings)
    assert one.extra == {}


def test_what_looks_like_a_setting_and_is_none_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [
        {"prompt": "a", "temprature": 1, "kind": "x", "expected": [1], "source": "s", "index": 3},
        {"prompt": "b", "temprature": 2, "repetition_penalty": 1.1, "max-new-tokens": 3},
        {"prompt": "c", "\x1b[31mtemperature": 1, "idx": 1, "task_id": 1, "topK": 0},
    ]
    path = write_prompts(tmp_path / "prompts.jsonl", prompts)
    lines = read_prompts(path)
    assert [{**line.extra, "prompt": line.prompt} for line in lines] == prompts
    assert [record.getMessage().removeprefix(f"{path}, ") for record in caplog.records] == [
        "line 1: 'temprature' is no setting here (did you mean temperature?); it changes no text",
        "line 2: 'repetition_penalty' is no setting here; it changes no text",
        "line 2: 'max-new-tokens' is no setting here (did you mean max_new_tokens?); "
        "it changes no text",
        r"line 3: '\x1b[31mtemperature' is no setting here (did you mean temperature?); "
        "it changes no text",
        "line 3: 'topK' is no setting here (did you mean top_k?); it changes no text",
    ]


def test_the_held_out_prompts_are_a_prompts_file(caplog: pytest.LogCaptureFixture) -> None:
    lines = read_prompts(ROOT / "model" / "heldout.jsonl")
    assert {line.kind for line in lines} == {"prompt", "messages"}
    assert {name for line in lines for name in line.extra} >= {"kind", "expected"}
    assert not any(line.settings for line in lines) and caplog.records == []


def test_standard_input_is_read_as_a_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def piped(content: bytes) -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        return run("--prompts-file", "-")

    content = "".join(json.dumps(prompt) + "\n" for prompt in PROMPTS).encode()
    assert piped(content).code == 0
    before = (tmp_path / "results.jsonl").read_bytes()
    again = piped(content)  # resumed by the fingerprint of what came
    assert (again.code, again.err[:10]) == (0, "0 prompts ")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert_one_line(piped(b'{"id": 1}\n'), "error: standard input, line 1: none: it needs one of")
    assert_one_line(piped(b""), "error: standard input: has no prompts")
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(run("--prompts-file", "-"), "error: standard input: closed")


@pytest.mark.parametrize(
    "line, problem",
    [
        ("nonsense", "not valid JSON"),
        ('{"prompt": NaN}', "NaN is not JSON"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ("{}", "none: it needs one of prompt (text), messages and ids"),
        ('{"prompt": "a", "ids": [1]}', "prompt and ids: it needs one of"),
        ('{"prompt": "a", "text": "b"}', "prompt and text are the same; give one of them"),
        ('{"text": 3}', "prompt: 3 is not text"),
        (
            '{"text": "a", "max_tokens": 1, "max_new_tokens": 1}',
            "max_new_tokens and max_tokens are the same",
        ),
        ('{"prompt": "a", "max_tokens": 0}', "max_new_tokens: 0 is not an integer above 0"),
        ('{"prompt": "a", "score": 1e999}', "not valid JSON (1e999 is too large)"),
        ('{"prompt": 3}', "prompt: 3 is not text"),
        ('{"prompt": null}', "prompt: None is not text"),
        ('{"messages": "hi"}', "messages: 'hi' is not a list of objects"),
        ('{"messages": ["hi"]}', "is not a list of objects"),
        ('{"ids": [1, true]}', "is not a list of integers"),
        ('{"ids": [1.5]}', "is not a list of integers"),
        ('{"prompt": "a", "id": 1.5}', "id: 1.5 is not text or an integer"),
        ('{"prompt": "a", "id": true}', "id: True is not text or an integer"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: 0 is not an integer above 0"),
        ('{"prompt": "a", "temperature": "1"}', "temperature: '1' is not a number"),
        ('{"prompt": "a", "temperature": 1e9999}', "not valid JSON (1e9999 is too large)"),
        ('{"prompt": "a", "top_k": 2.5}', "top_k: 2.5 is not an integer"),
        ('{"prompt": "a", "seed": "x"}', "seed: 'x' is not an integer"),
        ('{"prompt": "a", "seed": 1%s}' % ("0" * 5000), "not valid JSON"),
        ('{"prompt": "a", "stop": [1]}', "stop: [1] is not text or a list of texts"),
        ('{"prompt": "a", "logprobs": 1}', "logprobs: 1 is not true or false"),
        ('{"prompt": "a", "json_schema": null}', "json_schema: None is not a schema or 'any'"),
        ('{"prompt": "a", "json_schema": "{}"}', "json_schema: '{}' is not a schema or 'any'"),
    ],
)
def test_a_bad_line_is_named_in_one_line(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(PromptError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert problem in str(error.value)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_files_that_cannot_be_read_as_prompts(tmp_path: Path) -> None:
    def problem(content: bytes | None = None) -> str:
        path = tmp_path / "prompts.jsonl"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PromptError) as error:
            read_prompts(path)
        return str(error.value).removeprefix(str(path))

    assert problem() == ": cannot be read (No such file or directory)"
    assert problem(b"") == ": has no prompts; each line is an object with a prompt"
    assert problem(b"\n \n").startswith(": has no prompts")
    assert problem(b'{"prompt": "a"}\n{"prompt": "\xff"}') == (
        ", line 2: not valid UTF-8 at byte 12"
    )
    assert problem(b'{"prompt": "a"}\n{"prompt": "b", "id": 1}') == (
        ", line 2: id 1: also line 1's"
    )
    assert problem(b'{"prompt": "' + b"x" * 2**22 + b'"}') == ", line 1: over 4194304 bytes"
    with pytest.raises(PromptError, match="cannot be read \\(Is a directory"):
        read_prompts(tmp_path)


def test_a_seed_is_the_runs_plus_the_index_unless_the_line_has_one() -> None:
    params = [SamplingParams(), SamplingParams(seed=7), SamplingParams(temperature=1.0)]
    assert [p.seed for p in batch.seeded(params, 2**64 - 1)] == [2**64 - 1, 7, 1]
    assert batch.seeded(params, None) == params


# What a run writes.


def test_results_are_the_librarys_one_a_line_as_they_end(
    raw: Path, run: Run, tmp_path: Path
) -> None:
    got = run("--slots", 2)
    assert (got.code, got.out) == (0, "")
    header, results = read_results(tmp_path / "results.jsonl")
    assert header["orthrus_fast_results"] == 1
    assert set(header["fingerprint"]) == {"weights", "settings", "prompts"}
    assert (header["prompts"], header["seed"]) == (6, None)
    configuration = header["configuration"]
    assert (configuration["slots"], configuration["mode"]) == (2, "diffusion")
    assert configuration["sampling"]["temperature"] == 0
    assert list(results) != [p.get("id", 2) for p in PROMPTS]  # short ones do not wait
    decoder = orthrus_fast.load(raw, device="cpu", slots=2)
    for number, line in enumerate(PROMPTS, 1):
        result = results[line.get("id", number)]
        params = SamplingParams(
            stop=tuple(line.get("stop", ())), logprobs=line.get("logprobs", False)
        )
        prompt = line.get("prompt", line.get("ids"))
        expected = decoder.generate(prompt, line.get("max_new_tokens", 12), params)
        assert result["index"] == number - 1
        assert (result["text"], result["tokens"]) == (expected.text, expected.tokens)
        assert (result["finish_reason"], result["error"]) == (expected.finish_reason, None)
        assert result.get("logprobs") == pytest.approx(expected.logprobs)
        assert result["stats"]["prompt_tokens"] > 0
    n_tokens = sum(len(result["tokens"]) for result in results.values())
    assert got.err.startswith(f"6 prompts · {n_tokens} tokens · ")
    assert got.err.endswith(" tokens/s · 0 failed\n")


def test_a_bad_prompt_is_a_result_and_stays_one(run: Run, tmp_path: Path) -> None:
    prompts = [
        {"id": "empty", "prompt": ""},
        {"id": "no ids", "ids": []},
        {"id": "good", "prompt": "hello"},
        {"id": "not in the vocabulary", "ids": [1, -3]},
        {"id": "no template", "messages": [{"role": "user", "content": "x"}]},
        {"id": "surrogate", "prompt": "\ud800"},
        {"id": "long", "prompt": "x" * 10**6},
        {"id": "budget", "prompt": "x", "max_new_tokens": 10**30},
    ]
    got = run(prompts=prompts)
    assert got.code == 3
    assert "8 prompts · 12 tokens · " in got.err and got.err.endswith(
        " · 7 failed (see their results)\n"
    )
    _, results = read_results(tmp_path / "results.jsonl")
    assert results["good"]["finish_reason"] == "length"
    parts = {
        "empty": "prompt: empty",
        "no ids": "ids: empty",
        "not in the vocabulary": "-3 is no id below 272",
        "no template": "template",
        "surrogate": "lone surrogate",
        "long": "1000000 tokens + max_new_tokens 12",
        "budget": "over max_seq_len",
    }
    for name, part in parts.items():
        result = results[name]
        assert (result["finish_reason"], result["tokens"]) == ("error", [])
        assert part in result["error"]
    before = (tmp_path / "results.jsonl").read_bytes()
    again = run(prompts=prompts)
    assert again.code == 3  # an earlier run's failures are failures
    assert again.err.startswith("0 prompts · 0 tokens · ")
    assert again.err.endswith(" · 7 failed (see their results) · 8 were done before\n")
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_line_repeats_the_fields_that_are_no_settings(run: Run, tmp_path: Path) -> None:
    own = {"kind": "x", "expected": {"a": [1.5, None, "\ud800"]}, "source": "é"}
    taken = {"index": 40, "tokens": "t", "finish_reason": None, "error": "e", "extra": {"extra": 1}}
    prompts = [{"text": "a", "id": "plain"}, {"text": "a", "id": "own", **own}]
    prompts += [{"text": "", "id": "failed", **own}, {"text": "a", "id": "taken", **own, **taken}]
    assert run(prompts=prompts).code == 3
    results = read_results(tmp_path / "results.jsonl")[1]
    plain, failed = results["plain"], results["failed"]
    here = {"id": "own", "index": 1}
    assert results["own"] == {**plain, **here, **own}
    assert {name: failed[name] for name in own} == own and "empty" in failed["error"]
    there = {"id": "taken", "index": 3, "extra": taken}
    assert results["taken"] == {**plain, **there, **own}
    assert run(prompts=prompts).code == 3  # taken up by its own index
    got = run(prompts=[prompts[0], {**prompts[1], "source": "f"}, *prompts[2:]])
    assert_one_line(got, "differs in prompts")


def test_a_full_disk_names_the_file_and_the_rest_comes_later(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run().code == 0
    output = tmp_path / "results.jsonl"
    expected, n_bytes = read_results(output), output.stat().st_size
    output.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, as of a full disk
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes * 3 // 4, limits[1]))
        got = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_one_line(got, f"error: {output}: cannot be written (File too large); what is done stays")
    assert "Errno" not in got.err
    assert 0 < output.stat().st_size <= n_bytes * 3 // 4
    assert run().code == 0
    assert read_results(output) == expected


def test_order_neighbours_and_slots_do_not_show_in_the_results(run: Run, tmp_path: Path) -> None:
    own = {"temperature": 0.9, "top_p": 0.95}
    prompts: list[dict[str, Any]] = [
        {"id": f"p{i}", "prompt": "abcdefg"[i:] or "z", "max_new_tokens": 4 + 7 * (i % 3)}
        | ({"seed": 100 + i} | own if i % 2 else {})
        for i in range(8)
    ]

    def results(order: list[int], slots: int) -> dict[Any, Any]:
        output = tmp_path / f"{order}{slots}.jsonl"
        assert run("--slots", slots, prompts=[prompts[i] for i in order], output=output).code == 0
        found = read_results(output)[1]
        return {name: (found[name]["tokens"], found[name]["text"]) for name in found}

    forward = results(list(range(8)), 3)
    assert len(forward) == 8
    assert results([7, 6, 5, 4, 3, 2, 1, 0], 3) == forward
    assert results([3, 1], 3) == {name: forward[name] for name in ("p3", "p1")}
    assert results(list(range(8)), 1) == forward


def test_a_chat_template_wraps_text_and_messages_but_not_ids(
    chat: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [
        {"prompt": "hi"},
        {"messages": [{"role": "user", "content": "m"}]},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "m"}]},
        {"ids": list(b"ids")},
        {"messages": []},
    ]

    def sent(*more: object) -> list[str]:
        encoded: list[str] = []
        encode = orthrus_fast.Decoder.encode

        def spy(self: Any, prompt: Any, **more: Any) -> list[int]:
            ids = encode(self, prompt, **more)
            encoded.append(bytes(ids).decode())
            return ids

        with monkeypatch.context() as patch:
            patch.setattr(orthrus_fast.Decoder, "encode", spy)
            output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
            assert run(*more, prompts=prompts, checkpoint=chat, output=output).code == 3
        assert "messages: empty" in read_results(output)[1][5]["error"]
        return encoded

    own = "<system>own</system><user>m</user><assistant>"
    user = ("<user>hi</user><assistant>", "<user>m</user><assistant>")
    assert sent() == [*user, own, "ids"]
    assert sent("--raw") == ["hi", user[1], own, "ids"]
    brief = "<system>brief</system>"
    assert sent("--system", "brief") == [brief + user[0], brief + user[1], own, "ids"]
    thinking = sent("--no-thinking")
    assert [text.endswith("[thinking False]") for text in thinking] == [True, True, True, False]


def test_standard_output_takes_results_too(run: Run, tmp_path: Path) -> None:
    done = run(prompts=PROMPTS[:2], output="-")
    assert done.code == 0
    assert run(prompts=PROMPTS[:2]).code == 0
    (tmp_path / "printed.jsonl").write_text(done.out)
    printed = read_results(tmp_path / "printed.jsonl")[1]
    assert printed == read_results(tmp_path / "results.jsonl")[1]
    assert done.err.startswith("2 prompts \xb7 24 tokens")


def test_the_embedded_checkpoint_converts_a_file_of_tables(run: Run, tmp_path: Path) -> None:
    task = "Convert to JSON:\n\nname,age\nAnn,31\nBob,45"
    prompts = [{"prompt": task}, {"messages": [{"role": "user", "content": task}]}]
    got = run("--slots", 2, "--max-new-tokens", 64, checkpoint=ROOT / "model", prompts=prompts)
    assert got.code == 0
    first, second = read_results(tmp_path / "results.jsonl")[1].values()
    assert first["tokens"] == second["tokens"]
    assert json.loads(first["text"]) == [{"name": "Ann", "age": 31}, {"name": "Bob", "age": 45}]


def test_a_terminal_sees_how_many_are_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    got = run()
    assert "6/6" in got.err and "tokens/s" in got.err
    assert re.search(r"\d:\d\d(\x1b\S*)? left", got.err)


# Going on where a run was killed.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call asked of the decoder."""
    asked: list[int] = []
    as_completed = orthrus_fast.Decoder.as_completed

    def spy(self: Any, prompts: list[Any], *rest: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return as_completed(self, prompts, *rest, **more)

    monkeypatch.setattr(orthrus_fast.Decoder, "as_completed", spy)
    return asked


@pytest.mark.parametrize("sampled", [False, True])
def test_a_run_cut_off_anywhere_is_finished_with_the_same_results(
    run: Run, tmp_path: Path, counted: list[int], sampled: bool
) -> None:
    more = ("--slots", 2, *(("--temperature", 1.0) if sampled else ()))
    output = tmp_path / "results.jsonl"
    assert run(*more).code == 0
    header, expected = read_results(output)
    assert isinstance(header["seed"], int) == sampled
    assert [expected[name]["seed"] for name in ("a", "last")] == (
        [header["seed"], header["seed"] + 5] if sampled else [None, None]
    )
    whole = output.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {ends[0]: 0, ends[0] + 1: 0, ends[3]: 3, ends[4] - 1: 3, ends[4] + 9: 4, ends[6] - 1: 5}
    for cut, n_kept in cuts.items():
        counted.clear()
        output.write_bytes(whole[:cut])
        got = run(*more)
        assert got.code == 0
        assert sum(counted) == 6 - n_kept
        assert ("were done before" in got.err) == (n_kept > 0)
        assert output.read_bytes().startswith(whole[: ends[n_kept]])
        assert read_results(output) == (header, expected)


def test_a_torn_header_or_an_empty_file_is_begun_anew(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run(prompts=PROMPTS[:1]).code == 0
    expected, whole = read_results(output), output.read_bytes()
    for cut in (0, 1, 10, 30, whole.index(b"\n")):
        output.write_bytes(whole[:cut])
        assert run(prompts=PROMPTS[:1]).code == 0
        assert read_results(output) == expected


def test_a_last_line_of_garbage_is_dropped(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run(prompts=PROMPTS[:2]).code == 0
    expected = read_results(output)
    header = output.read_bytes().split(b"\n")[0]
    for garbage in (b"\0" * 64 + b"\n", b'{"id": "a", "ind\n', b"\xff\n", b"[" * 99_999):
        output.write_bytes(header + b"\n" + garbage)
        assert run(prompts=PROMPTS[:2]).code == 0
        assert read_results(output) == expected


def test_another_run_is_refused_with_what_differs(run: Run, raw: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    other = tmp_path / "other"
    shutil.copytree(raw, other)
    assert run("--temperature", 0.5, "--seed", 5).code == 0
    before = output.read_bytes()

    def refused(*more: object, **options: Any) -> str:
        got = run("--temperature", 0.5, *more, **options)
        assert_one_line(got, str(output), "results of another run", "nothing was changed")
        assert output.read_bytes() == before
        return str(got.err.split("which differs in ")[1].split("; nothing")[0])

    assert run("--temperature", 0.5, checkpoint=other).code == 0  # another place, the same weights
    assert output.read_bytes() == before
    assert refused("--seed", 6) == "settings (seed: 5 there, 6 here)"
    assert refused(prompts=PROMPTS[:-1]) == "prompts"
    assert refused(prompts=PROMPTS[::-1]) == "prompts"
    assert refused(prompts=[{**PROMPTS[0], "top_k": 3}, *PROMPTS[1:]]) == "prompts"
    assert refused("--slots", 3) == "settings (slots: 1 there, 3 here)"
    assert refused("--mode", "ar") == "settings (mode: 'diffusion' there, 'ar' here)"
    assert refused("--max-new-tokens", 13) == "settings (max_new_tokens: 12 there, 13 here)"
    assert "float64' here; max_seq_len: 512 there, 500 here" in refused(
        "--dtype", "float64", "--max-seq-len", 500
    )
    assert "sampling: " in refused("--top-k", 3)
    assert "raw: False there, True here" in refused("--raw")
    (other / "generation_config.json").write_text('{"eos_token_id": [3]}')
    assert refused(checkpoint=other) == "weights"
    assert refused("--seed", 6, checkpoint=other, prompts=PROMPTS[:1]).startswith("weights, ")


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"my diary\n", "is no results file of orthrus-fast; nothing was changed"),
        (b'{"prompt": "a"}\n', "is no results file"),
        (b"{", None),
        (b"[1]\n", "is no results file"),
        (b"\x00\xff" * 3_000_000, "is no results file"),
        (b'{"orthrus_fast_results": 2}\n', "of format 2; this reads 1"),
        (b'{"orthrus_fast_results": 1}\n', "is no results file"),
        (
            b'{"orthrus_fast_results": 1, "fingerprint": 3, "configuration": {}, "seed": 1}\n',
            "is no results file",
        ),
    ],
)
def test_a_file_of_anything_else_is_left_alone(
    tmp_path: Path, content: bytes, problem: str | None
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    if problem is None:
        results_file.Results(path).__exit__(None, None, None)
        return
    with pytest.raises(RequestError) as error:
        results_file.Results(path)
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)
    assert path.read_bytes() == content


def test_damage_within_the_results_is_named_and_left_alone(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    assert run(prompts=PROMPTS[:2]).code == 0
    header, one, two = output.read_bytes().splitlines(keepends=True)
    damaged = {
        header + b"garbage\n" + two: "line 2: not a result",
        header + one + one + two: "line 3: id 'a': is there twice, or is no prompt's",
        header + one.replace(b'"a"', b'"b"') + two: "line 2: id 'b': is there twice, or is no",
        header + one + two.replace(b'"index": 1', b'"index": 7'): "line 3: id 2: is there twice",
        header + one.replace(b'"index": 0', b'"index": []') + two: "line 2: id 'a'",
    }
    for content, problem in damaged.items():
        output.write_bytes(content)
        assert_one_line(run(prompts=PROMPTS[:2]), str(output), problem, "remove the line")
        assert output.read_bytes() == content


def test_two_runs_cannot_write_to_one_file(run: Run, tmp_path: Path) -> None:
    with results_file.Results(tmp_path / "results.jsonl"):
        assert_one_line(run(), "another process is writing to it")
    assert run().code == 0


def test_outputs_that_cannot_be(run: Run, tmp_path: Path, raw: Path) -> None:
    assert_one_line(run(output=tmp_path), "not a regular file")
    assert_one_line(run(output="/dev/null"), "not a regular file; '-' is standard output")
    assert_one_line(run(output=tmp_path / "no" / "x"), "cannot be written (No such file")
    assert_one_line(run(output=tmp_path / "prompts.jsonl"), "is no results file")


def test_a_run_that_never_began_leaves_no_file(run: Run, tmp_path: Path) -> None:
    assert_one_line(run(checkpoint=tmp_path / "nowhere"), "nowhere")
    assert_one_line(run("--system", "x"), "--system", "no chat template")
    assert_one_line(run(prompts=[{"prompt": "a", "temperature": -1}]), "line 1: sampling: temp")
    plain = write_checkpoint(tmp_path / "plain", draft=False, tokenizer=True)
    assert_one_line(
        run("--mode", "diffusion", checkpoint=plain), "plain Qwen3"
    )  # said once decoding begins
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    "more, problem",
    [
        (["--prompt", "x"], "--prompts-file does not go with --prompt"),
        (["--demo", "code"], "--demo"),
        (["--json"], "--prompts-file does not go with --json"),
        (["--check"], "--prompts-file does not go with --check"),
        (["--show-blocks"], "--show-blocks"),
        (["--slots", "0"], "slots: 0"),
    ],
)
def test_flags_that_make_no_sense_here(run: Run, more: list[str], problem: str) -> None:
    assert_one_line(run(*more), problem)


def test_a_prompts_file_needs_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompts-file", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err == "error: --prompts-file needs --output\n"


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = results_file.Results.write

    def interrupted(self: results_file.Results, *rest: Any) -> None:
        write(self, *rest)
        if len(self.done) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results_file.Results, "write", interrupted)
        got = run()
    assert got.code == 130
    assert got.err == "interrupted: 2 of 6 prompts are done; the same command resumes\n"
    assert len(read_results(tmp_path / "results.jsonl")[1]) == 2
    got = run()
    assert (got.code, got.err[:9]) == (0, "4 prompts")
    assert got.err.endswith("2 were done before\n")


def test_a_reader_that_closed_the_output_is_no_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: bytes) -> None:
        raise BrokenPipeError

    with results_file.Results("-") as results:
        monkeypatch.setattr(results, "_file", SimpleNamespace(write=write))
        line = PromptLine("x", 0, 1, "ids", [5], {}, {})
        with pytest.raises(BrokenPipeError):
            results.write(line, Generation("", [], "eos", None, None))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_is_gone_on_from(run: Run, tmp_path: Path, raw: Path, stop: int) -> None:
    prompts = [{"prompt": f"prompt {i}", "max_new_tokens": 100} for i in range(10)]
    output = tmp_path / "results.jsonl"
    line = flags(raw, write_prompts(tmp_path / "p.jsonl", prompts), output, "--temperature", "1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process
    with subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *line], stderr=subprocess.PIPE, env=environment
    ) as process:
        give_up = time.monotonic() + 60
        while time.monotonic() < give_up and process.poll() is None:
            if output.exists() and output.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.01)
        process.send_signal(stop)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in errors
    written = output.read_bytes()
    kept = written[: written.rindex(b"\n") + 1]
    assert 2 <= kept.count(b"\n") - 1 < 10
    got = run("--temperature", 1, prompts=prompts)
    assert got.code == 0, got.err
    assert output.read_bytes().startswith(kept)
    header, results = read_results(output)
    whole = tmp_path / "whole.jsonl"
    assert (
        run("--temperature", 1, "--seed", header["seed"], prompts=prompts, output=whole).code == 0
    )
    assert read_results(whole)[1] == results


# The fingerprint.


OTHER_VALUES: dict[str, Any] = {  # of a line's fields, none of them what PROMPTS[0] has
    "id": "b",
    "max_new_tokens": 3,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.5,
    "min_p": 0.25,
    "seed": 9,
    "stop": "end",
    "logprobs": True,
    "json_schema": {"properties": {"a": {}, "b": {}}},
}


def fingerprint(decoder: orthrus_fast.Decoder, path: Path, **line: Any) -> dict[str, str]:
    """Of a file of one prompt with these fields."""
    lines = read_prompts(write_prompts(path, [line]))
    assert decoder.checkpoint is not None
    header = results_file.make_header(decoder, decoder.checkpoint, lines, {}, 1)
    return dict(header["fingerprint"])


def test_every_field_of_a_line_counts_for_the_prompts_fingerprint(
    raw: Path, tmp_path: Path
) -> None:
    assert set(OTHER_VALUES) == set(prompts_file.FIELDS) - set(prompts_file.KINDS)
    decoder, path = orthrus_fast.load(raw, device="cpu"), tmp_path / "prompts.jsonl"
    plain = fingerprint(decoder, path, prompt="hello")
    assert fingerprint(decoder, path, prompt="hello", id=1) == plain  # the line's number
    found = [fingerprint(decoder, path, prompt="hello", **{k: v}) for k, v in OTHER_VALUES.items()]
    found += [
        fingerprint(decoder, path, prompt="hello", kind="a"),
        fingerprint(decoder, path, prompt="hello", kind="b"),
        fingerprint(decoder, path, prompt="hello", min_p=0.5),
        fingerprint(decoder, path, prompt="hello", min_p=0),
        fingerprint(decoder, path, prompt="hello", json_schema="any"),
        fingerprint(decoder, path, prompt="hello", json_schema={"properties": {"b": {}, "a": {}}}),
        fingerprint(decoder, path, prompt="hullo"),
        fingerprint(decoder, path, ids=[104]),
        fingerprint(decoder, path, messages=[{"role": "user", "content": "hello"}]),
    ]
    assert all(one["settings"] == plain["settings"] for one in found)
    assert all(one["weights"] == plain["weights"] for one in found)
    prompts = {one["prompts"] for one in (plain, *found)}
    assert len(prompts) == 1 + len(found)


def test_every_setting_of_the_flags_counts_for_the_settings_fingerprint(
    raw: Path, tmp_path: Path
) -> None:
    lines = read_prompts(write_prompts(tmp_path / "prompts.jsonl", PROMPTS))
    decoder = orthrus_fast.load(raw, device="cpu")
    assert decoder.checkpoint is not None

    def settings(params: SamplingParams, **configuration: Any) -> str:
        asked = results_file.sampling_settings(params) | configuration
        header = results_file.make_header(decoder, decoder.checkpoint, lines, asked, 1)  # type: ignore[arg-type]
        return str(header["fingerprint"]["settings"])

    others = ("id", "max_new_tokens", "seed", "json_schema")
    names = [name for name in OTHER_VALUES if name not in others]
    values = {**OTHER_VALUES, "stop": ("end",)}
    changed = [settings(SamplingParams(**{name: values[name]})) for name in names]
    changed += [settings(SamplingParams(), mode="ar"), settings(SamplingParams(), mode="diffusion")]
    assert len({settings(SamplingParams()), *changed}) == 1 + len(changed)
    assert settings(SamplingParams(seed=9)) == settings(SamplingParams())  # it stands apart


def test_the_weights_digest_covers_files_headers_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_checkpoint(tmp_path / "model", n_shards=2, tokenizer=True)

    def digest() -> str:
        return fingerprints.weights_digest(open_checkpoint(directory))

    first = digest()
    assert digest() == first
    moved = shutil.copytree(directory, tmp_path / "moved")
    assert fingerprints.weights_digest(open_checkpoint(moved)) == first
    shard = directory / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprints, "SAMPLES", 5)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 64)
    sampled = digest()
    seen = set()
    for place in (len(content) - 1, len(content) - 64, (len(content) - 64) // 2):
        changed = bytearray(content)
        changed[place] ^= 1
        shard.write_bytes(changed)
        seen.add(digest())
    shard.write_bytes(content)
    assert digest() == sampled
    (directory / "additional_chat_templates").mkdir()
    tools = "additional_chat_templates/tool_use.jinja"
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", tools):
        with open(directory / name, "a") as file:
            file.write(" ")
        seen.add(digest())
    assert len(seen | {sampled, first}) == 9


# That no setting drops out of the fingerprint.

OTHER_FLAGS: dict[str, Any] = {  # and the settings of sampling, below
    "mode": "ar",
    "max_new_tokens": 3,
    "raw": True,
    "system": "be brief",
    "thinking": True,
}
SAMPLING = [field.name for field in fields(SamplingParams) if not field.name.startswith("_")]


def settings_fingerprint(checkpoint: Path, configuration: dict[str, Any], **changed: Any) -> str:
    """Of a run whose flags are all at their defaults, but for those ``changed``."""
    parser = build_generate_parser("orthrus generate")
    args = parser.parse_args(["--prompts-file", "p", "--output", "o"])
    vars(args).update({name: value for name, value in changed.items() if name not in SAMPLING})
    params = SamplingParams(**{name: changed[name] for name in changed if name in SAMPLING})
    decoder: Any = SimpleNamespace(configuration=configuration)
    settings = batch.batch_settings(args, params)
    header = results_file.make_header(decoder, open_checkpoint(checkpoint), [], settings, None)
    return str(header["fingerprint"]["settings"])


@pytest.mark.parametrize("name", [*OTHER_FLAGS, *SAMPLING])
def test_a_run_with_another_flag_has_another_fingerprint(raw: Path, name: str) -> None:
    value = (OTHER_FLAGS | OTHER_VALUES | {"stop": ("end",), "grammar": Grammar("json_object")})[
        name
    ]
    counts = settings_fingerprint(raw, {}, **{name: value}) != settings_fingerprint(raw, {})
    assert counts == (name != "seed")  # which the header has beside it


def test_a_line_may_have_every_setting_of_sampling() -> None:
    """A grammar as the schema that it is of."""
    assert set(SAMPLING) - set(prompts_file.FIELDS) == {"grammar"}
    assert "json_schema" in prompts_file.FIELDS


def test_a_decoder_of_another_configuration_has_another_fingerprint(raw: Path) -> None:
    """But for what changes no text."""
    configuration = orthrus_fast.load(raw, device="cpu").configuration
    plain = settings_fingerprint(raw, configuration)
    other = {n: settings_fingerprint(raw, configuration | {n: "other"}) for n in configuration}
    assert {n for n in other if other[n] == plain} == set(fingerprints.NOT_SETTINGS)
