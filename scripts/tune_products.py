"""Tiles for the products of the public models on the GPU at hand: writes kernels/tiles.json.

    python -m scripts.tune_products [--rows 32]

Each product is timed as it runs in a pass: in a CUDA graph, between norms, its weights not in any
cache; where K is split, the next norm adds the partial sums, and that counts too. Where cuBLAS,
without what follows the product, is faster by 3%, no tiles are written, and cuBLAS keeps the shape.
Other chips' entries stay as they are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast import kernels
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import build_on_meta
from orthrus_fast.kernels.norm import add_norm
from orthrus_fast.kernels.products import ROWS, Tiles, launch
from orthrus_fast.model import Layer, View

TABLE = Path(kernels.__file__).with_name("tiles.json")
MODELS = ("1.7B", "4B", "8B")
STREAMED = 600_000_000  # bytes of weights that one timing walks through; far past the caches
# (block_n, block_k, num_warps): what came first for some shape in a wider search.
BLOCKS = ((64, 128, 4), (64, 256, 4), (128, 128, 8))
SHARED_KIB = (74, 112, 220)  # for three, two and one program on a multiprocessor
MARGIN = 1.03  # cuBLAS must be faster by this to keep a shape


class Shape(NamedTuple):
    """A product of ``n_rows`` rows with a weight [n, k], and what follows it."""

    n_rows: int
    n: int
    k: int
    end: str  # "", "swiglu" or "argmax"

    @property
    def key(self) -> str:
        return f"{self.n_rows}x{self.n}x{self.k}"


def shapes() -> list[Shape]:
    """Every product of the public models' passes, for every number of rows in the table."""
    found: dict[Shape, None] = {}
    for name in MODELS:
        model = build_on_meta(shape_config(name))
        layer = model.layers[0]
        assert isinstance(layer, Layer)
        linears = [*layer.linears(View.AUTOREGRESSIVE), model.lm_head]
        ends = {layer.mlp.gate_up: "swiglu", model.lm_head: "argmax"}
        for n_rows in ROWS:
            for linear in linears:
                n, k = linear.weight.shape
                found[Shape(n_rows, n, k, ends.get(linear, ""))] = None
    return list(found)


def candidates(shape: Shape) -> Iterator[Tiles]:
    """Tiles worth a try: enough programs to fill the chip, and at least two steps for each."""
    for block_n, block_k, num_warps in BLOCKS:
        n_tiles, stage = shape.n // block_n, (block_n + shape.n_rows) * block_k * 2
        depths: set[tuple[int, int]] = set()
        for n_splits in (1,) if shape.end else (1, 2, 3, 4, 8):
            n_steps = shape.k // (block_k * n_splits)
            if shape.k % (block_k * n_splits) or n_steps < 2:
                continue
            if n_splits > 1 and not 60 <= n_tiles * n_splits <= 320:
                continue
            for kib in SHARED_KIB:
                depths.add((n_splits, min(kib * 1024 // stage, n_steps, 8)))
        for n_splits, num_stages in sorted(depths):
            if num_stages >= 2:
                yield Tiles(block_n, block_k, n_splits, num_warps, num_stages)


def run(x: Tensor, weight: Tensor, shape: Shape, tiles: Tiles) -> Tensor:
    argmax = "both" if shape.end == "argmax" else ""
    return launch(x, weight, tiles, swiglu=shape.end == "swiglu", argmax=argmax)[0]


def compile_one(job: tuple[Shape, Tiles]) -> None:
    """In a process of its own, so that many compile at once; Triton's cache hands them on."""
    shape, tiles = job
    x = torch.zeros(shape.n_rows, shape.k, dtype=torch.bfloat16, device="cuda")
    run(x, torch.zeros(shape.n, shape.k, dtype=torch.bfloat16, device="cuda"), shape, tiles)


def microseconds(step: Callable[[], None], n_products: int) -> float:
    """Of one product; the median of seven replays of a graph that holds ``n_products``."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(8)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans: list[float] = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return statistics.median(spans) * 1000 / n_products


def tune(shape: Shape) -> tuple[Tiles | None, str]:
    """The fastest tiles, None if cuBLAS is faster; and a line that says how they compare."""
    n_weights = max(2, min(32, STREAMED // (shape.n * shape.k * 2)))
    kind: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = torch.randn(n_weights, shape.n, shape.k, **kind)
    x = torch.randn(shape.n_rows, shape.k, **kind)
    stream = torch.randn(shape.n_rows, 1024 if shape.end else shape.n, **kind)

    def timed(product: Callable[[Tensor], Tensor]) -> float:
        def step() -> None:
            partials = stream[None]
            for weight in weights:
                add_norm(stream, partials, stream[0], 1e-6)
                of_product = product(weight)
                partials = partials if shape.end else of_product

        return microseconds(step, n_weights)

    cublas = timed(lambda weight: F.linear(x, weight)[None])
    custom = {
        tiles: timed(lambda weight, tiles=tiles: run(x, weight, shape, tiles))  # type: ignore[misc]
        for tiles in candidates(shape)
    }
    best = min(custom, key=lambda tiles: custom[tiles])
    line = f"{shape.key:18} cuBLAS {cublas:6.1f} us, custom {custom[best]:6.1f} {tuple(best)}"
    return (best if custom[best] < cublas * MARGIN else None), line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--rows", type=int, choices=ROWS, help="tune these alone, keep the others")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_products: needs a CUDA device")
    wanted = [shape for shape in shapes() if args.rows in (None, shape.n_rows)]
    jobs = [(shape, tiles) for shape in wanted for tiles in candidates(shape)]
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        for _ in pool.imap_unordered(compile_one, jobs, chunksize=8):
            pass
    chosen: dict[str, Tiles] = {}
    for shape in wanted:
        tiles, line = tune(shape)
        print(line if tiles else f"{line}: cuBLAS", flush=True)
        if tiles:
            chosen[shape.key] = tiles
    table = json.loads(TABLE.read_text("utf-8"))
    major, minor = torch.cuda.get_device_capability()
    chip = table["chips"].setdefault(f"sm_{major}{minor}", {"measured_on": {}, "tiles": {}})
    for shape in wanted:
        chip["measured_on"][str(shape.n_rows)] = torch.cuda.get_device_name()
        chip["tiles"].pop(shape.key, None)
    found = chip["tiles"] | {key: list(tiles) for key, tiles in chosen.items()}
    chip["tiles"] = {shape.key: found[shape.key] for shape in shapes() if shape.key in found}
    args.output.write_text(to_json(table), "utf-8")


def to_json(table: object) -> str:
    """Indented, but a list stays on one line."""
    return (
        re.sub(r"\[[^\]]*\]", lambda m: " ".join(m[0].split()), json.dumps(table, indent=1)) + "\n"
    )


if __name__ == "__main__":
    main()
