"""Result files: what is read from benchmarks/results/, and how it is named on a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from orthrus_fast.bench_report.tables import Result
from orthrus_fast.errors import RequestError, one_line

RESULTS = "benchmarks/results"
MODELS = ("1.7B", "4B", "8B")  # the order of rows; others follow by name
PEERS_OWN_DEFAULTS = (
    "contexts",
    "new_tokens",
    "repeats",
    "sequences",
)  # other than the benchmark's

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ResultFile:
    """One JSON file of the benchmark or of benchmarks/peers.py."""

    path: Path
    content: Result

    @property
    def arguments(self) -> Result:
        arguments: Result = self.content["arguments"]
        return arguments

    @property
    def parts(self) -> dict[str, Result]:
        """What was measured, by part; the breakdown by kernel and a peers' file count as parts."""
        parts = {n: p for n, p in self.content.get("parts", {}).items() if "skipped" not in p}
        if self._unfinished.get("slots"):
            parts.setdefault("slots", guarded(self, "unfinished", self._slots_so_far))
        if "kernels" in self.content:
            parts["kernels"] = {"kernels": self.content["kernels"]}
        if "transformers" in self.content:
            parts["peers"] = self.content
        return parts

    @property
    def _unfinished(self) -> Result:
        """The steps that were done of parts that were not."""
        unfinished: Result = self.content.get("unfinished", {})
        return unfinished

    def _slots_so_far(self) -> Result:
        """The part of throughput as far as a run that was ended early came with it."""
        from orthrus_fast.bench.slots import choose_context
        from orthrus_fast.bench.subject import CONTEXTS

        arguments, entries = self.arguments, self._unfinished["slots"]
        limit = self.run_of("slots")["configuration"]["max_seq_len"]
        contexts, done = arguments["contexts"] or CONTEXTS, {entry["slots"] for entry in entries}
        missing = [n for n in arguments["slots_list"] if n not in done]
        why = "the run ended before"
        return {
            "accept_asked": arguments["accept"],
            "context": choose_context(contexts, arguments["new_tokens"], limit),
            "at": [entry for entry in entries if "why" not in entry],
            "left_out": [entry for entry in entries if "why" in entry]
            + [{"slots": n, "why": why} for n in sorted(missing)],
        }

    @property
    def model(self) -> str:
        """A shape, a checkpoint's name, or "embedded" for the repository's own."""
        if self.arguments.get("shape"):
            return str(self.arguments["shape"])
        name = str(self.arguments.get("checkpoint") or "model").rstrip("/").split("/")[-1]
        return "embedded" if name == "model" else name

    @property
    def label(self) -> str:
        """The model, and what was asked for that is not the rule."""
        words = [self.model]
        arguments = self.arguments
        if arguments.get("slots", 1) != 1:
            words.append(f"{arguments['slots']} slots")
        if arguments.get("block_size"):
            words.append(f"width {arguments['block_size']}")
        for name in ("runner", "attention", "compile_mode", "dtype"):
            if arguments.get(name) not in (None, "auto", "default"):
                words.append(str(arguments[name]))
        return ", ".join(words)

    def run_of(self, part: str) -> Result:
        """Where and when the part was measured."""
        if "run" in self.content:  # a peers' file
            run: Result = self.content["run"]
        else:
            run = self.content["runs"][self.content["parts"].get(part, {}).get("run", -1)]
        return run

    def command(self) -> str:
        """What measures the file again."""
        from orthrus_fast.bench import build_parser

        parser, peers = build_parser(), "transformers" in self.content
        words = ["python benchmarks/peers.py" if peers else "python -m orthrus_fast.bench"]
        name, _ = guarded(self, "runs", hardware, self, "")
        threads = re.search(r"CPU, (\d+) threads", name)
        if threads:
            words.insert(0, f"OMP_NUM_THREADS={threads[1]}")
        for name, value in self.arguments.items():
            own = peers and name in PEERS_OWN_DEFAULTS
            if name == "accept" and self.arguments.get("accept_source"):
                words.append(f"--accept {self.arguments['accept_source']['name']}")
            elif own or value != parser.get_default(name):
                words += _flag(name, value)
        if not peers:
            parts = [*self.content["parts"], *self._unfinished]
            words.append(f"--parts {','.join(parts)}")
        if "kernels" in self.content:
            words.append("--profile trace.json")
        return " ".join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value in (None, False, []) or isinstance(value, dict):
        return []  # what was not asked for, or no flag of its own
    if value is True:
        return [flag]
    return [f"{flag} {','.join(map(str, value)) if isinstance(value, list) else value}"]


def read_result(path: Path) -> ResultFile:
    """Raises RequestError for what is no result file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: {one_line(str(error))}") from None
    if not is_result(content):
        raise RequestError(f"{path}: is no result of the benchmark or of benchmarks/peers.py")
    return ResultFile(path, content)


def is_result(content: Any) -> bool:
    """Whether it has the frame of one; what is inside is seen when it is shown."""
    if not isinstance(content, dict) or not isinstance(content.get("arguments"), dict):
        return False
    if "transformers" in content:
        return isinstance(content.get("run"), dict)
    parts: Any = content.get("parts")
    whole = isinstance(content.get("runs"), list) and isinstance(parts, dict)
    return whole and all(isinstance(part, dict) for part in parts.values())


def read_folder(root: Path, device: str) -> list[ResultFile]:
    """A device's results, models in order of size, later runs after earlier ones."""
    folder = root / RESULTS / device
    if not folder.is_dir():
        raise RequestError(f"{RESULTS}/{device}: there is no such folder")
    files = [read_result(path) for path in sorted(folder.glob("*.json"))]
    return sorted(files, key=lambda file: (model_order(file), file.label, date(file)))


def model_order(file: ResultFile) -> tuple[int, str]:
    return (MODELS.index(file.model) if file.model in MODELS else len(MODELS), file.model)


def date(file: ResultFile) -> str:
    return guarded(file, "runs", lambda: str(file.run_of("")["date"]))


def guarded(
    file: ResultFile, part: str, make: Callable[P, T], *args: P.args, **rest: P.kwargs
) -> T:
    """``make(*args)``; a file that lacks what is read from it becomes an error of one line."""
    try:
        return make(*args, **rest)
    except KeyError as error:
        raise RequestError(f"{file.path}: {part}: has no {error}") from None
    except (TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise RequestError(f"{file.path}: {part}: {one_line(str(error))}") from None


def surroundings(files: Iterable[ResultFile], part: str) -> str:
    """Hardware, versions, date and commit of what the files hold of a part, in a line."""
    said: dict[str, dict[str, None]] = {}
    for file in files:
        machine, when = guarded(file, "runs", _surroundings, file, part)
        said.setdefault(machine, {})[when] = None
    return "; ".join(f"{machine}; {', '.join(when)}" for machine, when in said.items())


def _surroundings(file: ResultFile, part: str) -> tuple[str, str]:
    """Hardware and versions, and when: the day and the commit."""
    run, (name, day) = file.run_of(part), hardware(file, part)
    words = [name]
    if run["driver"]:
        words.append(f"driver {run['driver']}")
    words.append(f"torch {run['torch']}")
    if run["triton"] and run["gpu"]:
        words.append(f"Triton {run['triton']}")
    if "transformers" in file.content:
        words.append(f"transformers {file.content['transformers']}")
    when = day
    if run["commit"]:
        when += f" at commit {run['commit'][:8]}{' with changes' if run['dirty'] else ''}"
    return ", ".join(words), when


def hardware(file: ResultFile, part: str) -> tuple[str, str]:
    """The GPU's or CPU's name, and the day."""
    run = file.run_of(part)
    return str(run["gpu"] or run["configuration"]["hardware"]), str(run["date"][:10])
