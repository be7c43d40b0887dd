"""orthrus chat: its turns, its commands, and what the model sees of a long conversation."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import orthrus_fast
from orthrus_fast.cli.chat import find_command, fit
from orthrus_fast.cli.main import main
from orthrus_fast.cli.session import encode
from orthrus_fast.decoder import Decoder
from orthrus_fast.encoding import Prompt
from orthrus_fast.results import Chunk, Generation
from tests.checkpoints import write_checkpoint
from tests.cli.terminals import terminal

# The command, whose answers begin once a key was pressed.
COMMAND = """
import select, sys
from orthrus_fast.cli import chat, main

def decode(*rest, decode=chat.decode):
    print("begun")
    select.select([0], [], [])
    return decode(*rest)

chat.decode = decode
sys.exit(main.main())
"""


class Run(SimpleNamespace):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], lines: str, *arguments: object) -> Run:
    """``orthrus chat`` in this process, on the CPU, with ``lines`` from a pipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        code = main(["chat", "--device", "cpu", *map(str, arguments)])
    captured = capsys.readouterr()
    return Run(code=code, out=captured.out, err=captured.err)


class Canned:
    """A stream of one chunk, or of none, that Ctrl-C or an ``error`` ends."""

    def __init__(self, text: str, error: str | None = None) -> None:
        speed = {"tokens_per_cycle": None, "tokens_per_second": None, "time_to_first_token": 0.0}
        stats: Any = SimpleNamespace(cycles=0, reused_tokens=0, **speed) if text else None
        self.result = Generation(text, [1], "error" if error else None, None, stats, error)

    def __iter__(self) -> Iterator[Chunk]:
        if self.result.text:
            yield Chunk([1], [self.result.text], 0)
        if self.result.error is None:
            raise KeyboardInterrupt

    def close(self) -> None: ...


class Streams:
    """``seen``: what was said in each conversation that was decoded; tiny models answer all alike.

    ``canned``: the answers to the first ones.
    """

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.canned: list[Canned] = []


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    found, stream = Streams(), Decoder.stream

    def recorded(decoder: Decoder, prompt: Prompt, *rest: Any) -> Any:
        given = stream(decoder, prompt, *rest)  # which refuses what is too long
        assert decoder.tokenizer is not None
        text = decoder.tokenizer.decode(decoder.encode(prompt))
        found.seen.append(re.findall(r"<(?:system|user|assistant)>(.*?)</", text, re.DOTALL))
        return found.canned.pop(0) if found.canned else given

    monkeypatch.setattr(Decoder, "stream", recorded)
    return found


def test_turns_are_remembered_and_one_that_is_too_long_is_dropped(
    chat: Path, capsys: pytest.CaptureFixture[str], streams: Streams
) -> None:
    line = ("--checkpoint", chat, "--max-new-tokens", 8, "--max-seq-len", 120)
    got = run(capsys, f"one\n\n{'x' * 200}\ntwo\n", *line)
    first, second = got.out.splitlines()
    assert got.code == 0
    assert streams.seen == [["one"], ["one", first, "two"]]
    assert got.err.count("8 tokens \xb7") == 2
    assert got.err.count("error: prompt: 2") == 1
    assert got.err.count("(this turn is dropped)") == 1
    assert got.err.count("tokens of the prompt reused") == 1
    assert "forgotten" not in got.err  # for a turn that was dropped, nothing is
    decoder = orthrus_fast.load(chat, device="cpu", max_seq_len=120)
    said = [("user", "one"), ("assistant", first), ("user", "two")]
    messages = [{"role": role, "content": content} for role, content in said]
    assert [decoder.generate(one, 8).text for one in (messages[:1], messages)] == [first, second]


def test_a_full_context_forgets_its_oldest_turns_and_says_so(
    chat: Path, capsys: pytest.CaptureFixture[str], streams: Streams
) -> None:
    a, b, c, d, e = "a" * 20, "b" * 20, "c" * 60, "d", "e" * 140
    line = ("--checkpoint", chat, "--max-new-tokens", 8, "--max-seq-len", 200, "--system", "short")
    got = run(capsys, f"{a}\n{b}\n{c}\n{d}\n{e}\n", *line)
    one, two, three, four, _ = got.out.splitlines()
    assert got.code == 0
    assert streams.seen == [
        ["short", a],
        ["short", a, one, b],
        ["short", b, two, c],
        ["short", c, three, d],
        ["short", e],
    ]
    assert got.err.count("the context was full: the oldest turn was forgotten") == 2
    assert got.err.count("the context was full: the 2 oldest turns were forgotten") == 1


def test_what_is_kept_of_a_conversation_leaves_room_for_an_answer(chat: Path) -> None:
    decoder = orthrus_fast.load(chat, device="cpu", max_seq_len=200)
    messages = [{"role": ("user", "assistant")[i % 2], "content": "x" * 10} for i in range(81)]

    def n_tokens(budget: int | None, thinking: bool | None = None) -> int:
        thought = {"thinking": thinking, "thinks": bool(thinking)}
        args: Any = SimpleNamespace(max_new_tokens=budget, system="short", **thought)
        ids, kept = fit(decoder, args, messages)
        assert kept == messages[len(messages) - len(kept) :] and kept[0]["role"] == "user"
        assert ids == encode(decoder, args, kept)
        return len(ids)

    newest, turn = n_tokens(1000), n_tokens(1) - n_tokens(50)  # the newest is never dropped
    assert (newest, turn) == (56, 56)
    assert n_tokens(None) == n_tokens(50)  # a quarter of 200
    for budget in (1, 8, 32, 33, 88, 89, 144):
        assert n_tokens(budget) + budget <= 200 < n_tokens(budget) + budget + turn
    decoder.max_seq_len = 2000
    assert n_tokens(None) == n_tokens(256) > n_tokens(500)
    assert n_tokens(None, thinking=True) == n_tokens(500, thinking=True)


@pytest.mark.parametrize(
    "text, command",
    [
        ("/exit", "/exit"),
        ("/exit  ", "/exit"),
        ("/", "/"),
        ("/etc?", "/etc?"),
        ("/help me", "/help me"),
        (" /exit", None),
        ("exit", None),
        ("// a comment", None),
        ("/etc/fstab holds what?", None),
        ("/exit\nfrom a pasted page", None),
    ],
)
def test_what_is_a_command(text: str, command: str | None) -> None:
    assert find_command(text) == command


@pytest.mark.parametrize("leave", ["/exit", "/quit"])
def test_commands_are_obeyed_and_not_sent(
    chat: Path, capsys: pytest.CaptureFixture[str], streams: Streams, leave: str
) -> None:
    line = ("--checkpoint", chat, "--max-new-tokens", 8, "--max-seq-len", 200)
    got = run(capsys, f"one\n/help\n/nothing\n/clear\n /two\n{leave}\nthree\n", *line)
    assert got.code == 0
    assert streams.seen == [["one"], ["/two"]]
    lines = got.err.splitlines()
    assert any(line.startswith("/clear  forget") for line in lines)
    assert "error: /nothing: no such command; /help lists them" in got.err
    assert lines.count("the conversation is forgotten") == 1


def test_help_fits_on_a_screen(chat: Path, capsys: pytest.CaptureFixture[str]) -> None:
    got = run(capsys, "/help\n", "--checkpoint", chat)
    assert max(map(len, got.err.splitlines())) <= 80


class Typed(io.StringIO):
    """A terminal that is read."""

    def isatty(self) -> bool:
        return True


def test_a_turn_without_an_answer_is_dropped(
    chat: Path, capsys: pytest.CaptureFixture[str], streams: Streams
) -> None:
    streams.canned = [Canned("", "logits that are\nnot finite")]
    got = run(capsys, "one\ntwo\n", "--checkpoint", chat, "--max-new-tokens", 8)
    assert got.code == 0
    assert streams.seen == [["one"], ["two"]]
    assert "error: logits that are\\nnot finite (this turn is dropped)" in got.err


def test_ctrl_c_ends_a_chat_that_nobody_types(
    chat: Path, capsys: pytest.CaptureFixture[str], streams: Streams
) -> None:
    streams.canned = [Canned("some")]
    got = run(capsys, "one\ntwo\n", "--checkpoint", chat)
    assert (got.code, got.out) == (130, "some\n")
    assert got.err.splitlines()[-1] == "interrupted"


def test_a_template_that_refuses_the_first_turn_ends_the_chat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True)
    template = "{% if messages[0].content == 'bad' %}{{ raise_exception('bad word') }}{% endif %}x"
    (directory / "chat_template.jinja").write_text(template)
    got = run(capsys, "bad\ngood\n", "--checkpoint", directory)
    assert (got.code, got.out) == (2, "")
    assert "bad word" in got.err.splitlines()[-1]


def test_a_checkpoint_without_a_chat_template_is_refused(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = run(capsys, "one\n", "--checkpoint", raw)
    assert (got.code, got.out) == (2, "")
    assert "no chat template; use: orthrus generate" in got.err.splitlines()[-1]


def test_on_a_terminal(chat: Path) -> None:
    """A banner, an answer that no key disturbs, its speed, one that Ctrl-C ends, and Ctrl-D."""
    line = ("chat", "--checkpoint", chat, "--device", "cpu", "--max-new-tokens", 8)
    with terminal(COMMAND, *line) as screen:
        banner = screen.wait("> ").splitlines()[-2:]
        assert banner[0].endswith("/model · context of 512 tokens")
        assert banner[1] == "/help lists the commands · Ctrl-C ends an answer · Ctrl-D leaves"
        screen.type("one\r")
        screen.wait("begun")
        screen.type("/clear\r")
        assert "/clear" not in screen.wait("8 tokens ·")
        screen.wait("> ")
        assert screen.wait("> ") == "/clear\nthe conversation is forgotten\n"
        screen.type("two\r")
        screen.wait("begun")
        screen.interrupt()
        assert screen.wait("> ") == "\ninterrupted: this turn is dropped\n"
        screen.type("\x04")
        assert screen.end() == (0, "\n")


def test_ctrl_c_ends_an_answer_and_keeps_it(
    chat: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    streams: Streams,
) -> None:
    streams.canned = [Canned("some"), Canned("")]
    monkeypatch.setattr("orthrus_fast.cli.keyboard.import_readline", lambda: None)
    monkeypatch.setattr("orthrus_fast.cli.keyboard.is_waiting", lambda seconds: False)
    monkeypatch.setattr("termios.tcgetattr", lambda stream: [0] * 6)
    monkeypatch.setattr("termios.tcsetattr", lambda stream, when, settings: None)
    monkeypatch.setattr(sys, "stdin", Typed("one\nlost\ntwo\n"))
    code = main(["chat", "--device", "cpu", "--checkpoint", str(chat), "--max-new-tokens", "8"])
    got = capsys.readouterr()
    assert code == 0 and got.out.startswith("some\n\n")
    assert streams.seen == [["one"], ["one", "some", "lost"], ["one", "some", "two"]]
    assert "interrupted: the text above is what was written so far" in got.err
    assert "interrupted before the first token" in got.err
