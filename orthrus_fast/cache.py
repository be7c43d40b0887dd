"""The KV cache: storage and nothing else. How many rows are committed is the caller's business."""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_fast.config import ModelConfig


class KVCache:
    """One K and one V tensor per layer, each [B, n_kv_heads, S, head_dim], zeroed once.

    Rows at or past a slot's committed length are scratch: a pass writes its block there, and the
    next pass overwrites what was not committed. Buffers start at zero, and what overflowed is
    written as zero (``model.finite``), so that a masked row is finite: 0 · NaN is not 0.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (n_slots, config.n_kv_heads, capacity, config.head_dim)
        self.n_slots = n_slots
        self.capacity = capacity
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    def reset(self) -> None:
        """All rows zero, as at first."""
        for rows in (*self.k, *self.v):
            rows.zero_()

    def copy_rows(self, source: int, target: int, begin: int, end: int) -> None:
        """Copy rows ``begin`` … ``end`` - 1 of one slot to the same positions of another."""
        for rows in (*self.k, *self.v):
            rows[target, :, begin:end] = rows[source, :, begin:end]


def write_rows(cache: Tensor, rows: Tensor, positions: Tensor, slot: Tensor) -> None:
    """Store rows [R, T, n_kv_heads, head_dim] in a layer's K or V: ``positions`` [R, T], slot [R].

    All (slot, position) pairs differ and lie below the capacity, so no write races another.
    """
    # Index tensors around a slice put their dimensions first: [R, T, n_kv_heads, head_dim].
    cache[slot[:, None], :, positions] = rows
