"""The server's replicas under Ray Serve: one application before several decoders.

    serve run orthrus_fast.server.ray:build slots=8

A front takes requests, checks who may ask, and hands each to a replica, which answers with the
application of a single server. The conversation's beginning is the session that Ray's ring of
hashes knows, so that its next turn finds its rows cached. Ray starts replicas and replaces dead
ones; a request that one of these had sent nothing for yet is given to another.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import Metric
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RunningReplica
from ray.serve.schema import LoggingConfig
from starlette.types import Message, Receive, Scope, Send

from orthrus_fast.errors import QueueFullError, RequestError, one_line
from orthrus_fast.fingerprint import fingerprint
from orthrus_fast.loading import load
from orthrus_fast.server.access import Access, Guard, error_object, is_loopback, read_keys
from orthrus_fast.server.answers import END, event
from orthrus_fast.server.app import (
    EVENTS,
    Facts,
    Sending,
    ServerSettings,
    Service,
    bare_app,
    read_body,
    start_worker,
    tokenizer_of,
    unless_gone,
)
from orthrus_fast.server.metrics import merged
from orthrus_fast.server.protocol import HTTPError, served_name

ATTEMPTS = 4  # replicas that may die under one request
BEGINNING = 512  # characters or ids of a raw prompt that say which conversation it is
STATUS_SECONDS = 5  # that replicas may take to say how they are
STORE_BYTES = 100 * 2**20  # of Ray's memory for large objects, of which there are none
NAME = "orthrus"  # of the application
MANY = 100_000  # requests at a front, which wait there for a replica
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
PASSED_ON = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string")
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)

Begun = tuple[int, list[tuple[bytes, bytes]], bytes]  # status, headers, first part of the body
Parts = Any  # DeploymentResponseGenerator, whose methods have no types


class Arguments(BaseModel):
    """The ``args`` of a config file. ``load`` has further arguments of ``orthrus_fast.load``.

    ``max_waiting`` requests wait for a replica at most. Keys are those of ``orthrus serve``.
    """

    model_config = ConfigDict(extra="forbid")

    checkpoint: str | None = None
    slots: int = 8
    load: dict[str, Any] = {}
    model: str | None = None
    mode: Literal["diffusion", "ar"] | None = None
    max_waiting: int = 256
    host: str = "127.0.0.1"
    allowed_hosts: list[str] = []
    api_key_file: str | None = None

    def access(self) -> Access:
        """Who may ask. Raises RequestError for a host that others reach, without keys."""
        return Access(self.host, read_keys(self.api_key_file), tuple(self.allowed_hosts))


class Replica:
    """One decoder, and the single server's application around it."""

    def __init__(self, arguments: Arguments) -> None:  # which Ray calls in the event loop
        decoder = load(arguments.checkpoint, slots=arguments.slots, **arguments.load)
        self._fingerprint = fingerprint(decoder)
        name = arguments.model or served_name(arguments.checkpoint)
        more: dict[str, Any] = {"mode": arguments.mode, "max_waiting": arguments.max_waiting}
        settings = ServerSettings(name, self._fingerprint, **more)
        self._service = Service(Facts.of(decoder), tokenizer_of(decoder), settings)
        self._app = self._service.app()
        start_worker(decoder, self._service.jobs)

    async def answer(
        self, scope: Scope, body: bytes, asked: str | None
    ) -> AsyncIterator[Begun | bytes]:
        """Yield a response's beginning, then its body in parts; ``asked`` is for the router."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        received: Iterator[Message] = iter([{"type": "http.request", "body": body}])

        async def receive() -> Message:
            for message in received:
                return message
            return await asyncio.Future()  # who leaves cancels the task

        answering = asyncio.create_task(self._app(scope, receive, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            if (start := await sent.get()) is None:
                raise RuntimeError("the application gave no response")
            self._service.answered(scope["path"], start["status"])
            bodies = together(sent)
            yield start["status"], start["headers"], await anext(bodies, b"")
            async for part in bodies:
                yield part
        finally:
            answering.cancel()

    async def check_health(self) -> None:
        """Raise RuntimeError where texts are no longer decoded: Ray then replaces the replica."""
        if (failure := self._service.jobs.failure) is not None:
            raise RuntimeError(failure)

    async def metrics(self) -> tuple[str, list[Metric]]:
        """The replica's name, and what it counted."""
        name = serve.get_replica_context().replica_id.unique_id
        return name, self._service.metrics.collect()

    def record_routing_stats(self) -> dict[str, str]:
        """What the routers know of this replica."""
        return {"fingerprint": self._fingerprint}


class ConversationRouter(ConsistentHashRouter):
    """Ray's ring of hashes, but for who is busy, and for who has another fingerprint.

    A replica that has ``busy_at`` requests is passed over while others have fewer; where all have
    as many, the one with the fewest takes the request.
    """

    def initialize_state(self, busy_at: int) -> None:  # type: ignore[override]
        """Take in the deployment's ``request_router_kwargs``."""
        super().initialize_state(num_fallback_replicas=MANY)  # all of them
        self._busy_at = busy_at

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Groups of replicas, of which the first one with room for the request takes it."""
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        ring = [replica for rank in ranks for replica in rank]
        asked = pending_request.args[2] if pending_request else None
        for fitting in (asked, None) if asked else ():  # None: has not said yet
            if some := [r for r in ring if r.routing_stats.get("fingerprint") == fitting]:
                ring = some
                break
        queued = self.replica_queue_len_cache.get
        busy = [r for r in ring if (queued(r.replica_id) or 0) >= self._busy_at]
        return [*([r] for r in ring if r not in busy), busy]


class Front:
    """What clients reach of ``replicas``, behind a guard."""

    def __init__(self, replicas: DeploymentHandle[Any]) -> None:
        self._replicas = replicas

    async def pass_on(self, request: Request) -> Response:
        """The response of the replica that has the conversation's beginning, or of another."""
        body = await read_body(request) if request.method == "POST" else b""
        key = digest(request.scope["orthrus_key"])  # which itself stays here, as most headers do
        beginning, asked = what_is_asked(body)
        session = digest(key + beginning) if beginning else ""
        replicas = self._replicas.options(session_id=session, stream=True)
        scope = {name: request.scope[name] for name in PASSED_ON}
        kind = request.headers.get("content-type", "").encode("latin-1")
        scope |= {"headers": [(b"content-type", kind)], "orthrus_key": key}
        for _ in range(ATTEMPTS):
            parts: Parts = replicas.answer.remote(scope, body, asked)
            try:
                status, headers, part = await unless_gone(request, anext(parts))
            except RayActorError:
                continue  # nothing was sent: another replica may answer
            except BackPressureError:
                raise QueueFullError("queue: as many wait as may; try again later") from None
            except BaseException:
                parts.cancel()
                raise
            named = {name.decode(): value.decode() for name, value in headers}
            is_stream = named.get("content-type") == EVENTS["content-type"]
            return Sending(rest(part, parts, is_stream), parts.cancel, named, status)
        raise HTTPError(503, f"{ATTEMPTS} replicas died under this request; try again later")

    async def health(self) -> Response:
        """How many replicas decode texts."""
        n_replicas = sum(one is None for one in await self._of_all("check_health"))
        said = {"status": "ok" if n_replicas else "no replica answers", "replicas": n_replicas}
        return JSONResponse(said, 200 if n_replicas else 503)

    async def exposition(self) -> Response:
        """What the replicas counted."""
        told = [one for one in await self._of_all("metrics") if isinstance(one, tuple)]
        return Response(merged(told), media_type="text/plain; version=0.0.4")

    async def _of_all(self, method: str) -> list[Any]:
        """What each replica says: a result or an exception; nothing where there are none."""
        try:
            answers = self._replicas.broadcast(method)
            return await answers.results_async(timeout_s=STATUS_SECONDS, return_exceptions=True)
        except (DeploymentUnavailableError, TimeoutError):
            return []


def digest(text: str) -> str:
    """A name of a text that does not tell it."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def what_is_asked(body: bytes) -> tuple[str, str | None]:
    """What all requests of a conversation begin with, and the fingerprint that one asks for.

    Of a chat these are the messages up to the user's first one, of a raw prompt the first
    characters or ids. Nothing where there is no such thing: a replica says what is wrong.
    """
    try:
        asked = json.loads(body)
        fingerprint = asked.get("system_fingerprint")
        messages = asked.get("messages")
        if messages is None:
            first = asked.get("prompt", "")[:BEGINNING]
        else:
            users = [i for i, one in enumerate(messages) if one.get("role") == "user"]
            first = messages[: users[0] + 1] if users else messages
    except (ValueError, RecursionError, AttributeError, TypeError):
        return "", None
    return json.dumps(first) if first else "", fingerprint


async def together(sent: asyncio.Queue[Message | None]) -> AsyncIterator[bytes]:
    """The parts of a body, as one where they have come at once, until None comes."""
    messages: list[Message | None] = []
    while None not in messages:
        messages = [await sent.get()]
        while not sent.empty():
            messages.append(sent.get_nowait())
        if body := b"".join(one.get("body", b"") for one in messages if one is not None):
            yield body


async def rest(part: bytes, parts: Parts, is_stream: bool) -> AsyncIterator[bytes]:
    """A body whose first part is here; an event says so where the replica dies.

    It may die when all has come and only this is unknown: all but streams come in one part.
    """
    yield part
    try:
        async for part in parts:
            yield part
    except RayError:
        if is_stream and not part.endswith(END):
            message = "the replica that decoded this text died; ask again"
            yield event(error_object(500, message))


def create_front(replicas: DeploymentHandle[Any], access: Access) -> Guard:
    """The ASGI application before ``replicas``."""
    front, app = Front(replicas), bare_app()
    app.add_api_route("/health", front.health)
    app.add_api_route("/metrics", front.exposition)
    app.add_api_route("/{path:path}", front.pass_on, methods=METHODS)
    return Guard(app, access, lambda path, status: None)  # Ray counts them


class Ingress:
    """The front as a deployment, behind Ray's proxies."""

    def __init__(self, arguments: Arguments, replicas: DeploymentHandle[Any]) -> None:
        access = arguments.access()
        self._is_open = not access.keys
        self._front = create_front(replicas, access)

    async def __call__(self, request: Request) -> Response:
        """The response to a request.

        What the proxies listen on is not known here: without keys only this machine is answered.
        """
        if self._is_open and not (request.client and is_loopback(request.client.host)):
            message = "others reach this server, so it needs a key: set ORTHRUS_API_KEY"
            return JSONResponse(error_object(403, message), 403)
        return Passed(self._front)


class Passed(Response):
    """The response that an application gives."""

    def __init__(self, app: Guard) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await self._app(dict(scope), receive, send)


def replicas_of(arguments: Arguments, **options: Any) -> serve.Application:
    """The replicas as a deployment; ``options`` are those of Ray's."""
    router = {
        "request_router_class": ConversationRouter,
        "request_router_kwargs": {"busy_at": arguments.slots},
        "request_routing_stats_period_s": 2,
    }
    deployment = serve.deployment(
        max_ongoing_requests=2 * arguments.slots,  # some wait, so that no slot does
        max_queued_requests=arguments.max_waiting,
        request_router_config=router,
        health_check_period_s=2,
        logging_config=QUIET,
        **options,
    )
    return deployment(Replica).bind(arguments)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a config file. Raises RequestError for its ``args``."""
    try:
        arguments = Arguments.model_validate(args)
    except ValidationError as invalid:
        raise RequestError(one_line(f"args: {invalid}")) from None
    arguments.access()  # what is wrong with it is known before anything starts
    options: dict[str, Any] = {"max_ongoing_requests": MANY, "logging_config": QUIET}
    ingress = serve.deployment(ray_actor_options={"num_cpus": 0}, **options)
    return ingress(Ingress).bind(arguments, replicas_of(arguments))


@contextmanager
def local_replicas(
    arguments: Arguments, n_replicas: int, on_gpus: bool
) -> Iterator[DeploymentHandle[Any]]:
    """Replicas in a cluster of this machine's own, which ends with the block.

    Each has a GPU, or as many as share its model, or its part of the cores. Raises RequestError
    where they do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    n_cores, n_gpus = os.cpu_count() or 1, arguments.load.get("tensor_parallel", 1)
    each: dict[str, Any] = (
        {"num_gpus": n_gpus} if on_gpus else {"num_cpus": max(1, n_cores // n_replicas)}
    )
    ray.init(
        address="local",
        num_cpus=max(n_cores, n_replicas),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        object_store_memory=STORE_BYTES,
    )
    try:
        needed = n_replicas * n_gpus
        if on_gpus and (found := ray.cluster_resources().get("GPU", 0)) < needed:
            raise RequestError(f"{n_replicas} replicas need {needed} GPUs; there are {found:.0f}")
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        more: dict[str, Any] = {"ray_actor_options": each, "max_constructor_retry_count": 1}
        app = replicas_of(arguments, num_replicas=n_replicas, **more)
        try:
            handle = serve.run(app, name=NAME, route_prefix=None)
        except RuntimeError:
            [replicas] = serve.status().applications[NAME].deployments.values()
            said = one_line(replicas.message.strip().splitlines()[-1])
            raise RequestError(f"the replicas do not start: {said}") from None
        yield handle
    finally:
        ray.shutdown()
