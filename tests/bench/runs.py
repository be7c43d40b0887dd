"""What the tests of the benchmark share: its runs on a CPU at the tiny shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orthrus_fast.bench.__main__ import main
from orthrus_fast.bench.flags import build_parser
from orthrus_fast.bench.session import Session, build_session

TINY = ("--shape", "tiny", "--device", "cpu", "--repeats", "2", "--max-seq-len", "300")
EMBEDDED = ("--device", "cpu", "--repeats", "1", "--sequences", "3", "--contexts", "64")
EMBEDDED += ("--max-seq-len", "400", "--new-tokens", "12", "--slots", "3")
BOUND = 4.9  # standard errors: a right mean is further off once in a million seeds; ours is fixed


def run(path: Path, *flags: str, expected: int = 0) -> Any:
    """The JSON of a run; every test names its own file."""
    assert main([*flags, "--json", str(path)]) == expected
    return json.loads(path.read_text(encoding="utf-8"))


def session(*flags: str) -> Session:
    return build_session(build_parser().parse_args(flags))


def check_times(values: dict[str, float]) -> None:
    assert 0 < values["p10"] <= values["median"] <= values["p90"]
    assert values["n"] >= 1
