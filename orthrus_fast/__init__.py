"""orthrus-fast: lossless, fast decoding of Orthrus (dual-view Qwen3) checkpoints in plain PyTorch.

decoder = orthrus_fast.load("model/")
print(decoder.generate("def fibonacci(n):").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orthrus_fast import errors

if TYPE_CHECKING:
    from orthrus_fast.decoder import Chunk, Decoder, Generation, Stats, Stream, load
    from orthrus_fast.sampling import SamplingParams

__version__ = "0.1.0"
_OF_DECODER = ("Chunk", "Decoder", "Generation", "Stats", "Stream", "load")
__all__ = ["Chunk", "Decoder", "Generation", "SamplingParams", "Stats", "Stream", "errors", "load"]


def __getattr__(name: str) -> Any:
    """Import torch only once a name that needs it is asked for (PEP 562): --help stays quick."""
    if name == "SamplingParams":
        from orthrus_fast.sampling import SamplingParams

        return SamplingParams
    if name in _OF_DECODER:
        from orthrus_fast import decoder

        return getattr(decoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
