"""The application: OpenAI's endpoints, the page, health and metrics, over one decoder.

Which may be in another process: what is asked of it goes through ``jobs``.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from orthrus_fast.decoder import Decoder
from orthrus_fast.encoding import Encoder
from orthrus_fast.engine.request import Limits
from orthrus_fast.errors import OrthrusError, RequestError
from orthrus_fast.options import MODES
from orthrus_fast.server.access import Access, Guard, error_object, policy_of
from orthrus_fast.server.answers import END, Answer, ChatChoice, Choice, TextChoice, event
from orthrus_fast.server.jobs import Job, Jobs, News, Task
from orthrus_fast.server.metrics import Metrics
from orthrus_fast.server.parsing import THOUGHT
from orthrus_fast.server.protocol import (
    DEFAULT_COMPLETION,
    ChatBody,
    CompletionBody,
    GenerationBody,
    HTTPError,
    check_fingerprint,
    check_model,
    parse,
    seed_of,
    status_of,
)
from orthrus_fast.server.worker import Worker
from orthrus_fast.tokenizer import Tokenizer

MAX_BODY = 2**23  # bytes of a request
DISCARDED = 8 * MAX_BODY  # bytes of one that is too long, read so that its client hears why
BODY_SECONDS, SEND_SECONDS = 30, 60  # that a client may take to send its body, or read a piece
RETRY_SECONDS = 2  # after which a client whose request the queue had no room for may try again


@dataclass(frozen=True)
class ServerSettings:
    """``model`` is the name that clients know; ``fingerprint`` what the texts depend on, in short.

    ``mode`` is that of requests that name none; at most ``max_waiting`` texts wait for a slot.
    """

    model: str
    fingerprint: str
    access: Access = Access()
    mode: str | None = None
    max_waiting: int = 256


@dataclass(frozen=True)
class Facts:
    """What an application knows of its decoder, besides its tokenizer."""

    name: str
    slots: int
    limits: Limits
    modes: tuple[str, ...]

    @staticmethod
    def of(decoder: Decoder) -> Facts:
        """Those of a decoder."""
        modes = tuple(MODES) if decoder.runner.model.has_draft_view else ("ar",)
        return Facts(decoder.name, decoder.slots, decoder.engine.limits, modes)


def create_app(decoder: Decoder, settings: ServerSettings) -> Guard:
    """The ASGI application over a decoder in this process.

    Raises RequestError for one that has no tokenizer.
    """
    service = Service(Facts.of(decoder), tokenizer_of(decoder), settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker, thread = start_worker(decoder, service.jobs)
        yield
        worker.stop()
        thread.join()

    return Guard(service.app(lifespan), settings.access, service.answered)


def tokenizer_of(decoder: Decoder) -> Tokenizer:
    """The decoder's tokenizer. Raises RequestError where it has none."""
    if decoder.tokenizer is None:
        raise RequestError(f"{decoder.name} has no tokenizer.json, which a server needs")
    return decoder.tokenizer


def start_worker(decoder: Decoder, jobs: Jobs) -> tuple[Worker, threading.Thread]:
    """Have a thread decode the jobs of the event loop that this runs in."""
    loop = asyncio.get_running_loop()

    def tell(news: list[News]) -> None:
        loop.call_soon_threadsafe(jobs.hear, news)

    worker = Worker(decoder, tell)
    jobs.order = worker.order
    thread = threading.Thread(target=worker.run, name="engine", daemon=True)
    thread.start()
    return worker, thread


def bare_app(lifespan: Any = None) -> FastAPI:
    """An application that has no endpoints yet, and tells clients of errors as OpenAI does."""
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (OrthrusError, HTTPException, ClientDisconnect, Exception):
        app.add_exception_handler(kind, refused)
    return app


async def refused(request: Request, error: Exception) -> Response:
    """What a client hears of an error."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        content = error_object(error.status_code, f"{request.url.path}: {error.detail}")
        return JSONResponse(content, error.status_code, error.headers)
    status = status_of(error)
    if not isinstance(error, OrthrusError):
        return JSONResponse(error_object(status, "the server failed; its log says how"), status)
    field, code = getattr(error, "field", None), getattr(error, "code", None)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    return JSONResponse(error_object(status, str(error), field, code), status, headers)


class Service:
    """The endpoints."""

    def __init__(self, facts: Facts, tokenizer: Tokenizer, settings: ServerSettings) -> None:
        self.metrics = Metrics()
        self.jobs = Jobs(facts.slots, settings.max_waiting, self.metrics.saw)
        self.metrics.show(lambda: self.jobs.n_running, lambda: self.jobs.n_waiting)
        self._facts, self._settings, self._tokenizer = facts, settings, tokenizer
        self._encode = Encoder(facts.name, tokenizer).encode
        self._page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        self._policy = policy_of(self._page)
        self._started = int(time.time())
        self._paths: set[str] = set()

    def app(self, lifespan: Any = None) -> FastAPI:
        """The application, before which somebody has to check who asks."""
        app = bare_app(lifespan)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/models/{name:path}", self.model)
        app.add_api_route("/health", self.health)
        app.add_api_route("/metrics", self.exposition)
        app.add_api_route("/", self.page)
        self._paths = {getattr(route, "path", "") for route in app.routes}
        return app

    def answered(self, path: str, status: int) -> None:
        """Count a response."""
        self.metrics.answered(path if path in self._paths else "other", status)

    async def chat(self, request: Request) -> Response:
        """The answer to a chat."""
        body = parse(ChatBody, await read_body(request))
        self._check(body)
        messages = [message.for_template() for message in body.messages]
        ids = await asyncio.to_thread(self._encode, messages, **body.template_arguments)
        in_thought = self._tokenizer.decode(ids[-8:], skip_special=False).rstrip().endswith(THOUGHT)
        how = (self._tokenizer, body.logprobs, in_thought, bool(body.offered))
        choices = [ChatChoice(index, *how) for index in range(body.n)]
        tasks = self._tasks(body, [ids], body.budget, body.logprobs)
        return await self._answer(request, body, tasks, "chat.completion", choices)

    async def completions(self, request: Request) -> Response:
        """The continuations of raw prompts."""
        body = parse(CompletionBody, await read_body(request))
        self._check(body)
        prompts = await asyncio.to_thread(lambda: list(map(self._encode, body.prompts)))
        budget, with_logprobs = body.max_tokens or DEFAULT_COMPLETION, body.logprobs is not None
        tasks = self._tasks(body, prompts, budget, with_logprobs)
        how = (self._tokenizer, with_logprobs)
        choices = [TextChoice(index, *how) for index in range(len(tasks))]
        return await self._answer(request, body, tasks, "text_completion", choices)

    def _check(self, body: GenerationBody) -> None:
        """Raises HTTPError for what is not served here."""
        check_model(body.model, self._settings.model)
        check_fingerprint(body.system_fingerprint, self._settings.fingerprint)

    def _tasks(
        self, body: GenerationBody, prompts: list[list[int]], budget: int | None, logprobs: bool
    ) -> list[Task]:
        """The choices of each prompt, a seed each. Raises PromptError for a prompt too long."""
        for ids in prompts:  # here, since the worker, which checks it again, has better to do
            self._facts.limits.check_length(len(ids), budget or 1)
        seed = secrets.randbits(48) if body.seed is None else body.seed
        settings = [body.sampling(seed_of(seed, choice), logprobs) for choice in range(body.n)]
        mode = body.mode or self._settings.mode
        return [Task(ids, budget, sampling, mode) for ids in prompts for sampling in settings]

    async def _answer(
        self,
        request: Request,
        body: GenerationBody,
        tasks: list[Task],
        kind: str,
        choices: list[ChatChoice] | list[TextChoice],
    ) -> Response:
        """Decode, and answer in one piece or in many."""
        model, fingerprint = self._settings.model, self._settings.fingerprint
        n_prompt = sum(len(task.ids) for task in tasks[:: body.n])
        answer = Answer(kind, model, fingerprint, choices, n_prompt)
        job = await self.jobs.submit(tasks, request.scope["orthrus_key"])
        if body.stream:
            return Sending(events(job, answer, body.with_usage), job.close, EVENTS)
        try:
            await unless_gone(request, collect(job, answer.choices))
        finally:
            job.close()
        return JSONResponse(answer.whole())

    async def models(self) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        """The model of this name."""
        check_model(name, self._settings.model)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        kind = {"object": "model", "created": self._started, "owned_by": "orthrus-fast"}
        facts = self._facts
        more = {"max_model_len": facts.limits.max_seq_len, "modes": facts.modes}
        return {"id": self._settings.model, **kind, **more}

    async def health(self) -> Response:
        """Whether texts are decoded."""
        if self.jobs.failure is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": self.jobs.failure}, 503)

    async def exposition(self) -> Response:
        """What was counted."""
        return Response(self.metrics.exposition(), media_type="text/plain; version=0.0.4")

    async def page(self) -> Response:
        """The page to chat on."""
        return HTMLResponse(self._page, headers={"Content-Security-Policy": self._policy})


async def read_body(request: Request) -> bytes:
    """The JSON text of a request. Raises HTTPError for another type, too much, or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPError(415, f"Content-Type: {kind[:100]!r} is not application/json")
    parts: list[bytes] = []
    n_bytes = 0
    try:
        with anyio.fail_after(BODY_SECONDS):
            async for part in request.stream():
                n_bytes += len(part)
                parts = [*parts, part] if n_bytes <= MAX_BODY else []
                if n_bytes > DISCARDED:
                    break
    except TimeoutError:
        raise HTTPError(408, f"body: not complete after {BODY_SECONDS} seconds") from None
    if n_bytes > MAX_BODY:
        raise HTTPError(413, f"body: over {MAX_BODY} bytes")
    return b"".join(parts)


Result = TypeVar("Result")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives. Raises ClientDisconnect as soon as the client leaves."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def collect(job: Job, choices: list[Choice]) -> None:
    """Give the pieces of a job to its choices. Raises OrthrusError where a text failed."""
    while pieces := await job.take():
        for piece in pieces:
            choices[piece.index].push(piece)
            if piece.result is not None and piece.result.error is not None:
                raise OrthrusError(piece.result.error)


async def events(job: Job, answer: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    """The server-sent events of an answer; an error ends them."""
    more = {"usage": None} if with_usage else {}
    first = [one for choice in answer.choices if (one := choice.first()) is not None]
    told = [event(answer.chunk(first, **more))] if first else []
    while pieces := await job.take():
        for piece in pieces:
            if piece.result is not None and piece.result.error is not None:
                yield b"".join(told) + event(error_object(500, piece.result.error))
                return
            told.append(event(answer.chunk([answer.choices[piece.index].push(piece)], **more)))
        yield b"".join(told)
        told = []
    if with_usage:
        yield event(answer.chunk([], usage=answer.usage()))
    yield END


EVENTS = {
    "content-type": "text/event-stream; charset=utf-8",
    "x-accel-buffering": "no",  # of a proxy, which would collect them
}


class Sending(StreamingResponse):
    """Parts of a body, until they end or the client leaves or stops reading; then ``close()``."""

    def __init__(
        self,
        content: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str],
        status: int = 200,
    ) -> None:
        super().__init__(content, status, headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        clock = asyncio.get_running_loop().time
        try:
            with anyio.fail_after(None) as limit:

                async def within_time(message: Any) -> None:
                    limit.deadline = clock() + SEND_SECONDS
                    await send(message)
                    limit.deadline = math.inf

                await super().__call__(scope, receive, within_time)
        except TimeoutError:
            pass  # an incomplete response, which closes the connection
        finally:
            self._close()
