"""What tests ask of a decoder's insides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast import Decoder, loading
from orthrus_fast.invariance import Invariance


def committed(decoder: Decoder, layer: int) -> tuple[Tensor, Tensor]:
    """K and V [length, KV, D] of slot 0's committed rows."""
    runner = decoder.runner
    length = int(runner.state.length[0])
    k, v = runner.cache.k[layer], runner.cache.v[layer]
    return k[0, :, :length].transpose(0, 1), v[0, :, :length].transpose(0, 1)


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
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            loading, "check", lambda _, widths, __, prefill=True: found(holds, widths, prefill)
        )
        yield
