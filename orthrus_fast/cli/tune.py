"""orthrus tune: the fastest tiles of the products on the card at hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orthrus_fast.cli.flags import build_tune_parser
from orthrus_fast.cli.terminal import write_output
from orthrus_fast.errors import RequestError
from orthrus_fast.launch import launched
from orthrus_fast.options import PUBLIC_SHAPES

if TYPE_CHECKING:
    from orthrus_fast.config import ModelConfig


def run(arguments: Sequence[str], prog: str) -> int:
    """Measure tiles, keep them for this chip, print where they are; return the exit code."""
    args = build_tune_parser(prog).parse_args(arguments)
    if launched().size > 1:
        raise RequestError("tune: it measures one GPU; start it without torchrun")
    import torch

    if not torch.cuda.is_available():
        raise RequestError("tune: no CUDA device is available here; a CPU has no tiles to measure")
    from orthrus_fast import tuning
    from orthrus_fast.checkpoint import build_on_meta
    from orthrus_fast.kernels.tiles import chip_name, tuned_table

    shares = [config.share(0, args.tensor_parallel) for config in configs(args)]
    models = map(build_on_meta, shares)
    formats = ["" if name == "checkpoint" else name for name in args.weights]
    shapes = [s for model in models for s in tuning.product_shapes(model, args.rows, formats)]
    device = torch.device("cuda", torch.cuda.current_device())
    table = Path(args.output or tuned_table(chip_name(device)))
    chosen = tuning.tune(dict.fromkeys(shapes), lambda line: print(line, file=sys.stderr))
    tuning.write_table(table, chosen)
    write_output(f"{table}\n")
    return 0


def configs(args: argparse.Namespace) -> list[ModelConfig]:
    """Return the configs of the models whose products are measured."""
    from orthrus_fast.bench.shapes import shape_config
    from orthrus_fast.checkpoint import open_checkpoint

    if args.checkpoint is not None:
        return [open_checkpoint(args.checkpoint).config]
    return [shape_config(shape) for shape in args.shape or PUBLIC_SHAPES]
