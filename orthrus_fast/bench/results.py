"""The JSON file: the command line that made it, its environment, and the parts."""

import argparse
import json
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from orthrus_fast.bench.common import REPOSITORY, Result
from orthrus_fast.bench.flags import Parser, flags_of
from orthrus_fast.files import write_whole


class Report:
    """The content of the JSON file, which is written whole after every part."""

    def __init__(self, program: str, parser: Parser, args: argparse.Namespace) -> None:
        self.path = args.json
        self.command = f"{program} {shlex.join(flags_of(parser, args))}".rstrip()
        arguments = {name: value for name, value in vars(args).items() if name != "json"}
        self.content: Result = {"command": self.command, "environment": {}, "arguments": arguments}
        self.content |= {"parts": {}, "failed": {}}

    def describe(self, configuration: Result) -> None:
        """Set the environment of a decoder of this ``configuration``."""
        if configuration["device"] == "cpu":
            self.content["command"] = f"OMP_NUM_THREADS={torch.get_num_threads()} {self.command}"
        self.content["environment"] = environment(configuration)

    def add(self, section: str, name: str, value: Any) -> None:
        """Set one part of "parts", or its problem in "failed", and write the file."""
        self.content[section][name] = value
        if self.path is not None:
            write_whole(Path(self.path), json.dumps(self.content, indent=1) + "\n")


def environment(configuration: Result) -> Result:
    """Return what is needed, besides the command, to repeat a run."""
    git = ("git", "-C", str(REPOSITORY))
    root = first_line(*git, "rev-parse", "--show-toplevel")
    own = root is not None and Path(root).resolve() == REPOSITORY  # else somebody else's around it
    commit = first_line(*git, "rev-parse", "HEAD") if own else None
    changed = first_line(*git, "status", "--porcelain") if own else None
    on_gpu, n = configuration["device"].startswith("cuda"), configuration.get("tensor_parallel", 1)
    hardware = f"{n} × {configuration['hardware']}" if n > 1 else configuration["hardware"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": None if commit is None else changed is not None,
        "hardware": hardware,
        "gpu": hardware if on_gpu else None,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "configuration": configuration,
    }


def first_line(*command: str) -> str | None:
    """Return the first line that a program prints; None where it is absent, fails or is silent."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def version_of(package: str) -> str | None:
    """Return the version of an installed package; None where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
