"""Attention backends: a file each, one signature (``kernels.interface.Attend``), one test for all.

To add one: a module here with a function ``backend`` as in ``sdpa``, and its name in ``options``.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orthrus_fast.errors import RequestError
from orthrus_fast.kernels.interface import Attend
from orthrus_fast.kernels.select import why_no_triton
from orthrus_fast.options import ATTENTION_BACKENDS, listed


@dataclass(frozen=True)
class Backend:
    """One way to attend."""

    name: str
    attend: Attend
    split_boundaries: Callable[[int], list[int]]  # cache rows -> positions where splits begin
    row_invariant: bool  # whether a causal row has the same bits in a block of any width

    def custom_op(self) -> Attend:
        """``attend`` as a custom operator, which a compiler calls without looking inside."""
        attend: Any = self.attend  # a function, so it can be hashed
        return _custom_op(self.name, attend)

    def tile_boundaries(self, capacity: int) -> list[int]:
        """Positions within a cache of ``capacity`` rows at which tiles or splits of keys begin.

        All splits, and of the tiles those of the beginning and some later ones.
        """
        tiles = {*range(64, min(1024, capacity), 64), *range(1024, capacity, 1024)}
        return sorted((tiles | set(self.split_boundaries(capacity))) - {0})


def find_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Backend:
    """The backend of that name.

    ``auto`` is the fastest that keeps the conditions of bit identity: ``triton`` where its kernels
    run, else ``sdpa``. Raises RequestError for an unknown name, UnsupportedError for a backend that
    cannot run here.
    """
    if name not in ("auto", *ATTENTION_BACKENDS):
        raise RequestError(
            f"attention: {name!r} is not one of {listed(ATTENTION_BACKENDS, 'auto')}"
        )
    if name == "auto":
        name = "sdpa" if why_no_triton(device, dtype, head_dim) else "triton"
    module: Any = importlib.import_module(f"orthrus_fast.attention.{name}")
    backend: Backend = module.backend(device, dtype, head_dim)
    return backend


@functools.cache  # an operator's name can be registered once a process
def _custom_op(name: str, attend: Any) -> Attend:
    operator = torch.library.custom_op(
        f"orthrus_fast::attend_{name}",
        attend,
        mutates_args=(),
        schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, Tensor slot, "
        "Tensor? prefetch=None, *, bool causal) -> Tensor",
    )
    operator.register_fake(
        lambda q, *_, causal: torch.empty_like(q, memory_format=torch.contiguous_format)
    )
    attend_op: Attend = operator
    return attend_op
