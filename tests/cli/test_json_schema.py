"""``--json-schema``: text that a schema allows, in both modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from orthrus_fast.cli.main import main

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["a", "b"]}, "n": {"type": "integer", "maximum": 9}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
FLAGS = ("--prompt", "A record:", "--device", "cpu", "--max-new-tokens", "60")


def run(*flags: str) -> int:
    return main(["generate", *FLAGS, *flags])


def test_the_text_is_what_the_schema_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert run("--json-schema", str(file), "--check", "--json", "--temperature", "1.5") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "eos" and result["check"] == {"identical": True}
    jsonschema.validate(json.loads(result["text"]), SCHEMA)


def test_any_object_has_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--json-schema", "any") == 0
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize("content", [None, b"\xff", b'{"not": {}}', b"nonsense", b""])
def test_a_schema_that_cannot_be_served_ends_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    file = tmp_path / "schema.json"
    if content is not None:
        file.write_bytes(content)
    assert run("--json-schema", str(file)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "grammar" in said or "--json-schema" in said


def test_a_line_of_a_prompts_file_brings_a_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the flag's; one that cannot be served fails alone; resumed only with the same."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    (tmp_path / "schema").write_text('{"type": "boolean"}')
    named = {"properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
    named |= {"required": ["b", "a"], "additionalProperties": False}
    schemas: list[Any] = [SCHEMA, named, "any", True, {"not": {}}, None]

    def run_with(schemas: list[Any]) -> int:
        lines = [{"prompt": "A record:", "json_schema": one, "temperature": 1.5} for one in schemas]
        for line in lines:
            if line["json_schema"] is None:
                del line["json_schema"]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths = ["--prompts-file", str(prompts), "--output", str(output)]
        more = ["--json-schema", str(tmp_path / "schema"), "--seed", "1", "-n", "60"]
        return main(["generate", *paths, "--device", "cpu", *more])

    assert run_with(schemas) == 3
    results = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    results.sort(key=lambda result: result["index"])
    assert [one["finish_reason"] for one in results] == [*["eos"] * 4, "error", "eos"]
    assert 'Unimplemented keys: ["not"]' in results[4]["error"]
    values = [json.loads(one["text"]) for one in results if one["text"]]
    jsonschema.validate(values[0], SCHEMA)
    assert list(values[1]) == ["b", "a"] and isinstance(values[2], dict)
    assert isinstance(values[-1], bool)
    assert run_with(schemas) == 3
    other = dict(reversed(named["properties"].items()))
    capsys.readouterr()
    assert run_with([SCHEMA, named | {"properties": other}, *schemas[2:]]) == 2
    assert "differs in prompts" in capsys.readouterr().err


def test_a_schema_of_a_line_that_is_too_long_is_named_by_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    line = {"prompt": "a", "json_schema": {"const": "x" * 250_000}}
    prompts.write_text('{"prompt": "a"}\n' + json.dumps(line))
    output = str(tmp_path / "results.jsonl")
    assert main(["generate", "--prompts-file", str(prompts), "--output", output]) == 2
    assert "line 2: grammar: 250013 characters are more than" in capsys.readouterr().err


def test_results_of_another_schema_are_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", str(tmp_path / "results.jsonl")
    prompts.write_text('{"prompt": "A record:"}\n')
    batch = ["generate", "--prompts-file", str(prompts), "--output", output, "-n", "60"]
    for name, source in (("a", SCHEMA), ("b", {"type": "boolean"})):
        (tmp_path / name).write_text(json.dumps(source))
    flag = [*batch, "--device", "cpu", "--json-schema"]
    assert main([*flag, str(tmp_path / "a")]) == 0
    lines = Path(output).read_text().splitlines()
    jsonschema.validate(json.loads(json.loads(lines[-1])["text"]), SCHEMA)
    assert main([*flag, str(tmp_path / "a")]) == 0
    assert main([*flag, str(tmp_path / "b")]) == 2
