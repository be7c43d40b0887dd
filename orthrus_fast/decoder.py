"""The decoder: takes prompts, hands them to the engine, hands out text.

text -> ids -> engine -> new ids -> text

Whoever waits for a text of his own does the engine's steps meanwhile, for everybody: so calls from
several threads, and half-read streams, share passes.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, overload

from torch import Tensor

from orthrus_fast.answer import Answer
from orthrus_fast.checkpoint import Checkpoint
from orthrus_fast.encoding import Encoder, Prompt, is_chat
from orthrus_fast.engine.engine import Engine
from orthrus_fast.engine.request import Request, Update
from orthrus_fast.errors import OrthrusError, PromptError, RequestError, UnsupportedError
from orthrus_fast.grammar import Grammar
from orthrus_fast.invariance import Invariance
from orthrus_fast.matching import Grammars, Matcher
from orthrus_fast.options import MAX_NEW_TOKENS, MODES, listed
from orthrus_fast.results import Chunk, Generation
from orthrus_fast.runners import EagerRunner
from orthrus_fast.sampling import SamplingParams, is_integer
from orthrus_fast.tokenizer import Tokenizer

Sampling = SamplingParams | Sequence[SamplingParams | None] | None
Budget = int | Sequence[int | None] | None
Prompts = list[str] | list[list[int]] | list[list[dict[str, Any]]] | list[Prompt]


class Decoder:
    """A loaded checkpoint with its buffers. Made by ``load``; serves any number of calls at a time.

    ``engine`` does the work; ``configuration`` is what its promise holds within; ``invariance``
    what the check of the passes found; ``startup`` seconds by stage; ``checkpoint`` the files
    behind it, None for weights that come from elsewhere.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        tokenizer: Tokenizer | None,
        checkpoint: Checkpoint | None,
        configuration: Mapping[str, Any],
        startup: Mapping[str, float],
        invariance: Invariance,
    ) -> None:
        self.name = name
        self.engine = engine
        self.tokenizer = tokenizer
        self.encoder = Encoder(name, tokenizer)
        self.checkpoint = checkpoint
        self.config = engine.runner.model.config
        self.block_width = self.config.block_size or 1  # a plain Qwen3 drafts nothing
        self.default_mode = "diffusion" if engine.runner.model.has_draft_view else "ar"
        self.slots = engine.runner.cache.n_slots
        self.max_seq_len = engine.limits.max_seq_len
        self.configuration = dict(configuration)
        self.startup = dict(startup)
        self.invariance = invariance
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            of_model = self.config.vocab_size, self.config.eos_token_ids
            self._grammars = Grammars(tokenizer, *of_model)
        self._ids = itertools.count()
        self._inboxes: dict[int, deque[Update]] = {}
        self._turn = threading.Condition()
        self._someone_steps = False

    @property
    def runner(self) -> EagerRunner:
        """What runs the passes; prepared for the widths that ``engine`` chooses from."""
        return self.engine.runner

    @property
    def ar_width(self) -> int:
        """Rows of mode ar's passes: one, or a block's where a row's bits may depend on that."""
        return self.engine.ar_width

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
        need chat messages. Raises PromptError, RequestError, TemplateError, QueueFullError; in a
        list, a bad prompt fails alone, in its result, as an error of the device and logits that
        are not finite always do.
        """
        more = template_arguments
        if _is_batch(prompt):
            many = cast(Prompts, prompt)
            done = dict(self.as_completed(many, max_new_tokens, sampling, mode, **more))
            return [done[index] for index in range(len(done))]
        if isinstance(sampling, Sequence):
            raise RequestError("sampling: a list of settings needs a list of prompts")
        one, budget = cast(Prompt, prompt), cast(int | None, max_new_tokens)
        with self.stream(one, budget, sampling, mode, **more) as stream:
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

        A prompt is encoded when a slot is free for it, or the next one will be. Bad arguments raise
        here; decoding starts with the first ``next``.
        """
        n = len(prompts)
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * n
        each = max_new_tokens
        budgets = list(each) if isinstance(each, Sequence) else [each] * n
        if len(settings) != n or len(budgets) != n:
            raise RequestError(
                f"{n} prompts, but sampling has {len(settings)} and max_new_tokens {len(budgets)}"
            )
        self.encoder.check_arguments(prompts, template_arguments)
        drafting, resolved = self._check(budgets, settings, mode)

        inbox: deque[Update] = deque()  # of all of them

        def submitted() -> Iterator[Stream | Generation]:
            for one, budget, params in zip(prompts, budgets, resolved, strict=True):
                arguments = template_arguments if is_chat(one) else {}
                try:
                    yield self._submit(one, budget, params, drafting, arguments, inbox)
                except OrthrusError as error:
                    yield Generation.failed(error, params.seed)

        return self._completed(submitted(), inbox)

    def _completed(
        self, source: Iterator[Stream | Generation], inbox: deque[Update]
    ) -> Iterator[tuple[int, Generation]]:
        """The results of streams as they end; one more is under way than there are slots."""
        waiting = enumerate(source)
        streams: dict[int, tuple[int, Stream]] = {}  # by request
        try:
            while True:
                while len(streams) <= self.slots:
                    if self.engine.is_full and streams:
                        break
                    self._step_until(lambda: not self.engine.is_full)
                    if (upcoming := next(waiting, None)) is None:
                        break
                    place, one = upcoming
                    if isinstance(one, Generation):
                        yield place, one
                    else:
                        streams[one.id] = place, one
                if not streams:
                    return
                update = self._wait(inbox)
                if update.id not in streams:  # it ended at a stop string
                    continue
                place, stream = streams[update.id]
                stream.take(update)
                if stream.is_over:
                    del streams[update.id]
                    yield place, stream.result
        finally:
            for _, stream in streams.values():
                stream.close()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        mode: str | None = None,
        **template_arguments: Any,
    ) -> Stream:
        """As ``generate`` for one prompt, a Chunk as soon as its tokens are committed.

        Bad arguments raise here, as does a queue that is full. The prompt is queued at once;
        decoding goes on whenever anybody waits for a text of this decoder.
        """
        how = (max_new_tokens, sampling, mode)
        return self.submit(prompt, *how, deque(), **template_arguments)

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        sampling: SamplingParams | None,
        mode: str | None,
        inbox: deque[Update],
        reuse_key: str = "",
        **template_arguments: Any,
    ) -> Stream:
        """As ``stream``, for a caller with an ``inbox`` of his own for many streams.

        He calls ``step``, and ``Stream.take`` with each update that lies in the inbox then. Cached
        rows are shared among requests of one ``reuse_key``.
        """
        drafting, [params] = self._check([max_new_tokens], [sampling], mode)
        how = (max_new_tokens, params, drafting, template_arguments)
        return self._submit(prompt, *how, inbox, reuse_key)

    def encode(self, prompt: Prompt, **template_arguments: Any) -> list[int]:
        """The ids of a prompt: text as it stands, messages through the checkpoint's template."""
        return self.encoder.encode(prompt, **template_arguments)

    def next_logits(self, prompt: Prompt, **template_arguments: Any) -> Tensor:
        """Logits [V] of the token after ``prompt``, by prefill, in the model's dtype."""
        ids, inbox = self.encode(prompt, **template_arguments), deque[Update]()
        request_id = self._queue(ids, 1, SamplingParams(), False, inbox, keep_logits=True)
        try:
            update = self._wait(inbox)
        finally:
            self._drop(request_id)
        if update.logits is None:
            raise OrthrusError(update.error or "decoding failed")
        return update.logits

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

    def _submit(
        self,
        prompt: Prompt,
        max_new_tokens: int | None,
        params: SamplingParams,
        drafting: bool,
        template_arguments: Mapping[str, Any],
        inbox: deque[Update],
        reuse_key: str = "",
    ) -> Stream:
        """Queue a prompt, whose updates go to ``inbox``."""
        ids = self.encode(prompt, **template_arguments)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(MAX_NEW_TOKENS, self.max_seq_len - len(ids)))
        detokenizer = None if self.tokenizer is None else self.tokenizer.detokenizer()
        answer = Answer(len(ids), params, detokenizer)
        matcher = None if params.grammar is None else self._matcher(params.grammar)
        how = (max_new_tokens, params, drafting, inbox, reuse_key)
        request_id = self._queue(ids, *how, matcher=matcher)
        return Stream(self, request_id, answer, inbox)

    def localize(self, request: Request) -> Request:
        """A request of another process, with what cannot be sent: its grammar, compiled here."""
        grammar = request.sampling.grammar
        return request if grammar is None else replace(request, matcher=self._matcher(grammar))

    def compile_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar, in this thread, for requests that come. Raises as ``stream`` does."""
        self._matcher(grammar)

    def _matcher(self, grammar: Grammar) -> Matcher:
        """A grammar compiled, here in the caller's thread. Raises RequestError."""
        if self._grammars is None:
            raise RequestError(f"sampling: a grammar needs a tokenizer; {self.name} has none")
        return self._grammars.matcher(grammar)

    def _queue(
        self,
        ids: list[int],
        max_new_tokens: int,
        params: SamplingParams,
        drafting: bool,
        inbox: deque[Update],
        reuse_key: str = "",
        keep_logits: bool = False,
        matcher: Matcher | None = None,
    ) -> int:
        """The id of a new request, whose updates go to ``inbox`` until it is dropped."""
        request_id = next(self._ids)
        how = (max_new_tokens, params, drafting)
        more: dict[str, Any] = {"keep_logits": keep_logits, "matcher": matcher}
        self._inboxes[request_id] = inbox
        try:
            self.engine.submit(Request(request_id, ids, *how, reuse_key, **more))
        except OrthrusError:
            del self._inboxes[request_id]
            raise
        return request_id

    def _forget(self, request_id: int) -> bool:
        """Hand out no more updates of a request; False where none were any more."""
        return self._inboxes.pop(request_id, None) is not None

    def _drop(self, request_id: int) -> None:
        """End a request that has not ended; takes no lock."""
        if self._forget(request_id):
            self.engine.cancel(request_id)

    def _wait(self, inbox: deque[Update]) -> Update:
        """The next of ``inbox``, which nobody else reads."""
        self._step_until(lambda: bool(inbox))
        return inbox.popleft()

    def _step_until(self, is_so: Callable[[], bool]) -> None:
        """Do as many of the engine's steps as it takes."""
        while not is_so():
            self.step(is_so)

    def step(self, unless: Callable[[], bool] = lambda: False) -> None:
        """One of the engine's steps, except where ``unless`` says that none is needed.

        One thread at a time steps, and hands out what came of it to all; another one waits for
        that instead.
        """
        updates: list[Update] = []
        mine = False
        try:
            with self._turn:
                if unless():
                    return
                if self._someone_steps:
                    self._turn.wait()
                    return
                mine = self._someone_steps = True
            updates = self.engine.step()
        finally:
            if mine:
                self._hand_out(updates)

    def _hand_out(self, updates: list[Update]) -> None:
        with self._turn:
            for update in updates:
                if (inbox := self._inboxes.get(update.id)) is not None:
                    inbox.append(update)
            self._someone_steps = False
            self._turn.notify_all()

    def _close(self, request_id: int, inbox: deque[Update]) -> None:
        """Drop a request, and wake up whoever waits for it."""
        self._drop(request_id)
        with self._turn:
            inbox.append(Update(request_id, []))
            self._turn.notify_all()


class Stream:
    """Chunks of one prompt as they are committed; leaving it early ends its request alone."""

    def __init__(
        self, decoder: Decoder, request_id: int, answer: Answer, inbox: deque[Update]
    ) -> None:
        self.id = request_id
        self._decoder = decoder
        self._answer = answer
        self._inbox = inbox
        self.is_over = False
        self._lock = threading.Lock()  # of whoever takes the next chunk

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        with self._lock:
            if self.is_over:
                raise StopIteration
            update = self._decoder._wait(self._inbox)
            if self.is_over:  # closed meanwhile
                raise StopIteration
            return self.take(update)

    def take(self, update: Update) -> Chunk:
        """Record an update of this request: what it adds to the text."""
        chunk = self._answer.extend(update)
        if update.finish_reason is not None:
            self._decoder._forget(self.id)
        elif self._answer.finish_reason is not None:  # a stop string, of which the engine is told
            self._decoder._drop(self.id)
        self.is_over = self._answer.finish_reason is not None
        return chunk

    def close(self) -> None:
        """End the request now."""
        if not self.is_over:
            self.is_over = True
            self._decoder._close(self.id, self._inbox)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._decoder._drop(self.id)

    @property
    def result(self) -> Generation:
        """All that came so far; complete once the stream is exhausted."""
        return self._answer.result()


def _is_batch(prompt: object) -> bool:
    """Whether ``prompt`` is a list of prompts. Raises PromptError for an empty list."""
    if not isinstance(prompt, list):
        return False
    if not prompt:
        raise PromptError("prompt: an empty list")
    return all(isinstance(part, (str, list)) for part in prompt)
