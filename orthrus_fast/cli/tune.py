"""orthrus tune: the fastest tiles of the products on the card at hand."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from orthrus_fast.cli.flags import PUBLIC_SHAPES, build_tune_parser
from orthrus_fast.cli.terminal import write_output
from orthrus_fast.errors import RequestError

if TYPE_CHECKING:
    from orthrus_fast.config import ModelConfig


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure tiles, keep them for this chip, print where they are; return the exit code."""
    args = build_tune_parser(prog).parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        raise RequestError("tune: no CUDA device is available here; a CPU has no tiles to measure")
    from orthrus_fast.tuning import tune

    products = dict.fromkeys(product for config in configs(args) for product in products_of(config))
    table = tune(products, args.rows, lambda line: print(line, file=sys.stderr, flush=True))
    if args.output is not None:
        shutil.copyfile(table, args.output)
    write_output(f"{args.output or table}\n")
    return 0


def configs(args: argparse.Namespace) -> list[ModelConfig]:
    """Return the configs of the models whose products are measured."""
    from orthrus_fast.bench.shapes import shape_config
    from orthrus_fast.checkpoint import open_checkpoint

    if args.checkpoint is not None:
        return [open_checkpoint(args.checkpoint).config]
    return [shape_config(shape) for shape in args.shape or PUBLIC_SHAPES]


def products_of(config: ModelConfig) -> list[tuple[int, int, str]]:
    """Return N and K of each product of a pass, and what follows it: "", "swiglu" or "argmax".

    All layers have the same ones, in both views.
    """
    from orthrus_fast.checkpoint import build_on_meta
    from orthrus_fast.model import Layer, View

    model = build_on_meta(config)
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    ends = {layer.mlp.gate_up: "swiglu", model.lm_head: "argmax"}
    linears = [*layer.linears(View.AUTOREGRESSIVE), model.lm_head]
    return [(*linear.weight.shape, ends.get(linear, "")) for linear in linears]
