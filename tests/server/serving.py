"""A server on loopback, in a thread, and its clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

from orthrus_fast import Decoder
from orthrus_fast.server.access import Access, Guard
from orthrus_fast.server.app import ServerSettings, create_app
from orthrus_fast.server.front import Front
from orthrus_fast.server.listening import make_server
from tests.checkpoints import write_checkpoint
from tests.engine.solo import load

TEMPLATE = Path(__file__).resolve().parents[1] / "fixtures" / "chat" / "qwen3.jinja"


def write_chatting(directory: Path, eos: Sequence[int] = ()) -> Path:
    """A checkpoint of random weights with Qwen3's template; without ``eos`` no text ends early."""
    sizes = {"max_position_embeddings": 2048}
    write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=list(eos), **sizes)
    (directory / "chat_template.jinja").write_text(TEMPLATE.read_text())
    return directory


class Served:
    """A server that runs: its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


class Running(Served):
    """A server of a decoder in this process."""

    def __init__(self, decoder: Decoder, url: str) -> None:
        super().__init__(url)
        self.decoder = decoder


@contextlib.contextmanager
def serving_app(app: Guard) -> Iterator[Served]:
    """A server of an application; ends with the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, drain_seconds=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield Served(address_of(listener))
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def address_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def serving(decoder: Decoder, **settings: Any) -> Iterator[Running]:
    """A server of ``decoder`` in this process; ends with the block."""
    with serving_app(create_app(decoder, settings_of(**settings))) as served:
        yield Running(decoder, served.url)


@contextlib.contextmanager
def fronting(decoder: Decoder, drain: int = 5, **settings: Any) -> Iterator[tuple[Running, Front]]:
    """The same with a front, as ``orthrus serve`` has it."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = address_of(listener)
    front = Front(listener, drain)
    assert front.start(decoder, settings_of(**settings))
    decoding = threading.Thread(target=front.decode)
    decoding.start()
    try:
        yield Running(decoder, url), front
    finally:
        front.end()
        decoding.join(20)
        front.join()
        assert not decoding.is_alive()


def settings_of(model: str = "tiny", access: Access = Access(), **more: Any) -> ServerSettings:  # noqa: B008
    return ServerSettings(model, "fp_tiny", access, **more)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


class Script:
    """A detokenizer that tells a text of its own, a few characters a token."""

    def __init__(self, text: str, step: int = 3) -> None:
        self.pieces = [text[i : i + step] for i in range(0, len(text), step)]

    def push(self, token: int) -> str:
        return self.pieces.pop(0) if self.pieces else ""

    def finish(self) -> str:
        return ""


@contextlib.contextmanager
def telling(decoder: Decoder, text: str) -> Iterator[None]:
    """Every text of the decoder is ``text`` within, whatever its tokens."""
    assert decoder.tokenizer is not None
    decoder.tokenizer.detokenizer = lambda skip_special=True: Script(text)  # type: ignore
    try:
        yield
    finally:
        del decoder.tokenizer.detokenizer


__all__ = ["Access", "Running", "fronting", "load", "serving", "telling", "until", "write_chatting"]
