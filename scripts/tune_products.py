"""Tiles for the products of the public models on the GPU at hand: writes kernels/tiles.json.

    python -m scripts.tune_products [--rows 32]

Each product is timed as a pass has it: in a CUDA graph, between norms, its weights not in any
cache; where K is split the next norm adds up the parts, and that counts too. Where the library's,
without the end, is faster by 3%, no tiles are written, and the library keeps the shape.
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
from orthrus_fast.bench import shape_config
from orthrus_fast.kernels.norm import add_norm
from orthrus_fast.kernels.product import ROWS, Tiles, launch

TABLE = Path(kernels.__file__).with_name("tiles.json")
MODELS = ("1.7B", "4B", "8B")
STREAMED = 600_000_000  # bytes of weights that one timing walks through; far past the caches
# (block_n, block_k, num_warps): what came first for some shape in a wider search.
BLOCKS = ((64, 128, 4), (64, 256, 4), (128, 128, 8))
SHARED_KIB = (74, 112, 220)  # for three, two and one program on a multiprocessor
MARGIN = 1.03  # a library's product must be faster by this to keep a shape


class Shape(NamedTuple):
    """A product of ``n_rows`` rows with a weight [n, k], and its end."""

    n_rows: int
    n: int
    k: int
    end: str  # "", "swiglu" or "greatest"

    @property
    def key(self) -> str:
        return f"{self.n_rows}x{self.n}x{self.k}"


def shapes() -> list[Shape]:
    """Every product of the public models' passes, for every number of rows in the table."""
    found: dict[Shape, None] = {}
    for model in MODELS:
        config = shape_config(model)
        hidden, heads = config.hidden_size, config.n_heads * config.head_dim
        for n_rows in ROWS:
            for n, k, end in (
                (heads + 2 * config.n_kv_heads * config.head_dim, hidden, ""),
                (hidden, heads, ""),
                (2 * config.intermediate_size, hidden, "swiglu"),
                (hidden, config.intermediate_size, ""),
                (config.vocab_size, hidden, "greatest"),
            ):
                found[Shape(n_rows, n, k, end)] = None
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
    best = "both" if shape.end == "greatest" else ""
    return launch(x, weight, tiles, swiglu=shape.end == "swiglu", best=best)[0]


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
    """The fastest tiles, None if the library is faster; and a line that says how they compare."""
    n_weights = max(2, min(32, STREAMED // (shape.n * shape.k * 2)))
    kind: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = torch.randn(n_weights, shape.n, shape.k, **kind)
    x = torch.randn(shape.n_rows, shape.k, **kind)
    stream = torch.randn(shape.n_rows, 1024 if shape.end else shape.n, **kind)

    def timed(product: Callable[[Tensor], Tensor]) -> float:
        def step() -> None:
            parts = stream[None]
            for weight in weights:
                add_norm(stream, parts, stream[0], 1e-6)
                product_parts = product(weight)
                parts = parts if shape.end else product_parts

        return microseconds(step, n_weights)

    library = timed(lambda weight: F.linear(x, weight)[None])
    own = {
        tiles: timed(lambda weight, tiles=tiles: run(x, weight, shape, tiles))  # type: ignore[misc]
        for tiles in candidates(shape)
    }
    best = min(own, key=lambda tiles: own[tiles])
    line = f"{shape.key:18} library {library:6.1f} us, own {own[best]:6.1f} {tuple(best)}"
    return (best if own[best] < library * MARGIN else None), line


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
        print(line if tiles else f"{line}: the library's", flush=True)
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
