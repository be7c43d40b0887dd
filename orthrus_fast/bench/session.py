"""A benchmark session: a decoder, its prompts, and what the command line says to do with them."""

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from orthrus_fast.bench.baseline import make_baseline
from orthrus_fast.bench.common import CONTEXTS, LONGEST_PROMPT, PREFILL_LENGTHS, Result
from orthrus_fast.bench.decoding import Replay, share_of_right_drafts
from orthrus_fast.bench.flags import number_and_source, prompts_path
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.checkpoint import open_checkpoint
from orthrus_fast.config import ModelConfig
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.loading import Options, build_decoder, build_on_ranks, open_decoder, resolve
from orthrus_fast.model import Transformer
from orthrus_fast.prompts import PromptLine, read_prompts
from orthrus_fast.runners import EagerRunner
from orthrus_fast.sampling import SamplingParams
from orthrus_fast.tensor_parallel import Ranks

NO_SIBLING = {"skipped": "it makes decoders of its own, on one GPU alone"}


class Session:
    """``contexts``: committed tokens at which passes are timed; ``ranks``: of a shared model."""

    def __init__(
        self, args: argparse.Namespace, options: Options, decoder: Decoder, contexts: Sequence[int]
    ) -> None:
        self.args, self.options, self.decoder, self.contexts = args, options, decoder, contexts
        self.runner, self.width = decoder.runner, decoder.block_width
        self.device, self.drafting = self.runner.device, self.runner.model.has_draft_view
        peers = decoder.engine.peers
        self.ranks = peers if isinstance(peers, Ranks) else None
        limit = decoder.max_seq_len - args.new_tokens
        self.contexts_with_room = [n for n in contexts if n <= limit]  # for a whole decode
        self.sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}

    @cached_property
    def baseline(self) -> EagerRunner:
        """What AR is measured against: one row a pass without the promise; not on ranks."""
        return make_baseline(self.decoder)

    @property
    def acceptance(self) -> Result:
        """What a part says about its replayed drafts: ``accept`` is the share that is right."""
        asked, source = number_and_source(self.args.accept)
        share = share_of_right_drafts(asked, self.decoder.block_width)
        of = {"label": "replayed acceptance", "accept": share}
        return {**of, "accept_asked": asked, "accept_source": source}

    def seeded(self, n: int, **settings: Any) -> list[SamplingParams]:
        """Return the settings of ``n`` sequences, each with a seed of its own."""
        seeds = [(self.args.seed + index) % 2**64 for index in range(n)]
        return [SamplingParams(**settings, seed=seed) for seed in seeds]

    def replay(self, salt: int = 0) -> Replay:
        """Return a replay at this acceptance; another ``salt`` draws other drafts."""
        seed = self.args.seed + 1 + salt
        return Replay(self.runner, self.width, self.acceptance["accept"], seed)


def build_session(args: argparse.Namespace, call: Callable[[], object] | None = None) -> Session:
    """Check the arguments, load or draw the weights, build the decoder. Raises OrthrusError."""
    SamplingParams(args.temperature, args.top_k, args.top_p)
    if args.temperature == 0 and (args.top_k, args.top_p) != (None, None):
        raise RequestError("--top-k and --top-p need a --temperature above 0: greedy ignores them")
    path = args.checkpoint or ("" if args.shape else embedded_checkpoint())
    config = shape_config(args.shape) if args.shape else open_checkpoint(path).config
    names = ["device", "dtype", "slots", "runner", "attention", "compile_mode", "block_size"]
    names += ["weights", "draft_weights", "tensor_parallel"]
    asked = {name: getattr(args, name) for name in names}
    options = Options(max_seq_len=choose_max_seq_len(args, config), **asked, prefix_reuse=False)
    settings = resolve(options, config)
    contexts = choose_contexts(args, settings.max_seq_len)
    if (block := settings.config.block_size) is not None:
        share_of_right_drafts(number_and_source(args.accept)[0], block)
        if not all(2 <= width <= block for width in args.widths or ()):
            raise RequestError(f"widths: {args.widths} are not all within 2 … {block}")
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(settings.device)
    if not args.shape:
        decoder = open_decoder(path, options, None, (), None, call)
        return Session(args, options, decoder, contexts)
    name = f"random weights of shape {args.shape}, seed {args.seed}"
    build = partial(build_decoder, name, config, partial(random_model, seed=args.seed), options)
    decoder = build_on_ranks(build, config, args.tensor_parallel, call, together=True)
    return Session(args, options, decoder, contexts)


def sibling(session: Session, options: Options) -> Decoder:
    """Return another decoder over the same weights. Raises RequestError."""

    def copy_model(config: ModelConfig, kernels: Kernels, *_: object) -> Transformer:
        # Without its weights: tables of positions and the choice of products are a decoder's own.
        model = copy.copy(session.runner.model)
        model.kernels = kernels
        return model

    of = session.decoder
    return build_decoder(of.name, of.config, copy_model, options, weights_present=True)


def choose_contexts(args: argparse.Namespace, max_seq_len: int) -> list[int]:
    """Return the contexts asked for, or those of CONTEXTS that fit. Raises RequestError."""
    for context in args.contexts or ():
        if context >= max_seq_len:
            raise RequestError(f"contexts: {context} is not below max_seq_len {max_seq_len}")
    return [context for context in args.contexts or CONTEXTS if context < max_seq_len]


def choose_max_seq_len(args: argparse.Namespace, config: ModelConfig) -> int:
    """Return what was asked for, or room for every part as far as the model's limit allows."""
    longest = max(*(args.contexts or CONTEXTS), *PREFILL_LENGTHS)
    room = min(longest + args.new_tokens, config.max_position_embeddings)
    length: int = args.max_seq_len or room
    if args.new_tokens >= length:
        n = args.new_tokens
        raise RequestError(f"new_tokens: {n} leaves no room for a prompt in max_seq_len {length}")
    return length


def release_memory() -> None:
    """Free what dropped decoders held; their graphs and steps refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def choose_prompts(session: Session) -> list[list[int]]:
    """Return the ids of ``--sequences`` prompts, spread over a file or random, of many lengths."""
    n, lines = session.args.sequences, chosen_lines(session)
    if lines:
        return [session.decoder.encode(line.prompt) for line in lines]
    longest = min(LONGEST_PROMPT, session.decoder.max_seq_len - session.args.new_tokens)
    generator = torch.Generator().manual_seed(session.args.seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return random_prompts(session, lengths)


def chosen_lines(session: Session) -> list[PromptLine]:
    """Return ``--sequences`` lines of the file of prompts, spread over it; [] without a file."""
    path = prompts_path(session.args)
    lines = read_prompts(path) if path is not None else []
    n = min(session.args.sequences, len(lines))
    return [lines[i * len(lines) // n] for i in range(n)]


def random_prompts(session: Session, lengths: Sequence[int], salt: int = 0) -> list[list[int]]:
    """Draw ids, the same for the same seed and ``salt``."""
    generator = torch.Generator().manual_seed(session.args.seed * 1_000_003 + salt)
    size = session.decoder.config.vocab_size
    return [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]
