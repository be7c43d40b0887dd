"""Measures which tiles are fastest for a model's products on the GPU at hand, and keeps them.

Each product is timed as it runs in a pass: in a CUDA graph, between norms, its weights not in any
cache; where its partial sums are left, the next norm adds them, and that counts too. Tiles change
no bit of a result (``kernels.tiles``), so this can change how long a text takes, never the text.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthrus_fast.files import write_whole
from orthrus_fast.kernels import quantized
from orthrus_fast.kernels.formats import GROUP, PLACES, Stored, quantize, quantized_split
from orthrus_fast.kernels.interface import Weight, k_split
from orthrus_fast.kernels.norm import add_norm
from orthrus_fast.kernels.products import launch
from orthrus_fast.kernels.tiles import Tiles, chip_name, shared_memory
from orthrus_fast.model import Layer, Transformer
from orthrus_fast.options import TILED_ROWS

STREAMED = 600_000_000  # bytes of weights that one timing walks through; far past the caches
MOST_QUANTIZED = 1024  # rows of a product with fewer bits in the table
FEW = 128  # rows up to which a tile holds them all
# What came first for some shape in a wider search: (block_n, block_k, num_warps) for few rows;
# (block_m, block_n, block_k, num_warps) for many.
FEW_PROGRAMS = 128  # about as many as a chip has multiprocessors
NARROW = ((32, 128, 4), (32, 256, 4))  # of weights too small for that, such as a rank's share
FEW_ROWS = ((64, 64, 4), (64, 128, 4), (64, 256, 4), (128, 128, 8))
MANY_ROWS = ((128, 128, 64, 8), (128, 128, 64, 4), (256, 128, 64, 8), (128, 256, 64, 8))
SOME_ROWS = (
    (256, 64, 64, 8),
    (256, 64, 64, 4),
    (128, 64, 64, 4),
    (128, 64, 128, 4),
    (128, 128, 128, 4),
    (64, 128, 64, 4),
)
SHARED_KIB = (50, 74, 112, 122, 165, 220)  # four programs on a multiprocessor, down to one


class Shape(NamedTuple):
    """A product of ``n_rows`` rows with a weight [n, k], what follows it, and the format."""

    n_rows: int
    n: int
    k: int
    end: str  # "", "swiglu" or "argmax"
    format: str = ""
    n_ranks: int = 1  # that have a share of K, of which k is one
    n_shares: int = 1  # of N, of which n is one

    @property
    def key(self) -> str:
        return f"{self.n_rows}x{self.n}x{self.k} {self.format}".strip()

    @property
    def split(self) -> int:
        if self.end:
            return self.k
        n_columns, n_inner = self.n * self.n_shares, self.k * self.n_ranks
        of_whole = quantized_split(n_inner) if self.format else k_split(n_columns, n_inner)
        return self.k if self.n_ranks > 1 and self.k % of_whole else of_whole


def product_shapes(
    model: Transformer, rows: Sequence[int] = TILED_ROWS, formats: Sequence[str] = ("",)
) -> list[Shape]:
    """Every product of a model's passes, for every number of rows and format of the weights."""
    layer, head = model.verifier.layers[0], model.verifier.lm_head
    assert isinstance(layer, Layer)
    ends = {layer.mlp.gate_up: "swiglu", head: "argmax"}
    found: dict[Shape, None] = {}
    for n_rows in rows:
        for linear in (*layer.linears(), head):
            shape = Shape(n_rows, len(linear.weight), linear.n_inputs, ends.get(linear, ""))
            shape = shape._replace(n_ranks=linear.n_ranks, n_shares=linear.n_shares)
            for format in formats:
                if not format or n_rows <= MOST_QUANTIZED:
                    found[shape._replace(format=format)] = None
    return list(found)


def candidates(shape: Shape, shared: int) -> Iterator[Tiles]:
    """Tiles worth a try on a chip with ``shared`` bytes of shared memory for a block."""
    if shape.format:
        yield from quantized_candidates(shape, shared)
        return
    joins = (False, True) if shape.split < shape.k else (False,)
    if shape.n_rows <= FEW:
        heights = {1: (16, 32), 16: (16, 32), 128: (64, 128)}.get(shape.n_rows, (shape.n_rows,))
        is_small = shape.n // FEW_ROWS[0][0] * math.ceil(shape.k / shape.split) < FEW_PROGRAMS
        widths = (*FEW_ROWS, *NARROW) if is_small and not shape.end else FEW_ROWS
        for block_m, (block_n, block_k, num_warps) in product(heights, widths):
            stage = (block_n + block_m) * block_k * 2
            kib = [limit for limit in SHARED_KIB if limit * 1024 <= shared]
            for depth in {min(limit * 1024 // stage, shape.split // block_k, 8) for limit in kib}:
                if depth >= 2:
                    yield Tiles(block_m, block_n, block_k, False, False, num_warps, depth)
        return
    blocks = MANY_ROWS if shape.n_rows > 4 * FEW else (*MANY_ROWS, *SOME_ROWS)
    descriptors = (False, True) if shape.k % 8 == 0 else (False,)  # which want 16 bytes aligned
    for (block_m, block_n, block_k, num_warps), joined, by in product(blocks, joins, descriptors):
        most = shared // ((block_m + block_n) * block_k * 2)
        for depth in {min(most, 4), min(most, 6)}:
            if depth >= 2:
                yield Tiles(block_m, block_n, block_k, joined, by, num_warps, depth)


def quantized_candidates(shape: Shape, shared: int) -> Iterator[Tiles]:
    """The same of weights in fewer bits, of which a step is a group of words."""
    places = PLACES[shape.format]
    most = 128 if 2 * (64 + 128 * places) * GROUP * 2 <= shared else 64
    block_m = max(16, min(shape.n_rows, most))
    for block_n, num_warps in ((64, 4), (128, 4), (128, 8)):
        stage = (block_n + block_m * places) * GROUP * 2
        for depth in {min(limit * 1024 // stage, 8) for limit in (50, 74, 112, 130, 165, 220)}:
            if depth >= 2 and depth * stage <= shared:
                yield Tiles(block_m, block_n, GROUP, False, False, num_warps, depth)


def make_operands(shape: Shape, n_weights: int) -> tuple[Tensor, list[Weight]]:
    """Rows of x, and weights to multiply them with in turn; those in fewer bits mean nothing."""
    kind: Any = {"dtype": torch.bfloat16, "device": "cuda"}
    weights: list[Weight] = []
    for _ in range(n_weights):
        if not shape.format:
            weights.append(Stored(torch.randn(shape.n, shape.k, **kind)))
            continue
        meta = quantize(torch.empty(shape.n, shape.k, device="meta"), shape.format)
        words, scale, codes = (
            None if t is None else torch.empty_like(t, device="cuda") for t in meta
        )
        assert words is not None and scale is not None
        words.random_(-(2**15), 2**15)
        scale.fill_(1)
        codes = None if codes is None else codes.fill_(0x3C3C3C3C)
        weights.append(Stored(words, scale, codes, shape.k, shape.split, shape.format))
    return torch.randn(shape.n_rows, shape.k, **kind), weights


def run(x: Tensor, weight: Weight, shape: Shape, tiles: Tiles) -> Tensor:
    swiglu, argmax = shape.end == "swiglu", "both" if shape.end == "argmax" else ""
    if shape.format:  # greedy drafts need no logits
        return quantized.launch(x, weight, "ids" if argmax else shape.end, tiles=tiles)[0]
    return launch(x, weight.weight, shape.split, tiles, swiglu=swiglu, argmax=argmax)[0]


def compile_one(job: tuple[Shape, Tiles]) -> str | None:
    """In a process of its own, so that many compile at once; Triton's cache hands them on.

    Returns what went wrong, where something did.
    """
    shape, tiles = job
    try:
        x, (weight,) = make_operands(shape, 1)
        run(x, weight, shape, tiles)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def microseconds(step: Callable[[], None], n_products: int) -> float:
    """Of one product; the median of five replays of a graph that holds ``n_products``."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(6)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans: list[float] = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return statistics.median(spans) * 1000 / n_products


def time_product(shape: Shape, product: Callable[[Tensor, Weight], Tensor]) -> float:
    """Microseconds of ``product`` (x, weight) and of the norm after it."""
    n_weights = max(2, min(32, STREAMED // (shape.n * shape.k * 2)))
    x, weights = make_operands(shape, n_weights)
    width = 1024 if shape.end else shape.n
    stream = torch.randn(shape.n_rows, width, dtype=torch.bfloat16, device="cuda")

    def step() -> None:
        partials = stream[None]
        for weight in weights:
            add_norm(stream, partials, stream[0], 1e-6)
            of_product = product(x, weight)
            partials = partials if shape.end else of_product

    return microseconds(step, n_weights)


def tune(shapes: Iterable[Shape], log: Callable[[str], None]) -> dict[str, Tiles]:
    """The fastest tiles of each shape, by its key; progress goes to ``log``."""
    device = torch.device("cuda", torch.cuda.current_device())
    shared = shared_memory(device)
    jobs = [(shape, tiles) for shape in shapes for tiles in candidates(shape, shared)]
    log(f"compiling {len(jobs)} kernels")
    usable: dict[Shape, list[Tiles]] = {}
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        problems = pool.imap(compile_one, jobs, chunksize=4)
        for (shape, tiles), problem in zip(jobs, problems, strict=True):
            if problem is None:
                usable.setdefault(shape, []).append(tiles)
    chosen: dict[str, Tiles] = {}
    for number, (shape, tried) in enumerate(usable.items(), 1):
        times = {
            tiles: time_product(shape, partial(run, shape=shape, tiles=tiles)) for tiles in tried
        }
        best = min(times, key=lambda tiles: times[tiles])
        chosen[shape.key] = best
        log(f"{number} of {len(usable)}: {shape.key} {times[best]:.1f} us, {tuple(best)}")
    return chosen


def write_table(path: Path, chosen: dict[str, Tiles]) -> None:
    """Put the tiles of this chip into a table, in place of those for the same shapes."""
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        table = None
    if not isinstance(table, dict) or not isinstance(table.get("chips"), dict):
        table = {"chips": {}}
    device = torch.device("cuda", torch.cuda.current_device())
    entry = table["chips"].setdefault(chip_name(device), {"measured_on": "", "tiles": {}})
    entry["measured_on"] = torch.cuda.get_device_name(device)
    entry["tiles"] |= {key: list(tiles) for key, tiles in chosen.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(table))


def to_json(table: object) -> str:
    """Indented, but a list stays on one line."""
    return (
        re.sub(r"\[[^\]]*\]", lambda m: " ".join(m[0].split()), json.dumps(table, indent=1)) + "\n"
    )
