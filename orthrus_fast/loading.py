"""From a checkpoint to a decoder: device, dtype, memory, kernels, weights, runner, in this order.

``build_decoder`` is the one place where a ``Decoder`` is put together.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orthrus_fast import __version__, steps
from orthrus_fast.attention import Backend, find_backend
from orthrus_fast.cache import KVCache
from orthrus_fast.checkpoint import (
    Checkpoint,
    Progress,
    count_bytes,
    load_model,
    open_checkpoint,
    weight_bytes,
)
from orthrus_fast.config import ModelConfig
from orthrus_fast.decoder import Decoder
from orthrus_fast.engine.engine import Engine
from orthrus_fast.engine.request import Limits
from orthrus_fast.engine.width import Times, WidthPolicy
from orthrus_fast.errors import RequestError, UnsupportedError, is_out_of_memory, shown
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.invariance import Invariance, check
from orthrus_fast.kernels.formats import of_one
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.plain import ROW_MULTIPLE
from orthrus_fast.kernels.select import select_kernels, why_no_triton
from orthrus_fast.kernels.tiles import chip_name, tables_of
from orthrus_fast.launch import local_rank
from orthrus_fast.model import Transformer
from orthrus_fast.options import (
    DRAFT_WEIGHTS,
    DTYPES,
    ONE_ROW,
    ONE_WIDTH,
    RANKS,
    WEIGHTS,
    dtype_name,
    listed,
)
from orthrus_fast.quantization import CHECKPOINT, Formats, Quantizer
from orthrus_fast.runners import EagerRunner, check_runner, make_runner
from orthrus_fast.sampling import is_integer
from orthrus_fast.tensor_parallel import Ranks, start
from orthrus_fast.tokenizer import Tokenizer

DEFAULT_MAX_SEQ_LEN = 4096  # tokens; less where the model was made for less
GPU_GRAPHS = 350_000_000  # bytes of graphs, of kernels and of the libraries' workspaces
MakeModel = Callable[[ModelConfig, Kernels, torch.device, torch.dtype, Quantizer], Transformer]
_log = logging.getLogger("orthrus_fast")


@dataclass(frozen=True)
class Options:
    """How a checkpoint is to be decoded; None leaves the choice to ``load``, which says how."""

    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    max_seq_len: int | None = None
    slots: int = 1
    runner: str = "auto"
    attention: str = "auto"
    compile_mode: str = "default"
    block_size: int | None = None
    draft_view: bool = True
    weights: str = "checkpoint"
    draft_weights: str = "auto"
    drafting: str | int = "auto"
    prefix_reuse: bool = True
    tensor_parallel: int = 1


def load(
    path_or_repo: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    max_seq_len: int | None = None,
    slots: int = 1,
    runner: str = "auto",
    attention: str = "auto",
    compile_mode: str = "default",
    revision: str | None = None,
    *,
    block_size: int | None = None,
    draft_view: bool = True,
    weights: str = "checkpoint",
    draft_weights: str = "auto",
    drafting: str | int = "auto",
    prefix_reuse: bool = True,
    tensor_parallel: int = 1,
    ignore_config_fields: Collection[str] = (),
    progress: Progress | None = None,
) -> Decoder:
    """Load a checkpoint from a directory or the Hugging Face Hub, ready to decode.

    Without ``path_or_repo`` it is the small one that comes with the package. ``device`` defaults to
    CUDA where there is one; ``dtype`` to float32 on CPU and the config's own on CUDA;
    ``max_seq_len`` (prompt plus new tokens) to 4096 or the model's limit, if that is less;
    ``runner`` to graph on CUDA and eager on CPU; ``block_size`` to the checkpoint's own: a smaller
    one proposes less and computes less, for many slots or a slow processor. ``compile_mode`` is
    torch.compile's; max-autotune picks tiles by timing, so the texts of two starts may differ.
    ``draft_view`` False leaves that view's weights on disk, for mode ar alone. ``draft_weights``:
    the drafter's in fp8, int8 or int4, which change no text; auto takes the fastest that fits on a
    GPU, the checkpoint's on a CPU. ``weights`` fp8 or int4 quantizes both views: another model, in
    less memory. ``drafting`` auto has mode diffusion draft when it pays, by blocks of the width
    that pays most; a number of rows is a width always to draft at. ``prefix_reuse`` lets a prompt
    start from cache rows that others have left. ``tensor_parallel`` 2 or 4 has as many GPUs hold a
    share each, with the same text: processes are started, or those of torchrun are taken, of which
    only the first returns. ``ignore_config_fields`` names unknown fields of config.json that, as
    the caller knows, change nothing. ``progress`` is called with bytes loaded and bytes in all.
    Raises CheckpointError, RequestError or UnsupportedError, and RankError where one of several
    processes ends; torch's settings and random state stay as they were. Processes forked after this
    may hang: spawn them.
    """
    of_passes = (runner, attention, compile_mode, block_size, draft_view, weights, draft_weights)
    rest = (drafting, prefix_reuse, tensor_parallel)
    options = Options(device, dtype, max_seq_len, slots, *of_passes, *rest)
    where = embedded_checkpoint() if path_or_repo is None else path_or_repo
    return open_decoder(where, options, revision, tuple(ignore_config_fields), progress)


def open_decoder(
    where: str | Path,
    options: Options,
    revision: str | None,
    ignored: tuple[str, ...],
    progress: Progress | None,
    together: Callable[[], object] | None = None,
) -> Decoder:
    """See ``load``; ``together``: what has the processes of other ranks come here, and go on."""
    check_options(options)
    checkpoint = open_checkpoint(where, revision=revision, ignore_config_fields=ignored)

    def make_model(config: ModelConfig, *how: Any) -> Transformer:
        of = replace(checkpoint, config=config)
        return load_model(of, *how, draft_view=options.draft_view, progress=progress)

    config, n_ranks = checkpoint.config, options.tensor_parallel
    build = partial(build_decoder, checkpoint.name, config, make_model, options, checkpoint)
    same = {"path_or_repo": where, "revision": revision, "ignore_config_fields": ignored}
    call = together or partial(load, **asdict(options) | same)
    return build_on_ranks(build, config, n_ranks, call, together is not None)


def build_on_ranks(
    build: Callable[..., Decoder],
    config: ModelConfig,
    n_ranks: int,
    call: Callable[[], object] | None,
    together: bool = False,
) -> Decoder:
    """The decoder that ``build`` makes with its ``ranks``, if there are to be several.

    Where none have been started, new processes make the ``call``, to come here, too. Each returns
    if all go on ``together``, with the same requests; else the first alone.
    """
    if n_ranks == 1:
        return build()
    config.share(0, n_ranks)  # which may raise
    ranks = start(n_ranks, call)
    if ranks.rank > 0 and torch.cuda.is_available():  # of this process, which serves the first
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    with ranks.ending_together():
        decoder = build(ranks=ranks)
    if ranks.rank == 0:
        weakref.finalize(decoder, ranks.close)
    elif not together:
        ranks.localize = decoder.localize
        ranks.serve(decoder.engine.step)
    return decoder


def check_options(options: Options) -> None:
    """Raise RequestError or UnsupportedError for what no checkpoint could be decoded with."""
    device = parse_device(options.device)
    runner = check_runner(options.runner, options.compile_mode, device)
    if not is_integer(options.tensor_parallel) or options.tensor_parallel not in RANKS:
        raise RequestError(
            f"tensor_parallel: {options.tensor_parallel!r} is not one of "
            + ", ".join(map(str, RANKS))
        )
    if options.tensor_parallel > 1:
        check_ranks(options, device, runner)
    if not is_integer(options.slots) or options.slots < 1:
        raise RequestError(f"slots: {options.slots!r} is not an integer of at least 1")
    if options.dtype is not None:
        parse_dtype(options.dtype)
    if options.weights not in WEIGHTS:
        raise RequestError(f"weights: {options.weights!r} is not one of {listed(WEIGHTS)}")
    if options.draft_weights not in ("auto", *DRAFT_WEIGHTS):
        raise RequestError(
            f"draft_weights: {options.draft_weights!r} is not one of "
            f"{listed(DRAFT_WEIGHTS, 'auto')}"
        )
    if options.weights != "checkpoint" and options.draft_weights not in ("auto", options.weights):
        raise RequestError(
            f"draft_weights {options.draft_weights!r}: with weights {options.weights!r} both views "
            "have the same; leave draft_weights out"
        )
    if options.draft_weights != "auto" and not options.draft_view:
        raise RequestError(
            f"draft_weights: {options.draft_weights!r}, but without the draft view nothing drafts"
        )


def check_ranks(options: Options, device: torch.device, runner: str) -> None:
    """Raise RequestError or UnsupportedError for what no ranks could share a model with."""
    n_ranks = options.tensor_parallel
    if options.device is not None and torch.device(options.device).index is not None:
        raise RequestError(
            f"device: {str(options.device)!r} is one, but tensor_parallel {n_ranks} takes "
            f"{n_ranks}; use {device.type!r}"
        )
    if runner == "compiled":
        raise UnsupportedError("tensor_parallel: not with runner 'compiled'; use 'auto'")
    if device.type == "cuda" and torch.cuda.device_count() < n_ranks:
        n = torch.cuda.device_count()
        raise RequestError(f"tensor_parallel: {n_ranks} needs as many GPUs, and there are {n}")


class Settings(NamedTuple):
    """What some options come to for one model on this machine."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    max_seq_len: int
    slots: int
    runner: str
    backend: Backend
    compile_mode: str
    formats: Formats
    drafting: str | int
    prefix_reuse: bool
    draft_view: bool

    @property
    def widths(self) -> list[int]:
        """Of the blocks that are drafted: one, or those that ``drafting`` auto chooses from.

        A CPU multiplies whole tiles of rows. A graph is captured for each width; a runner without
        graphs on a GPU would have to compile for each.
        """
        block = self.config.block_size
        if block is None or not self.draft_view:
            return []
        if self.drafting != "auto":
            return [int(self.drafting)]
        if self.device.type == "cpu":
            return sorted({min(ROW_MULTIPLE, block), block})
        return captured_widths(block) if self.runner == "graph" else [block]

    @property
    def block(self) -> int:
        """Rows of the widest block; a plain Qwen3 has no drafts to make room for."""
        return max(self.widths, default=self.config.block_size or 1)

    def described(self) -> dict[str, Any]:
        """As they stand in a decoder's configuration."""
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "runner": self.runner,
            "compile_mode": None if self.runner == "eager" else self.compile_mode,
            "attention": self.backend.name,
            "tiles": self._tables(),
            "slots": self.slots,
            "block_size": self.config.block_size,
            "weights": self.formats.verifier,
            "draft_weights": self.formats.drafter,
            "drafting": self.drafting,
            "prefix_reuse": self.prefix_reuse,
            "max_seq_len": self.max_seq_len,
            "tensor_parallel": self.config.n_ranks,
        }

    def _tables(self) -> list[str] | None:
        """The tables that products' tiles come from; None where a library multiplies."""
        if why_no_triton(self.device, self.dtype, self.config.head_dim):
            return None
        return tables_of(chip_name(self.device))


def resolve(options: Options, config: ModelConfig, rank: int = 0) -> Settings:
    """The options with every default filled in. Raises RequestError, UnsupportedError."""
    check_options(options)
    device = parse_device(options.device)
    config = with_block_size(config, options.block_size)
    if options.tensor_parallel > 1:
        config = config.share(rank, options.tensor_parallel)
        device = torch.device("cuda", local_rank()) if device.type == "cuda" else device
    default = "float32" if device.type == "cpu" else config.dtype
    dtype = parse_dtype(default if options.dtype is None else options.dtype)
    max_seq_len = check_max_seq_len(options.max_seq_len, config)
    runner = check_runner(options.runner, options.compile_mode, device)
    backend = find_backend(options.attention, device, dtype, config.head_dim)
    check_drafting(options.drafting, config)
    rest = (max_seq_len, options.slots, runner, backend, options.compile_mode)
    how = (CHECKPOINT, options.drafting, options.prefix_reuse, options.draft_view)
    plain = Settings(config, device, dtype, *rest, *how)
    return plain._replace(formats=choose_formats(options, plain))


def choose_formats(options: Options, settings: Settings) -> Formats:
    """The formats of both views' weights: as asked for; or for the drafter the fastest that fits.

    Raises RequestError for a drafter's where there is none.
    """
    config, device, dtype, max_seq_len, slots, *_ = settings
    if not config.has_draft_view and options.draft_weights != "auto":
        raise RequestError(
            f"draft_weights: {options.draft_weights!r}, but a plain Qwen3 has nothing that drafts"
        )
    no_kernels = why_no_triton(device, dtype, config.head_dim)
    if options.weights != "checkpoint" or not (config.has_draft_view and options.draft_view):
        return Formats(options.weights, options.weights)
    if options.draft_weights != "auto":
        return Formats("checkpoint", options.draft_weights)
    if no_kernels or dtype != torch.bfloat16:  # of which alone weights are unpacked in a few steps
        return CHECKPOINT
    formats = Formats("checkpoint", "int4")  # the fastest
    memory = memory_needed(config, dtype, device, max_seq_len, slots, formats)
    return formats if sum(memory) <= available_memory(device) else CHECKPOINT


def build_decoder(
    name: str,
    config: ModelConfig,
    make_model: MakeModel,
    options: Options,
    checkpoint: Checkpoint | None = None,
    *,
    weights_present: bool = False,
    ranks: Ranks | None = None,
) -> Decoder:
    """A decoder of the model that ``make_model`` returns, once everything else has been checked.

    ``weights_present``: the weights are in memory already, so that only the rest has to fit.
    ``ranks`` share the model; but for the first this process then serves it, and does not return.
    Raises RequestError or UnsupportedError, and what ``make_model`` raises.
    """
    settings = resolve(options, config) if ranks is None else agree(ranks, options, config)
    config, device, dtype, max_seq_len, slots = settings[:5]
    formats, where = settings.formats, (config, dtype, device, max_seq_len, slots)
    memory = memory_needed(*where, formats, options.draft_view)
    memory = memory._replace(weights=0) if weights_present else memory
    check_memory(memory, device)
    tokenizer = None if checkpoint is None else find_tokenizer(checkpoint)
    begin = time.perf_counter()
    quantizer = Quantizer(formats, of_one if ranks is None else ranks.all_max)
    kernels = select_kernels(settings.backend.attend, device, dtype, config.head_dim)
    with _room_for(memory, device):
        if ranks is not None:
            kernels = ranks.kernels(kernels, config, dtype, device, *rows_of(settings))
        model = make_model(config, kernels, device, dtype, quantizer)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        startup = {"weights": time.perf_counter() - begin - quantizer.seconds}
        startup |= {"quantize": quantizer.seconds} if quantizer.seconds else {}
        if not weights_present:
            say_weights(name, model, quantizer)
        runner, promise, invariance = prepare_runner(model, settings, ranks)
    startup |= runner.seconds | {"check": invariance.seconds}
    if settings.runner != "eager":
        stages = (f"{stage} {seconds:.1f} s" for stage, seconds in startup.items())
        _log.info("ready: %s", ", ".join(stages))
    commit = checkpoint.commit if checkpoint else None
    configuration = {
        **(describe_machine(device) | {"checkpoint": name, "commit": commit}),
        **settings.described(),
        **{"weight_bytes": weight_bytes(model)._asdict(), "promise": promise},
    }
    engine = make_engine(runner, settings, promise == ONE_ROW, ranks)
    return Decoder(name, engine, tokenizer, checkpoint, configuration, startup, invariance)


def find_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's, if it has one."""
    there = (checkpoint.directory / "tokenizer.json").exists()
    return Tokenizer.from_directory(checkpoint.directory) if there else None


def agree(ranks: Ranks, options: Options, config: ModelConfig) -> Settings:
    """A rank's settings, but for its share those of all. Raises RequestError if theirs differ."""
    settings = resolve(options, config, ranks.rank)
    own = {**asdict(options), **describe_machine(settings.device), **asdict(settings.config.whole)}
    own |= {"device": settings.device.type, "capacity": settings.max_seq_len}
    for rank, other in enumerate(ranks.share(own)):
        for name, value in own.items():
            if other.get(name) != value:
                raise RequestError(
                    f"tensor_parallel: {name} is {shown(str(value))} on rank {ranks.rank}, but "
                    f"{shown(str(other.get(name)))} on rank {rank}"
                )
    return settings._replace(formats=ranks.share(settings.formats)[0])


def rows_of(settings: Settings) -> tuple[int, int]:
    """The rows of the widest pass, and of the widest that decodes."""
    block = settings.config.block_size or 1
    capacity = steps.cache_rows(settings.max_seq_len, block)
    rows = settings.slots * max(block, settings.block)
    return max(rows, min(steps.PREFILL_CHUNK, capacity)), rows


def make_engine(
    runner: EagerRunner, settings: Settings, one_row: bool, ranks: Ranks | None = None
) -> Engine:
    """The engine around a prepared runner; without ``one_row`` every cycle has the same width."""
    limits = Limits(settings.max_seq_len, settings.config.max_position_embeddings)
    guesses = {1: 1.0, **dict.fromkeys(settings.widths, 2.0)}  # passes
    times = Times(runner.cycle_seconds or guesses, seen=bool(runner.cycle_seconds))
    block = settings.block
    fixed = None if one_row and settings.drafting == "auto" else block
    policy = WidthPolicy(settings.widths, times, fixed)
    ar_width = 1 if one_row else block
    return Engine(runner, limits, policy, ar_width, one_row, settings.prefix_reuse, ranks)


def say_weights(name: str, model: Transformer, quantizer: Quantizer) -> None:
    """Log what the weights are and take; warn where they are not the checkpoint's."""
    formats, sizes = quantizer.formats, weight_bytes(model)
    if formats.any or model.embed_tokens.weight.is_cuda:
        _log.info(
            "weights: verifier %s, %.2f GB; drafter %s, %.2f GB of its own; quantized in %.1f s",
            *(formats.verifier, sizes.verifier / 1e9, formats.drafter, sizes.drafter / 1e9),
            quantizer.seconds,
        )
    if not all(linear.sums_as_one for linear in model.verifier.linears()):
        _log.warning(
            "tensor_parallel %d: a product has fewer partial sums on one GPU, or others; texts may "
            "differ from those of one",
            model.config.n_ranks,
        )
    if formats.verifier != "checkpoint":
        _log.warning(
            "weights %s: this is another model than %s, and its texts may differ",
            *(formats.verifier, name),
        )


def prepare_runner(
    model: Transformer, settings: Settings, ranks: Ranks | None = None
) -> tuple[EagerRunner, str, Invariance]:
    """A runner with its cache and state, ready for what it promises; and what the check found.

    Blocks and single rows where a row's bits are a function of its tokens alone; else blocks.
    """
    config, device, dtype, max_seq_len, slots, name, backend, compile_mode = settings[:8]
    block_size, block = config.block_size or 1, settings.block
    capacity = steps.cache_rows(max_seq_len, block_size)
    model.set_capacity(capacity)
    cache = KVCache(config, slots, capacity, dtype, device)
    state = steps.State.create(slots, capacity, block_size, device)
    runner = make_runner(name, model, state, cache, backend, compile_mode)
    boundaries = backend.tile_boundaries(capacity)
    obstacle = _why_one_width(settings)
    captured = settings.widths if name == "graph" else []
    widths = [block] if obstacle else sorted({1, *captured, block})
    runner.compile_kernels(widths)
    for width in reversed(widths):
        runner.prepare(width)
    if not obstacle:
        runner.prepare_prefill()
        found = on_all(ranks, check(runner, widths, boundaries))
        if found.holds:
            runner.measure(widths)
            if ranks is not None:
                times = (runner.cycle_seconds, runner.chunk_seconds)
                runner.cycle_seconds, runner.chunk_seconds = ranks.share(times)[0]
            level = logging.INFO if name == "graph" else logging.DEBUG  # there starting takes time
            _log.log(level, "row invariance holds: %s", found)
            return runner, ONE_ROW, found
        obstacle = f"a row's bits depend on more than its tokens here ({found})"
    runner.prefill_widths = ()  # so that a prompt's length alone says how it is cut
    found = on_all(ranks, check(runner, [block], boundaries, prefill=False))
    texts = "are the same; they may change with block_size, slots and max_seq_len"
    if not found.holds:
        texts = f"may differ even so ({found})"
    _log.warning(
        "%s: both modes decode by blocks of %d rows, of which ar uses one. Their texts %s",
        *(obstacle, block, texts),
    )
    return runner, ONE_WIDTH, found


def on_all(ranks: Ranks | None, found: Invariance) -> Invariance:
    """What the check found, which holds only if it does on every rank."""
    if ranks is None or all(ranks.share(found.holds)):
        return found
    return replace(found, holds=False)


def _why_one_width(settings: Settings) -> str | None:
    """What keeps a row's bits from being a function of its tokens alone; None: nothing known."""
    device, dtype, backend = settings.device, settings.dtype, settings.backend
    no_triton = why_no_triton(device, dtype, settings.config.head_dim)
    if device.type == "cuda" and no_triton:
        return f"cuBLAS sums as the number of rows suits it, and the kernel for that {no_triton}"
    if not backend.row_invariant:
        return f"attention '{backend.name}' sums as the number of rows suits it"
    return None


def with_block_size(config: ModelConfig, block_size: int | None) -> ModelConfig:
    """The same with narrower blocks; None changes nothing. Raises RequestError."""
    if block_size is None:
        return config
    if config.block_size is None:
        raise RequestError(f"block_size: {block_size!r}, but a plain Qwen3 drafts no blocks")
    if not is_integer(block_size) or not 2 <= block_size <= config.block_size:
        raise RequestError(
            f"block_size: {block_size!r} is not an integer from 2 to {config.block_size}, "
            "the checkpoint's own"
        )
    return replace(config, block_size=block_size)


def captured_widths(block_size: int) -> list[int]:
    """Rows of the blocks that a GPU chooses from: powers of two from 4 on, and the whole block."""
    powers = [2**n for n in range(2, block_size.bit_length())]
    return sorted({*(width for width in powers if width < block_size), block_size})


def check_drafting(drafting: str | int, config: ModelConfig) -> None:
    """Raise RequestError for what is neither "auto" nor a width that blocks can have."""
    if drafting == "auto":
        return
    block = config.block_size
    if block is None:
        raise RequestError(f"drafting: {drafting!r}, but a plain Qwen3 drafts nothing")
    if not is_integer(drafting) or not 2 <= drafting <= block:
        raise RequestError(f"drafting: {drafting!r} is not 'auto' or an integer from 2 to {block}")


class Memory(NamedTuple):
    """Bytes that a decoder needs."""

    weights: int
    cache: int
    passes: int  # what passes' own tensors, their graphs and the libraries' workspaces may take

    def __str__(self) -> str:
        weights, cache, passes = (size / 1e9 for size in self)
        text = f"weights {weights:.2f} GB + KV cache {cache:.2f} GB"
        text += f" + passes {passes:.2f} GB" if passes else ""
        return f"{text} = {sum(self) / 1e9:.2f} GB"


def memory_needed(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
    slots: int,
    formats: Formats = CHECKPOINT,
    draft_view: bool = True,
) -> Memory:
    """The arithmetic of the memory check."""
    rows = slots * steps.cache_rows(max_seq_len, config.block_size or 1)
    return Memory(
        weights=sum(count_bytes(config, dtype, formats, draft_view)),
        cache=rows * config.cache_elements_per_token * dtype.itemsize,
        passes=_passes(config, dtype, max_seq_len, slots) if device.type == "cuda" else 0,
    )


def _passes(config: ModelConfig, dtype: torch.dtype, max_seq_len: int, slots: int) -> int:
    """Bytes of passes' tensors on a GPU: what graphs keep, and the widest pass's own."""
    block = config.block_size or 1
    rows, capacity = slots * block, steps.cache_rows(max_seq_len, block)
    # Each width has a verify graph that keeps its logits, one for sampling, one under a grammar;
    # sampling a draft has as many at work, and a copy; masks take two bytes and leave another.
    n_logits = 3 * slots * sum({1, *captured_widths(block)}) + 3 * rows
    logits = (n_logits * dtype.itemsize + 2 * rows) * config.vocab_size
    # A partial result of attention for every 512 keys and for some shorter splits, in float32.
    n_splits = capacity // 512 + 10
    splits = rows * config.n_heads * n_splits * (config.head_dim + 2) * torch.float32.itemsize
    widest = max(rows, min(steps.PREFILL_CHUNK, capacity))
    # The residual stream and its norm before and after; q and what attention returns; SwiGLU's.
    query = config.n_heads * config.head_dim
    row = (4 * config.hidden_size + 2 * query + config.intermediate_size) * dtype.itemsize
    # Four partial sums at most, in float32.
    qkv = query + 2 * config.n_kv_heads * config.head_dim
    row += 4 * max(qkv, config.hidden_size) * torch.float32.itemsize
    outputs = sum(steps.PREFILL_WIDTHS) * config.hidden_size * dtype.itemsize  # prefill's graphs'
    own = (widest + rows) * row + outputs  # the graphs of scores have a pool of their own
    return GPU_GRAPHS + logits + splits + own + _sent(config, dtype, widest, rows)


def _sent(config: ModelConfig, dtype: torch.dtype, n_rows: int, n_decoded: int) -> int:
    """Bytes of what ranks send each other, and of the logits that have come (``symmetric.Areas``).

    Of two products all ranks' partial sums, four at most, in float32; and of the head its logits.
    """
    if config.n_ranks == 1:
        return 0
    logits = 2 * n_decoded * config.vocab_size * dtype.itemsize
    return 2 * 4 * n_rows * config.hidden_size * torch.float32.itemsize + logits


def check_memory(memory: Memory, device: torch.device) -> None:
    """Refuse what cannot fit before anything is allocated. Raises RequestError."""
    available = available_memory(device)
    where = f"free on {device}" if device.type == "cuda" else "of memory"
    if sum(memory) > available:
        raise _no_room(memory, f"there are {available / 1e9:.2f} GB {where}")


def available_memory(device: torch.device) -> float:
    """Bytes that a decoder may take: what a GPU has free, or all of the host's memory."""
    if device.type == "cuda":
        free, reserved = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        # What torch keeps for tensors to come can be used, too.
        return free + reserved - torch.cuda.memory_allocated(device)
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf  # Windows: it grants no more than there is, which ``_room_for`` reports


def _no_room(memory: Memory, why: str) -> RequestError:
    return RequestError(
        f"needs {memory}, but {why}; "
        "lower max_seq_len or slots, take a smaller dtype, a smaller checkpoint, or another device"
    )


@contextmanager
def _room_for(memory: Memory, device: torch.device) -> Iterator[None]:
    """Turn any allocation within that fails into one line of what ``memory`` was needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise  # a fault of ours
        raise _no_room(memory, f"{device} has no room for it") from None


def parse_device(device: str | torch.device | None) -> torch.device:
    """The device to use; None: CUDA where there is one. Raises RequestError, UnsupportedError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise RequestError(
            f"device: {device!r} is not a device such as 'cpu' or 'cuda:0'"
        ) from None
    if parsed.type == "cpu" and not parsed.index:
        return torch.device("cpu")
    if parsed.type != "cuda":
        raise UnsupportedError(f"device {device!r} is not supported; use 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"device {device!r}: no CUDA device is available here; use 'cpu'")
    if parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise UnsupportedError(
            f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0"
        )
    return parsed if parsed.index is not None else torch.device("cuda", torch.cuda.current_device())


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name. Raises RequestError."""
    name = dtype_name(dtype)
    if name is None:
        raise RequestError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    parsed: torch.dtype = getattr(torch, name)
    return parsed


def check_max_seq_len(max_seq_len: int | None, config: ModelConfig) -> int:
    """The capacity to use, prompt plus new tokens. Raises RequestError past the model's limit."""
    limit = config.max_position_embeddings
    if max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, limit)
    if not is_integer(max_seq_len):
        raise RequestError(f"max_seq_len: {max_seq_len!r} is not an integer")
    if not 2 <= max_seq_len <= limit:
        raise RequestError(
            f"max_seq_len: {max_seq_len} is not within 2 … {limit} (the model's own limit)"
        )
    return max_seq_len


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, as they stand in a decoder's configuration."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "orthrus_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": hardware,
    }
