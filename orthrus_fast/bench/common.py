"""What all files of the benchmark share."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
EMBEDDED = REPOSITORY / "model"
WARM_UP = 3  # runs before what is timed
ROUNDS = 3  # prompts that are decoded whole
DRAWS = 4  # of drafts for each: what is accepted varies far more than time does
PREFILL_LENGTHS = (1024, 8192)  # prompt tokens
LONGEST_PROMPT = 1024  # tokens; of the identity part's random prompts

Result = dict[str, Any]


def tell(text: str) -> None:
    """Progress, where someone watches."""
    if sys.stderr.isatty():
        print(f"{text} …", file=sys.stderr, flush=True)


def write_whole(path: Path, content: Result) -> None:
    """JSON that is there whole or not at all, also when writing it is interrupted."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def release_memory() -> None:
    """Give back what dropped decoders held; their graphs and steps refer to each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
