"""The command line as a user meets it: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

import orthrus_fast.steps
from orthrus_fast import Chunk
from orthrus_fast.cli.main import main
from orthrus_fast.cli.terminal import printable, render
from orthrus_fast.errors import RequestError
from orthrus_fast.runners import EagerRunner
from orthrus_fast.sampling import NO_TOKEN
from tests.checkpoints import write_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


class Run(SimpleNamespace):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Run:
    """``orthrus`` in this process, on the CPU; a command, or else generate, and its flags."""
    words = [str(a) for a in arguments]
    words = words if words[:1] in (["info"], ["chat"], ["serve"]) else ["generate", *words]
    device = [] if words[0] == "info" or "--device" in words else ["--device", "cpu"]
    try:
        code = main(words + device)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return Run(code=code, out=captured.out, err=captured.err)


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """generate.py as its own process, from another directory."""
    line = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    options = {"stdin": subprocess.DEVNULL, "cwd": "/", "timeout": 120, **options}
    if "input" in options:
        del options["stdin"]
    return subprocess.run(line, capture_output=True, check=False, **options)


@contextmanager
def standard_input(content: bytes) -> Iterator[None]:
    """Within, a pipe with ``content`` and no more to come."""
    with silent_pipe() as write:
        os.write(write, content)
        os.close(write)
        yield


@contextmanager
def silent_pipe() -> Iterator[int]:
    """Within, standard input is a pipe without data; its other end, to be closed by the user."""
    read, write = os.pipe()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(read, encoding="utf-8") as pipe:
        patch.setattr(sys, "stdin", pipe)
        yield write


# What good input gets.


def test_text_goes_out_and_one_line_of_facts_to_standard_error(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--max-new-tokens", 20, "--drafting", 8)  # else the clock has a say in the cycles
    got = run(capsys, "--checkpoint", raw, "--prompt", "hello", *how)
    expected = orthrus_fast.load(raw, device="cpu", drafting=8).generate("hello", 20)
    assert got.code == 0
    assert got.out == expected.text + "\n"
    facts, budget = got.err.strip().splitlines()[-2:]
    cycles = expected.stats.cycles
    assert re.fullmatch(
        rf"20 tokens · {19 / cycles:.2f} tokens per cycle in {cycles} cycles · [\d.]+ tokens/s · "
        r"first token after [\d.]+ s · diffusion on cpu \(float32, eager\)",
        facts,
    )
    assert budget == "the text ended at its limit of 20 new tokens; --max-new-tokens raises it"


SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": [
        "text",
        "tokens",
        "finish_reason",
        "error",
        "seed",
        "stats",
        "configuration",
        "startup",
        "invariance",
        "check",
    ],
    "properties": {
        "startup": {
            "type": "object",
            "required": ["weights"],
            "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
        },
        "invariance": {"type": ["object", "null"], "required": ["holds", "widths"]},
        "text": {"type": "string"},
        "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "finish_reason": {"enum": ["eos", "length", "stop", "error", None]},
        "error": {"type": ["string", "null"]},
        "seed": {"type": ["integer", "null"]},
        "check": {"type": ["object", "null"], "required": ["identical"]},
        "stats": {
            "type": "object",
            "additionalProperties": False,
            "required": [
                "prompt_tokens",
                "cycles",
                "tokens_per_cycle",
                "accepted",
                "time_to_first_token",
                "seconds",
                "tokens_per_second",
                "reused_tokens",
            ],
            "properties": {
                "prompt_tokens": {"type": "integer", "minimum": 1},
                "cycles": {"type": "integer", "minimum": 0},
                "tokens_per_cycle": {"type": ["number", "null"]},
                "accepted": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "time_to_first_token": {"type": "number", "exclusiveMinimum": 0},
                "seconds": {"type": "number", "exclusiveMinimum": 0},
                "tokens_per_second": {"type": ["number", "null"]},
                "reused_tokens": {"type": "integer", "minimum": 0},
            },
        },
        "configuration": {
            "type": "object",
            "required": [
                "checkpoint",
                "hardware",
                "torch",
                "dtype",
                "runner",
                "attention",
                "slots",
                "block_size",
                "max_seq_len",
                "mode",
            ],
        },
    },
}


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
@pytest.mark.parametrize("budget", [1, 9])
def test_json_is_one_object_of_the_promised_form(
    raw: Path, capsys: pytest.CaptureFixture[str], mode: str, budget: int
) -> None:
    arguments = ("--prompt", "hello", "--json", "--check", "--seed", 5, "--mode", mode)
    got = run(capsys, "--checkpoint", raw, "--max-new-tokens", budget, *arguments)
    assert got.code == 0
    result = json.loads(got.out)
    jsonschema.validate(result, SCHEMA)
    assert len(result["tokens"]) == budget
    assert result["stats"]["cycles"] == 0 if budget == 1 else result["stats"]["cycles"] > 0
    assert (result["seed"], result["configuration"]["mode"]) == (5, mode)
    assert result["check"] == {"identical": True}


def test_chat_template_system_message_and_thinking_reach_the_model(
    chat: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompt(*arguments: object) -> str:
        prompts: list[list[int]] = []
        stream = orthrus_fast.Decoder.stream

        def spy(self: Any, ids: list[int], *rest: Any) -> Any:
            prompts.append(ids)
            return stream(self, ids, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(orthrus_fast.Decoder, "stream", spy)
            line = ("--checkpoint", chat, "--prompt", "hi", "--max-new-tokens", 1, *arguments)
            assert run(capsys, *line).code == 0
        return bytes(prompts[0]).decode()

    assert prompt() == "<user>hi</user><assistant>"
    assert prompt("--system", "be brief").startswith("<system>be brief</system><user>")
    assert prompt("--system", "") == "<system></system><user>hi</user><assistant>"
    assert prompt("--thinking").endswith("<assistant>[thinking True]")
    assert prompt("--no-thinking").endswith("<assistant>[thinking False]")
    assert prompt("--raw") == "hi"


SAMPLED = ("--prompt", "hello", "--max-new-tokens", 30, "--temperature", 1.0)


def test_sampling_flags_reach_the_decoder_and_the_seed_is_reported(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filters = ("--top-k", 40, "--top-p", 0.9, "--min-p", 0.01)
    got = run(capsys, "--checkpoint", raw, *SAMPLED, *filters, "--seed", 5)
    params = orthrus_fast.SamplingParams(1.0, top_k=40, top_p=0.9, min_p=0.01, seed=5)
    decoder = orthrus_fast.load(raw, device="cpu")
    assert got.out == decoder.generate("hello", 30, params).text + "\n"
    assert got.out != decoder.generate("hello", 30).text + "\n"
    assert got.err.splitlines()[-2].endswith(" · seed 5")


def test_a_drawn_seed_is_reported_and_gives_the_text_again(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--checkpoint", raw, *SAMPLED, "--json")
    got = run(capsys, *line)
    first = json.loads(got.out)
    assert f" · seed {first['seed']}" in got.err
    again = json.loads(run(capsys, *line, "--seed", first["seed"], "--mode", "ar").out)
    assert again["tokens"] == first["tokens"]
    other = json.loads(run(capsys, *line).out)
    assert other["seed"] != first["seed"]


def test_check_gives_the_second_mode_the_seed_that_the_first_drew(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = run(capsys, "--checkpoint", raw, *SAMPLED, "--check", "--json")
    assert (got.code, json.loads(got.out)["check"]) == (0, {"identical": True})


def test_stop_ends_the_text_and_may_be_repeated(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = orthrus_fast.load(raw, device="cpu").generate("hello", 60).text
    stops = (text[20:22], text[10:13])
    flags = [part for stop in stops for part in ("--stop", stop)]
    got = run(capsys, "--checkpoint", raw, "--prompt", "hello", *flags, "--json")
    result = json.loads(got.out)
    assert result["finish_reason"] == "stop"
    assert result["text"] == text[: min(text.index(stop) for stop in stops)]


def test_sampling_checkpoint_takes_its_settings_but_for_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True, eos_token_id=[])
    defaults = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95}
    (directory / "generation_config.json").write_text(json.dumps(defaults))

    def tokens(*flags: object) -> list[int]:
        line = ("--checkpoint", directory, "--prompt", "hello", "--max-new-tokens", 30, "--json")
        return list(json.loads(run(capsys, *line, "--seed", 5, *flags).out)["tokens"])

    of_checkpoint = tokens("--sampling", "checkpoint")
    spelled_out = ("--temperature", 0.8, "--top-k", 20, "--top-p", 0.95)
    assert of_checkpoint == tokens(*spelled_out)
    own = tokens("--sampling", "checkpoint", "--temperature", 2.5)
    assert own == tokens(*spelled_out[2:], "--temperature", 2.5) != of_checkpoint
    greedy = tokens()
    assert greedy == tokens("--sampling", "greedy") != of_checkpoint
    assert greedy == tokens("--sampling", "checkpoint", "--temperature", 0)


@pytest.mark.parametrize(
    "flags, warned",
    [
        (["--thinking"], True),
        (["--thinking", "--sampling", "checkpoint"], True),  # which has no settings: greedy
        (["--thinking", "--temperature", 0.6], False),
        (["--no-thinking"], False),
        ([], False),
    ],
)
def test_greedy_decoding_with_thinking_is_advised_against_once(
    chat: Path, capsys: pytest.CaptureFixture[str], flags: list[object], warned: bool
) -> None:
    line = ("--checkpoint", chat, "--prompt", "hi", "--max-new-tokens", 2)
    got = run(capsys, *line, *flags)
    assert got.code == 0
    assert got.err.count("warning: Qwen advises against greedy decoding in thinking") == warned


def test_check_tells_a_difference_and_exits_1(
    raw: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_too_long = orthrus_fast.steps.accept  # type: ignore[attr-defined]
    monkeypatch.setattr(
        orthrus_fast.steps,  # type: ignore[attr-defined]
        "accept",
        lambda block, target: (one_too_long(block, target) + 1).clamp(max=block.shape[1] - 1),
    )
    line = ("--checkpoint", raw, "--prompt", "hello", "--check", "--max-new-tokens", 60)
    got = run(capsys, *line)
    assert got.code == 1
    assert re.search(
        r"check: DIFFERENT from token \d+: ar \[\d+\], diffusion \[\d+\]; "
        r"the two best logits there belong to \[\d+, \d+\] and are [\d.e-]+ apart",
        got.err,
    )


def test_info_says_what_a_checkpoint_is_and_needs(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = run(capsys, "info", "--checkpoint", raw)
    assert got.code == 0
    for fact in ("autoregressive and draft", "block size        8", "272, tied: yes", "KV cache"):
        assert fact in got.out
    assert_refused(run(capsys, "info", "--checkpoint", raw, "--max-seq-len", 10**6), "max_seq_len")


def test_blocks_are_marked_and_joined_are_the_text() -> None:
    chunk = Chunk([1, 2, 3], ["a", "b", "c"], 2)
    assert render(chunk, False, True) == "abc"
    assert render(chunk, True, True) == "\x1b[32mab\x1b[0mc"
    assert render(chunk, True, False) == "⟨ab⟩c"
    assert render(Chunk([1], ["a"], 0), True, False) == "a"


def test_control_characters_are_escaped_on_a_terminal_only() -> None:
    text = "a\x1b[31m\x07\x9b[bold]\r\tb\nc\x7f é 👩‍👩‍👧"
    assert printable(text, False) == text
    assert printable(text, True) == ("a\\x1b[31m\\x07\\x9b[bold]\\r\tb\nc\\x7f é 👩‍👩‍👧")


# As its own process.


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from orthrus_fast.cli.main import main\n"
        "for command in ('generate', 'chat', 'info', 'bench', 'tune'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit as exit: assert exit.code == 0\n"
    )
    line = [sys.executable, "-c", code]
    got = subprocess.run(line, cwd=ROOT, check=True, timeout=60, capture_output=True, text=True)
    assert got.stdout.count("usage: orthrus ") == 5
    assert got.stdout.count("Exit codes: 0 done; 1 --check") == 4
    assert command("--version").stdout.decode() == f"orthrus-fast {orthrus_fast.__version__}\n"


def test_the_prompt_may_come_from_standard_input(
    raw: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(content: bytes, *more: str) -> Run:
        with standard_input(content):
            return run(capsys, "--checkpoint", raw, "--max-new-tokens", 8, "--json", *more)

    text = "naïve 中".encode()
    answers = given(text), given(b"", "--prompt", "naïve 中"), given(text, "--prompt", "-")
    tokens = [json.loads(got.out)["tokens"] for got in answers]
    assert tokens[0] == tokens[1] == tokens[2]
    bad = given(b"abc\xff")
    assert (bad.code, bad.out) == (2, "")
    assert bad.err == "error: standard input: not valid UTF-8 at byte 3\n"
    empty = given(b"")
    assert (empty.code, empty.err.splitlines()[-1][:20]) == (2, "error: prompt: empty")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        none = run(capsys, "--checkpoint", raw)
    assert (none.code, "none given" in none.err) == (2, True)


def test_ctrl_c_keeps_what_was_written(raw: Path) -> None:
    line = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(raw), "--device", "cpu"]
    line += ["--prompt", "hello", "--mode", "ar", "--max-new-tokens", "500"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(1)  # the text has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first and out.endswith(b"\n")
    assert b"interrupted: the text above is what was written so far" in err
    assert b"Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_before_the_text_leaves_no_traceback(raw: Path) -> None:
    line = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(raw), "--prompt", "-"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        time.sleep(1)  # it waits for the prompt now, or is still starting: both must be quiet
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert process.returncode != 130 or err.decode().splitlines()[-1:] == ["interrupted"]


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(raw: Path) -> None:
    line = f"{sys.executable} {ROOT}/generate.py --checkpoint {raw} --prompt x --json | head -c 1"
    got = subprocess.run(line, shell=True, capture_output=True, timeout=60, check=False)
    assert b"Traceback" not in got.stderr
    assert b"Exception" not in got.stderr


@pytest.mark.parametrize(
    "redirection, code, expected",
    [
        ("--prompt - <&-", 2, "error: standard input: closed"),
        pytest.param("--prompt x >&-", 2, "error: standard output: closed", marks=SLOW),
        ("--prompt x >/dev/full", 2, "error: standard output: No space left on device\n"),
        pytest.param(
            "--prompt x --json >/dev/full", 2, "error: standard output: No space", marks=SLOW
        ),
        pytest.param("--prompt x 2>&- >/dev/null", 0, "", marks=SLOW),
    ],
)
def test_streams_that_are_closed_or_full(
    raw: Path, redirection: str, code: int, expected: str
) -> None:
    line = f"{sys.executable} {ROOT}/generate.py --checkpoint {raw} --device cpu {redirection}"
    options = {"capture_output": True, "text": True, "timeout": 60, "stdin": subprocess.DEVNULL}
    got = subprocess.run(line, shell=True, check=False, **options)  # type: ignore[call-overload]
    assert got.returncode == code
    assert expected in got.stderr
    assert "Traceback" not in got.stderr
    assert "Exception" not in got.stderr


@pytest.mark.parametrize("flags", [(), ("--json",), ("--check",)])
def test_a_text_that_overflows_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    model = write_checkpoint(tmp_path / "model", tokenizer=True)
    line = ("--checkpoint", model, "--prompt", "x", "--dtype", "float16", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthrus_fast.steps, "first_token", lambda *_: torch.tensor(NO_TOKEN))
        got = run(capsys, *line)
    error = "dtype: logits are not finite in float16; use bfloat16 or float32"
    assert (got.code, got.err.splitlines()[-1]) == (2, f"error: {error}")
    if "--json" in flags:
        assert json.loads(got.out)["error"] == error
    else:
        assert got.out.strip() == ""


def test_json_is_json_in_any_locale_and_on_any_terminal(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "naïve \x9b31m \x7f 中"
    got = run(capsys, "--checkpoint", raw, "--prompt", prompt, "--json")
    text = json.loads(got.out)["text"]
    assert text == orthrus_fast.load(raw, device="cpu").generate(prompt).text
    assert all(" " <= character < "\x7f" or character == "\n" for character in got.out)


def test_ctrl_c_before_the_first_token_is_said_so(
    raw: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EagerRunner, "start", interrupt)
    got = run(capsys, "--checkpoint", raw, "--prompt", "x", "--json")
    assert got.code == 130
    assert got.err.splitlines()[-1] == "interrupted before the first token"
    result = json.loads(got.out)
    assert (result["tokens"], result["stats"]) == ([], None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RequestError("no room")])
def test_what_was_decoded_is_printed_whatever_becomes_of_its_check(
    raw: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(orthrus_fast.Decoder, "generate", fail)
    got = run(
        capsys, "--checkpoint", raw, "--prompt", "x", "--max-new-tokens", 8, "--check", "--json"
    )
    result = json.loads(got.out)
    assert len(result["tokens"]) == 8 and result["check"] is None
    if isinstance(error, KeyboardInterrupt):
        assert (got.code, got.err.splitlines()[-1]) == (130, "check: interrupted")
    else:
        assert (got.code, got.err.splitlines()[-1]) == (2, "error: no room")


def test_without_the_embedded_checkpoint_the_default_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("orthrus_fast.cli.generate.embedded_checkpoint", lambda: tmp_path)
    assert_refused(run(capsys), "demos.json", "file not found")
    (tmp_path / "demos.json").write_text("[1]")
    assert_refused(run(capsys), "demos.json", "no demonstration 'records'")
    assert_refused(run(capsys, "--raw"), "--raw")


def test_a_missing_package_is_named(raw: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from orthrus_fast.cli.main import main;"
        f"sys.exit(main(['generate', '--checkpoint', {str(raw)!r}, '--prompt', 'x']))"
    )
    line = [sys.executable, "-c", code]
    got = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert got.returncode == 2
    what_to_do = "run: pip install -e . in the repository"
    assert got.stderr == f"error: torch is not installed; {what_to_do}\n"


@pytest.mark.slow
def test_on_a_terminal_blocks_are_coloured_and_controls_escaped(raw: Path) -> None:
    master, terminal = pty.openpty()
    line = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(raw), "--show-blocks"]
    line += ["--prompt", "hello", "--max-new-tokens", "40", "--device", "cpu", "--drafting", "8"]
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"}
    process = subprocess.Popen(line, stdout=terminal, stderr=subprocess.PIPE, env=environment)
    process.communicate(timeout=60)
    os.close(terminal)
    written = b""
    while part := read_terminal(master):
        written += part
    os.close(master)
    decoder = orthrus_fast.load(raw, device="cpu", drafting=8)  # by the clock blocks would differ
    chunks = list(decoder.stream("hello", 40))
    assert any(chunk.n_accepted for chunk in chunks)
    expected = "".join(render(chunk, True, True) for chunk in chunks) + "\n"
    assert written.decode() == expected.replace("\n", "\r\n")


def read_terminal(master: int) -> bytes:
    try:
        return os.read(master, 4096)
    except OSError:  # Linux says so when the other end is closed
        return b""


# What bad input gets: one line, exit code 2, no traceback, nothing on standard output.


def assert_refused(got: Run, *parts: str) -> None:
    lines = [line for line in got.err.splitlines() if not line.startswith("downloading")]
    assert got.code == 2, got
    assert got.out == ""
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    assert "Traceback" not in got.err
    for part in parts:
        assert part in lines[-1]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--nonsense"], ["--nonsense"]),
        (["--mode", "fast"], ["--mode", "fast"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens"]),
        (["--max-new-tokens", 0], ["max_new_tokens: 0 is below 1"]),
        (["--max-new-tokens", -5], ["max_new_tokens: -5"]),
        (["--max-new-tokens", 10**6], ["max_new_tokens 1000000", "max_seq_len 512"]),
        (["--max-seq-len", 10**6], ["max_seq_len: 1000000", "512"]),
        (["--prompt", ""], ["prompt: empty"]),
        (["--prompt", "x" * 600], ["600 tokens + max_new_tokens 1 ", "max_seq_len 512"]),
        (["--prompt", "bad \udcff byte"], ["surrogate"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--temperature", "nan"], ["temperature=nan"]),
        (["--temperature", "1", "--top-k", "-2"], ["top_k=-2"]),
        (["--temperature", "1", "--top-p", "1.5"], ["top_p=1.5"]),
        (["--sampling", "checkpoint", "--min-p", "-1"], ["min_p=-1.0"]),
        (["--top-k", "3"], ["--top-k needs --temperature above 0, or --sampling checkpoint"]),
        (["--top-p", "0.5", "--sampling", "greedy"], ["--top-p needs --temperature"]),
        (["--min-p", "0.5", "--temperature", "0"], ["--min-p needs --temperature"]),
        (["--sampling", "greedy", "--temperature", "0.7"], ["does not go with --temperature"]),
        (["--sampling", "random"], ["--sampling"]),
        (["--seed", "x"], ["--seed"]),
        (["--seed", str(2**64)], ["seed"]),
        (["--stop", ""], ["stop"]),
        (["--slots", "0"], ["slots: 0"]),
        (["--drafting", "9"], ["drafting: 9 is not 'auto' or an integer from 2 to 8"]),
        (["--drafting", "wide"], ["--drafting: invalid width_or_auto value: 'wide'"]),
        (["--output", "x"], ["--output needs --prompts-file"]),
        (["--prompts-file", "x"], ["--prompts-file does not go with --prompt"]),
        (["--dtype", "int4"], ["dtype: 'int4'"]),
        (["--runner", "graph"], ["runner 'graph'"]),
        (["--attention", "flash"], ["attention 'flash'"]),
        (["--revision", "main"], ["revision 'main'"]),
        (["--system", "x"], ["--system", "no chat template"]),
        (["--no-thinking"], ["--no-thinking", "no chat template"]),
        (["--system", "x", "--raw"], ["--raw does not go with --system"]),
        (["--no-thinking", "--raw"], ["--raw does not go with --no-thinking"]),
        (["--device", "gpu:1"], ["did you mean --device cuda:1?"]),
        (["--demo", "code"], ["--demo does not go with --checkpoint"]),
        (["--json", "--show-blocks"], ["--json does not go with --show-blocks"]),
    ],
)
def test_bad_flags(
    raw: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], parts: list[str]
) -> None:
    got = run(capsys, "--checkpoint", raw, "--prompt", "x", *arguments)
    assert_refused(got, *parts)


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99"])
def test_devices_that_are_not_there(raw: Path, device: str) -> None:
    got = command("--checkpoint", raw, "--prompt", "x", "--device", device)
    assert (got.returncode, got.stdout) == (2, b"")
    assert got.stderr.decode().startswith("error: device")


def break_checkpoint(directory: Path, kind: str) -> None:
    """Damage a good checkpoint in one way."""
    weights, config = directory / "model.safetensors", directory / "config.json"
    fields = json.loads(config.read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "not finite":
        write_checkpoint(directory, seed=3, tokenizer=True, dtype=torch.float32)
        spoil(weights)
    elif kind == "pickled":
        weights.unlink()
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x04")
    elif kind == "template":
        (directory / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    elif kind == "internals":
        text = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
        (directory / "chat_template.jinja").write_text(text)
    elif kind == "config gone":
        config.unlink()
    else:
        name, value = kind.split("=")
        fields[name] = json.loads(value)
        config.write_text(json.dumps(fields))


def spoil(weights: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "kind, parts",
    [
        ("truncated", ["model.safetensors"]),
        ("not finite", ["model.layers.1.mlp.up_proj.weight", "not finite"]),
        ("pickled", ["pytorch_model.bin", "pickle"]),
        ("template", ["no system role"]),
        ("internals", ["chat"]),
        ("config gone", ["config.json"]),
        ('model_type="llama"', ["config.json", "model_type", "llama"]),
        ("attention_bias=true", ["attention_bias"]),
        ("use_sliding_window=true", ["use_sliding_window"]),
        ('quantization_config={"bits": 4}', ["quantization_config"]),
        ('hidden_act="gelu"', ["hidden_act"]),
        ('rope_parameters={"rope_theta": 1e4, "rope_type": "llama3"}', ["rope_type", "llama3"]),
        ("block_size=null", ["block_size"]),
        ("block_size=1", ["block_size"]),
        ("mask_token_id=null", ["mask_token_id"]),
        ("mask_token_id=272", ["mask_token_id"]),
        ("num_hidden_layers=3", ["missing"]),
        ("num_hidden_layers=1", ["model.layers.1."]),
        ("intermediate_size=1000000", ["instead of [1000000"]),
        ("logit_scale=2.0", ["logit_scale"]),
    ],
)
def test_bad_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, parts: list[str]
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True)
    break_checkpoint(directory, kind)
    assert_refused(run(capsys, "--checkpoint", directory, "--prompt", "x"), *parts)


def test_a_missing_directory_and_a_missing_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(run(capsys, "--checkpoint", tmp_path / "nope", "--prompt", "x"), "nope")
    assert_refused(run(capsys, "--checkpoint", "./a\nb", "--prompt", "x"), "./a\\nb")
    assert_refused(run(capsys, "--checkpoint", "", "--prompt", "x"), "'' is neither a directory")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    got = command("--checkpoint", "nobody/nothing", "--prompt", "x", env=environment)
    assert (got.returncode, got.stdout) == (2, b"")
    assert got.stderr.decode().splitlines()[-1].startswith("error: nobody/nothing")


def test_a_plain_qwen3_decodes_in_the_mode_that_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = write_checkpoint(tmp_path / "model", draft=False, tokenizer=True)
    line = ("--checkpoint", plain, "--prompt", "x", "--max-new-tokens", 4)
    assert_refused(run(capsys, *line, "--mode", "diffusion"), "plain Qwen3", "mode 'ar'")
    for mode in ((), ("--mode", "ar")):
        got = run(capsys, *line, *mode)
        assert (got.code, " · ar on cpu (" in got.err) == (0, True)
    assert_refused(run(capsys, *line, "--check"), "--check", "one mode only")


def test_an_empty_message_is_refused_though_a_template_would_wrap_it(
    chat: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(run(capsys, "--checkpoint", chat, "--prompt", ""), "prompt: empty")
    piped = command("--checkpoint", chat, input=b"")
    assert (piped.returncode, piped.stdout) == (2, b"")
    assert piped.stderr.startswith(b"error: prompt: empty")


def test_thinking_with_a_template_that_knows_nothing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    line = ("--checkpoint", directory, "--prompt", "x", "--no-thinking")
    assert_refused(run(capsys, *line), "--no-thinking", "no thinking mode")
