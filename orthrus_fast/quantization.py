"""Fewer bits for weights: a model's Linears are swapped as soon as they are in memory.

The drafter decides nothing, so its weights may be anything: with ``drafter`` weights of its own it
reads a half or a quarter of the bytes, and the text stays that of the verifier to the bit. With
``verifier`` weights in fewer bits the model is another one than the checkpoint's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from orthrus_fast.kernels.formats import AllMax, Stored, of_one, quantize, quantized_split
from orthrus_fast.model import Linear, Transformer


@dataclass(frozen=True)
class Formats:
    """Of each view's weights: "checkpoint", "fp8", "int8" or "int4"."""

    verifier: str = "checkpoint"
    drafter: str = "checkpoint"

    @property
    def any(self) -> bool:
        """Whether anything is quantized."""
        return {self.verifier, self.drafter} != {"checkpoint"}

    def swap(self, model: Transformer, part: nn.Module, all_max: AllMax = of_one) -> None:
        """Quantize what users of ``part``, one of the model's parts, multiply with.

        Its weights, just loaded, are freed where no view reads them any more. Of rows that ranks
        share ``all_max`` finds the greatest.
        """
        done: dict[tuple[Linear, str], Linear] = {}
        places = list(_places(model, part))
        is_kept = self.verifier == "checkpoint" and not all(place[2] for place in places)

        def quantized(format: str, linear: Linear) -> Linear:
            if (linear, format) not in done:
                done[linear, format] = _quantized(linear, format, all_max, is_kept)
            return done[linear, format]

        for owner, name, of_drafter in places:
            format = self.drafter if of_drafter else self.verifier
            if format != "checkpoint":
                setattr(owner, name, _swapped(getattr(owner, name), partial(quantized, format)))


CHECKPOINT = Formats()  # nothing is quantized


class Quantizer:
    """Gives a model's parts their ``formats`` as they come; ``seconds``: what that has taken."""

    def __init__(self, formats: Formats = CHECKPOINT, all_max: AllMax = of_one) -> None:
        self.formats, self.all_max, self.seconds = formats, all_max, 0.0

    def swap(self, model: Transformer, part: nn.Module) -> None:
        """See ``Formats.swap``."""
        if not self.formats.any:
            return
        begin = _now(part)
        self.formats.swap(model, part, self.all_max)
        self.seconds += _now(part) - begin


def _now(part: nn.Module) -> float:
    """Seconds of the clock, once the device of ``part`` has done what it was told."""
    device = next(part.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _places(model: Transformer, part: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Where the model has ``part``: its owner, the name there, whether that is the drafter's.

    The drafter's come first, that the verifier's may take the place of what both have read.
    """
    tied = part is model.embed_tokens and model.config.tie_word_embeddings
    for stack in (model.drafter, model.verifier):
        if stack is None:
            continue
        if tied or part is stack.lm_head:
            yield stack, "lm_head", stack is model.drafter
        for layer in stack.layers:
            for name in ("attention", "mlp"):
                if getattr(layer, name) is part:
                    yield layer, name, stack is model.drafter


def _swapped(module: nn.Module, quantized: Callable[[Linear], Linear]) -> nn.Module:
    """A copy whose Linears are quantized; or, of a Linear, itself."""
    if isinstance(module, Linear):
        return quantized(module)
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    for name, child in module.named_children():
        if isinstance(child, Linear):
            setattr(copied, name, quantized(child))
    return copied


def _quantized(
    linear: Linear, format: str, all_max: AllMax = of_one, is_kept: bool = False
) -> Linear:
    """A Linear in fewer bits; ``is_kept``: the other view multiplies with the weight as it is."""
    twin = copy.copy(linear)
    twin._parameters = {}
    with torch.no_grad():
        greatest = all_max if linear.n_ranks > 1 else of_one
        stored = quantize(linear.weight.detach(), format, greatest)
    names = ("weight", "scale", "group_scale")
    for name, tensor in zip(names, stored, strict=True):
        value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        twin.register_parameter(name, value)
    whole = quantized_split(linear.n_inputs * linear.n_ranks)
    twin.sums_as_one = linear.n_ranks == 1 or linear.n_inputs % whole == 0
    of_rank = quantized_split(linear.n_inputs, 4 // linear.n_ranks)
    twin.format, twin.split = format, whole if twin.sums_as_one else of_rank
    if is_kept:
        twin.whole = Stored(
            linear.weight, n_inputs=linear.n_inputs, split=linear.split, n_ranks=linear.n_ranks
        )
    return twin
