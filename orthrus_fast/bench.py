"""The benchmark: what is timed, how, and the report.

    python -m orthrus_fast.bench --shape 8B --json result.json

The work is cut into parts, and the JSON file is rewritten after each, so that a run that was ended
early goes on where it stopped. Both sides of every ratio are measured in one part, and the ceiling
anew in each part that quotes a share of it. Replayed acceptance means: the draft pass runs at full
cost, then its proposals give way to the known continuation, a wanted share of it right; speeds at a
trained model's acceptance are so measured on random weights. Heavy imports wait until needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from orthrus_fast.bench_report import show
from orthrus_fast.config import ModelConfig, RopeConfig
from orthrus_fast.errors import OrthrusError, RequestError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from orthrus_fast.decoder import Decoder
    from orthrus_fast.model import Kernels, Transformer, View
    from orthrus_fast.runners import EagerRunner, First
    from orthrus_fast.sampling import SamplingParams
    from orthrus_fast.steps import State

REPOSITORY = Path(__file__).resolve().parent.parent
EMBEDDED = REPOSITORY / "model"
CONTEXTS = (128, 1024, 4096)  # committed tokens
PREFILL_LENGTHS = (1024, 8192)  # prompt tokens
LONGEST_PROMPT = 1024  # tokens; of the identity part's random prompts
WARM_UP = 3  # runs before what is timed
ROUNDS = 3  # repeats of whole decodes, which average over hundreds of cycles each
STREAMED = {"cuda": 2**31, "cpu": 2**26}  # bytes one timing of the ceiling reads; far past caches
TEMPERATURES = (0.0, 0.3, 0.7, 1.0)
CYCLE_SETTINGS: dict[str, dict[str, Any]] = {  # of the sampling part
    "greedy": {},
    "sampled": {"temperature": 0.7},
    "filtered": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # Qwen3's own recommendation
}
FORMAT = 1  # of the JSON file

Result = dict[str, Any]


# Shapes of the public models, to be filled with random weights.


def shape_config(shape: str) -> ModelConfig:
    """The config of a public model; "tiny" is for tests of this program alone."""
    if shape == "tiny":
        return _config(64, 128, 2, 4, True, 512, n_kv_heads=2, head_dim=16, block_size=8)
    hidden_size, intermediate_size, n_layers, n_heads, tied = {
        "1.7B": (2048, 6144, 28, 16, True),
        "4B": (2560, 9728, 36, 32, True),
        "8B": (4096, 12288, 36, 32, False),
    }[shape]
    return _config(hidden_size, intermediate_size, n_layers, n_heads, tied, 151936)


def _config(
    hidden_size: int,
    intermediate_size: int,
    n_layers: int,
    n_heads: int,
    tied: bool,
    vocab_size: int,
    n_kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 32,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960 if vocab_size > 151669 else 4096,
        tie_word_embeddings=tied,
        rope=RopeConfig(theta=1e6),
        dtype="bfloat16",
        block_size=block_size,
        mask_token_id=min(151669, vocab_size - 1),
    )


def random_model(
    config: ModelConfig, kernels: Kernels, device: torch.device, dtype: torch.dtype, seed: int
) -> Transformer:
    """Weights drawn on the device with standard deviation 0.02; norms at 1.

    With "tiny" it is 0.2: a model that small would repeat its last token for ever.
    """
    import torch

    from orthrus_fast.checkpoint import allocate

    model = allocate(config, kernels, device, dtype, draft_view=True)
    generator = torch.Generator(device).manual_seed(seed)
    deviation = 0.02 if config.hidden_size >= 2048 else 0.2
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, deviation, generator=generator)
    return model


# What is benchmarked.


@dataclass(frozen=True)
class Bench:
    """A decoder and what to do with it."""

    args: argparse.Namespace
    decoder: Decoder
    contexts: tuple[int, ...]

    @property
    def runner(self) -> EagerRunner:
        return self.decoder._runner

    @property
    def width(self) -> int:
        """Rows of a block."""
        return self.decoder._width

    @property
    def drafting(self) -> bool:
        return self.runner.model.has_draft_view

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def accept(self) -> float:
        """The share of right drafts that replays have."""
        return share_of_right_drafts(self.args.accept, self.width)


def build(args: argparse.Namespace) -> Bench:
    """Load or draw the weights and build the decoder. Raises OrthrusError."""
    import torch

    from orthrus_fast.decoder import parse_device

    device = parse_device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    decoder = build_shape(args, device) if args.shape else load_checkpoint(args, device)
    contexts = tuple(c for c in args.contexts or CONTEXTS if c < decoder.max_seq_len)
    for context in args.contexts or ():
        if context not in contexts:
            raise RequestError(
                f"contexts: {context} is not below max_seq_len {decoder.max_seq_len}"
            )
    bench = Bench(args, decoder, contexts)
    if bench.drafting:
        share_of_right_drafts(args.accept, bench.width)  # refused here, before anything is timed
    return bench


def build_shape(args: argparse.Namespace, device: torch.device) -> Decoder:
    from orthrus_fast.decoder import (
        Decoder,
        check_memory,
        default_dtype,
        memory_needed,
        parse_dtype,
        with_block_size,
    )
    from orthrus_fast.runners import check_runner, find_kernels

    begin = time.perf_counter()
    config = with_block_size(shape_config(args.shape), args.block_size)
    dtype = parse_dtype(args.dtype) or default_dtype(config, device)
    runner = check_runner(args.runner, "default", device)
    attention, kernels = find_kernels(args.attention, device, dtype, config.head_dim)
    max_seq_len = choose_max_seq_len(args, config)
    check_memory(memory_needed(config, dtype, device, max_seq_len, args.slots), device)
    model = random_model(config, kernels, device, dtype, args.seed)
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    drawn = time.perf_counter() - begin
    decoder = Decoder(
        f"random weights of shape {args.shape}, seed {args.seed}",
        model,
        None,
        max_seq_len=max_seq_len,
        slots=args.slots,
        runner=runner,
        attention=attention,
    )
    decoder.startup = {"draw weights": drawn, **decoder.startup}
    return decoder


def load_checkpoint(args: argparse.Namespace, device: torch.device) -> Decoder:
    from orthrus_fast.checkpoint import open_checkpoint
    from orthrus_fast.decoder import load

    path = args.checkpoint if args.checkpoint is not None else EMBEDDED
    return load(
        path,
        device=device,
        dtype=args.dtype,
        max_seq_len=choose_max_seq_len(args, open_checkpoint(path).config),
        slots=args.slots,
        block_size=args.block_size,
        runner=args.runner,
        attention=args.attention,
    )


def choose_max_seq_len(args: argparse.Namespace, config: ModelConfig) -> int:
    """What was asked for, or else room for every part, as far as the model's limit allows."""
    from orthrus_fast.decoder import check_max_seq_len

    wanted = args.max_seq_len
    if wanted is None:
        longest = max(*(args.contexts or CONTEXTS), *PREFILL_LENGTHS)
        wanted = min(longest + args.new_tokens, config.max_position_embeddings)
    length = check_max_seq_len(wanted, config)
    if args.new_tokens >= length:
        n = args.new_tokens
        raise RequestError(f"new_tokens: {n} leaves no room for a prompt in max_seq_len {length}")
    return length


def random_prompts(bench: Bench, lengths: Sequence[int], salt: int = 0) -> list[list[int]]:
    """Random ids, the same for the same seed and ``salt``."""
    import torch

    generator = torch.Generator().manual_seed(bench.args.seed * 1_000_003 + salt)
    vocab_size = bench.decoder.config.vocab_size
    prompts: list[list[int]] = [
        torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]
    return prompts


# Clocks.


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """What the decoder's own calls run under; the compiler would compile anew without it."""
    import torch

    from orthrus_fast.runners import compiler_limits, plain_arithmetic

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(plain_arithmetic(device))
        stack.enter_context(compiler_limits())
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and spread of some measurements, in their own unit."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[round(share * (len(ordered) - 1))]

    median = statistics.median(ordered)
    return {"median": median, "p10": at(0.1), "p90": at(0.9), "n": len(ordered)}


def time_steps(
    steps: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[dict[str, float]]:
    """Milliseconds of each of ``steps``, which run in turn, as in a cycle.

    On a GPU between events, all launched ahead: the host's own time shows only where the device
    waits for it.
    """
    import torch

    for _ in range(WARM_UP):
        for step in steps:
            step()
    n_runs = repeats * len(steps)
    if device.type == "cuda":
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(n_runs + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for i in range(n_runs):
            steps[i % len(steps)]()
            events[i + 1].record()
        torch.cuda.synchronize(device)
        spans = [begin.elapsed_time(end) for begin, end in pairwise(events)]
    else:
        marks = [time.perf_counter()]
        for i in range(n_runs):
            steps[i % len(steps)]()
            marks.append(time.perf_counter())
        spans = [(end - begin) * 1e3 for begin, end in pairwise(marks)]
    return [summary(spans[i :: len(steps)]) for i in range(len(steps))]


def time_cycles(
    runner: EagerRunner, width: int, drafting: bool, repeats: int, sampling: bool = False
) -> dict[str, float]:
    """Milliseconds of a whole cycle, from one report's arrival at the host to the next's."""
    return summary(cycle_spans(runner, width, drafting, repeats, sampling))


def cycle_spans(
    runner: EagerRunner, width: int, drafting: bool, repeats: int, sampling: bool
) -> list[float]:
    marks = []
    for _ in range(WARM_UP + repeats + 1):
        while runner.in_flight <= runner.ahead:
            runner.launch(drafting, width, sampling)
        runner.read()
        marks.append(time.perf_counter())
    runner.drain()
    return [(end - begin) * 1e3 for begin, end in pairwise(marks[WARM_UP:])]


def place(bench: Bench, context: int) -> None:
    """Every slot at ``context`` committed rows, ended, so that cycles run and nothing moves."""
    import torch

    state = bench.runner.state
    state.reset()
    state.length.fill_(context)
    state.drafting.fill_(bench.drafting)
    generator = torch.Generator(bench.device).manual_seed(bench.args.seed)
    for ids in (state.anchor, state.proposals):
        ids.random_(bench.decoder.config.vocab_size, generator=generator)


@contextmanager
def random_cache(bench: Bench) -> Iterator[None]:
    """A cache full of random rows, and afterwards a decoder as new."""
    import torch

    cache, generator = bench.runner.cache, torch.Generator(bench.device)
    for rows in (*cache.k, *cache.v):
        rows.normal_(generator=generator)
    try:
        yield
    finally:
        bench.runner.drain()
        bench.runner.state.reset()
        cache.reset()


# The parts. Each returns what goes into the JSON file: times in ms unless named otherwise.


def startup(bench: Bench) -> Result:
    """Seconds until ready, and the memory that decoding took beyond weights and cache."""
    decoder = bench.decoder
    prompt = random_prompts(bench, [min(LONGEST_PROMPT, decoder.max_seq_len // 2)])[0]
    for mode in ("ar", "diffusion") if bench.drafting else ("ar",):
        decoder.generate(prompt, min(32, decoder.max_seq_len - len(prompt)), mode=mode)
    return {
        "seconds": dict(decoder.startup),
        "invariance": asdict(decoder.invariance) if decoder.invariance else None,
        "memory": memory_taken(bench),
    }


def memory_taken(bench: Bench) -> Result:
    """Bytes; peaks since before the weights, of torch's allocator (None without a GPU)."""
    import torch

    cache = bench.runner.cache
    weights = sum(weight.nbytes for weight in bench.runner.model.parameters())
    rows = sum(tensor.nbytes for tensor in (*cache.k, *cache.v))
    result: Result = {"weights_bytes": weights, "cache_bytes": rows}
    peaks: dict[str, int | None] = {"allocated": None, "reserved": None}
    if bench.device.type == "cuda":
        peaks["allocated"] = torch.cuda.max_memory_allocated(bench.device)
        peaks["reserved"] = torch.cuda.max_memory_reserved(bench.device)
        free, total = torch.cuda.mem_get_info(bench.device)
        result["device_used_bytes"] = total - free
    for name, peak in peaks.items():
        result[f"peak_{name}_bytes"] = peak
        result[f"over_{name}_bytes"] = None if peak is None else peak - weights - rows
    return result


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


def passes(bench: Bench) -> Result:
    """Draft, verify and the whole cycle at each context; AR by the block's rows and by one."""
    bench.runner.prepare(1)
    measured = ceiling(bench)
    with random_cache(bench):
        at = [passes_at(bench, context, measured["bytes_per_s"]) for context in bench.contexts]
    return {"ceiling": measured, "at": at}


def passes_at(bench: Bench, context: int, rate: float) -> Result:
    """``rate``: the ceiling in bytes/s."""
    from orthrus_fast.model import View

    tell(f"passes at {context} committed tokens")
    runner, width, repeats = bench.runner, bench.width, bench.args.repeats
    place(bench, context)
    steps: dict[str, Callable[[], object]] = {"verify": lambda: runner.verify(width)}
    if bench.drafting:
        steps = {"draft": runner.draft, **steps}
    times = time_steps(list(steps.values()), bench.device, repeats)
    result: Result = {"context": context}
    for name, ms in zip(steps, times, strict=True):
        view = View.DRAFT if name == "draft" else View.AUTOREGRESSIVE
        result[name] = {"ms": ms, **shares(bench, view, context, ms["median"], rate)}
    if bench.drafting:
        cycle, both = time_cycles(runner, width, True, repeats), sum(t["median"] for t in times)
        over = cycle["median"] - both
        result["cycle"] = {"ms": cycle, "over_passes_ms": over, "over_passes_share": over / both}
    runner.state.drafting.fill_(False)
    padded, one_row = time_steps(
        [lambda: runner.verify(width), lambda: runner.verify(1)], bench.device, repeats
    )
    result["ar"] = {"padded_ms": padded, "one_row_ms": one_row}
    return result


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


@contextmanager
def replaced(runner: EagerRunner, **methods: Callable[..., Any]) -> Iterator[None]:
    """Other methods on this one runner."""
    for name, method in methods.items():
        setattr(runner, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(runner, name)


class Replay:
    """Replayed acceptance: draft passes whose proposals give way to a corrupted known text.

    A position's draft is right or wrong for a whole decode, drawn beforehand. That is as good as
    drawing it in each cycle: no position is judged twice, since a wrong one ends its cycle and
    verification then supplies the token itself.
    """

    def __init__(self, bench: Bench, salt: int = 0) -> None:
        import torch

        self.runner, self.accept = bench.runner, bench.accept
        state = bench.runner.state
        self.drafts = torch.zeros_like(state.tokens)  # [B, S]
        self.offset = torch.arange(1, bench.width, device=bench.device)
        self.random = torch.Generator(bench.device).manual_seed(bench.args.seed + 1 + salt)
        self.vocab_size = bench.decoder.config.vocab_size

    def know(self, slot: int, tokens: Tensor) -> None:
        """Set the text [n] that ``slot`` will decode, prompt included; drafts are drawn from it."""
        import torch

        shift = torch.empty_like(tokens).random_(1, self.vocab_size, generator=self.random)
        draw = torch.rand(len(tokens), generator=self.random, device=tokens.device)
        wrong = (tokens + shift) % self.vocab_size
        self.drafts[slot, : len(tokens)] = torch.where(draw < self.accept, tokens, wrong)

    def draft(self, sampling: bool = False) -> None:
        """The runner's draft pass, and then other proposals; nothing is read on the host."""
        import torch

        type(self.runner).draft(self.runner, sampling)
        state = self.runner.state
        at = state.length[:, None] + self.offset  # the anchor sits at position length
        torch.gather(self.drafts, 1, at, out=state.proposals)


def expected_tokens_per_cycle(accept: float, width: int) -> float:
    """Mean of 1 + the length of the run of right drafts, each right with probability ``accept``."""
    return sum(accept**n for n in range(width))


def share_of_right_drafts(asked: float, width: int) -> float:
    """``asked`` itself up to 1; above, the share that gives so many tokens per cycle.

    Raises RequestError for more than blocks of ``width`` rows can give.
    """
    if asked <= 1:
        return asked
    if asked >= width:
        raise RequestError(
            f"accept: {asked:g} tokens per cycle is not above 1 and below {width}, "
            "the rows of a block"
        )
    low, high = 0.0, 1.0
    for _ in range(64):  # each halves what is left; a float has 53 bits
        middle = (low + high) / 2
        if expected_tokens_per_cycle(middle, width) < asked:
            low = middle
        else:
            high = middle
    return high


class Decoded(NamedTuple):
    """Some prompts decoded at once."""

    tokens: list[list[int]]  # new ones, by prompt
    accepted: list[int]  # drafts accepted, by cycle
    tokens_per_second: float  # all prompts' together, after the last one's first token

    @property
    def tokens_per_cycle(self) -> float | None:
        n_after_first = sum(len(tokens) - 1 for tokens in self.tokens)
        return n_after_first / len(self.accepted) if self.accepted else None


def decode(
    decoder: Decoder,
    prompts: list[list[int]],
    n_tokens: int,
    drafting: bool,
    width: int,
    settings: Sequence[SamplingParams | None] | None = None,
) -> Decoded:
    """Serve the prompts in the decoder's own loop, text and mailbox included.

    ``settings``: one for each prompt; None is greedy.
    """
    decoder._runner.state.reset()
    each = settings or [None] * len(prompts)
    requests = [decoder._request(p, n_tokens, s) for p, s in zip(prompts, each, strict=True)]
    for _ in decoder._run(requests, drafting, width):
        pass
    seconds = max(r.last_at for r in requests) - max(r.first_at for r in requests)
    tokens = [request.tokens for request in requests]
    n_after_first = sum(len(ids) - 1 for ids in tokens)
    accepted = [n for request in requests for n in request.accepted]
    return Decoded(tokens, accepted, n_after_first / seconds if seconds > 0 else 0.0)


def seeded(
    bench: Bench,
    n: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[SamplingParams]:
    """The settings of ``n`` sequences, each with a seed of its own. Raises RequestError."""
    from orthrus_fast.sampling import SamplingParams

    seeds = [(bench.args.seed + index) % 2**64 for index in range(n)]
    return [SamplingParams(temperature, top_k, top_p, seed=seed) for seed in seeds]


@contextmanager
def endless(runner: EagerRunner) -> Iterator[None]:
    """No token ends a text: what is decoded has the length that was asked for."""
    eos = runner.eos.clone()
    runner.eos.fill_(-1)  # in place: a captured graph reads this tensor
    try:
        yield
    finally:
        runner.eos.copy_(eos)


def cycles(bench: Bench) -> Result:
    """Tokens/s at replayed acceptance against both ARs, end to end, prefill excepted."""
    if not bench.drafting:
        return {"skipped": "no draft view"}
    n_tokens, limit = bench.args.new_tokens, bench.decoder.max_seq_len
    fitting = [context for context in bench.contexts if context + n_tokens <= limit]
    with endless(bench.runner):
        at = [cycles_at(bench, context) for context in fitting]
    return {
        "label": "replayed acceptance",
        "accept": bench.accept,
        "accept_asked": bench.args.accept,
        "new_tokens": n_tokens,
        "at": at,
        "left_out": [context for context in bench.contexts if context not in fitting],
    }


def cycles_at(bench: Bench, context: int) -> Result:
    decoder, n_tokens, width = bench.decoder, bench.args.new_tokens, bench.width
    prompts = random_prompts(bench, [context] * decoder.slots, salt=context)
    replay = Replay(bench, salt=context)
    rates: dict[str, list[float]] = {"diffusion": [], "ar_padded": [], "ar_one_row": []}
    accepted: list[int] = []
    n_emitted, equal = 0, True
    for n in range(min(ROUNDS, bench.args.repeats)):
        tell(f"cycles at {context} committed tokens, round {n + 1}")
        padded = decode(decoder, prompts, n_tokens, False, width)
        known = bench.runner.state.tokens.clone()
        one_row = decode(decoder, prompts, n_tokens, False, 1)
        for slot, text in enumerate(known):
            replay.know(slot, text)
        with replaced(bench.runner, draft=replay.draft):
            diffusion = decode(decoder, prompts, n_tokens, True, width)
        for name, run in zip(rates, (diffusion, padded, one_row), strict=True):
            rates[name].append(run.tokens_per_second)
        accepted += diffusion.accepted
        n_emitted += sum(len(tokens) - 1 for tokens in diffusion.tokens)
        equal = equal and diffusion.tokens == padded.tokens
    faster = max(statistics.median(rates[name]) for name in ("ar_padded", "ar_one_row"))
    return {
        "context": context,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "speedup_over_faster_ar": statistics.median(rates["diffusion"]) / faster,
        "tokens_per_cycle": n_emitted / len(accepted),
        "tokens_per_cycle_expected": expected_tokens_per_cycle(bench.accept, width),
        "tokens_per_cycle_standard_error": statistics.pstdev(accepted) / len(accepted) ** 0.5,
        "cycles": len(accepted),
        "tokens_equal_to_ar": equal,
        "one_row_tokens_equal_to_ar": one_row.tokens == padded.tokens,
    }


def sampled_cycles(bench: Bench) -> Result:
    """What sampling adds to a cycle: greedy, sampled, and sampled with filters, in turn."""
    bench.runner.prepare(bench.width, sampling=True)
    with random_cache(bench):
        at = [sampled_cycles_at(bench, context) for context in bench.contexts]
    mode = "diffusion" if bench.drafting else "ar"
    return {"mode": mode, "settings": CYCLE_SETTINGS, "at": at}


def sampled_cycles_at(bench: Bench, context: int) -> Result:
    """``over_greedy_share``: the median's excess over greedy's, as a share of greedy's."""
    tell(f"sampling at {context} committed tokens")
    runner, repeats = bench.runner, bench.args.repeats
    place(bench, context)
    spans: dict[str, list[float]] = {name: [] for name in CYCLE_SETTINGS}
    for _ in range(ROUNDS):
        for name, settings in CYCLE_SETTINGS.items():
            each = seeded(bench, bench.decoder.slots, **settings)
            for slot, params in enumerate(each):
                runner.state.settings.put(slot, params)
            sampling = each[0].temperature > 0
            spans[name] += cycle_spans(runner, bench.width, bench.drafting, repeats, sampling)
    ms = {name: summary(values) for name, values in spans.items()}
    greedy = ms["greedy"]["median"]
    over = {name: of["median"] / greedy - 1 for name, of in ms.items() if name != "greedy"}
    return {"context": context, "cycle_ms": ms, "over_greedy_share": over}


def eager(bench: Bench) -> Result:
    """This runner's cycle against the eager runner's, over the same weights, state and cache."""
    from orthrus_fast.runners import EagerRunner

    runner, width = bench.runner, bench.width
    other = EagerRunner(runner.model, runner.state, runner.cache)
    context = bench.contexts[len(bench.contexts) // 2]
    with random_cache(bench):
        place(bench, context)
        own = time_cycles(runner, width, bench.drafting, bench.args.repeats)
        eagers = time_cycles(other, width, bench.drafting, bench.args.repeats)
    return {
        "context": context,
        "mode": "diffusion" if bench.drafting else "ar",
        "runner": bench.decoder.configuration["runner"],
        "cycle_ms": own,
        "eager_cycle_ms": eagers,
        "speedup": eagers["median"] / own["median"],
    }


class Kept(NamedTuple):
    """All that a decoded sequence left behind."""

    tokens: Tensor  # [n + 1]: prompt, output, the anchor last
    n_prompt: int
    rows: Tensor  # [n - n_prompt, V]: logits of verification at each committed position
    cache: list[Tensor]  # [n_kv_heads, n, head_dim] a layer, K then V


class Recorder:
    """Keeps, on the device, the logits of every position that a decode commits, and its cache.

    Rows are written where they belong before it is known which were accepted; the next cycle
    writes over the others, as it does in the cache. So nothing waits, and what runs is the
    decoder's own loop. A sequence is kept before its slot's next one is prefilled.
    """

    def __init__(self, bench: Bench) -> None:
        import torch

        self.runner = bench.runner
        state, head = bench.runner.state, bench.runner.model.lm_head.weight
        n_slots, n_rows = bench.decoder.slots, bench.args.new_tokens + bench.width
        shape = (n_slots, n_rows, bench.decoder.config.vocab_size)
        self.rows = torch.zeros(shape, dtype=head.dtype, device=bench.device)
        self.n_prompt = torch.zeros_like(state.slots)  # [B], of the sequence in each slot
        self.offset = torch.arange(bench.width, device=bench.device)
        self.start([], None)

    def start(self, expected: list[Kept], replay: Replay | None) -> None:
        """Begin a decode; with ``expected``, sequences are compared with these, then dropped."""
        self.n_prompt.zero_()
        self.owners: dict[int, int] = {}  # slot -> sequence
        self.n_opened = 0
        self.expected, self.replay = expected, replay
        self.kept: dict[int, Kept] = {}
        self.verdicts: dict[int, Result] = {}

    def prefill(self, prompt: list[int], slot: int, limit: int, params: SamplingParams) -> First:
        self._keep(slot)
        first = type(self.runner).prefill(self.runner, prompt, slot, limit, params)
        self.owners[slot] = self.n_opened
        self.n_prompt[slot] = len(prompt)
        if self.replay is not None:
            self.replay.know(slot, self.expected[self.n_opened].tokens)
        self.n_opened += 1
        return first

    def verify(self, width: int, sampling: bool = False) -> Tensor:
        state = self.runner.state
        at = (state.length - self.n_prompt)[:, None] + self.offset[:width]
        report = type(self.runner).verify(self.runner, width, sampling)
        self.rows[state.slots[:, None], at] = self.runner.logits
        return report

    def finish(self) -> None:
        for slot in list(self.owners):
            self._keep(slot)

    def _keep(self, slot: int) -> None:
        if slot not in self.owners:
            return
        state, cache, index = self.runner.state, self.runner.cache, self.owners.pop(slot)
        n, n_prompt = int(state.length[slot]), int(self.n_prompt[slot])
        kept = Kept(
            state.tokens[slot, : n + 1].clone(),
            n_prompt,
            self.rows[slot, : n - n_prompt].clone(),
            [rows[slot, :, :n].clone() for rows in (*cache.k, *cache.v)],
        )
        if self.expected:
            self.verdicts[index] = compare(self.expected[index], kept)
        else:
            self.kept[index] = kept


def compare(expected: Kept, got: Kept) -> Result:
    """How many rows of two decodes of one sequence differ in any bit; a missing one differs."""
    import torch

    from orthrus_fast.invariance import bits_of

    def differing(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> int:
        n = min(len(a), len(b))
        return int((bits_of(a[:n]) != bits_of(b[:n])).any(dims).sum()) + abs(len(a) - len(b))

    n_rows = max(len(expected.rows), len(got.rows))
    layers = zip(expected.cache, got.cache, strict=True)
    cache = [(a.transpose(0, 1), b.transpose(0, 1)) for a, b in layers]  # positions first
    n = min(len(expected.tokens), len(got.tokens))
    wrong = (expected.tokens[:n] != got.tokens[:n]).nonzero()
    return {
        "prompt_tokens": expected.n_prompt,
        "new_tokens": len(expected.tokens) - expected.n_prompt,
        "tokens_equal": torch.equal(expected.tokens, got.tokens),
        "first_difference": int(wrong[0]) - expected.n_prompt if len(wrong) else None,
        "rows": n_rows,
        "rows_differing": differing(expected.rows, got.rows, (1,)),
        "cache_rows": sum(max(len(a), len(b)) for a, b in cache),
        "cache_rows_differing": sum(differing(a, b, (1, 2)) for a, b in cache),
    }


def identity(bench: Bench) -> Result:
    """AR against diffusion, to the bit: tokens, logits at every emitted position, cache rows.

    Random weights get replayed drafts, a checkpoint drafts for itself. Sampled, where the command
    line says so, with a seed for each sequence, the same in both modes.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    args, width, decoder = bench.args, bench.width, bench.decoder
    n_tokens, prompts = args.new_tokens, identity_prompts(bench)
    settings = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    each = seeded(bench, len(prompts), **settings)
    recorder = Recorder(bench)
    with replaced(bench.runner, prefill=recorder.prefill, verify=recorder.verify):
        tell("identity: ar")
        decode(decoder, prompts, n_tokens, False, width, each)
        recorder.finish()
        expected = [recorder.kept[i] for i in range(len(prompts))]
        replay = Replay(bench) if args.shape else None
        recorder.start(expected, replay)
        tell("identity: diffusion")
        drafts = {"draft": replay.draft} if replay else {}
        with replaced(bench.runner, **drafts):
            diffusion = decode(decoder, prompts, n_tokens, True, width, each)
        recorder.finish()
    verdicts = [{"seed": each[i].seed, **recorder.verdicts[i]} for i in range(len(prompts))]
    totals = ("rows", "rows_differing", "cache_rows", "cache_rows_differing")
    return {
        "drafts": f"replayed, {bench.accept:.3g} right" if replay else "the checkpoint's own",
        "accept": bench.accept if replay else None,
        "accept_asked": args.accept if replay else None,
        "sampling": settings,
        "sequences": len(prompts),
        "sequences_equal": sum(verdict["tokens_equal"] for verdict in verdicts),
        "new_tokens": sum(verdict["new_tokens"] for verdict in verdicts),
        **{name: sum(verdict[name] for verdict in verdicts) for name in totals},
        "ties_for_first_place": sum(count_ties(kept.rows) for kept in expected),
        "tokens_sha256": digest([kept.tokens.tolist() for kept in expected]),
        "distinct_tokens": len({token for tokens in diffusion.tokens for token in tokens}),
        "tokens_per_cycle": diffusion.tokens_per_cycle,
        "cycles": len(diffusion.accepted),
        "by_sequence": verdicts,
    }


def digest(tokens: list[list[int]]) -> str:
    """Of AR's texts, so that two starts can be compared."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def count_ties(rows: Tensor) -> int:
    """Rows of logits [n, V] whose two best are equal."""
    best = rows.topk(2).values
    return int((best[:, 0] == best[:, 1]).sum())


def identity_prompts(bench: Bench) -> list[list[int]]:
    """Ids of ``--sequences`` prompts: of a file, spread over it, or random ones of many lengths."""
    import torch

    n = bench.args.sequences
    path = bench.args.prompts_file
    if path is None and not bench.args.shape and bench.args.checkpoint is None:
        path = EMBEDDED / "heldout.jsonl"
    if path is not None:
        lines = read_prompts(Path(path))
        n = min(n, len(lines))
        chosen = [lines[i * len(lines) // n] for i in range(n)]
        return [bench.decoder.encode(prompt) for prompt in chosen]
    longest = min(LONGEST_PROMPT, bench.decoder.max_seq_len - bench.args.new_tokens)
    generator = torch.Generator().manual_seed(bench.args.seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return random_prompts(bench, lengths)


def read_prompts(path: Path) -> list[Any]:
    """A prompt a line: an object with "ids", "messages" or "text". Raises RequestError."""
    prompts = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            fields = json.loads(line)
            prompts.append(next(fields[k] for k in ("ids", "messages", "text") if k in fields))
    except (OSError, ValueError, TypeError, StopIteration) as error:
        where = f"{path}: line {len(prompts) + 1}"
        raise RequestError(
            f'prompts_file: {where}: not an object with "ids", "messages" or "text" ({error})'
        ) from None
    if not prompts:
        raise RequestError(f"prompts_file: {path}: empty")
    return prompts


def expected_accepted(
    draft_logits: Tensor, target_logits: Tensor, drafts: Tensor, temperature: float
) -> Tensor:
    """How many drafts rejection sampling is expected to accept, given the drafts: [B] float64.

    logits [B, K-1, V], drafts [B, K-1] that were drawn from the softmax of ``draft_logits /
    temperature``. The i-th is accepted, after those before it, with probability min(1, target
    probability / draft probability): Leviathan et al. 2023, arXiv 2211.17192, algorithm 1. In
    float64; filters off.
    """

    def log_probability(logits: Tensor) -> Tensor:
        scaled = (logits.double() / temperature).log_softmax(dim=-1)
        return scaled.gather(-1, drafts[..., None])[..., 0]

    ratio = (log_probability(target_logits) - log_probability(draft_logits)).exp()
    return ratio.clamp(max=1).cumprod(dim=-1).sum(dim=-1)


class BlockJudge:
    """Tokens per cycle of sampled blocks, ours and rejection sampling's, not cut by a text's end.

    Its runner decodes by the eager steps over the decoder's own weights, state and cache, since
    nothing reaches into a captured graph. Each block is judged twice on the same logits: by the
    tokens that our noise draws, and by ``expected_accepted``, which nothing is served by. Drafts
    are fresh draws in every block: what is cut off after a wrong draft was judged by no one.
    """

    def __init__(self, bench: Bench, temperature: float) -> None:
        from orthrus_fast.runners import EagerRunner

        runner = bench.runner
        self.runner = EagerRunner(runner.model, runner.state, runner.cache)
        self.temperature = temperature
        self.ours: list[float] = []
        self.rejection: list[float] = []
        for name in ("_sampled", "verify"):
            setattr(self.runner, name, getattr(self, name))

    def _sampled(self, state: State, logits: Tensor) -> Tensor:
        from orthrus_fast.steps import sampled

        self.draft_logits = logits
        return sampled(state, logits)

    def verify(self, width: int, sampling: bool = False) -> Tensor:
        from orthrus_fast.steps import accept, make_block

        state, is_open = self.runner.state, ~self.runner.state.done
        block = make_block(state, width)
        report = type(self.runner).verify(self.runner, width, sampling)
        ours = accept(block, report[:, :width])
        target_logits = self.runner.logits[:, :-1]
        rejection = expected_accepted(
            self.draft_logits, target_logits, block[:, 1:], self.temperature
        )
        self.ours += (1 + ours[is_open]).tolist()
        self.rejection += (1 + rejection[is_open]).tolist()
        return report


def temperatures(bench: Bench) -> Result:
    """A checkpoint's tokens per cycle by temperature, and what rejection sampling would have had.

    ``served``: as the decoder's own runner serves them, the last block cut at the text's end.
    ``uncut``, ``rejection_sampling``: of the whole blocks of a second decode, see ``BlockJudge``.
    Standard errors count cycles as independent.
    """
    if not bench.drafting:
        return {"skipped": "no draft view"}
    if bench.args.shape:
        return {"skipped": "random weights have no trained draft view"}
    prompts = identity_prompts(bench)
    return {
        "sequences": len(prompts),
        "new_tokens": bench.args.new_tokens,
        "filters": None,
        "served_by": bench.decoder.configuration["runner"],
        "judged_by": "eager steps over the same weights; texts may differ in near ties",
        "rejection_sampling": "arXiv 2211.17192, computed on the uncut blocks' logits, not served",
        "at": [temperatures_at(bench, prompts, temperature) for temperature in TEMPERATURES],
    }


def temperatures_at(bench: Bench, prompts: list[list[int]], temperature: float) -> Result:
    tell(f"temperatures: {temperature}")
    decoder, n_tokens, width = bench.decoder, bench.args.new_tokens, bench.width
    each = seeded(bench, len(prompts), temperature)
    served = decode(decoder, prompts, n_tokens, True, width, each)
    spread = mean_of(served.accepted)
    result: Result = {
        "temperature": temperature,
        "served": {**spread, "mean": served.tokens_per_cycle},
    }
    if temperature > 0:
        judge = BlockJudge(bench, temperature)
        with served_by(decoder, judge.runner):
            decode(decoder, prompts, n_tokens, True, width, each)
        result["uncut"] = mean_of(judge.ours)
        result["rejection_sampling"] = mean_of(judge.rejection)
        result["uncut_over_rejection_sampling"] = ratio_of(judge.ours, judge.rejection)
    return result


def mean_of(values: Sequence[float]) -> Result:
    """Mean, its standard error and the number of values; None where there are none."""
    if not values:
        return {"mean": None, "standard_error": None, "n": 0}
    error = statistics.pstdev(values) / len(values) ** 0.5
    return {"mean": statistics.fmean(values), "standard_error": error, "n": len(values)}


def ratio_of(values: Sequence[float], others: Sequence[float]) -> Result:
    """As ``mean_of``, of the ratio of two means; its error counts that they come in pairs."""
    if not values:
        return mean_of(values)
    below = statistics.fmean(others)
    ratio = statistics.fmean(values) / below
    rest = [(a - ratio * b) / below for a, b in zip(values, others, strict=True)]  # delta method
    return {**mean_of(rest), "mean": ratio}


@contextmanager
def served_by(decoder: Decoder, runner: EagerRunner) -> Iterator[None]:
    """Another runner in the decoder's loop, over the same state and cache."""
    own, decoder._runner = decoder._runner, runner
    try:
        yield
    finally:
        decoder._runner = own


def prefill(bench: Bench) -> Result:
    """Milliseconds to the first token, ids in, by the host's clock."""
    decoder = bench.decoder
    fitting = [length for length in PREFILL_LENGTHS if length < decoder.max_seq_len]
    at = []
    for length in fitting:
        tell(f"prefill of {length} tokens")
        prompt = random_prompts(bench, [length])[0]
        spans = first_token_ms(decoder, prompt, min(5, bench.args.repeats))
        rate = length / (spans["median"] / 1e3)
        at.append({"prompt_tokens": length, "ms": spans, "tokens_per_second": rate})
    left_out = [length for length in PREFILL_LENGTHS if length not in fitting]
    return {"at": at, "left_out": left_out}


def first_token_ms(decoder: Decoder, prompt: list[int], repeats: int) -> dict[str, float]:
    spans = []
    for _ in range(1 + repeats):
        stats = decoder.generate(prompt, 1, mode="ar").stats
        assert stats is not None
        spans.append(stats.time_to_first_token * 1e3)
    return summary(spans[1:])  # the first one warms up


PARTS: dict[str, Callable[[Bench], Result]] = {
    "startup": startup,
    "ceiling": ceiling,
    "passes": passes,
    "cycles": cycles,
    "sampling": sampled_cycles,
    "eager": eager,
    "identity": identity,
    "temperatures": temperatures,
    "prefill": prefill,
}


# The report: one JSON file; its tables are bench_report's.


class Report:
    """The JSON file, kept whole on disk after every part."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path = Path(args.json) if args.json else None
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "parts")}
        self.content: Result = {
            "format": FORMAT,
            "arguments": json.loads(json.dumps(arguments)),
            "runs": [],  # each start of this program that measured a part
            "parts": {},
            "failed": {},
        }
        if self.path is not None and self.path.exists():
            self.content = self._held(self.path, self.content["arguments"])
        elif self.path is not None and not self.path.absolute().parent.is_dir():
            raise RequestError(f"json: {self.path}: there is no such directory")

    @staticmethod
    def _held(path: Path, arguments: Result) -> Result:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            held = content["arguments"]
            content = {name: content[name] for name in ("format", "arguments", "runs", "parts")}
        except (OSError, ValueError, KeyError, TypeError):
            raise RequestError(f"json: {path}: exists and is no result of this program") from None
        if held != arguments or content["format"] != FORMAT:
            both = {*held, *arguments}
            names = sorted(name for name in both if held.get(name) != arguments.get(name))
            raise RequestError(
                f"json: {path}: was made with other arguments ({', '.join(names) or 'format'}); "
                "name another file, or remove this one"
            )
        return {**content, "failed": {}}

    @property
    def parts(self) -> dict[str, Result]:
        parts: dict[str, Result] = self.content["parts"]
        return parts

    def begin_run(self, decoder: Decoder) -> None:
        self.content["runs"].append(surroundings(decoder))

    def add(self, name: str, result: Result, seconds: float) -> None:
        """``run`` is the index of the run that measured the part, in ``part_seconds``."""
        run = len(self.content["runs"]) - 1
        self.parts[name] = {"run": run, "part_seconds": seconds, **result}
        self._write()

    def fail(self, name: str, problem: str) -> None:
        self.content["failed"][name] = problem
        self._write()

    def _write(self) -> None:
        if self.path is None:
            return
        draft = self.path.with_name(self.path.name + ".part")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, self.path)


def surroundings(decoder: Decoder) -> Result:
    """What is needed to repeat a run."""
    import torch

    commit = first_line("git", "-C", str(REPOSITORY), "rev-parse", "HEAD")
    changed = first_line("git", "-C", str(REPOSITORY), "status", "--porcelain")
    on_gpu = decoder.configuration["device"].startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "configuration": decoder.configuration,
        "gpu": decoder.configuration["hardware"] if on_gpu else None,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "commit": commit,
        "dirty": None if commit is None else changed is not None,
    }


def first_line(*command: str) -> str | None:
    """Of what a program prints; None where it is absent, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# The command line.


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (--help lists the flags)")


def integers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def acceptance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def parts(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(PARTS):
        raise ValueError
    return [name for name in PARTS if name in names]


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m orthrus_fast.bench",
        description="Time a decoder, pass by pass and end to end, and check its identity.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", metavar="DIR_OR_REPO", help="directory or Hub repository (default: model/)")
    shape = "random weights in the shape of a public model (tiny: for tests); no download"
    add("--shape", choices=("1.7B", "4B", "8B", "tiny"), help=shape)
    add("--device", metavar="D", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--dtype", metavar="T", help="float32, bfloat16, float16 or float64")
    add("--runner", choices=("auto", "eager", "compiled", "graph"), default="auto")
    add("--attention", choices=("auto", "sdpa", "triton", "flash"), default="auto")
    add("--slots", type=positive, default=1, metavar="B", help="decoded at once (default: 1)")
    width = "rows of a block (default and most: the model's own)"
    add("--block-size", type=positive, metavar="K", help=width)
    contexts = f"committed tokens (default: {','.join(map(str, CONTEXTS))}, as far as they fit)"
    add("--contexts", type=integers, metavar="N,…", help=contexts)
    add("--max-seq-len", type=positive, metavar="N", help="(default: room for every part)")
    everything = list(PARTS)
    add("--parts", type=parts, default=everything, metavar="LIST", help=",".join(everything))
    accept = "replayed acceptance: the share of drafts that are right (default: 0.85), "
    accept += "or, above 1, tokens per cycle"
    add("--accept", type=acceptance, default=0.85, metavar="P", help=accept)
    sequences = "of identity and temperatures (default: 4)"
    add("--sequences", type=positive, default=4, metavar="N", help=sequences)
    new_tokens = "of cycles, identity and temperatures, a sequence (default: 512)"
    add("--new-tokens", type=positive, default=512, metavar="N", help=new_tokens)
    prompts = 'of identity and temperatures: JSON lines with "ids", "messages" or "text"'
    add("--prompts-file", metavar="FILE", help=prompts)
    temperature = "of identity (default: 0, greedy), whose sequences have seeds of their own"
    add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    add("--top-k", type=positive, metavar="K", help="of identity, where sampled (default: off)")
    add("--top-p", type=probability, metavar="P", help="of identity, where sampled (default: off)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, prompts and drafts")
    add("--repeats", type=positive, default=20, metavar="N", help="of each timing (default: 20)")
    add("--json", metavar="FILE", help="results; the same command again goes on where it ended")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """0: all parts done; 1: a part failed; 2: bad input; 130: interrupted, the file is whole."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from orthrus_fast import bench_report

        return bench_report.main(arguments[1:])
    try:
        args = build_parser().parse_args(arguments)
        check_flags(args)
        return run(args)
    except OrthrusError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; run: pip install -e . in the repository")
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the parts that were done stay in --json's file", file=sys.stderr)
        return 130


def check_flags(args: argparse.Namespace) -> None:
    """Raise RequestError for flags that contradict each other."""
    if args.shape is not None and args.checkpoint is not None:
        raise RequestError("--shape does not go with --checkpoint")
    if args.shape is not None and args.prompts_file is not None:
        raise RequestError("--shape does not go with --prompts-file: random weights read no text")
    if args.new_tokens < 2:
        raise RequestError(f"new_tokens: {args.new_tokens} is below 2: the first comes by prefill")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise RequestError for settings that cannot be meant, before weights are loaded."""
    from orthrus_fast.sampling import SamplingParams

    SamplingParams(args.temperature, args.top_k, args.top_p)
    if args.temperature == 0 and (args.top_k, args.top_p) != (None, None):
        raise RequestError("--top-k and --top-p need a --temperature above 0: greedy ignores them")


def _fail(problem: str) -> int:
    print(f"error: {problem}", file=sys.stderr)
    return 2


def tell(text: str) -> None:
    """Progress, where someone watches."""
    if sys.stderr.isatty():
        print(f"{text} …", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure the parts that the file does not hold yet, and show them all."""
    report = Report(args)
    missing = [name for name in args.parts if name not in report.parts]
    from rich.console import Console

    if sys.stderr.isatty():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("orthrus_fast").setLevel(logging.INFO)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    bench = None
    if missing:
        check_sampling(args)
        bench = build(args)
        report.begin_run(bench.decoder)
    for name in args.parts:
        if bench is not None and name in missing:
            measure(name, bench, report)
        if name in report.parts:
            show(console, name, report.parts[name])
    return 1 if report.content["failed"] else 0


def measure(name: str, bench: Bench, report: Report) -> None:
    """One part, into the report. A fault in one part leaves the others to be measured."""
    tell(name)
    begin = time.perf_counter()
    try:
        with measuring(bench.device):
            result = PARTS[name](bench)
    except OrthrusError:
        raise
    except Exception as error:
        traceback.print_exc()
        report.fail(name, f"{type(error).__name__}: {error}")
    else:
        report.add(name, result, time.perf_counter() - begin)


if __name__ == "__main__":
    sys.exit(main())
