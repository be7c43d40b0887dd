"""Products by this package's kernels, whatever format a weight has; and the same for a compiler."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthrus_fast.kernels import products, quantized
from orthrus_fast.kernels.formats import Stored
from orthrus_fast.kernels.interface import Weight, fitting
from orthrus_fast.kernels.products import empty_partials


class CustomProducts:
    """``interface.Products`` by these kernels."""

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        weight = fitting(weight, x.numel() // x.shape[-1])
        if weight.format:
            return quantized.product(x, weight)
        return products.product(x, weight.weight, weight.split)

    def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
        weight = fitting(weight, x.numel() // x.shape[-1])
        if weight.format:
            return quantized.swiglu(x, weight, prefetch)
        return products.swiglu_product(x, weight.weight, prefetch)

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        weight = fitting(weight, x.numel() // x.shape[-1])
        if weight.format:
            return quantized.lm_head_argmax(x, weight, return_logits)
        return products.lm_head_argmax(x, weight.weight, return_logits)


# Custom operators, which a compiler calls without looking inside. A new name for each new
# signature: the compiler's cache on disk knows operators by name alone.


@torch.library.custom_op("orthrus_fast::split_product", mutates_args=())
def product_op(x: Tensor, weight: Tensor, split: int) -> Tensor:
    return products.product(x, weight, split, joins=False)


product_op.register_fake(
    lambda x, weight, split: empty_partials(x, len(weight), math.ceil(x.shape[-1] / split))
)
swiglu_product_op = torch.library.custom_op(
    "orthrus_fast::gated_product", products.swiglu_product, mutates_args=()
)
swiglu_product_op.register_fake(lambda x, weight, *_: x.new_empty(*x.shape[:-1], len(weight) // 2))
lm_head_argmax_op = torch.library.custom_op(
    "orthrus_fast::lm_head_ids", products.lm_head_argmax, mutates_args=()
)


@lm_head_argmax_op.register_fake
def _(x: Tensor, weight: Tensor, return_logits: bool) -> tuple[Tensor, Tensor]:
    ids = x.new_empty(x.shape[:-1], dtype=torch.int64)
    return ids, x.new_empty(*x.shape[:-1], len(weight) if return_logits else 0)


@torch.library.custom_op("orthrus_fast::quantized_product", mutates_args=())
def quantized_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    split: int,
    format: str,
    end: str,
) -> tuple[Tensor, Tensor]:
    """``end``: "" for partial sums, "swiglu", or which of ids and logits: "ids", "both"."""
    stored = Stored(weight, scale, group_scale, x.shape[-1], split, format)
    return quantized.launch(x, stored, end)


@quantized_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    group_scale: Tensor | None,
    split: int,
    format: str,
    end: str,
) -> tuple[Tensor, Tensor]:
    n_columns = {"swiglu": len(weight) // 2, "ids": 0}.get(end, len(weight))
    n_partials = 1 if end else math.ceil(x.shape[-1] / split)
    ids = x.new_empty(x.shape[:-1] if end in ("ids", "both") else (0,), dtype=torch.int64)
    return empty_partials(x, n_columns, n_partials), ids


class CompiledProducts:
    """The same for a compiler, to which the number of partial sums cannot follow that of rows."""

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        if weight.format:
            return self._quantized(x, weight, "")[0]
        out: Tensor = product_op(x, weight.weight, weight.split)
        return out

    def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
        if weight.format:
            return self._quantized(x, weight, "swiglu")[0][0]
        out: Tensor = swiglu_product_op(x, weight.weight, prefetch)
        return out

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        if weight.format:
            partials, ids = self._quantized(x, weight, "both" if return_logits else "ids")
            return ids, partials[0]
        both: tuple[Tensor, Tensor] = lm_head_argmax_op(x, weight.weight, return_logits)
        return both

    def _quantized(self, x: Tensor, weight: Weight, end: str) -> tuple[Tensor, Tensor]:
        of = (weight.weight, weight.scale, weight.group_scale, weight.split, weight.format)
        both: tuple[Tensor, Tensor] = quantized_op(x, *of, end)
        return both
