"""Products of a model that ranks share on CPUs: a rank's bits are those of its share of the whole.

Libraries choose how they sum by the shape of a product. So they are given one shape always: 16 rows
of x by 16 rows of a weight, which divide every rank's share where heads and features are multiples
of 16, and of K the columns that are summed at once (``interface.k_split``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.kernels.formats import dequantize
from orthrus_fast.kernels.interface import Weight
from orthrus_fast.kernels.plain import wide_dtype
from orthrus_fast.kernels.plain_sampling import choose

TILE = 16  # rows of x, and of a weight

Gather = Callable[[Tensor], Tensor]  # each rank's [...] -> all of them [n_ranks, ...], in order


@dataclass(frozen=True)
class TiledProducts:
    """``interface.Products`` in tiles; ``gather`` None: there is one rank."""

    gather: Gather | None = None

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        columns = torch.split(dequantize(weight, x.dtype), weight.split, 1)
        pairs = zip(torch.split(x, weight.split, -1), columns, strict=True)
        partials = torch.stack([multiply(*pair) for pair in pairs]).to(wide_dtype(x.dtype))
        if self.gather is None or weight.n_ranks == 1:
            return partials
        return self.gather(partials).flatten(0, 1)

    def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
        gate, up = dequantize(weight, x.dtype).chunk(2)
        return multiply(x, gate, up)

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        logits = multiply(x, dequantize(weight, x.dtype))
        if self.gather is not None:
            logits = self.gather(logits).movedim(0, -2).flatten(-2)
        return choose(logits), logits


def multiply(x: Tensor, weight: Tensor, up: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [N, K] transposed; or SwiGLU of that and of x times ``up`` [N, K]."""
    rows = x.reshape(-1, x.shape[-1])
    n_rows, n_columns = len(rows), len(weight)
    rows = F.pad(rows, (0, 0, 0, -n_rows % TILE))
    out = rows.new_empty(len(rows), n_columns + -n_columns % TILE)
    for first in range(0, len(rows), TILE):
        some = rows[first : first + TILE]
        for column in range(0, n_columns, TILE):
            tile = F.linear(some, _tile(weight, column))
            if up is not None:
                tile = F.silu(tile) * F.linear(some, _tile(up, column))
            out[first : first + TILE, column : column + TILE] = tile
    return out[:n_rows, :n_columns].reshape(*x.shape[:-1], n_columns)


def _tile(weight: Tensor, first: int) -> Tensor:
    """Rows of a weight [N, K] from ``first`` on, filled up with zeros."""
    tile = weight[first : first + TILE]
    return F.pad(tile, (0, 0, 0, TILE - len(tile))) if len(tile) < TILE else tile
