"""Turns as they are typed, pasted and piped: what a chat is given of them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from orthrus_fast.cli.keyboard import Keyboard, marks_pastes
from orthrus_fast.errors import PromptError
from tests.cli.terminals import Terminal, terminal

# Prints each turn; "hold N" holds the keyboard until N bytes were typed.
READER = """
import array, sys, time
if "without readline" in sys.argv:
    sys.modules["readline"] = None
from orthrus_fast.cli.keyboard import Keyboard

def typed():
    count = array.array("i", [0])
    fcntl.ioctl(0, termios.FIONREAD, count)
    return count[0]

keyboard = Keyboard()
before = termios.tcgetattr(0)
try:
    while (text := keyboard.read()) is not None:
        print("turn", repr(text), file=sys.stderr)
        if text.startswith("hold"):
            with keyboard.held():
                print("begun", flush=True)
                while typed() < int(text.split()[1]):
                    time.sleep(0.01)
                print("ended", flush=True)
    print("end of input")
except KeyboardInterrupt:
    print("left")
print("restored", termios.tcgetattr(0) == before)
"""
TABLE = "name,age\nAnn,31\nBob,5"
TERMS = pytest.mark.parametrize("term", ["xterm", "dumb"])


def turn(screen: Terminal, keys: str) -> str:
    """What the program was given once ``keys`` were typed at its prompt."""
    screen.wait("> ")
    screen.type(keys)
    return given(screen)


def given(screen: Terminal) -> str:
    screen.wait("turn '")
    return screen.wait("'\r\n")


@TERMS
def test_a_line_can_be_edited_and_called_back(term: str) -> None:
    with terminal(READER, term=term) as screen:
        assert turn(screen, "abc\x1b[D\x1b[DX\r") == "aXbc"
        assert turn(screen, "\x1b[A\x7fd\r") == "aXbd"


@TERMS
def test_a_pasted_table_is_one_turn(term: str) -> None:
    with terminal(READER, term=term) as screen:
        screen.wait("> ")
        screen.paste(TABLE)
        screen.type("\r")
        assert given(screen) == TABLE.replace("\n", "\\n")
        assert turn(screen, "next\r") == "next"


def test_a_line_may_be_longer_than_a_terminal_keeps() -> None:
    with terminal(READER) as screen:
        assert turn(screen, "x" * 7310 + "\r") == "x" * 7310


@TERMS
def test_ctrl_d_ends_the_line_and_the_input(term: str) -> None:
    with terminal(READER, term=term) as screen:
        screen.wait("> ")
        screen.type("\x04")
        assert screen.end() == (0, "\nend of input\nrestored True\n")


def test_ctrl_c_discards_a_line_and_leaves_where_there_is_none() -> None:
    hint = "\n(Ctrl-D leaves, and Ctrl-C again)\n"
    with terminal(READER) as screen:
        screen.wait("> ")
        for discarded in ("one", "two"):
            screen.type(discarded)
            screen.wait(discarded)
            screen.interrupt()
            assert screen.wait("> ") == "\n"
        screen.interrupt()
        assert screen.wait("> ") == hint
        screen.type("three")
        screen.wait("three")
        screen.interrupt()
        assert screen.wait("> ") == "\n"
        screen.interrupt()
        assert screen.wait("> ") == hint
        screen.interrupt()
        assert screen.end() == (0, "\nleft\nrestored True\n")


@TERMS
def test_what_is_typed_while_held_is_not_shown_but_kept(term: str) -> None:
    keys = "one\rtwx\x7fo\r"
    with terminal(READER, term=term) as screen:
        assert turn(screen, f"hold {len(keys)}\r").startswith("hold")
        screen.wait("begun\r\n")
        screen.type(keys)
        assert screen.wait("ended") == ""
        assert (given(screen), given(screen)) == ("one", "two")
        screen.wait("> ")
        screen.type("\x04")
        assert screen.end()[1].endswith("restored True\n")


def test_what_is_pasted_while_held_is_one_turn() -> None:
    with terminal(READER) as screen:
        turn(screen, f"hold {len(TABLE)}\r")
        screen.wait("begun\r\n")
        if "\x1b[?2004h" not in screen.screen:
            pytest.skip("this Python's readline knows no bracketed paste")
        screen.paste(TABLE)
        assert screen.wait("ended") == ""
        screen.type("\r")
        assert given(screen) == TABLE.replace("\n", "\\n")


def test_without_readline_a_paste_is_one_turn_and_a_cut_line_is_said() -> None:
    with terminal(READER, "without readline") as screen:
        screen.wait("> ")
        screen.paste(TABLE + "\n")
        assert given(screen) == TABLE.replace("\n", "\\n")
        screen.wait("> ")
        screen.type("x" * 5000 + "\r")
        screen.wait("error: a line was cut: without line editing a terminal keeps 4095 bytes")
        screen.wait("turn ''")
        assert turn(screen, "y" * 4094 + "\r") == "y" * 4094


def test_prompts_are_kept_out_of_a_redirected_output() -> None:
    with terminal(READER, stdout=subprocess.PIPE) as screen:
        assert turn(screen, "one\r") == "one"
        screen.wait("> ")
        screen.type("\x04")
        assert screen.process.stdout is not None
        assert screen.process.stdout.read() == b"end of input\nrestored True\n"


@pytest.mark.parametrize(
    "documentation, version, term, marks",
    [
        ("using GNU readline.", 0x802, "xterm", True),
        ("using GNU readline.", 0x801, "xterm", True),
        ("using GNU readline.", 0x800, "xterm", False),
        ("using libedit readline.", 0x802, "xterm", False),
        ("using GNU readline.", 0x802, "dumb", False),
        ("using GNU readline.", 0x802, None, False),
    ],
)
def test_pastes_are_marked_where_both_ends_can(
    monkeypatch: pytest.MonkeyPatch, documentation: str, version: int, term: str | None, marks: bool
) -> None:
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    asked: list[str] = []
    facts: dict[str, Any] = {"__doc__": documentation, "_READLINE_VERSION": version}
    readline = SimpleNamespace(parse_and_bind=asked.append, **facts)
    assert marks_pastes(readline) is marks  # type: ignore[arg-type]
    assert asked == ["set enable-bracketed-paste on"] * marks


def test_each_line_of_a_pipe_is_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"one\n\n{'x' * 7310}\nnaïve 中"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    keyboard = Keyboard()
    with keyboard.held():
        assert not keyboard.typed
    assert [keyboard.read() for _ in range(5)] == [*lines.split("\n"), None]


def test_a_pipe_that_is_not_utf_8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.write(write, b"abc\xff\n")
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        with pytest.raises(PromptError, match="standard input: not valid UTF-8"):
            Keyboard().read()
