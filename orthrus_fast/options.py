"""The names a user may choose from, each list once, without importing torch."""

from __future__ import annotations

MODES = ("diffusion", "ar")
RUNNERS = ("eager", "compiled", "graph")
ATTENTION_BACKENDS = ("sdpa", "triton", "flash")  # each is a module of orthrus_fast.attention
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DTYPES = ("float32", "bfloat16", "float16", "float64")
MAX_NEW_TOKENS = 256  # of a request that asks for no number, as far as they fit


def listed(names: tuple[str, ...], *more: str) -> str:
    """The names quoted, as an error message lists them."""
    return ", ".join(repr(name) for name in (*more, *names))
