"""The JSON file and what is needed to repeat a run."""

from __future__ import annotations

import argparse
import json
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from orthrus_fast.bench.common import REPOSITORY, Result, write_whole
from orthrus_fast.bench.kept import Kept
from orthrus_fast.errors import RequestError

FORMAT = 2  # of the JSON file
# Arguments that say nothing of what is measured: where results go, and which ones.
OUTSIDE = ("json", "parts", "against", "loss", "profile")


class Report:
    """The JSON file, kept whole on disk after every part, and after each step of a long one."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = Path(args.json) if args.json else None
        arguments = {k: v for k, v in vars(args).items() if k not in OUTSIDE}
        self.content: Result = {
            "format": FORMAT,
            "arguments": json.loads(json.dumps(arguments)),
            "runs": [],  # each start of this program that measured a part
            "parts": {},
            "unfinished": {},  # steps of parts that were interrupted
            "failed": {},
        }
        if self.path is not None and self.path.exists():
            self.content = self._held(self.path, self.content["arguments"])

    @staticmethod
    def _held(path: Path, arguments: Result) -> Result:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            held = content["arguments"]
            kept = {name: content[name] for name in ("format", "arguments", "runs", "parts")}
            kept["unfinished"] = content.get("unfinished", {})
            kept |= {name: content[name] for name in ("profile", "kernels") if name in content}
        except (OSError, ValueError, KeyError, TypeError):
            raise RequestError(f"json: {path}: exists and is no result of this program") from None
        if held != arguments or content["format"] != FORMAT:
            both = {*held, *arguments}
            names = sorted(name for name in both if held.get(name) != arguments.get(name))
            raise RequestError(
                f"json: {path}: was made with other arguments ({', '.join(names) or 'format'}); "
                "name another file, or remove this one"
            )
        return {**kept, "failed": {}}

    @property
    def parts(self) -> dict[str, Result]:
        parts: dict[str, Result] = self.content["parts"]
        return parts

    @property
    def has_profile(self) -> bool:
        return "kernels" in self.content

    @property
    def kernels(self) -> Result | None:
        return {"kernels": self.content["kernels"]} if self.has_profile else None

    @property
    def kept(self) -> Kept:
        return Kept(self.content["unfinished"], self._write)

    def begin_run(self, configuration: Result) -> None:
        self.content["runs"].append(surroundings(configuration))

    def add(self, name: str, result: Result, seconds: float) -> None:
        """``run`` is the index of the run that measured the part, in ``part_seconds``."""
        run = len(self.content["runs"]) - 1
        self.parts[name] = {"run": run, "part_seconds": seconds, **result}
        self.content["unfinished"].pop(name, None)
        self._write()

    def fail(self, name: str, problem: str) -> None:
        self.content["failed"][name] = problem
        self._write()

    def add_profile(self, what: Result, kernels: list[Result]) -> None:
        self.content |= {"profile": what, "kernels": kernels}
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            write_whole(self.path, self.content)


def surroundings(configuration: Result) -> Result:
    """What is needed to repeat a run of a decoder of this ``configuration``."""
    import torch

    commit = first_line("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    changed = first_line("git", "-C", str(REPOSITORY), "status", "--porcelain")
    on_gpu = configuration["device"].startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "configuration": configuration,
        "gpu": configuration["hardware"] if on_gpu else None,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit,
        "dirty": None if commit is None else changed is not None,
    }


def first_line(*command: str) -> str | None:
    """Of what a program prints; None where it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
