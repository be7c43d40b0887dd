"""What tests ask of a decoder's insides."""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_fast import Decoder


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
