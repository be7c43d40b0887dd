"""What a fresh clone promises: the README's commands and examples, and a wheel that works alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (block,) = [one for one in blocks if "openai" not in one]  # which wants a server
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
    for name in ("records", "code", "prose"):
        of = kinds[name]
        said = f"measured, distinct trigrams {of['distinct_trigram_share']:.1%}"
        assert f"| {name} | {of['tokens_per_cycle']:.2f} ({said}) |" in README


def test_links_in_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(targets) >= 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_package_and_the_checkpoint_are_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "orthrus_fast").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders} | {"orthrus_fast.embedded"}
    assert sorted(re.findall(r'"(.+?)"', listed[1])) == sorted(packages)


@pytest.mark.slow
def test_a_wheel_made_of_the_source_archive_works_elsewhere(tmp_path: Path) -> None:
    copy, target, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    for folder in (copy, elsewhere):  # a copy, so that no build folder is left in the clone
        folder.mkdir()
    for name in ("orthrus_fast", "model", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", str(ROOT / name), str(copy))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    build = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(archive))
    run(*pip, "wheel", *build, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", str(target), str(wheel))
    info = next(target.glob("orthrus_fast-*.dist-info"))
    assert {path.name for path in target.iterdir()} == {"orthrus_fast", "bin", info.name}
    assert (target / "orthrus_fast" / "py.typed").exists()
    assert (info / "licenses" / "model" / "NOTICE").exists()
    embedded = target / "orthrus_fast" / "embedded"
    assert {path.name for path in embedded.iterdir()} >= {
        p.name for p in (ROOT / "model").iterdir()
    }

    def command(*words: str) -> str:
        return run(*words, cwd=elsewhere, PYTHONPATH=str(target), OMP_NUM_THREADS="1")

    orthrus = str(target / "bin" / "orthrus")
    where = command(sys.executable, "-c", "import orthrus_fast; print(orthrus_fast.__file__)")
    assert where.startswith(str(target))
    assert str(embedded) in command(orthrus, "info")
    version = info.name.removeprefix("orthrus_fast-").removesuffix(".dist-info")
    assert command(sys.executable, "-m", "orthrus_fast", "--version").split() == [
        "orthrus-fast",
        version,
    ]
    table = "Convert to JSON:\n\nname,age\nAnn,31"
    text = command(orthrus, "generate", "--prompt", table, "--device", "cpu")
    assert json.loads(text) == [{"name": "Ann", "age": 31}]
    parts = ("--parts", "startup,acceptance", "--sequences", "1", "--new-tokens", "8")
    flags = (*parts, "--device", "cpu", "--repeats", "1", "--max-seq-len", "400")
    command(orthrus, "bench", *flags, "--contexts", "64", "--json", "r.json")
    measured = json.loads((elsewhere / "r.json").read_text(encoding="utf-8"))
    assert measured["environment"]["commit"] is None
    assert measured["parts"]["acceptance"]["prompts_file"] == "heldout.jsonl"


# An environment that holds what README installs, and nothing else.


def installed_for(names: list[str]) -> set[str]:
    """Return the distributions of these requirements and of what they need, without extras."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, metadata.requires(one.name) or [])
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with links to the packages that the project needs, and the project."""
    environment = tmp_path_factory.mktemp("bare") / ".venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    (site,) = environment.glob("lib/python*/site-packages")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needs = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert needs is not None
    for name in installed_for(re.findall(r'"(.+?)"', needs[1])):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            place = Path(str(distribution.locate_file(top)))
            if place.exists() and not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(place)
    (site / "orthrus_fast.pth").write_text(f"{ROOT}\n")
    script = environment / "bin" / "orthrus"
    code = "import sys; from orthrus_fast.cli.main import main; sys.exit(main())"
    script.write_text(f"#!{environment}/bin/python\n{code}\n")
    script.chmod(0o755)
    return environment


def in_bare(
    environment: Path, command: str, folder: Path, code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a shell's line there, in a folder that looks like the clone; check its exit code."""
    for entry in ROOT.iterdir():
        if entry.name not in (".venv", ".git") and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(environment)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["PATH"] = f"{environment}/bin{os.pathsep}{clean['PATH']}"  # as if it were activated
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**clean, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


NOT_RUN = {  # what of README's commands no test runs; a block may say so itself, in a comment
    "installs": r"\b(pip install|uv venv|uv pip|python3? -m venv|git clone)\b",
    "is the suite": r"\bpytest\b|\.ci/run",
    "needs the network": r"(--checkpoint|--model) [\w.-]+/[\w.-]+[^/\w]",
    "needs a GPU": r"--shape [148]|--device cuda",
}


def readmes_commands() -> list[str]:
    """Return the lines of README's bash blocks that need no network, key or GPU.

    Of a line that installs first, what follows the last && that still installs is left.
    """
    block = r"(<!-- not run: [^\n]*-->\s*)?^```(?:bash|sh|console)\n(.*?)^```"
    commands = []
    for not_run, lines in re.findall(block, README, re.DOTALL | re.MULTILINE):
        if not_run:
            continue
        for line in lines.replace("\\\n", " ").splitlines():
            parts = line.removeprefix("$ ").split(" && ")
            while parts and re.search(NOT_RUN["installs"], parts[0]):
                parts.pop(0)
            rest = " && ".join(parts)
            if rest and not rest.startswith("#"):
                commands.append(rest)
    whole = [one for one in commands if not any(re.search(p, one) for p in NOT_RUN.values())]
    return list(dict.fromkeys(whole))


def test_the_readme_has_commands_that_can_be_run() -> None:
    assert any("generate" in command for command in readmes_commands())
    assert any("--prompts-file" in command for command in readmes_commands())


@pytest.mark.slow
@pytest.mark.parametrize("command", readmes_commands())
def test_a_command_of_the_readme_runs_in_what_it_installs(
    command: str, bare: Path, tmp_path: Path
) -> None:
    done = in_bare(bare, command, tmp_path)
    assert done.stdout or list(tmp_path.glob("*.json*"))
    assert not re.search("Warning|Traceback|Errno", done.stderr), done.stderr


@pytest.mark.slow
def test_what_needs_more_than_the_readme_installs_says_what(bare: Path, tmp_path: Path) -> None:
    absent = in_bare(bare, "python -c 'import numpy'", tmp_path, 1)
    assert "No module named 'numpy'" in absent.stderr
    done = in_bare(bare, "orthrus serve", tmp_path, 2)
    needs = "pydantic is not installed; run: pip install -e '.[server]' in the repository"
    assert done.stderr == f"error: {needs}\n"
    done = in_bare(bare, "python -m scripts.train_embedded speed", tmp_path, 1)
    assert done.stderr == ("error: numpy is not installed; run: pip install -e '.[test]'\n")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["orthrus bench", "python -m orthrus_fast.bench"])
def test_the_benchmark_needs_no_more_than_decoding(
    program: str, bare: Path, tmp_path: Path
) -> None:
    parts = "--parts startup,acceptance --sequences 1 --new-tokens 8 --repeats 1 --contexts 64"
    done = in_bare(bare, f"{program} {parts} --max-seq-len 400 --device cpu", tmp_path)
    assert done.stdout and "Warning" not in done.stderr
