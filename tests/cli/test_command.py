"""The command line's names and its talk: flags, suggestions, pipes, demos, limits, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import orthrus_fast
from orthrus_fast import Chunk, Generation, SamplingParams, Stats
from orthrus_fast.cli import generate
from orthrus_fast.cli.flags import DEMOS, build_generate_parser
from orthrus_fast.cli.main import main
from orthrus_fast.cli.session import sampling
from orthrus_fast.cli.terminal import SHOWN_LINES, render, show_prompt
from tests.checkpoints import write_checkpoint
from tests.cli.test_generate import ROOT, assert_refused, run, silent_pipe
from tests.embedded import MODEL

QWEN3 = (  # as the public one does: thoughts unless enable_thinking is false
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}[no thoughts]{% endif %}"
)
THINKER = "{{ messages[0].content }}<assistant><think>"  # thinks whatever it is told


def with_template(directory: Path, template: str) -> Path:
    write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=[])
    (directory / "chat_template.jinja").write_text(template)
    return directory


# Names that people type.


@pytest.mark.parametrize(
    "words, parts",
    [
        (["--max-length", "5"], ["--max-length: no such flag; did you mean --max-seq-len"]),
        (["--ctx-size=5"], ["--ctx-size: no such flag; did you mean --max-seq-len"]),
        (["--do_sample"], ["--do-sample: no such flag; did you mean --temperature"]),
        (["-t", "0.5"], ["-t: no such flag; did you mean --temperature"]),
        (["--tempreature", "0.5"], ["did you mean --temperature?"]),
        (["--quantize"], ["--weights fp8 or int4"]),
        (["--interactive"], ["orthrus chat, or python -m orthrus_fast chat?"]),
        (["--chat"], ["orthrus chat, or python -m orthrus_fast chat?"]),
        (["--info"], ["orthrus info, or python -m orthrus_fast info?"]),
        (["-prompt", "x"], ["-prompt: no such flag; did you mean --prompt?"]),
        (["hello", "world"], ["did you mean --prompt 'hello world'?"]),
        (["--zzz"], ["--zzz: no such flag ("]),
    ],
)
def test_an_unknown_flag_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str], words: list[object], parts: list[str]
) -> None:
    assert_refused(run(capsys, *words), *parts, "generate --help lists the flags)")


def test_a_flag_of_another_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    got = run(capsys, "chat", "--prompt", "x")
    assert_refused(got, "--prompt: no such flag here; orthrus generate has it", "chat --help")


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--prompt", "a b"], "--prompt: a command comes first; did you mean: orthrus generate "),
        (["--chat"], "did you mean: orthrus chat?"),
        (["model/"], "did you mean: orthrus generate --checkpoint model/?"),
        (["a b"], "did you mean: orthrus generate --prompt 'a b'?"),
        (
            ["genrate"],
            "there are generate, chat, serve, bench, info, tune; did you mean: orthrus generate?",
        ),
        (["xyz"], "'xyz' is no command; there are generate, chat, serve, bench, info, tune\n"),
    ],
)
def test_a_forgotten_or_unknown_command_is_told(
    capsys: pytest.CaptureFixture[str], words: list[str], meant: str
) -> None:
    assert main(words) == 2
    got = capsys.readouterr()
    assert got.out == "" and got.err.startswith("error: ") and meant in got.err


def test_underscores_are_understood_in_names_alone() -> None:
    words = ["--max_new_tokens=3", "--stop", "a_b", "--prompt=c_d", "--top_k", "2"]
    args = build_generate_parser("").parse_args(words)
    assert (args.max_new_tokens, args.stop, args.prompt, args.top_k) == (3, ["a_b"], "c_d", 2)


@pytest.mark.parametrize("off", ["0", "-1"])
def test_top_k_may_be_spelled_as_off(off: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sampling", "checkpoint", "--top-k", off]
    args = build_generate_parser("").parse_args(words)
    defaults = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    assert sampling(args).resolved(defaults) == SamplingParams(0.7, top_p=0.9)
    assert run(capsys, "--prompt", "x", "--top-k", off, "-n", 1).code == 0  # without temperature


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "info", "tune"])
def test_the_version_is_told_at_every_level(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"orthrus-fast {orthrus_fast.__version__}\n"


def test_flags_of_the_machine_and_the_config_reach_load(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def load(path: object, **options: Any) -> None:
        seen.update(options)
        raise orthrus_fast.errors.CheckpointError("enough")

    monkeypatch.setattr(orthrus_fast, "load", load)
    fields = ("--ignore-config-field", "a", "--ignore-config-field", "b_c")
    how = ("--drafting", "8", "--no-prefix-reuse", "--mode", "ar")
    run(capsys, "--prompt", "x", "--compile-mode", "max-autotune", *fields, *how)
    assert (seen["drafting"], seen["prefix_reuse"]) == (8, False)
    assert seen["compile_mode"] == "max-autotune"
    assert seen["ignore_config_fields"] == ("a", "b_c")
    assert seen["draft_view"] is False
    run(capsys, "--prompt", "x")
    assert (seen["drafting"], seen["prefix_reuse"], seen["draft_view"]) == ("auto", True, True)


def test_what_the_package_has_is_listed() -> None:
    assert {"load", "Decoder", "SamplingParams", "__version__"} <= set(dir(orthrus_fast))
    assert all(hasattr(orthrus_fast, name) for name in dir(orthrus_fast))


def test_the_benchmark_goes_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert " bench [-h]" in capsys.readouterr().out.splitlines()[0]


def test_info_says_what_is_the_default_and_what_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    got = run(capsys, "info")
    assert "model (embedded, the default)\n" in got.out
    (machine,) = [line for line in got.out.splitlines() if line.startswith("this machine")]
    assert f" torch {torch.__version__}, " in machine and "unless --dtype" in machine


# Pipes.


def test_a_pipe_is_read_to_its_end_however_late(
    raw: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthrus_fast.cli.generate.PATIENCE", 0.01)
    select, ready = generate.select.select, threading.Event()

    def silence_first(*arguments: Any) -> Any:
        result = select(*arguments)
        ready.set()  # the patience has run out
        return result

    monkeypatch.setattr(generate.select, "select", silence_first)
    with silent_pipe() as write:

        def late() -> None:
            ready.wait(60)
            for part in (b"hel", b"lo"):
                os.write(write, part)
            os.close(write)

        writer = threading.Thread(target=late)
        writer.start()
        got = run(capsys, "--checkpoint", raw, "--max-new-tokens", 8, "--json")
        writer.join()
    assert got.err.splitlines()[0].startswith("reading the prompt from standard input … (--prompt")
    expected = orthrus_fast.load(raw, device="cpu").generate("hello", 8)
    assert json.loads(got.out)["tokens"] == expected.tokens


@pytest.mark.parametrize("asked", [("--demo", "records"), ("--prompt", "x")])
def test_a_silent_pipe_is_not_waited_for_where_the_prompt_is_known(
    capsys: pytest.CaptureFixture[str], asked: tuple[str, str]
) -> None:
    with silent_pipe() as write:
        got = run(capsys, *asked, "--max-new-tokens", 2)
        os.close(write)
    assert (got.code, "reading" in got.err) == (0, False)


# Demos.


@pytest.mark.parametrize("flags", [("--system", "x"), ("--raw",), ("--thinking",)])
def test_flags_of_a_prompt_need_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(run(capsys, *flags), f"{flags[0]} needs a prompt")


def test_a_long_prompt_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    show_prompt("\n".join(["a\x1b"] * SHOWN_LINES))
    assert capsys.readouterr().err == "a\\x1b\n" * SHOWN_LINES
    show_prompt("a\n" * (SHOWN_LINES + 7))
    assert capsys.readouterr().err == "a\n" * SHOWN_LINES + "… (7 more lines)\n"


def test_a_prompt_is_dimmed_and_blocks_are_coloured_where_colours_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = Chunk([1, 2], ["a", "b"], 1)

    def shown(term: str, no_color: str) -> tuple[str, str]:
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        show_prompt("x")
        return capsys.readouterr().err, render(chunk, True, True)

    assert shown("xterm", "") == ("\x1b[2mx\x1b[0m\n", "\x1b[32ma\x1b[0mb")
    assert shown("dumb", "") == shown("xterm", "1") == ("x\n", "⟨a⟩b")


# What is on the screen.


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code as a process of its own, in the repository's root."""
    environment = {**os.environ, **environment}
    options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    options |= {"stdin": subprocess.DEVNULL, "env": environment}
    return subprocess.run([sys.executable, "-c", code], check=False, **options)


MAIN = "from orthrus_fast.cli.main import main; sys.exit(main(sys.argv[1:] or {words!r}))"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_terminal_is_told_of_the_loading_before_torch_is_imported(command: str) -> None:
    for terminal in (True, False):
        code = f"import sys; sys.modules['torch'] = None; sys.stderr.isatty = lambda: {terminal};"
        got = in_process(code + MAIN.format(words=[command]))
        *told, error = got.stderr.splitlines()
        assert told == ["loading the embedded checkpoint …"] * terminal
        assert error.startswith("error: torch is not installed")


def test_nothing_of_others_is_on_the_screen_without_numpy(tmp_path: Path) -> None:
    package = tmp_path / "numpy"
    package.mkdir()
    (package / "__init__.py").write_text("raise ModuleNotFoundError('none here', name='numpy')")
    words = ["generate", "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    warned = in_process("import torch", PYTHONPATH=path)
    assert "Failed to initialize NumPy" in warned.stderr  # else this test sees nothing
    got = in_process("import sys;" + MAIN.format(words=words), PYTHONPATH=path)
    lines = got.stderr.splitlines()
    assert (got.returncode, len(lines)) == (0, 2)
    begins = ("2 tokens · ", "the text ended at ")
    assert all(map(str.startswith, lines, begins))


# Limits.


def test_a_default_limit_shrinks_to_the_room_and_a_given_one_does_not(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("--checkpoint", raw, "--prompt", "x" * 30)

    def ended(*flags: object) -> tuple[int, str]:
        got = run(capsys, *line, "--json", *flags)
        assert got.code == 0
        return len(json.loads(got.out)["tokens"]), got.err.splitlines()[-1]

    room = "the text ended at the 10 new tokens that max_seq_len 40 leaves room for"
    assert ended("--max-seq-len", 40) == (10, f"{room}; --max-seq-len raises it")
    n, told = ended()
    assert (n, told[:49]) == (256, "the text ended at the default limit of 256 new to")
    n, told = ended("--max-new-tokens", 3)
    assert (n, told[:41]) == (3, "the text ended at its limit of 3 new toke")
    n, told = ended("--prompt", "x" * 500)
    assert (n, told[-37:]) == (12, "room for, which is the model's own limit"[-37:])
    too_long = run(capsys, *line, "--max-seq-len", 40, "--max-new-tokens", 11)
    assert_refused(too_long, "max_new_tokens 11")


# Thinking.


def tokens_asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, int | None]]:
    """The prompt and the limit of each request to come, which then decodes one token."""
    asked: list[tuple[bytes, int | None]] = []
    stream = orthrus_fast.Decoder.stream

    def spy(self: Any, ids: list[int], limit: int | None, *rest: Any) -> Any:
        asked.append((bytes(ids), limit))
        return stream(self, ids, 1, *rest)

    monkeypatch.setattr(orthrus_fast.Decoder, "stream", spy)
    return asked


WARNING = "warning: Qwen advises against greedy decoding in thinking mode"
OFF = "thinking is off; --thinking turns it on"


def test_thinking_is_off_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tokens_asked_for(monkeypatch)
    line = ("--checkpoint", with_template(tmp_path / "model", QWEN3), "--prompt", "hi")

    def said(*flags: object) -> tuple[bool, bool]:
        got = run(capsys, *line, *flags)
        assert got.code == 0
        return OFF in got.err.splitlines(), WARNING in got.err

    assert said() == (True, False)
    assert said("--no-thinking") == (False, False)
    assert asked == [(b"<user>hi<assistant>[no thoughts]", None)] * 2
    assert said("--thinking") == (False, True)
    assert said("--thinking", "--temperature", 0.6) == (False, False)
    assert asked[2:] == [(b"<user>hi<assistant>", 512 - 19)] * 2
    assert said("--thinking", "--max-new-tokens", 7) == (False, True)
    assert asked[4][1] == 7
    assert said("--raw") == (False, False)
    assert asked[5] == (b"hi", None)


def test_a_template_that_always_thinks_is_warned_of_and_has_the_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tokens_asked_for(monkeypatch)
    directory = with_template(tmp_path / "model", THINKER)
    got = run(capsys, "--checkpoint", directory, "--prompt", "hi")
    assert (got.code, WARNING in got.err, OFF in got.err) == (0, True, False)
    assert asked == [(b"hi<assistant><think>", 512 - 20)]


def test_a_template_that_only_mentions_thinking_is_not_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tokens_asked_for(monkeypatch)
    template = "{# enable_thinking #}{{ messages[0].content }}"
    got = run(capsys, "--checkpoint", with_template(tmp_path / "model", template), "--prompt", "hi")
    assert (got.code, OFF in got.err, asked) == (0, False, [(b"hi", None)])


# How it ends.


def test_speeds_are_told_in_those_of_ar(capsys: pytest.CaptureFixture[str]) -> None:
    def told(diffusion: float, device: str, width: int) -> str:
        results = {
            name: Generation("", [], "eos", None, Stats(1, 1, 1.0, (), 0.1, 1.0, rate))
            for name, rate in (("diffusion", diffusion), ("ar", 100.0))
        }
        runner = SimpleNamespace(device=torch.device(device))
        decoder: Any = SimpleNamespace(runner=runner, ar_width=width)
        generate.show_speeds(decoder, results)
        return capsys.readouterr().err.strip().rpartition("; ")[2]

    assert told(49.0, "cuda", 1) == "0.49× the speed of AR (slower)"
    assert told(276.0, "cuda", 1) == "2.76× the speed of AR"
    for device, width, n_rows in (("cuda", 32, 32), ("cpu", 1, 16), ("cpu", 17, 32)):
        rows = f"which multiplies {n_rows} rows a token here (orthrus bench has a one-row AR)"
        assert told(276.0, device, width) == f"2.76× the speed of AR, {rows}"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_request_that_ended_in_an_error_is_told_after_what_came(
    raw: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    stats = Stats(1, 1, 1.0, (0,), 0.1, 0.2, 10.0)
    failed = Generation("ab", [97, 98], "error", None, stats, "dtype float16: not finite")

    class Stream:
        result = failed

        def __iter__(self) -> Any:
            return iter([Chunk([97, 98], ["a", "b"], 0)])

    monkeypatch.setattr(orthrus_fast.Decoder, "stream", lambda *_: Stream())
    flags = ["--json"] if as_json else []
    got = run(capsys, "--checkpoint", raw, "--prompt", "x", "--check", *flags)
    assert got.code == 2
    assert got.err.splitlines()[-1] == "error: dtype float16: not finite"
    assert "check:" not in got.err
    if as_json:
        result = json.loads(got.out)
        assert (result["text"], result["error"]) == ("ab", "dtype float16: not finite")
    else:
        assert got.out == "ab\n"


def test_a_full_disk_names_the_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(words: list[str]) -> int:
        raise OSError(28, "No space left on device", "out.jsonl")

    monkeypatch.setattr("orthrus_fast.cli.main.run", full)
    monkeypatch.setattr("orthrus_fast.cli.main.drop_output", lambda: None)
    assert main(["generate"]) == 2
    assert capfd.readouterr().err == "error: out.jsonl: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_standard_output_is_named_whatever_is_printed() -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "orthrus_fast"]
        got = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (got.returncode, got.stderr) == (2, b"error: standard output: No space left on device\n")


def test_the_demos_of_the_flag_are_those_of_the_file() -> None:
    assert tuple(json.loads((MODEL / "demos.json").read_text())) == DEMOS
