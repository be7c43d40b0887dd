"""What tests ask of a decoder's insides."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast import Decoder, SamplingParams, loading, steps
from orthrus_fast.invariance import Invariance
from orthrus_fast.runners import EagerRunner, SlotOutput

_PATCHING = threading.RLock()


def committed(decoder: Decoder, layer: int) -> tuple[Tensor, Tensor]:
    """K and V [length, KV, D] of slot 0's committed rows."""
    runner = decoder.runner
    length = int(runner.state.length[0])
    k, v = runner.cache.k[layer], runner.cache.v[layer]
    return k[0, :, :length].transpose(0, 1), v[0, :, :length].transpose(0, 1)


def contents(state: steps.State) -> list[Tensor]:
    """Copies of what cycles move, and of what bounds them."""
    names = ("length", "anchor", "tokens", "done", "max_length")
    return [getattr(state, name).clone() for name in names]


def always_drafting(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a load, with a draft of the whole block in every cycle of mode diffusion."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    width = options.get("block_size") or config.get("block_size")
    return {"drafting": "auto" if width is None else width, **options}


def start(
    runner: EagerRunner,
    prompt: list[int],
    slot: int,
    max_length: int,
    params: SamplingParams | None = None,
    drafting: bool = False,
) -> SlotOutput:
    """Give a slot a prompt, and wait for its first token; no launch may be in flight."""
    params = params or SamplingParams()
    runner.open(slot, prompt, 0, max_length, params, drafting)
    chunks = list(
        steps.prefill_chunks(0, len(prompt), runner.prefill_widths, runner.cache.capacity)
    )
    for chunk in chunks[:-1]:
        runner.prefill(slot, *chunk)
        assert runner.read() == []
    runner.start(slot, *chunks[-1], params)
    [output] = runner.read()
    return output


def prefill_logits(runner: EagerRunner, ids: Tensor, slot: int, begin: int = 0) -> Tensor:
    """Logits [V] after the prompt ``ids`` [n], whose first ``begin`` rows ``slot`` has."""
    runner.open(slot, ids.tolist(), begin, len(ids) + 1)
    for first, end, width in steps.prefill_chunks(
        begin, len(ids), runner.prefill_widths, runner.cache.capacity
    ):
        if end < len(ids):
            runner.prefill(slot, first, end, width)
        else:
            logits = runner.start(slot, first, end, width, SamplingParams())
        runner.read()
    return logits.clone()


def rows_are_invariant(decoder: Decoder) -> bool:
    """Whether this machine's products give the same bits in each of 16 equal rows."""
    model = decoder.runner.model
    for weight in {p for p in model.parameters() if p.dim() == 2}:
        x = torch.randn(1, weight.shape[1]).expand(16, -1).contiguous()
        out = x @ weight.T
        if not torch.equal(out, out[:1].expand_as(out).contiguous()):
            return False
    return True


def found(holds: bool, widths: Any = (1,), prefill: bool = True) -> Invariance:
    """What a check might find."""
    return Invariance(holds, tuple(widths), prefill, 10, 0 if holds else 3, 5, holds, 0.5)


@contextmanager
def unchecked(holds: bool = True) -> Iterator[None]:
    """Decoders loaded within take it that a row's bits depend on its tokens alone, or do not.

    For tests of texts, which see for themselves; a check of each decoder would cost them minutes.
    Threads take turns: each would put back what it has found, another's patch.
    """
    with _PATCHING, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loading, "check", lambda _, widths, *__, **named: found(holds, widths, **named)
        )
        yield
