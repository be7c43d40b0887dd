"""How fast this device reads memory, and how many bytes a pass has to read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from orthrus_fast.bench.clocks import time_steps
from orthrus_fast.bench.common import Result
from orthrus_fast.config import ModelConfig

if TYPE_CHECKING:
    import torch

    from orthrus_fast.bench.subject import Bench
    from orthrus_fast.model import Transformer, View

STREAMED = {"cuda": 2**31, "cpu": 2**26}  # bytes one timing of the ceiling reads; far past caches


def ceiling(bench: Bench) -> Result:
    """The best rate at which this device streams bytes, in bytes/s, as seen just now."""
    rates = {"product": product_rate(bench), **read_rates(bench)}
    best = max(rates, key=lambda name: rates[name])
    rates_per_s = {f"{name}_bytes_per_s": rate for name, rate in rates.items()}
    return {**rates_per_s, "bytes_per_s": rates[best], "best": best}


def product_rate(bench: Bench) -> float:
    """Bytes/s of weights through the output head's product, at the block's number of rows.

    A head that fits in a cache is copied until the copies don't.
    """
    import torch
    from torch.nn.functional import linear

    head = bench.runner.model.lm_head.weight
    streamed = STREAMED[bench.device.type]
    heads = [head]
    while len(heads) * head.nbytes < streamed // 4:
        heads.append(head.clone())
    n_rounds = math.ceil(streamed / (len(heads) * head.nbytes))
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (bench.decoder.slots * bench.width, head.shape[1])
    x = torch.empty(shape, dtype=head.dtype, device=bench.device).normal_(generator=generator)

    def products() -> None:
        for _ in range(n_rounds):
            for weight in heads:
                linear(x, weight)

    times = time_steps([replayable(products, bench.device)], bench.device, bench.args.repeats)
    return n_rounds * len(heads) * head.nbytes / (times[0]["median"] / 1e3)


def replayable(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """``run`` as a CUDA graph, so that launches cost nothing; on a CPU, itself."""
    import torch

    if device.type != "cuda":
        return run
    run()  # libraries set up what a capture must not see
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def read_rates(bench: Bench) -> dict[str, float]:
    """Bytes/s of plain reductions over a big buffer of the model's dtype."""
    import torch

    dtype = bench.runner.model.lm_head.weight.dtype
    n_elements = STREAMED[bench.device.type] // dtype.itemsize
    generator = torch.Generator(bench.device).manual_seed(0)
    tile = torch.empty(2**20, dtype=dtype, device=bench.device).normal_(generator=generator)
    buffer = tile.repeat(max(1, n_elements // 2**20))
    steps: dict[str, Callable[[], object]] = {"amax": buffer.amax, "sum": buffer.sum}
    times = time_steps(list(steps.values()), bench.device, bench.args.repeats)
    rates = [buffer.nbytes / (span["median"] / 1e3) for span in times]
    return dict(zip(steps, rates, strict=True))


def shares(bench: Bench, view: View, context: int, ms: float, rate: float) -> Result:
    """How much of the ceiling's ``rate``, in bytes/s, a pass of ``ms`` reached."""
    weights = streamed_bytes(bench.runner.model, view)
    rows = cache_bytes(bench.decoder.config, context + bench.width, weights_itemsize(bench))
    rows *= bench.decoder.slots
    return {
        "weights_bytes": weights,
        "cache_bytes": rows,
        "share_by_weights": weights / (ms / 1e3) / rate,
        "share_by_weights_and_cache": (weights + rows) / (ms / 1e3) / rate,
    }


def weights_itemsize(bench: Bench) -> int:
    return bench.runner.model.lm_head.weight.dtype.itemsize


def streamed_bytes(model: Transformer, view: View) -> int:
    """Bytes of the matrices that one pass of ``view`` reads: layers and head, no embedding."""
    from orthrus_fast.model import Layer
    from orthrus_fast.model import View as Views

    total = model.lm_head.weight.nbytes
    for layer in model.layers:
        assert isinstance(layer, Layer)
        attention = layer.attention if view is Views.AUTOREGRESSIVE else layer.draft_attention
        assert attention is not None
        for product in (attention.qkv, attention.o, layer.gate_up, layer.down):
            total += product.weight.nbytes
    return int(total)


def cache_bytes(config: ModelConfig, n_rows: int, itemsize: int) -> int:
    """Bytes of K and V that a pass over ``n_rows`` positions, its block's own among them, reads."""
    return config.cache_elements_per_token * n_rows * itemsize
