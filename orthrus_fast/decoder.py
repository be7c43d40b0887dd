"""The decoder: takes prompts, runs the cycles, hands out text. One loop for both modes.

ids -> prefill -> cycles of draft, verify, accept, commit -> new ids -> text
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any, SupportsIndex, cast, overload

from torch import Tensor

from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.errors import BusyError, OrthrusError, PromptError, RequestError, UnsupportedError
from orthrus_fast.invariance import Invariance
from orthrus_fast.options import MAX_NEW_TOKENS, MODES, ONE_ROW, listed
from orthrus_fast.request import Request
from orthrus_fast.results import Chunk, Generation
from orthrus_fast.runners import EagerRunner, SlotOutput
from orthrus_fast.sampling import SamplingParams, is_integer
from orthrus_fast.tokenizer import Tokenizer

Prompt = str | list[int] | list[dict[str, Any]]
Sampling = SamplingParams | Sequence[SamplingParams | None] | None
Budget = int | Sequence[int | None] | None
Prompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[Prompt]


class Decoder:
    """A loaded checkpoint with its buffers. Made by ``load``; serves one call at a time.

    ``configuration`` is what its promise holds within; ``invariance`` what the check of the passes
    found; ``startup`` seconds by stage; ``checkpoint`` the files behind it, None for weights that
    come from elsewhere. Mode ar runs passes of ``ar_width`` rows: one, or as many as a block's
    where a row's bits may depend on that.
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
        invariance: Invariance,
    ) -> None:
        self.name = name
        self.runner = runner  # prepared for blocks of ``block_width`` and ``ar_width``
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        self.config = runner.model.config
        self.block_width = self.config.block_size or 1  # a plain Qwen3 drafts nothing
        one_row = configuration["promise"] == ONE_ROW
        self.ar_width = 1 if one_row else self.block_width
        self.default_mode = "diffusion" if runner.model.has_draft_view else "ar"
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
        max_new_tokens: int | None = ...,
        sampling: SamplingParams | None = ...,
        mode: str | None = ...,
        **template_arguments: Any,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Prompts,
        max_new_tokens: Budget = ...,
        sampling: Sampling = ...,
        mode: str | None = ...,
        **template_arguments: Any,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: Prompt | Prompts,
        max_new_tokens: Budget = None,
        sampling: Sampling = None,
        mode: str | None = None,
        **template_arguments: Any,
    ) -> Generation | list[Generation]:
        """Decode a prompt to its end or ``max_new_tokens``: a Generation, or a list of them.

        ``prompt`` is raw text, chat messages (dicts), ids (ints), or a list of these.
        ``max_new_tokens`` None is 256, or what fits; ``sampling`` None is greedy. Either is for all
        of a list, or a list with one for each. ``mode`` None drafts where the model can.
        ``template_arguments`` (``enable_thinking``, ``tools``, …) go to the chat template; they
        need chat messages. Raises PromptError, RequestError, TemplateError, BusyError; in a list, a
        bad prompt fails alone, in its result, as logits that are not finite always do.
        """
        more = template_arguments
        if _is_batch(prompt):
            many = cast(Prompts, prompt)
            done = dict(self.as_completed(many, max_new_tokens, sampling, mode, **more))
            return [done[index] for index in range(len(done))]
        if isinstance(sampling, Sequence):
            raise RequestError("sampling: a list of settings needs a list of prompts")
        one, budget = cast(Prompt, prompt), cast(int | None, max_new_tokens)
        stream = self.stream(one, budget, sampling, mode, **more)
        for _ in stream:
            pass
        return stream.result

    def as_completed(
        self,
        prompts: Prompts,
        max_new_tokens: Budget = None,
        sampling: Sampling = None,
        mode: str | None = None,
        **template_arguments: Any,
    ) -> Iterator[tuple[int, Generation]]:
        """As ``generate`` with a list: (index, Generation) of each prompt as it ends.

        A prompt is encoded once a slot is free for it. Bad arguments raise here; decoding starts
        with the first ``next``: BusyError comes there.
        """
        n = len(prompts)
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * n
        each = max_new_tokens
        budgets = list(each) if isinstance(each, Sequence) else [each] * n
        if len(settings) != n or len(budgets) != n:
            raise RequestError(
                f"{n} prompts, but sampling has {len(settings)} and max_new_tokens {len(budgets)}"
            )
        self._check_template_arguments(prompts, template_arguments)
        drafting, resolved = self._check(budgets, settings, mode)

        def encoded() -> Iterator[Request]:
            for i, (one, budget, params) in enumerate(zip(prompts, budgets, resolved, strict=True)):
                arguments = template_arguments if _is_chat(one) else {}
                try:
                    request = self._request(one, budget, params, arguments, i)
                except OrthrusError as error:
                    request = Request([], 0, params, index=i)
                    request.fail(str(error))
                yield request

        samples = any(params.samples for params in resolved)
        run = self._run(encoded(), drafting, self._width(drafting), samples)
        return ((request.index, request.result()) for request, _ in run if request.finish_reason)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        mode: str | None = None,
        **template_arguments: Any,
    ) -> Stream:
        """As ``generate`` for one prompt, a Chunk as soon as its tokens are committed.

        Bad arguments raise here; decoding starts with the first ``next``: BusyError comes there.
        """
        drafting, [params] = self._check([max_new_tokens], [sampling], mode)
        request = self._request(prompt, max_new_tokens, params, template_arguments)
        width = self._width(drafting)
        return Stream(request, self._run([request], drafting, width, params.samples))

    def encode(self, prompt: Prompt, **template_arguments: Any) -> list[int]:
        """The ids of a prompt: text as it stands, messages through the checkpoint's template."""
        self._check_template_arguments([prompt], template_arguments)
        if isinstance(prompt, list) and all(isinstance(part, SupportsIndex) for part in prompt):
            return [part if isinstance(part, bool) else index(part) for part in prompt]  # type: ignore[arg-type]
        if not _is_chat(prompt) and not isinstance(prompt, str):
            kinds = {type(part).__name__ for part in prompt} if isinstance(prompt, list) else set()
            kind = type(prompt).__name__ + (f" of {', '.join(sorted(kinds))}" if kinds else "")
            raise PromptError(f"prompt: {kind} is not a string, or a list of messages or of ids")
        if self.tokenizer is None:
            raise PromptError(f"{self.name}: has no tokenizer.json; pass ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode_chat(prompt, **template_arguments)  # type: ignore[arg-type]

    def next_logits(self, prompt: Prompt, **template_arguments: Any) -> Tensor:
        """Logits [V] of the token after ``prompt``, by prefill, in the model's dtype."""
        request = self._request(prompt, 1, SamplingParams(), template_arguments)
        with self._exclusive():
            ids = self.runner.ids(request.prompt)
            return self.runner.prefill_logits(ids, 0).clone()  # no inference tensor

    def _check_template_arguments(
        self, prompts: Sequence[object], arguments: Mapping[str, Any]
    ) -> None:
        """Raises RequestError for arguments that none of the prompts would heed."""
        if arguments and not any(map(_is_chat, prompts)):
            names = ", ".join(arguments)
            raise RequestError(f"{names}: for a chat template; the prompt is no list of messages")
        if self.tokenizer is None or not self.tokenizer.has_chat_template:
            return  # which encoding says
        for name, value in arguments.items():
            if value is not None and not self.tokenizer.chat_template.mentions(name):
                raise RequestError(f"{name}: the chat template of {self.name} has no such variable")

    def _check(
        self,
        budgets: Sequence[int | None],
        settings: Sequence[SamplingParams | None],
        mode: str | None,
    ) -> tuple[bool, list[SamplingParams]]:
        """Whether to draft, and the settings resolved. Raises RequestError."""
        for budget in [budget for budget in budgets if budget is not None]:
            if not is_integer(budget):
                raise RequestError(f"max_new_tokens: {budget!r} is not an integer")
            if budget < 1:
                raise RequestError(f"max_new_tokens: {budget} is below 1")
        resolved = [self._resolved(params) for params in settings]
        mode = self.default_mode if mode is None else mode
        if mode not in MODES:
            raise RequestError(f"mode: {mode!r} is not one of {listed(MODES)}")
        if mode == "diffusion" and not self.runner.model.has_draft_view:
            why = "loaded with draft_view=False" if self.config.has_draft_view else "a plain Qwen3"
            raise UnsupportedError(
                f"mode 'diffusion': {self.name} is {why}, without the draft view's weights; "
                "use mode 'ar'"
            )
        return mode == "diffusion", resolved

    def _resolved(self, params: SamplingParams | None) -> SamplingParams:
        """The settings with all that they leave open. Raises RequestError."""
        if not isinstance(params, (SamplingParams, type(None))):
            raise RequestError(f"sampling: {params!r} is not a SamplingParams")
        if params is not None and params.stop and self.tokenizer is None:
            raise RequestError(f"sampling: stop needs a tokenizer; {self.name} has none")
        params = (params or SamplingParams()).resolved(dict(self.config.sampling_defaults))
        if params.temperature > 0 and params.seed is None:
            params = replace(params, seed=secrets.randbits(48))  # whole in any JSON reader
        return params

    def _request(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        params: SamplingParams,
        template_arguments: Mapping[str, Any],
        index: int = 0,
    ) -> Request:
        ids = self.encode(prompt, **template_arguments)
        if not ids:
            raise PromptError("prompt: empty; it needs at least one token")
        for token in ids:
            if isinstance(token, bool) or not 0 <= token < self.config.vocab_size:
                raise PromptError(f"prompt: {token!r} is no id below {self.config.vocab_size}")
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, self.max_seq_len - len(ids)))
        if len(ids) + max_new_tokens > self.max_seq_len:
            limit = self.config.max_position_embeddings
            raise PromptError(
                f"prompt: {len(ids)} tokens + max_new_tokens {max_new_tokens} = "
                f"{len(ids) + max_new_tokens}, over max_seq_len {self.max_seq_len} "
                f"(the model's own limit is {limit}); shorten the prompt or lower max_new_tokens"
                + (", or raise max_seq_len" if self.max_seq_len < limit else "")
            )
        detokenizer = None if self.tokenizer is None else self.tokenizer.detokenizer()
        dtype = str(self.runner.model.embed_tokens.weight.dtype).removeprefix("torch.")
        eos = self.config.eos_token_ids
        return Request(ids, max_new_tokens, params, eos, detokenizer, dtype, index)

    def _width(self, drafting: bool) -> int:
        return self.block_width if drafting else self.ar_width

    def _run(
        self, requests: Iterable[Request], drafting: bool, width: int, samples: bool
    ) -> Generator[tuple[Request, Chunk], None, None]:
        """Serve requests in order, as many at once as there are slots, each to its end.

        The next one is asked for once a slot is free; one that has failed by then takes none.
        Verify passes have ``width`` rows. ``samples``: whether any request may sample.
        """
        with self._exclusive():
            runner, source = self.runner, iter(requests)
            runner.prepare(width)
            if samples:
                runner.prepare(width, sampling=True)
            free = list(range(self.slots))
            active: dict[int, Request] = {}
            upcoming: Request | None = None
            emitted: dict[int, SlotOutput]
            while True:
                if upcoming is None and free:
                    upcoming = next(source, None)
                if upcoming is None and not active:
                    return
                if upcoming is not None and upcoming.finish_reason is not None:
                    yield upcoming, Chunk([], [], 0)
                    upcoming = None
                    continue
                if upcoming is not None and not runner.in_flight:
                    # A cycle in flight would know the slot's last owner.
                    slot, request, upcoming = free.pop(0), upcoming, None
                    request.start()
                    active[slot] = request
                    wanted = (request.prompt, slot, request.max_length, request.params)
                    emitted = {slot: runner.prefill(*wanted, drafting)}
                else:
                    sampling = any(request.params.samples for request in active.values())
                    while upcoming is None and runner.in_flight <= runner.lookahead:
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
                    yield request, chunk

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

    def __init__(
        self, request: Request, chunks: Generator[tuple[Request, Chunk], None, None]
    ) -> None:
        self._request = request
        self._chunks = chunks

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        self._check_not_running()
        return next(self._chunks)[1]

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


def _is_chat(prompt: object) -> bool:
    """Whether ``prompt`` is a list of messages."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) for m in prompt)


def _is_batch(prompt: object) -> bool:
    """Whether ``prompt`` is a list of prompts. Raises PromptError for an empty list."""
    if not isinstance(prompt, list):
        return False
    if not prompt:
        raise PromptError("prompt: an empty list")
    return all(isinstance(part, (str, list)) for part in prompt)
