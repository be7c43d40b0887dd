"""orthrus-fast: lossless, fast decoding of Orthrus (dual-view Qwen3) checkpoints in plain PyTorch.

decoder = orthrus_fast.load("model/")
print(decoder.generate("def fibonacci(n):").text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orthrus_fast import errors

if TYPE_CHECKING:
    from orthrus_fast.decoder import Decoder, Stream
    from orthrus_fast.grammar import Grammar
    from orthrus_fast.loading import load
    from orthrus_fast.results import Chunk, Generation, Stats
    from orthrus_fast.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Chunk",
    "Decoder",
    "Generation",
    "Grammar",
    "SamplingParams",
    "Stats",
    "Stream",
    "errors",
    "load",
]

_MODULES = {
    "Chunk": "results",
    "Decoder": "decoder",
    "Generation": "results",
    "Grammar": "grammar",
    "SamplingParams": "sampling",
    "Stats": "results",
    "Stream": "decoder",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    """Import torch only once a name that needs it is asked for (PEP 562): --help stays quick."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"orthrus_fast.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
