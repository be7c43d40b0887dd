"""The decoder: takes prompts, runs the cycles, hands out text. One loop for both modes.

ids -> prefill -> cycles of draft, verify, accept, commit -> new ids -> text
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any, SupportsIndex, cast, overload

from torch import Tensor

from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.errors import (
    BusyError,
    PromptError,
    RequestError,
    TemplateError,
    UnsupportedError,
)
from orthrus_fast.invariance import Invariance
from orthrus_fast.options import MODES, listed
from orthrus_fast.request import Request
from orthrus_fast.results import Chunk, Generation
from orthrus_fast.runners import EagerRunner, SlotOutput
from orthrus_fast.sampling import SamplingParams, is_integer
from orthrus_fast.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams | None] | None
Prompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[Prompt]


class Decoder:
    """A loaded checkpoint with its buffers. Made by ``load``; serves one call at a time.

    ``configuration`` is what its promise holds within; ``invariance`` what the check of the verify
    pass found (None without CUDA graphs or a ``compile_mode``); ``startup`` seconds by stage;
    ``checkpoint`` the files behind it, None for weights that come from elsewhere.
    """

    def __init__(
        self,
        name: str,
        runner: EagerRunner,
        tokenizer: Tokenizer | None,
        checkpoint: Checkpoint | None,
        max_seq_len: int,
        configuration: Mapping[str, Any],
        startup: Mapping[str, float],
        invariance: Invariance | None,
    ) -> None:
        self.name = name
        self.runner = runner  # prepared for blocks of ``block_width``
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.config = runner.model.config
        self.block_width = self.config.block_size or 1  # a plain Qwen3 drafts nothing
        self.slots = runner.cache.n_slots
        self.max_seq_len = max_seq_len
        self.configuration = dict(configuration)
        self.startup = dict(startup)
        self.invariance = invariance
        self._lock = threading.Lock()

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
        self, prompt: Prompts, max_new_tokens: int = ..., sampling: Sampling = ..., mode: str = ...
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
        requests: dict[int, Request] = {}
        for number, (one, params) in enumerate(zip(prompts, settings, strict=True)):
            try:
                requests[number] = self._request(one, budgets[number], params)
            except (PromptError, TemplateError) as error:
                seed = params.seed if params else None
                failed.append((number, Generation.failed(error, seed)))
        return self._as_completed(failed, requests, drafting)

    def _as_completed(
        self, failed: list[tuple[int, Generation]], requests: dict[int, Request], drafting: bool
    ) -> Iterator[tuple[int, Generation]]:
        yield from failed
        waiting = dict(requests)
        for _ in self._run(list(requests.values()), drafting, self.block_width):
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
        return Stream(request, self._run([request], drafting, self.block_width))

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
            ids = self.runner.ids(request.prompt)
            return self.runner.prefill_logits(ids, 0).clone()  # no inference tensor

    def _check(
        self, budgets: Sequence[int], settings: Sequence[SamplingParams | None], mode: str
    ) -> bool:
        """Whether to draft. Raises RequestError for settings that cannot be served."""
        for budget in budgets:
            if not is_integer(budget):
                raise RequestError(f"max_new_tokens: {budget!r} is not an integer")
            if budget < 1:
                raise RequestError(f"max_new_tokens: {budget} is below 1")
        for params in settings:
            if not isinstance(params, (SamplingParams, type(None))):
                raise RequestError(f"sampling: {params!r} is not a SamplingParams")
            if params is not None and params.stop and self.tokenizer is None:
                raise RequestError(f"sampling: stop needs a tokenizer; {self.name} has none")
        if mode not in MODES:
            raise RequestError(f"mode: {mode!r} is not one of {listed(MODES)}")
        if mode == "diffusion" and not self.runner.model.has_draft_view:
            why = "loaded with draft_view=False" if self.config.has_draft_view else "a plain Qwen3"
            raise UnsupportedError(
                f"mode 'diffusion': {self.name} is {why}, without the draft view's weights; "
                "use mode 'ar'"
            )
        return mode == "diffusion"

    def _request(
        self, prompt: Prompt, max_new_tokens: int, sampling: SamplingParams | None
    ) -> Request:
        ids = self.encode(prompt)
        if not ids:
            raise PromptError("prompt: empty; it needs at least one token")
        for token in ids:
            if isinstance(token, bool) or not 0 <= token < self.config.vocab_size:
                raise PromptError(f"prompt: {token!r} is no id below {self.config.vocab_size}")
        if len(ids) + max_new_tokens > self.max_seq_len:
            limit = self.config.max_position_embeddings
            raise PromptError(
                f"prompt: {len(ids)} tokens + max_new_tokens {max_new_tokens} = "
                f"{len(ids) + max_new_tokens}, over max_seq_len {self.max_seq_len} "
                f"(the model's own limit is {limit}); shorten the prompt or lower max_new_tokens"
                + (", or raise max_seq_len" if self.max_seq_len < limit else "")
            )
        detokenizer = None if self.tokenizer is None else self.tokenizer.detokenizer()
        params = (sampling or SamplingParams()).resolved(dict(self.config.sampling_defaults))
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(48))  # whole in any JSON reader
        return Request(ids, max_new_tokens, params, self.config.eos_token_ids, detokenizer)

    def _run(
        self, requests: Sequence[Request], drafting: bool, width: int
    ) -> Generator[Chunk, None, None]:
        """Serve requests in order, as many at once as there are slots, each to its end."""
        with self._exclusive():
            runner = self.runner
            runner.prepare(width)
            if any(request.samples for request in requests):
                runner.prepare(width, sampling=True)
            waiting = deque(requests)
            free = list(range(self.slots))
            active: dict[int, Request] = {}
            emitted: dict[int, SlotOutput]
            while waiting or active:
                refill = bool(waiting and free)
                if refill and not runner.in_flight:  # cycles in flight know the slot's last owner
                    slot, request = free.pop(0), waiting.popleft()
                    request.start()
                    active[slot] = request
                    emitted = {
                        slot: runner.prefill(
                            request.prompt, slot, request.max_length, request.params
                        )
                    }
                else:
                    sampling = any(request.samples for request in active.values())
                    while not refill and runner.in_flight <= runner.lookahead:
                        runner.launch(drafting, width, sampling)
                    outputs = runner.read()
                    emitted = {slot: outputs[slot] for slot in active}
                for slot, output in emitted.items():
                    request = active[slot]
                    chunk = request.extend(output)
                    if request.finish_reason is not None:
                        del active[slot]
                        free.append(slot)
                        if request.finish_reason == "stop":
                            runner.close(slot)  # the device knows of no strings
                    yield chunk

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time. A slot that a dropped call left active is simply started anew."""
        if not self._lock.acquire(blocking=False):
            raise BusyError("this decoder is serving another call; finish or close that one first")
        try:
            yield
        finally:
            try:
                self.runner.drain()
            finally:  # a second Ctrl-C must not leave the decoder busy for ever
                self._lock.release()


class Stream:
    """Chunks of one prompt as they are committed; leaving it early keeps the decoder usable."""

    def __init__(self, request: Request, chunks: Generator[Chunk, None, None]) -> None:
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
            raise BusyError("this stream is running in another thread")

    @property
    def result(self) -> Generation:
        """All that came so far; complete once the stream is exhausted."""
        return self._request.result()


def _is_batch(prompt: object) -> bool:
    """Whether ``prompt`` is a list of prompts. Raises PromptError for an empty list."""
    if not isinstance(prompt, list):
        return False
    if not prompt:
        raise PromptError("prompt: an empty list")
    return all(isinstance(part, (str, list)) for part in prompt)
