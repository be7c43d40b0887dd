"""What is benchmarked: a decoder, and what the command line says to do with it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orthrus_fast.bench.common import EMBEDDED, PREFILL_LENGTHS
from orthrus_fast.bench.kept import Kept
from orthrus_fast.bench.replay import share_of_right_drafts
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.config import ModelConfig
from orthrus_fast.errors import RequestError

if TYPE_CHECKING:
    import torch

    from orthrus_fast.decoder import Decoder
    from orthrus_fast.runners import EagerRunner

CONTEXTS = (128, 1024, 4096)  # committed tokens


@dataclass(frozen=True)
class Bench:
    """A decoder and what to do with it."""

    args: argparse.Namespace
    decoder: Decoder
    contexts: tuple[int, ...]
    kept: Kept = field(default_factory=Kept)  # of parts that an earlier start left unfinished

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


def build(args: argparse.Namespace, kept: Kept | None = None) -> Bench:
    """Load or draw the weights and build the decoder. Raises OrthrusError."""
    import torch

    from orthrus_fast.decoder import parse_device

    device = parse_device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    decoder = build_shape(args, device) if args.shape else load_checkpoint(args, device)
    contexts = choose_contexts(args, decoder.max_seq_len)
    bench = Bench(args, decoder, contexts, kept or Kept())
    if bench.drafting:
        share_of_right_drafts(args.accept, bench.width)  # refused here, before anything is timed
    return bench


def check_without_weights(args: argparse.Namespace) -> None:
    """Raise OrthrusError, as ``build`` does, for what can be seen before there are weights."""
    from orthrus_fast.checkpoint import open_checkpoint
    from orthrus_fast.decoder import parse_device, parse_dtype, with_block_size

    parse_device(args.device)
    parse_dtype(args.dtype)
    if args.shape:
        config = shape_config(args.shape)
    else:
        config = open_checkpoint(args.checkpoint or EMBEDDED).config
    config = with_block_size(config, args.block_size)
    choose_contexts(args, choose_max_seq_len(args, config))
    if config.block_size is not None:
        share_of_right_drafts(args.accept, config.block_size)


def choose_contexts(args: argparse.Namespace, max_seq_len: int) -> tuple[int, ...]:
    """The contexts asked for, or the usual ones that fit. Raises RequestError."""
    for context in args.contexts or ():
        if context >= max_seq_len:
            raise RequestError(f"contexts: {context} is not below max_seq_len {max_seq_len}")
    return tuple(context for context in args.contexts or CONTEXTS if context < max_seq_len)


def with_room(contexts: Sequence[int], n_tokens: int, max_seq_len: int) -> list[int]:
    """The contexts after which ``n_tokens`` more fit."""
    return [context for context in contexts if context + n_tokens <= max_seq_len]


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
    runner = check_runner(args.runner, args.compile_mode, device)
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
        compile_mode=args.compile_mode,
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
        compile_mode=args.compile_mode,
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
