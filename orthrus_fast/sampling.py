"""The settings of a request's sampling, on the host and, one value a slot, on the device.

What they mean for the logits: ``kernels.plain_sampling``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from orthrus_fast.errors import RequestError
from orthrus_fast.grammar import Grammar

NO_TOKEN = -1  # what a row gives whose logits are not finite
_MAX_TEMPERATURE = 1e30  # temperature times noise stays finite in float32
_CHECKPOINT_DECIDES = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen; greedy by default. Raises RequestError naming the field.

    ``temperature`` 0 is greedy, whatever the filters. The filters act in this order: ``top_k``
    keeps the k highest logits (0 or -1: all); ``top_p`` the fewest highest whose probability, among
    those, reaches p; ``min_p`` those at least that fraction as probable as the best. Ties at a
    threshold are all kept; None is off. ``seed`` (0 … 2**64 - 1) keys the noise; None draws one.
    Text ends before the first of the ``stop`` strings, one or a list. ``logprobs`` asks for each
    token's log-probability under the model itself, before temperature and filters. ``grammar`` says
    which texts may be written: a token that it forbids is as if the vocabulary had none such, for
    the filters and ``logprobs``, too.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()  # kept as a tuple
    logprobs: bool = False
    grammar: Grammar | None = None
    _of_checkpoint: tuple[str, ...] = field(default=(), repr=False)  # fields yet to be resolved

    def __post_init__(self) -> None:
        if is_integer(self.top_k) and self.top_k in (0, -1):
            object.__setattr__(self, "top_k", None)
        if isinstance(self.stop, (str, list)):
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            object.__setattr__(self, "stop", stop)
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        if not _is_number(temperature) or not 0 <= temperature <= _MAX_TEMPERATURE:
            self._refuse("temperature", f"a number from 0 to {_MAX_TEMPERATURE:g}")
        if self.top_k is not None and not (is_integer(self.top_k) and 1 <= self.top_k < 2**63):
            self._refuse("top_k", "None, 0, -1 or an integer of at least 1")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            self._refuse("top_p", "None or a number above 0 and at most 1")
        if min_p is not None and not (_is_number(min_p) and 0 <= min_p <= 1):
            self._refuse("min_p", "None or a number from 0 to 1")
        if self.seed is not None and not (is_integer(self.seed) and 0 <= self.seed < 2**64):
            self._refuse("seed", "None or an integer from 0 to 2**64 - 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            self._refuse("stop", "a string or a list of strings, none of them empty")
        if not isinstance(self.logprobs, bool):
            self._refuse("logprobs", "True or False")
        if not isinstance(self.grammar, (Grammar, type(None))):
            self._refuse("grammar", "None or a Grammar")

    @property
    def samples(self) -> bool:
        """Whether a cycle must do more than take the greatest logit."""
        return self.temperature > 0 or self.logprobs

    def _refuse(self, name: str, wanted: str) -> None:
        raise RequestError(f"sampling: {name}={getattr(self, name)!r} is not {wanted}")

    @classmethod
    def from_checkpoint(cls, **overrides: Any) -> SamplingParams:
        """The checkpoint's own temperature and filters, but for ``overrides``.

        They are known once a decoder has ``resolved`` them. Raises RequestError.
        """
        known = [f.name for f in fields(cls) if not f.name.startswith("_")]
        for name in overrides:
            if name not in known:
                raise RequestError(f"sampling: {name!r} is not one of {', '.join(known)}")
        undecided = tuple(name for name in _CHECKPOINT_DECIDES if name not in overrides)
        return cls(**overrides, _of_checkpoint=undecided)

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These settings with what ``from_checkpoint`` left open taken from ``defaults``.

        ``defaults`` holds generation_config.json's fields. ``do_sample`` false is greedy, true
        without a temperature is temperature 1; without ``do_sample``, a temperature decides. A
        filter that is absent is off. Raises RequestError for a value out of range, and for
        ``unserved`` settings, which are not implemented.
        """
        if not self._of_checkpoint:
            return self
        if defaults.get("unserved"):
            raise RequestError(
                f"sampling: the checkpoint's own has {defaults['unserved']}, which is not "
                "implemented; give temperature, top_k, top_p and min_p instead of the checkpoint's"
            )
        values: dict[str, Any] = {name: defaults.get(name) for name in _CHECKPOINT_DECIDES}
        if not defaults.get("do_sample", values["temperature"] is not None):
            values["temperature"] = 0.0
        elif values["temperature"] is None:
            values["temperature"] = 1.0
        top_k = values["top_k"]
        if isinstance(top_k, float) and top_k.is_integer():  # the config's parser made it one
            values["top_k"] = int(top_k)
        chosen: dict[str, Any] = {name: values[name] for name in self._of_checkpoint}
        return replace(self, **chosen, _of_checkpoint=())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


class Settings(NamedTuple):
    """Sampling settings on the device, one value a slot, so that a change recaptures nothing."""

    temperature: Tensor  # [B] float32: 0 is greedy
    top_k: Tensor  # [B] int64: 0 is off
    top_p: Tensor  # [B] float32: 1 is off
    min_p: Tensor  # [B] float32: 0 is off
    seed: Tensor  # [B] int64: the 64 bits of the key, in two's complement

    @staticmethod
    def create(n_slots: int, device: torch.device) -> Settings:
        """Every slot greedy, its filters off."""
        return Settings(
            temperature=torch.zeros(n_slots, device=device, dtype=torch.float32),
            top_k=torch.zeros(n_slots, device=device, dtype=torch.int64),
            top_p=torch.ones(n_slots, device=device, dtype=torch.float32),
            min_p=torch.zeros(n_slots, device=device, dtype=torch.float32),
            seed=torch.zeros(n_slots, device=device, dtype=torch.int64),
        )

    def put(self, slot: int, params: SamplingParams) -> None:
        """Give ``slot`` the settings of a request, in place; a seed of None counts as 0."""
        assert not params._of_checkpoint  # resolved
        seed = params.seed or 0
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k or 0
        self.top_p[slot] = 1.0 if params.top_p is None else params.top_p
        self.min_p[slot] = params.min_p or 0.0
        self.seed[slot] = seed - 2**64 if seed >= 2**63 else seed

    def of(self, slot: Tensor) -> Settings:
        """The settings of ``slot`` [R] int64, [R] each."""
        return Settings(*(values[slot] for values in self))
