"""Constants and helpers that the whole benchmark shares; free of torch."""

import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]  # or site-packages, of an installed wheel
CONTEXTS = (128, 1024, 4096)  # committed tokens before a pass
PREFILL_LENGTHS = (1024, 8192)  # prompt tokens
HISTORY = 4096  # tokens of a chat before its next turn
LONGEST_PROMPT = 1024  # tokens of a random prompt, at most
ROUNDS = 3  # prompts that are decoded whole

Result = dict[str, Any]


def log(text: str) -> None:
    """Print progress where somebody watches."""
    if sys.stderr.isatty():
        print(f"{text} …", file=sys.stderr, flush=True)
