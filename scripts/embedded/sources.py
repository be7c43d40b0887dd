"""The Python code that the checkpoint was trained on: pinned public packages, which pip downloads
and checks by sha256.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

MIN_BYTES, MAX_BYTES = 500, 100_000
PACKAGE_BYTES = 12_000_000  # no package may outweigh the rest
MAX_MEAN_LINE = 80  # longer lines: data tables written as Python


@dataclasses.dataclass(frozen=True)
class Source:
    """One line of SOURCES.tsv. `role` is "train" or "held-out"."""

    name: str
    version: str
    licence: str
    sha256: str
    role: str


def read_sources(path: Path) -> list[Source]:
    """Read the rows of SOURCES.tsv (its header names the fields of `Source`)."""
    with path.open(encoding="utf-8", newline="") as file:
        return [Source(**row) for row in csv.DictReader(file, delimiter="\t")]


def fetch(sources: Sequence[Source], wheels: Path) -> None:
    """Download the pinned wheels; pip refuses one whose hash differs."""
    wheels.mkdir(parents=True, exist_ok=True)
    pins = wheels / "requirements.txt"
    pins.write_text(
        "".join(f"{s.name}=={s.version} --hash=sha256:{s.sha256}\n" for s in sources),
        encoding="utf-8",
    )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
    ]
    subprocess.run(
        [*command, "--platform", "any", "--dest", str(wheels), "--requirement", str(pins)],
        check=True,
    )


def documents(sources: Sequence[Source], wheels: Path, role: str) -> Iterator[str]:
    """Yield the Python files of the packages of a role as text, each once, without vendored code,
    in a fixed order.
    """
    by_hash = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(wheels.glob("*.whl"))
    }
    seen: set[bytes] = set()
    for source in sources:
        if source.role != role:
            continue
        if source.sha256 not in by_hash:
            raise FileNotFoundError(
                f"{source.name} {source.version} is not in {wheels}: run `fetch` first"
            )
        budget = PACKAGE_BYTES
        for data in _python_files(by_hash[source.sha256]):
            digest = hashlib.sha256(data).digest()
            text = _readable(data)
            if text is None or digest in seen or len(data) > budget:
                continue
            seen.add(digest)
            budget -= len(data)
            yield text


def _python_files(wheel: Path) -> list[bytes]:
    """Return a wheel's Python files, ordered by hash, so that a budget takes a fair sample."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            n
            for n in archive.namelist()
            if n.endswith(".py") and "vendor" not in n and "antlr" not in n
        ]
        files = [archive.read(name) for name in names]
    return sorted(
        (f for f in files if MIN_BYTES <= len(f) <= MAX_BYTES),
        key=lambda f: hashlib.sha256(f).digest(),
    )


def _readable(data: bytes) -> str | None:
    try:
        text = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
    lines = text.count("\n") + 1
    return text if len(text) / lines <= MAX_MEAN_LINE and len(text) > 0.95 * len(data) else None
