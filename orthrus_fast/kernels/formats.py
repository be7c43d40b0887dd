"""Weights in fewer bits: how each format lays them out, and back. Plain PyTorch, on any device.

Weights lie in words of 16 bits, two or four in each: a word has a weight of each of as many groups
of GROUP columns, which follow one another, so that a kernel takes a group from one place in all
words. K is filled up with zeros to whole words. Each row has a scale. ``fp8`` is e4m3; ``int8`` and
``int4``, from -128 and -8 on, are stored plus that. An int4 group has a scale of its own, over the
row's: a number of 8 bits, four of them significant, so that its product with a weight is exact in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.kernels.interface import Weight

GROUP = 64
PLACES = {"fp8": 2, "int8": 2, "int4": 4}  # weights in a word
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}  # a weight over its scale
ZERO = {"int8": 128, "int4": 8}  # what stands for 0
LARGEST_SCALE = 1.875 * 2.0**8  # of a group, over its row's: see ``_scale_of``
TRIES = 5  # of a group's scale, from the one that holds all down: that of least squared error wins
AllMax = Callable[[Tensor], Tensor]  # [N] -> the greatest on any of the ranks that share K
AT_ONCE = 2**24  # weights that are quantized at a time, at most


class Stored(NamedTuple):
    """A ``Weight`` by itself."""

    weight: Tensor
    scale: Tensor | None = None
    group_scale: Tensor | None = None
    n_inputs: int = 0
    split: int = 0
    format: str = ""
    n_ranks: int = 1
    whole: Weight | None = None


def quantized_split(n_inputs: int, most: int = 4) -> int:
    """Columns of K that a sum takes where others add it up: a fourth or half of all, or all.

    As ``interface.k_split``, a property of the weight: whole words, in sums of almost one length.
    ``most``: how many sums at most, of a rank's share of K.
    """
    step = max(PLACES.values()) * GROUP
    n_steps = -(-n_inputs // step)
    for n_sums in (4, 2):
        each = -(-n_steps // n_sums)
        if n_sums <= most and 10 * n_sums * each <= 11 * n_steps:
            return each * step
    return n_steps * step


def of_one(x: Tensor) -> Tensor:
    """``AllMax`` where nobody shares K."""
    return x


def quantize(
    weight: Tensor, format: str, all_max: AllMax = of_one
) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [N, K] -> words [N, …] int16, ``scale`` [N] and, of int4, ``group_scale``.

    That has a word [steps, N] int32 with the codes of each step's four groups. ``scale`` is of the
    whole row, of which ranks may have a share each.
    """
    if weight.is_meta:
        return _shapes(weight, format)
    n_rows = max(1, AT_ONCE // weight.shape[1])
    parts = [_quantize(part.float(), format, all_max) for part in torch.split(weight, n_rows)]
    words, scale, group_scale = zip(*parts, strict=True)
    codes = None if group_scale[0] is None else torch.cat(group_scale, dim=1)
    return torch.cat(words), torch.cat(scale), codes


def _shapes(weight: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same without memory."""
    n_rows, n_inputs = weight.shape
    n_steps = -(-n_inputs // (PLACES[format] * GROUP))
    words = weight.new_empty(n_rows, n_steps * GROUP, dtype=torch.int16)
    codes = weight.new_empty(n_steps, n_rows, dtype=torch.int32) if format == "int4" else None
    return words, weight.new_empty(n_rows, dtype=torch.float32), codes


def _quantize(weight: Tensor, format: str, all_max: AllMax) -> tuple[Tensor, Tensor, Tensor | None]:
    places = PLACES[format]
    n_rows = len(weight)
    padded = F.pad(weight, (0, -weight.shape[1] % (places * GROUP)))
    groups = padded.view(n_rows, -1, GROUP)
    if format == "int4":
        values, scale, codes = _round_groups(groups, all_max)
    else:
        scale = _positive(all_max(weight.abs().amax(dim=1)) / LARGEST[format])
        values, codes = groups / scale[:, None, None], None
    if format == "fp8":
        bits = values.to(torch.float8_e4m3fn).view(torch.uint8).int()
    else:
        bits = values.round().int() + ZERO[format]
    shifts = torch.arange(0, 16, 16 // places, device=weight.device)[:, None]
    words = (bits.view(n_rows, -1, places, GROUP) << shifts).sum(dim=2)
    return words.to(torch.int16).flatten(1), scale, codes


def _round_groups(groups: Tensor, all_max: AllMax) -> tuple[Tensor, Tensor, Tensor]:
    """int4 of groups [N, groups, GROUP]: the values, the rows' scale, and the groups' codes."""
    greatest = groups.abs().amax(dim=2) / LARGEST["int4"]
    scale = _positive(all_max(greatest.amax(dim=1)) / LARGEST_SCALE)
    holds_all = _scale_code(greatest / scale[:, None])
    least, codes = torch.full_like(greatest, torch.inf), holds_all
    values = torch.zeros_like(groups)
    for fewer in range(TRIES):
        tried = (holds_all - fewer).clamp(min=0)
        of_group = (_scale_of(tried, torch.float32) * scale[:, None])[:, :, None]
        value = (groups / of_group).round_().clamp_(-ZERO["int4"], LARGEST["int4"])
        error = torch.addcmul(groups, value, of_group, value=-1).square_().sum(dim=2)
        better = error < least
        least, codes = torch.where(better, error, least), torch.where(better, tried, codes)
        values = torch.where(better[:, :, None], value, values)
    by_step = codes.to(torch.uint8).view(len(groups), -1, 4).transpose(0, 1).contiguous()
    return values, scale, by_step.view(torch.int32)[..., 0]


def _scale_code(scale: Tensor) -> Tensor:
    """The least code, 0 … 127, whose ``_scale_of`` is not below ``scale``, where there is one."""
    bits = scale.float().view(torch.int32)
    return ((bits + (2**20 - 1) >> 20) - (120 << 3)).clamp(0, 127)


def _scale_of(code: Tensor, dtype: torch.dtype) -> Tensor:
    """(1 + m / 8) · 2**(e - 7) of a code, whose low 3 bits are m: the upper bits of a float."""
    return ((code.to(torch.int32) + (120 << 3)) << 20).view(torch.float32).to(dtype)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] that a kernel multiplies with."""
    if not weight.format:
        return weight.weight
    assert weight.scale is not None
    wide, places = torch.promote_types(dtype, torch.float32), PLACES[weight.format]
    n_bits = 16 // places
    shifts = torch.arange(0, 16, n_bits, device=weight.weight.device)[:, None]
    words = weight.weight.int().view(len(weight.weight), -1, 1, GROUP)
    bits = (words >> shifts) & (2**n_bits - 1)  # [N, steps, places, GROUP]
    if weight.format == "fp8":
        values = bits.to(torch.uint8).view(torch.float8_e4m3fn).to(wide)
    else:
        values = (bits - ZERO[weight.format]).to(wide)
    scale = weight.scale[:, None, None, None].to(wide)
    if weight.group_scale is not None:
        codes = weight.group_scale[..., None].contiguous().view(torch.uint8)  # [steps, N, 4]
        scale = _scale_of(codes, wide).transpose(0, 1)[..., None] * scale
    rows: Tensor = (values * scale).flatten(1)[:, : weight.n_inputs]
    return rows.to(dtype)
