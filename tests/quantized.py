"""What a model with weights in fewer bits multiplies with, as a checkpoint of float64."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from orthrus_fast.kernels.formats import dequantize
from orthrus_fast.model import Linear
from orthrus_fast.quantization import _quantized
from tests.judge import Judge

QUANTIZED = ("fp8", "int8", "int4")


def stored(weight: Tensor, format: str) -> Linear:
    """weight [N, K] in a format, as a model has it."""
    with torch.device("meta"):
        linear = Linear(weight.shape[1], weight.shape[0])
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return _quantized(linear, format)


def dequantized(weights: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, with the values that products see; embeddings stay."""
    if format == "checkpoint":
        return weights
    found = {"lm_head.weight": weights["model.embed_tokens.weight"]} | weights
    return {
        name: dequantize(stored(weight, format), torch.float64)
        if weight.dim() == 2 and "embed_tokens" not in name
        else weight.double()
        for name, weight in found.items()
    }


def judge_of(directory: Path, format: str) -> Judge:
    """The judge of a checkpoint both of whose views have a format."""
    judge = Judge(directory)
    judge.weights = dequantized(judge.weights, format)
    return judge
