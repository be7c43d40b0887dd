"""Attention backends: one file each, one signature, held against ``sdpa`` by one test.

A backend attends a short block of rows over the static cache, which already holds the block's own
K and V:

    attend(q, k_cache, v_cache, start, slot, ahead, *, causal) -> [R, T, n_heads, head_dim]

``q`` [R, T, n_heads, head_dim]: row t of r sits at position ``start[r] + t`` of ``slot[r]``.
``k_cache``, ``v_cache`` [B, n_kv_heads, S, head_dim]; ``start``, ``slot`` [R]. Causal rows see the
positions up to their own (the autoregressive view); otherwise every row sees all ``start[r] + T``
(the draft view). The bits of a causal row depend on that row's query and the K and V it sees alone.
``ahead``, if given, is the weight that will be read next, for a kernel that can make use of it. The
result is contiguous.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor

from orthrus_fast.errors import RequestError, UnsupportedError


class Attend(Protocol):
    """The signature of a backend; see the module's docstring for shapes."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        ahead: Tensor | None = None,
        *,
        causal: bool,
    ) -> Tensor: ...


def find_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, Attend]:
    """The backend's own name (``auto`` resolved) and its function.

    ``auto`` is the fastest that keeps the conditions of bit identity: ``triton`` where its kernels
    run, else ``sdpa``. Raises UnsupportedError, RequestError for a name that is none.
    """
    if name not in ("auto", "sdpa", "triton", "flash"):
        raise RequestError(f"attention: {name!r} is not 'auto', 'sdpa', 'triton' or 'flash'")
    obstacle = why_no_triton(device, dtype, head_dim)
    if name == "triton" and obstacle:
        raise UnsupportedError(f"attention 'triton': {obstacle}; use 'auto' or 'sdpa'")
    if name == "triton" or (name == "auto" and not obstacle):
        from orthrus_fast.attention import triton

        return "triton", triton.attend
    if name == "flash":
        from orthrus_fast.attention import flash

        return "flash", flash.find_attend(device, dtype, head_dim)
    from orthrus_fast.attention import sdpa

    return "sdpa", sdpa.attend


def edges(name: str, capacity: int) -> list[int]:
    """Positions within a cache of ``capacity`` rows at which a backend's tiles or splits begin.

    Not every tile: the splits, and the tiles of the beginning.
    """
    tiles = {*range(64, min(1024, capacity), 64), *range(1024, capacity, 1024)}
    if name == "triton":
        from orthrus_fast.attention import triton

        tiles |= set(triton.split_edges(capacity))
    return sorted(tiles - {0})


def why_no_triton(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the Triton kernels from running here; None: nothing."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, not that of {torch.cuda.get_device_name(device)}"
    if dtype == torch.float64:
        return "has no float64"
    if head_dim not in (16, 32, 64, 128, 256):
        return f"has no head_dim {head_dim}"
    return None


@functools.cache  # a process's operators have one name each
def as_operator(name: str, attend: Any) -> Attend:
    """``attend`` as an operator that a compiler calls without looking inside."""
    operator = torch.library.custom_op(
        f"orthrus_fast::attend_{name}",
        attend,
        mutates_args=(),
        schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor start, Tensor slot, "
        "Tensor? ahead=None, *, bool causal) -> Tensor",
    )
    operator.register_fake(_empty_like_q)
    backend: Attend = operator
    return backend


def _empty_like_q(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    slot: Tensor,
    ahead: Tensor | None = None,
    *,
    causal: bool,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
