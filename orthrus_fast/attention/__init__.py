"""Attention backends: one file each, one signature, held against ``sdpa`` by one test.

A backend attends a short block of rows over the static cache, which already holds the block's own
K and V:

    attend(q, k_cache, v_cache, start, slot, *, causal) -> [R, T, n_heads, head_dim]

``q`` [R, T, n_heads, head_dim]: row t of r sits at position ``start[r] + t`` of ``slot[r]``.
``k_cache``, ``v_cache`` [B, n_kv_heads, S, head_dim]; ``start``, ``slot`` [R]. Causal rows see the
positions up to their own (the autoregressive view); otherwise every row sees all ``start[r] + T``
(the draft view). The bits of a causal row depend on that row's query and the K and V it sees alone.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from orthrus_fast.errors import UnsupportedError


class Attend(Protocol):
    """The signature of a backend; see the module's docstring for shapes."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        *,
        causal: bool,
    ) -> Tensor: ...


def find_backend(name: str) -> tuple[str, Attend]:
    """The backend's own name (``auto`` resolved) and its function. Raises UnsupportedError."""
    if name in ("auto", "sdpa"):
        from orthrus_fast.attention.sdpa import attend

        return "sdpa", attend
    if name in ("triton", "flash"):
        raise UnsupportedError(f"attention {name!r} is not implemented yet; use 'auto' or 'sdpa'")
    raise UnsupportedError(f"attention {name!r} is not known; use 'auto' or 'sdpa'")
