"""The decoder: owns the buffers, runs the cycles, hands out text. One loop for both modes.

ids -> prefill -> cycles of draft, verify, accept, commit -> new ids -> text
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import platform
import secrets
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, cast, overload

import torch
from torch import Tensor

from orthrus_fast import __version__, steps
from orthrus_fast.attention import edges
from orthrus_fast.cache import KVCache
from orthrus_fast.checkpoint import Checkpoint, Progress, load_model, open_checkpoint
from orthrus_fast.config import ModelConfig
from orthrus_fast.errors import (
    BusyError,
    PromptError,
    RequestError,
    TemplateError,
    UnsupportedError,
)
from orthrus_fast.invariance import Invariance, own_products, secure
from orthrus_fast.model import Transformer
from orthrus_fast.runners import EagerRunner, Emitted, check_runner, find_kernels, make_runner
from orthrus_fast.sampling import SamplingParams, is_integer
from orthrus_fast.tokenizer import Detokenizer, Tokenizer

DEFAULT_MAX_SEQ_LEN = 4096  # tokens; less where the model was made for less
_log = logging.getLogger("orthrus_fast")
# Bytes; benchmarks/README.md has what was seen.
GPU_PASSES, GPU_PASSES_SLOT = 350_000_000, 160_000_000

Prompt = str | list[int] | list[dict[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams | None] | None
Prompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[Prompt]


@dataclass(frozen=True)
class Stats:
    """What one request took. Times in seconds, from the start of its prefill."""

    prompt_tokens: int
    cycles: int  # verify passes; a diffusion cycle runs a draft pass before each
    tokens_per_cycle: float | None  # without the first token, which prefill gives; None: no cycle
    accepted: tuple[int, ...]  # draft tokens that each cycle emitted
    time_to_first_token: float
    seconds: float
    tokens_per_second: float | None  # of the tokens after the first, over the time after it


@dataclass(frozen=True)
class Generation:
    """The result of one prompt. ``tokens`` are the new ones, the end-of-sequence id included."""

    text: str
    tokens: list[int]
    finish_reason: str | None  # eos, length, stop, error; None: the stream was left early
    seed: int | None
    stats: Stats | None  # None where nothing came: an error, or a stream left at once
    error: str | None = None
    logprobs: list[float] | None = None  # of the tokens, where SamplingParams asked for them


@dataclass(frozen=True)
class Chunk:
    """What one pass emitted for one prompt.

    ``pieces`` has the text that each token completed, "" while a character is still incomplete; the
    first ``n_accepted`` tokens came from the draft, the rest is the verify (or prefill) pass's own.
    """

    tokens: list[int]
    pieces: list[str]
    n_accepted: int

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Decoder:
    """A loaded checkpoint with its buffers. Made by ``load``; serves one call at a time.

    ``configuration`` is what its promise holds within; ``invariance`` what the check of the verify
    pass found (None without CUDA graphs or a ``compile_mode``); ``startup`` seconds by stage.
    """

    def __init__(
        self,
        name: str,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        max_seq_len: int,
        slots: int,
        runner: str,
        attention: str,
        compile_mode: str = "default",
    ) -> None:
        self.name = name
        self.checkpoint: Checkpoint | None = None  # the files behind it, where ``load`` read them
        self.config = model.config
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.slots = slots
        self._width = self.config.block_size or 1  # a plain Qwen3 has no drafts to make room for
        self._lock = threading.Lock()
        weight = model.embed_tokens.weight
        capacity = steps.cache_rows(max_seq_len, self._width)
        model.set_capacity(capacity)
        cache = KVCache(self.config, slots, capacity, weight.dtype, weight.device)
        state = steps.State.create(slots, capacity, self._width, weight.device)

        def build() -> EagerRunner:
            return make_runner(runner, model, state, cache, attention, compile_mode)

        self.invariance: Invariance | None = None
        if runner == "graph" or compile_mode != "default":
            places = edges(attention, capacity)
            self._runner, self.invariance = secure(model, build, slots, self._width, places)
        else:
            self._runner = build()
            self._runner.prepare(self._width)
        self.startup = dict(self._runner.seconds)
        if self.invariance is not None:
            self.startup["check"] = self.invariance.seconds
        self.configuration: dict[str, Any] = {
            "orthrus_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "hardware": _hardware(weight.device),
            "checkpoint": name,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "runner": runner,
            "compile_mode": None if runner == "eager" else compile_mode,
            "attention": attention,
            "own_products": own_products(model, slots * self._width),
            "slots": slots,
            "block_size": self.config.block_size,
            "max_seq_len": max_seq_len,
        }

    @overload
    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = ...,
        sampling: SamplingParams | None = ...,
        mode: str = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        max_new_tokens: int = ...,
        sampling: Sampling = ...,
        mode: str = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        max_new_tokens: int = 256,
        sampling: Sampling = None,
        mode: str = "diffusion",
    ) -> Generation | list[Generation]:
        """Decode a prompt to its end or ``max_new_tokens``: a Generation, or a list of them.

        ``prompt`` is raw text, chat messages (dicts), ids (ints), or a list of these; ``sampling``
        is for all of a list, or a list with one for each. Raises PromptError, RequestError,
        BusyError; in a list, a bad prompt fails alone, in its result.
        """
        if _is_batch(prompt):
            done = dict(self.as_completed(cast(Prompts, prompt), max_new_tokens, sampling, mode))
            return [done[index] for index in range(len(done))]
        if isinstance(sampling, Sequence):
            raise RequestError("sampling: a list of settings needs a list of prompts")
        stream = self.stream(cast(Prompt, prompt), max_new_tokens, sampling, mode)
        for _ in stream:
            pass
        return stream.result

    def as_completed(
        self,
        prompts: Prompts,
        max_new_tokens: int | Sequence[int] = 256,
        sampling: Sampling = None,
        mode: str = "diffusion",
    ) -> Iterator[tuple[int, Generation]]:
        """As ``generate`` with a list: (index, Generation) of each prompt as it ends.

        ``max_new_tokens``, as ``sampling``, is for all of them or a list with one for each. Bad
        arguments raise here; decoding starts with the first ``next``: BusyError comes there.
        """
        n = len(prompts)
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * n
        each = max_new_tokens
        budgets = list(each) if isinstance(each, Sequence) else [each] * n
        if len(settings) != n or len(budgets) != n:
            raise RequestError(
                f"{n} prompts, but sampling has {len(settings)} and max_new_tokens {len(budgets)}"
            )
        drafting = self._check(budgets, settings, mode)
        failed: list[tuple[int, Generation]] = []
        requests: dict[int, _Request] = {}
        for number, (one, params) in enumerate(zip(prompts, settings, strict=True)):
            try:
                requests[number] = self._request(one, budgets[number], params)
            except (PromptError, TemplateError) as error:
                seed = params.seed if params else None
                failed.append((number, Generation("", [], "error", seed, None, str(error))))
        return self._as_completed(failed, requests, drafting)

    def _as_completed(
        self, failed: list[tuple[int, Generation]], requests: dict[int, _Request], drafting: bool
    ) -> Iterator[tuple[int, Generation]]:
        yield from failed
        waiting = dict(requests)
        for _ in self._run(list(requests.values()), drafting, self._width):
            for number in [n for n, request in waiting.items() if request.finish_reason]:
                yield number, waiting.pop(number).result()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: SamplingParams | None = None,
        mode: str = "diffusion",
    ) -> Stream:
        """As ``generate`` for one prompt, a Chunk as soon as its tokens are committed.

        Bad arguments raise here; decoding starts with the first ``next``: BusyError comes there.
        """
        drafting = self._check([max_new_tokens], [sampling], mode)
        request = self._request(prompt, max_new_tokens, sampling)
        return Stream(request, self._run([request], drafting, self._width))

    def generate_one_row(self, prompt: Prompt, max_new_tokens: int = 256) -> Generation:
        """Plain AR decoding, one row a pass: what a speed-up must be measured against.

        Its products have another shape than verification's, so their rounding may differ: no
        identity is claimed for its text. Raises as ``generate`` does.
        """
        self._check([max_new_tokens], [None], "ar")
        request = self._request(prompt, max_new_tokens, None)
        for _ in self._run([request], drafting=False, width=1):
            pass
        return request.result()

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt: text as it stands, messages through the checkpoint's template."""
        if isinstance(prompt, list) and all(isinstance(part, SupportsIndex) for part in prompt):
            return [part if isinstance(part, bool) else index(part) for part in prompt]  # type: ignore[arg-type]
        is_chat = isinstance(prompt, list) and all(isinstance(part, dict) for part in prompt)
        if not is_chat and not isinstance(prompt, str):
            kinds = {type(part).__name__ for part in prompt} if isinstance(prompt, list) else set()
            kind = type(prompt).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
            raise PromptError(f"prompt: {kind} is not a string, or a list of messages or of ids")
        if self.tokenizer is None:
            raise PromptError(f"{self.name}: has no tokenizer.json; pass ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt)  # type: ignore[arg-type]

    def next_logits(self, prompt: Prompt) -> Tensor:
        """Logits [V] of the token after ``prompt``, by prefill, in the model's dtype."""
        request = self._request(prompt, 1, None)
        with self._exclusive():
            ids = self._runner.ids(request.prompt)
            return self._runner.prefill_logits(ids, 0).clone()  # no inference tensor

    def _check(
        self, budgets: Sequence[int], settings: Sequence[SamplingParams | None], mode: str
    ) -> bool:
        """Whether to draft. Raises RequestError for settings that cannot be served."""
        for budget in budgets:
            if isinstance(budget, bool) or not isinstance(budget, int):
                raise RequestError(f"max_new_tokens: {budget!r} is not an integer")
            if budget < 1:
                raise RequestError(f"max_new_tokens: {budget} is below 1")
        for params in settings:
            if not isinstance(params, (SamplingParams, type(None))):
                raise RequestError(f"sampling: {params!r} is not a SamplingParams")
            if params is not None and params.stop and self.tokenizer is None:
                raise RequestError(f"sampling: stop needs a tokenizer; {self.name} has none")
        if mode not in ("ar", "diffusion"):
            raise RequestError(f"mode: {mode!r} is not 'ar' or 'diffusion'")
        if mode == "diffusion" and self.config.has_draft_view != self._runner.model.has_draft_view:
            raise UnsupportedError(
                "mode 'diffusion': loaded with draft_view=False, without the draft view's weights"
            )
        if mode == "diffusion" and not self.config.has_draft_view:
            raise UnsupportedError(
                f"mode 'diffusion': {self.name} is a plain Qwen3, without the draft "
                "view's weights; use mode 'ar'"
            )
        return mode == "diffusion"

    def _request(
        self, prompt: Prompt, max_new_tokens: int, sampling: SamplingParams | None
    ) -> _Request:
        ids = self.encode(prompt)
        if not ids:
            raise PromptError("prompt: empty; it needs at least one token")
        for token in ids:
            if isinstance(token, bool) or not 0 <= token < self.config.vocab_size:
                raise PromptError(f"prompt: {token!r} is no id below {self.config.vocab_size}")
        if len(ids) + max_new_tokens > self.max_seq_len:
            raise PromptError(
                f"prompt: {len(ids)} tokens + max_new_tokens {max_new_tokens} = "
                f"{len(ids) + max_new_tokens}, over max_seq_len {self.max_seq_len} "
                f"(the model's own limit is {self.config.max_position_embeddings}); shorten the "
                "prompt, lower max_new_tokens or raise max_seq_len"
            )
        detokenizer = None if self.tokenizer is None else self.tokenizer.detokenizer()
        params = (sampling or SamplingParams()).resolved(dict(self.config.sampling_defaults))
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(48))  # whole in any JSON reader
        return _Request(ids, max_new_tokens, params, self.config, detokenizer)

    def _run(
        self, requests: Sequence[_Request], drafting: bool, width: int
    ) -> Generator[Chunk, None, None]:
        """Serve requests in order, as many at once as there are slots, each to its end."""
        with self._exclusive():
            runner = self._runner
            runner.prepare(width)
            if any(request.samples for request in requests):
                runner.prepare(width, sampling=True)
            waiting = deque(requests)
            free = list(range(self.slots))
            active: dict[int, _Request] = {}
            while waiting or active:
                refill = bool(waiting and free)
                if refill and not runner.in_flight:  # cycles in flight know the slot's last owner
                    slot, request = free.pop(0), waiting.popleft()
                    request.start()
                    active[slot] = request
                    first = runner.prefill(request.prompt, slot, request.limit, request.params)
                    emitted: dict[int, Emitted] = {
                        slot: ([first.token], None, first.done, [first.logprob])
                    }
                else:
                    sampling = any(request.samples for request in active.values())
                    while not refill and runner.in_flight <= runner.ahead:
                        runner.launch(drafting, width, sampling)
                    cycle = runner.read()
                    emitted = {slot: cycle.of(slot) for slot in active}
                for slot, what in emitted.items():
                    request = active[slot]
                    chunk = request.extend(*what)
                    if request.finish_reason is not None:
                        del active[slot]
                        free.append(slot)
                        if request.finish_reason == "stop":
                            runner.close(slot)  # the device knows of no strings
                    yield chunk

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time. A slot that a dropped call left open is simply opened anew."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("this decoder is serving another call; finish or close that one first")
        try:
            yield
        finally:
            try:
                self._runner.drain()
            finally:  # a second Ctrl-C must not leave the decoder busy for ever
                self._lock.release()


class Stream:
    """Chunks of one prompt as they are committed; leaving it early keeps the decoder usable."""

    def __init__(self, request: _Request, chunks: Generator[Chunk, None, None]) -> None:
        self._request = request
        self._chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        self._check_not_running()
        return next(self._chunks)

    def close(self) -> None:
        """End the request now and free the decoder."""
        self._check_not_running()
        self._chunks.close()

    def _check_not_running(self) -> None:
        if inspect.getgeneratorstate(self._chunks) == inspect.GEN_RUNNING:
            raise BusyError("this stream is at work in another thread")

    @property
    def result(self) -> Generation:
        """All that came so far; complete once the stream is exhausted."""
        return self._request.result()


class _Request:
    """The host's record of one prompt: what was asked, and what has come of it so far."""

    def __init__(
        self,
        prompt: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        config: ModelConfig,
        detokenizer: Detokenizer | None,
    ) -> None:
        self.prompt = prompt
        self.limit = len(prompt) + max_new_tokens
        self.params = params
        self.eos_token_ids = config.eos_token_ids
        self.detokenizer = detokenizer
        self.held = ""  # text that may be the beginning of a stop string
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.pieces: list[str] = []
        self.accepted: list[int] = []
        self.finish_reason: str | None = None
        self.started = self.first_at = self.last_at = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    @property
    def samples(self) -> bool:
        """Whether a cycle must do more than take the greatest logit."""
        return self.params.temperature > 0 or self.params.logprobs

    def extend(
        self, tokens: list[int], n_accepted: int | None, done: bool, logprobs: list[float]
    ) -> Chunk:
        """Record what a cycle emitted; ``n_accepted`` is None for prefill, which is no cycle.

        A stop string ends the text before it, and the tokens with the one that completed it.
        """
        self.last_at = time.perf_counter()
        pieces: list[str] = []
        for token in tokens:
            pieces.append(self._piece(self.detokenizer.push(token) if self.detokenizer else ""))
            if self.finish_reason == "stop":
                break
        tokens = tokens[: len(pieces)]
        if done and self.finish_reason is None:
            rest = self.detokenizer.finish() if self.detokenizer else ""
            pieces[-1] += self._piece(rest)
            if self.finish_reason is None:
                pieces[-1] += self.held
                self.finish_reason = "eos" if tokens[-1] in self.eos_token_ids else "length"
        if n_accepted is None:
            self.first_at = self.last_at
        else:
            n_accepted = min(n_accepted, len(tokens))
            self.accepted.append(n_accepted)
        self.tokens += tokens
        self.pieces += pieces
        self.logprobs += logprobs[: len(tokens)]
        return Chunk(tokens, pieces, n_accepted or 0)

    def _piece(self, text: str) -> str:
        """What of the text may be shown now: not a stop string, nor what may become one."""
        self.held += text
        places = [(self.held.find(stop), stop) for stop in self.params.stop]
        ends = [(begin + len(stop), begin) for begin, stop in places if begin >= 0]
        if ends:  # the one that was complete first counts
            self.finish_reason = "stop"
            shown, self.held = self.held[: min(ends)[1]], ""
            return shown
        n_held = max((_overlap(self.held, stop) for stop in self.params.stop), default=0)
        shown = self.held[: len(self.held) - n_held]
        self.held = self.held[len(shown) :]
        return shown

    def result(self) -> Generation:
        return Generation(
            text="".join(self.pieces),
            tokens=list(self.tokens),
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            stats=self._stats() if self.tokens else None,
            logprobs=list(self.logprobs) if self.params.logprobs else None,
        )

    def _stats(self) -> Stats:
        n_after_first = len(self.tokens) - 1
        decoding = self.last_at - self.first_at
        return Stats(
            prompt_tokens=len(self.prompt),
            cycles=len(self.accepted),
            tokens_per_cycle=n_after_first / len(self.accepted) if self.accepted else None,
            accepted=tuple(self.accepted),
            time_to_first_token=self.first_at - self.started,
            seconds=self.last_at - self.started,
            tokens_per_second=n_after_first / decoding if decoding > 0 else None,
        )


def load(
    path_or_repo: str | Path,
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
    progress: Progress | None = None,
) -> Decoder:
    """Load a checkpoint from a directory or the Hugging Face Hub, ready to decode.

    ``device`` defaults to CUDA where there is one; ``dtype`` to float32 on CPU and the config's own
    on CUDA; ``max_seq_len`` (prompt plus new tokens) to 4096 or the model's limit, if that is less;
    ``runner`` to graph on CUDA and eager on CPU; ``block_size`` to the checkpoint's own: a smaller
    one proposes less and computes less, for many slots or a slow processor. ``compile_mode`` is
    torch.compile's, for runner compiled; max-autotune picks tiles by timing, so with it the texts
    of two starts may differ, those of one start's two modes may not. ``draft_view`` False leaves
    that view's weights on disk, for mode ar alone. ``progress`` is called with bytes loaded and
    bytes in all. Raises CheckpointError, RequestError or UnsupportedError; torch's global settings
    and random state stay as they were.
    """
    begin = time.perf_counter()
    torch_device = parse_device(device)
    runner = check_runner(runner, compile_mode, torch_device)
    if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
        raise RequestError(f"slots: {slots!r} is not an integer of at least 1")
    parsed_dtype = parse_dtype(dtype)
    checkpoint = open_checkpoint(path_or_repo, revision=revision)
    config = with_block_size(checkpoint.config, block_size)
    checkpoint = replace(checkpoint, config=config)
    torch_dtype = parsed_dtype or default_dtype(config, torch_device)
    attention, kernels = find_kernels(attention, torch_device, torch_dtype, config.head_dim)
    max_seq_len = check_max_seq_len(max_seq_len, config)
    check_memory(
        memory_needed(config, torch_dtype, torch_device, max_seq_len, slots, draft_view),
        torch_device,
    )
    tokenizer = None
    if (checkpoint.directory / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_directory(checkpoint.directory)
    model = load_model(
        checkpoint,
        kernels,
        device=torch_device,
        dtype=torch_dtype,
        draft_view=draft_view,
        progress=progress,
    )
    loaded = time.perf_counter() - begin
    decoder = Decoder(
        checkpoint.name,
        model,
        tokenizer,
        max_seq_len=max_seq_len,
        slots=slots,
        runner=runner,
        attention=attention,
        compile_mode=compile_mode,
    )
    decoder.checkpoint = checkpoint
    decoder.configuration["commit"] = checkpoint.commit
    decoder.startup = {"load": loaded, **decoder.startup}
    if runner != "eager":
        stages = (f"{stage} {seconds:.1f} s" for stage, seconds in decoder.startup.items())
        _log.info("ready: %s", ", ".join(stages))
    return decoder


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


class Memory(NamedTuple):
    """Bytes that a decoder needs."""

    weights: int
    cache: int
    passes: int  # what a pass's own tensors, its graphs and the libraries' workspaces may take

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
    draft_view: bool = True,
) -> Memory:
    """The arithmetic of ``load``'s memory check."""
    rows = slots * steps.cache_rows(max_seq_len, config.block_size or 1)
    n_weights = config.n_weights if draft_view else config.n_weights - config.n_draft_weights
    return Memory(
        weights=n_weights * dtype.itemsize,
        cache=rows * config.cache_elements_per_token * dtype.itemsize,
        passes=GPU_PASSES + slots * GPU_PASSES_SLOT if device.type == "cuda" else 0,
    )


def check_memory(memory: Memory, device: torch.device) -> None:
    """Refuse what cannot fit before anything is allocated."""
    if device.type == "cuda":
        available, where = torch.cuda.mem_get_info(device)[0], f"free on {device}"
        # What torch keeps for tensors to come is ours to use, too.
        available += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        available, where = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "of memory"
    if sum(memory) > available:
        raise RequestError(
            f"needs {memory}, but there are {available / 1e9:.2f} GB {where}; "
            "lower max_seq_len or slots, take a smaller dtype, or another device"
        )


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


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype that was asked for, None where none was. Raises RequestError."""
    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in known.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in known:
        raise RequestError(f"dtype: {dtype!r} is not one of {', '.join(known)}")
    return known[dtype]


def default_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """float32 on the CPU, elsewhere the config's own."""
    dtype = None if device.type == "cpu" else parse_dtype(config.dtype)
    return dtype or torch.float32


def check_max_seq_len(max_seq_len: int | None, config: ModelConfig) -> int:
    """The capacity to use, prompt plus new tokens. Raises RequestError past the model's limit."""
    limit = config.max_position_embeddings
    if max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, limit)
    if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int):
        raise RequestError(f"max_seq_len: {max_seq_len!r} is not an integer")
    if not 2 <= max_seq_len <= limit:
        raise RequestError(
            f"max_seq_len: {max_seq_len} is not within 2 … {limit} (the model's own limit)"
        )
    return max_seq_len


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _is_batch(prompt: object) -> bool:
    """Whether ``prompt`` is a list of prompts. Raises PromptError for an empty list."""
    if not isinstance(prompt, list):
        return False
    if not prompt:
        raise PromptError("prompt: an empty list")
    return all(isinstance(part, (str, list)) for part in prompt)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
