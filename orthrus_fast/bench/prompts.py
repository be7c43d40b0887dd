"""Where prompts come from: a file, or a seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthrus_fast.bench.common import EMBEDDED, LONGEST_PROMPT
from orthrus_fast.bench.subject import random_prompts
from orthrus_fast.errors import RequestError

if TYPE_CHECKING:
    from orthrus_fast.bench.subject import Bench


def chosen_prompts(bench: Bench) -> list[list[int]]:
    """Ids of ``--sequences`` prompts: of a file, spread over it, or random ones of many lengths."""
    import torch

    n = bench.args.sequences
    path = prompts_file(bench)
    if path is not None:
        lines = read_prompts(path)
        n = min(n, len(lines))
        chosen = [lines[i * len(lines) // n] for i in range(n)]
        return [bench.decoder.encode(prompt) for prompt in chosen]
    longest = min(LONGEST_PROMPT, bench.decoder.max_seq_len - bench.args.new_tokens)
    generator = torch.Generator().manual_seed(bench.args.seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return random_prompts(bench, lengths)


def prompts_file(bench: Bench) -> Path | None:
    """Of the command line, or the embedded checkpoint's own held-out prompts."""
    args = bench.args
    if args.prompts_file is not None:
        return Path(args.prompts_file)
    return EMBEDDED / "heldout.jsonl" if not args.shape and args.checkpoint is None else None


def read_prompts(path: Path) -> list[Any]:
    """A prompt a line: an object with "ids", "messages" or "text". Raises RequestError."""
    prompts = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            prompts.append(next(fields[k] for k in ("ids", "messages", "text") if k in fields))
    except (OSError, ValueError, TypeError, StopIteration) as error:
        where = f"{path}: line {len(prompts) + 1}"
        raise RequestError(
            f'prompts_file: {where}: not an object with "ids", "messages" or "text" ({error})'
        ) from None
    if not prompts:
        raise RequestError(f"prompts_file: {path}: empty")
    return prompts
