"""Logits to tokens. Greedy for now: the settings of a request, and the rule for ties."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from orthrus_fast.errors import RequestError, UnsupportedError


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen. Greedy (temperature 0) is all that is implemented.

    Every other setting is refused by name when a request carries it (UnsupportedError), so that
    none is ever silently ignored. ``seed`` is accepted: greedy decoding draws nothing from it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    @classmethod
    def from_checkpoint(cls) -> SamplingParams:
        """The settings of generation_config.json. Raises UnsupportedError: to come."""
        raise UnsupportedError("sampling: from_checkpoint is not implemented yet")

    def check_implemented(self) -> None:
        """Raise UnsupportedError naming the first setting that differs from greedy decoding.

        RequestError for a seed that is no integer.
        """
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, type(None))):
            raise RequestError(f"sampling: seed={self.seed!r} is not an integer")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and value != field.default:
                raise UnsupportedError(
                    f"sampling: {field.name}={value!r} is not implemented yet; "
                    "only greedy decoding (temperature 0) is"
                )


def choose(logits: Tensor) -> Tensor:
    """logits [..., V] -> token ids [...]: the greatest logit, the lowest id where several tie."""
    return logits.argmax(dim=-1)
