"""One way to run, measured in a process of its own for ``modes``.

    python -m orthrus_fast.bench.combination REQUEST.json RESULT.json

The result is written after each context, so that what crashes later leaves what came before.
"""

from __future__ import annotations

import json
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from orthrus_fast.bench.clocks import measuring, place, random_cache, time_cycles, time_steps
from orthrus_fast.bench.common import Result, tell, write_whole
from orthrus_fast.bench.decoding import endless
from orthrus_fast.bench.identity import compare_modes
from orthrus_fast.bench.replay import Replay
from orthrus_fast.bench.streaming import ceiling, shares
from orthrus_fast.bench.subject import Bench, build, random_prompts
from orthrus_fast.errors import OrthrusError, one_line

IDENTITY_TOKENS = 64  # at most, a slot


def main(request_path: str, result_path: str) -> int:
    """0, with the result in the file, a problem included that Python saw."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    result: Result = {"at": [], "problem": None}

    def write() -> None:
        write_whole(Path(result_path), result)

    try:
        measure(Namespace(**request["arguments"]), request["ceiling"], result, write)
    except OrthrusError as error:
        result["problem"] = str(error)
    except Exception as error:
        traceback.print_exc()
        result["problem"] = one_line(f"{type(error).__name__}: {error}")
    write()
    return 0


def measure(
    args: Namespace, known: Result | None, result: Result, write: Callable[[], None]
) -> None:
    """Into ``result``, step by step. ``known``: the ceiling, where it was measured before."""
    import torch

    bench = build(args)
    result["configuration"] = bench.decoder.configuration
    result["startup_seconds"] = dict(bench.decoder.startup)
    with measuring(bench.device):
        bench.runner.prepare(bench.width)
        before = peak(bench)
        result["ceiling"] = known or ceiling(bench)
        write()
        if before is not None:  # the ceiling's buffer is not the decoder's
            torch.cuda.reset_peak_memory_stats(bench.device)
        with random_cache(bench):
            for context in bench.contexts:
                result["at"].append(times_at(bench, context, result["ceiling"]["bytes_per_s"]))
                result["peak_allocated_bytes"] = before and max(before, peak(bench) or 0)
                write()
        for at in result["at"]:
            at["identity"] = identity_at(bench, at["context"])
            write()


def times_at(bench: Bench, context: int, rate: float) -> Result:
    """Passes and cycles of both modes. ``rate``: the ceiling in bytes/s."""
    from orthrus_fast.model import View

    tell(f"{context} committed tokens")
    runner, width, repeats = bench.runner, bench.width, bench.args.repeats
    place(bench, context)
    (verify,) = time_steps([lambda: runner.verify(width)], bench.device, repeats)
    draft, diffusion = None, None
    if bench.drafting:
        (draft,) = time_steps([runner.draft], bench.device, repeats)
        diffusion = time_cycles(runner, width, True, repeats)
    share = shares(bench, View.AUTOREGRESSIVE, context, verify["median"], rate)
    return {
        "context": context,
        "verify_ms": verify,
        "draft_ms": draft,
        "cycle_ms": {"ar": time_cycles(runner, width, False, repeats), "diffusion": diffusion},
        "share_by_weights": share["share_by_weights"],
        "share_by_weights_and_cache": share["share_by_weights_and_cache"],
        "identity": None,
    }


def peak(bench: Bench) -> int | None:
    """Bytes of torch's allocator since before the weights; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated(bench.device) if bench.device.type == "cuda" else None


def identity_at(bench: Bench, context: int) -> Result | None:
    """AR against diffusion with replayed drafts after ``context`` tokens; None without room."""
    n_tokens = min(bench.args.new_tokens, IDENTITY_TOKENS)
    if not bench.drafting or context + n_tokens > bench.decoder.max_seq_len:
        return None
    prompts = random_prompts(bench, [context] * bench.decoder.slots, salt=context)
    with endless(bench.runner):
        verdicts = compare_modes(bench, prompts, n_tokens, Replay(bench, salt=context)).verdicts
    return {
        "tokens_equal": all(verdict["tokens_equal"] for verdict in verdicts),
        "rows": sum(verdict["rows"] for verdict in verdicts),
        "rows_differing": sum(verdict["rows_differing"] for verdict in verdicts),
    }


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
