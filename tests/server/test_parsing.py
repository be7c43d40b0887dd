"""Thoughts and calls in an answer: whatever the cuts of the text, the parts are the same."""

from __future__ import annotations

import random

import pytest

from orthrus_fast.server.parsing import AnswerParser, ToolCall

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "é": [2]}}\n</tool_call>'
ADD = ToolCall("add", '{"a": 1, "é": [2]}')

Parsed = tuple[str, str, list[ToolCall]]


def parsed(pieces: list[str], in_thought: bool = False, tools: bool = True) -> Parsed:
    parser = AnswerParser(in_thought, tools)
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    reasoning = "".join(part.reasoning for part in parts)
    content = "".join(part.content for part in parts)
    return reasoning, content, [part.call for part in parts if part.call is not None]


CASES: list[tuple[str, Parsed]] = [
    ("", ("", "", [])),
    ("plain text ", ("", "plain text ", [])),
    ("<think>\nI see.\n</think>\n\nYes.", ("I see.", "Yes.", [])),
    ("\n <think>a</think>b", ("a", "b", [])),
    ("<think>\n\n</think>\n\nYes.", ("", "Yes.", [])),
    ("<think>\nno end\n", ("no end\n", "", [])),
    ("<think>x < y </thin </think>z", ("x < y </thin ", "z", [])),
    ("<thin", ("", "<thin", [])),
    ("  <thought>", ("", "  <thought>", [])),
    ("later <think>a</think>", ("", "later <think>a</think>", [])),
    (CALL, ("", "", [ADD])),
    (f"Let me see.\n{CALL}\n{CALL}\n", ("", "Let me see.", [ADD, ADD])),
    (f"<think>\nhm\n</think>\n\n{CALL}", ("hm", "", [ADD])),
    (f"a\n{CALL} b ", ("", "ab ", [ADD])),
    ('<tool_call>{"name": "f"}</tool_call>', ("", "", [ToolCall("f", "{}")])),
]
MALFORMED = [
    '<tool_call>{"name": "f", "arguments": {}}',
    "a \n<tool_call>\n{nonsense}\n</tool_call> b",
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "text"}</tool_call>',
    "<tool_call>" + "[" * 100_000 + "</tool_call>",
    "<tool_call></tool_call>",
    "<tool_ca",
    "<tool_call>",
    " \n",
]
CASES += [(text, ("", text, [])) for text in MALFORMED]
CASES += [(f"<tool_call>oh\n{CALL}", ("", "<tool_call>oh", [ADD]))]


@pytest.mark.parametrize("text, expected", CASES, ids=lambda case: repr(case)[:40])
def test_an_answer_has_its_parts_whatever_its_cuts(text: str, expected: Parsed) -> None:
    assert parsed([text]) == expected
    if len(text) < 1000:
        assert parsed(list(text)) == expected
    draw = random.Random(5)
    for _ in range(20):
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parsed(pieces) == expected


def test_a_prompt_may_end_within_a_thought() -> None:
    assert parsed(["\nhm", "\n</think>", "\n\nYes."], in_thought=True) == ("hm", "Yes.", [])


def test_without_tools_a_call_is_text() -> None:
    assert parsed([f"a {CALL}"], tools=False) == ("", f"a {CALL}", [])


def test_text_is_held_back_no_longer_than_needed() -> None:
    parser = AnswerParser(tools=True)
    assert [part.content for part in parser.push("Hello, <b>you</b> ")] == ["Hello, <b>you</b>"]
    assert [part.content for part in parser.push("<tool")] == []
    assert [part.content for part in parser.push("box>")] == [" <toolbox>"]
