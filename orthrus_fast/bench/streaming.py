"""How fast the device reads memory, and how many bytes a pass has to read."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from orthrus_fast.bench.clocks import time_steps
from orthrus_fast.bench.common import Result
from orthrus_fast.bench.session import Session
from orthrus_fast.kernels.interface import fitting
from orthrus_fast.model import Stack

STREAMED = {"cuda": 2**31, "cpu": 2**26}  # bytes that one timing reads; far more than caches hold


def ceiling(session: Session) -> Result:
    """Return the rates, in bytes/s, at which this device streams bytes, as seen just now."""
    rates = {"product": product_rate(session), **read_rates(session)}
    best = max(rates, key=lambda name: rates[name])
    rates_per_s = {f"{name}_bytes_per_s": rate for name, rate in rates.items()}
    return {**rates_per_s, "bytes_per_s": rates[best], "best": best}


def product_rate(session: Session) -> float:
    """Return the bytes/s of weights in the output head's product, with as many rows as a block.

    A head that fits in a cache is copied until the copies don't.
    """
    device, head = session.device, session.runner.model.embed_tokens.weight
    n_heads = max(1, math.ceil(STREAMED[device.type] // 4 / head.nbytes))
    heads = [head, *(head.clone() for _ in range(n_heads - 1))]
    n_rounds = math.ceil(STREAMED[device.type] / (n_heads * head.nbytes))
    x = head.new_empty(session.decoder.slots * session.width, head.shape[1])
    x.normal_(generator=torch.Generator(device).manual_seed(0))

    def products() -> None:
        for weight in heads * n_rounds:
            functional.linear(x, weight)

    (ms,) = time_steps([replayable(products, device)], device, session.args.repeats)
    return float(n_rounds * n_heads * head.nbytes / (ms["median"] / 1e3))


def replayable(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Return ``run`` as a CUDA graph, so that launches cost nothing; on a CPU, ``run`` itself."""
    if device.type != "cuda":
        return run
    run()  # libraries set up what a capture must not see
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def read_rates(session: Session) -> dict[str, float]:
    """Return the bytes/s of two reductions over a large buffer of the model's dtype."""
    device, head = session.device, session.runner.model.embed_tokens.weight
    tile = head.new_empty(2**20).normal_(generator=torch.Generator(device).manual_seed(0))
    buffer = tile.repeat(max(1, STREAMED[device.type] // tile.nbytes))
    steps: dict[str, Callable[[], object]] = {"amax": buffer.amax, "sum": buffer.sum}
    times = time_steps(list(steps.values()), device, session.args.repeats)
    rates = [buffer.nbytes / (ms["median"] / 1e3) for ms in times]
    return dict(zip(steps, rates, strict=True))


def bytes_read(session: Session, stack: Stack, context: int) -> Result:
    """Return the bytes of weights and of K and V that one pass of ``stack`` has to read."""
    model, n_rows = session.runner.model, session.decoder.slots * session.width
    n_positions = session.decoder.slots * context + n_rows
    n_elements = n_positions * session.decoder.config.cache_elements_per_token
    cache = n_elements * model.embed_tokens.weight.dtype.itemsize
    read = [fitting(linear, n_rows) for linear in stack.linears()]
    tensors = [t for weight in read for t in (weight.weight, weight.scale, weight.group_scale)]
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return {"weights_bytes": weights, "cache_bytes": cache}


def shares(read: Result, ms: float, rate: float) -> Result:
    """Return the share of ``rate``, in bytes/s, that a pass of ``ms`` reached."""
    weights, rows = (read[name] / (ms / 1e3) / rate for name in ("weights_bytes", "cache_bytes"))
    return {"share_by_weights": weights, "share_by_weights_and_cache": weights + rows}
