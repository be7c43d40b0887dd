"""What a fresh clone promises: the README's commands and examples, and a wheel that works alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str, cwd: Path = ROOT, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ci_runs_the_readmes_test_command() -> None:
    line = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest'
    assert line in README.splitlines()
    assert line in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_the_readmes_python_runs_as_it_stands() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    output = run(sys.executable, "-c", block)
    assert '[ {"name": "Ann", "age": 31}, {"name": "Bob", "age": 45} ]' in " ".join(output.split())


def test_the_readmes_recorded_output_is_what_comes_out() -> None:
    recorded = re.search(r"--show-blocks --check`.*?```\n(.*?)```", README, re.DOTALL)
    assert recorded is not None
    output = run(sys.executable, "generate.py", "--show-blocks", "--device", "cpu")
    text = recorded[1].split("\n170 tokens")[0] + "\n"
    assert text.count("⟨") > 10
    # Where a draft was right may turn with the last bits of another CPU; the text may not.
    assert re.sub("[⟨⟩]", "", output) == re.sub("[⟨⟩]", "", text)


def test_the_readmes_figures_are_the_measured_ones() -> None:
    kinds = json.loads((ROOT / "model" / "figures.json").read_text())["kinds"]
    columns = [kinds[name] for name in ("records", "code", "prose")]
    per_cycle = " | ".join(f"{kind['tokens_per_cycle']:.2f}" for kind in columns)
    distinct = " | ".join(f"{kind['distinct_trigram_share']:.1%}" for kind in columns)
    assert f"(model/figures.json)) | {per_cycle} |" in README
    assert f"(loops are easy to draft) | {distinct} |" in README


def test_links_in_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) >= 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.slow
def test_a_wheel_installs_and_imports_elsewhere(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), ".")
    copy = tmp_path / "source"  # so that no build folder is left in the clone
    copy.mkdir()
    for name in ("orthrus_fast", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", str(ROOT / name), str(copy))
    run(*pip, *build, cwd=copy)
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel))
    assert {path.name for path in target.iterdir()} == {
        "orthrus_fast",
        next(target.glob("orthrus_fast-*.dist-info")).name,
    }
    assert (target / "orthrus_fast" / "py.typed").exists()
    code = (
        "import orthrus_fast; print(orthrus_fast.__file__);"
        f"print(orthrus_fast.load({str(ROOT / 'model')!r}, device='cpu').generate([5], 4).tokens)"
    )
    where, tokens = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)
    ).splitlines()
    assert where.startswith(str(target))
    assert len(json.loads(tokens)) == 4
