"""``--json-schema``: text that a schema allows, in both modes."""

from __future__ import annotations

import json
from pathlib import Path

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
