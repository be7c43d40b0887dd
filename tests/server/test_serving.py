"""Queues, clients that leave, failures, metrics, and the end of a server."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orthrus_fast import Decoder, Grammar, SamplingParams
from orthrus_fast.engine.engine import Engine
from orthrus_fast.errors import OrthrusError
from orthrus_fast.results import Generation
from orthrus_fast.server import listening
from orthrus_fast.server.front import Front
from orthrus_fast.server.jobs import (
    NOTHING,
    Begin,
    Begun,
    Ended,
    Job,
    Jobs,
    Leave,
    News,
    Piece,
    Task,
)
from orthrus_fast.server.worker import Worker
from tests.server.serving import (
    Running,
    fronting,
    load,
    serving,
    settings_of,
    until,
    write_chatting,
)

LONG: Any = {"prompt": [5, 6, 7], "max_tokens": 1500, "mode": "ar"}
SHORT: Any = {"prompt": [8, 9], "max_tokens": 4}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatting(tmp_path_factory.mktemp("chatting") / "model")


@pytest.fixture
def running(checkpoint: Path) -> Iterator[Running]:
    with serving(load(checkpoint), max_waiting=1) as running:
        yield running


def count_cycles(decoder: Decoder) -> list[int]:
    """A list that grows with every cycle."""
    cycles: list[int] = []
    launch = decoder.runner.launch

    def counted(*arguments: Any) -> None:
        cycles.append(1)
        launch(*arguments)

    decoder.runner.launch = counted  # type: ignore[method-assign]
    return cycles


class Waiting(threading.Thread):
    """A client that waits for an answer."""

    def __init__(self, running: Running, body: Any) -> None:
        super().__init__()
        self.response: httpx.Response | None = None
        self._ask = lambda: running.post("/v1/completions", body)
        self.start()

    def run(self) -> None:
        self.response = self._ask()


def begun(running: Running, body: Any = LONG) -> tuple[httpx.Client, Any]:
    """A client and its stream, which has had a token."""
    client = httpx.Client(timeout=30)
    request = client.build_request(
        "POST", f"{running.url}/v1/completions", json={**body, "stream": True}
    )
    response = client.send(request, stream=True)
    lines = response.iter_lines()
    assert next(lines).startswith("data: ")
    return client, lines


def test_a_full_queue_is_429(running: Running) -> None:
    client, _ = begun(running)
    waiting = Waiting(running, SHORT)
    until(lambda: metric(running, "orthrus_waiting") == 1)
    response = running.post("/v1/completions", SHORT)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    with pytest.raises(openai.RateLimitError, match="try again later"):
        running.client().completions.create(model="tiny", prompt="x")
    client.close()  # its slot is the next one's
    waiting.join()
    assert waiting.response is not None and waiting.response.status_code == 200
    assert running.post("/v1/completions", SHORT).status_code == 200


def test_a_request_of_more_texts_than_ever_fit_is_400(running: Running) -> None:
    response = running.post("/v1/completions", {**SHORT, "n": 3})
    assert response.status_code == 400 and "3 texts" in response.text


def test_texts_of_one_request_are_queued_together_or_not_at_all(running: Running) -> None:
    client, _ = begun(running)
    assert running.post("/v1/completions", {**SHORT, "n": 2}).status_code == 429
    client.close()
    until(lambda: not running.decoder.engine.has_work)
    assert running.post("/v1/completions", {**SHORT, "n": 2}).status_code == 200


@pytest.mark.parametrize("how", ["streaming", "waiting", "queued"])
def test_a_client_that_leaves_ends_its_text(running: Running, how: str) -> None:
    """Within a cycle or two of the moment at which the server hears of it."""
    cycles = count_cycles(running.decoder)
    if how == "streaming":
        client, _ = begun(running)
        client.close()
    else:
        first = begun(running)[0] if how == "queued" else None
        before = metric(running, "orthrus_running") + metric(running, "orthrus_waiting")
        raw = connect(running, LONG)
        until(
            lambda: metric(running, "orthrus_running") + metric(running, "orthrus_waiting") > before
        )
        raw.close()
        if first is not None:
            until(lambda: metric(running, "orthrus_waiting") == 0)
            first.close()
    until(lambda: not running.decoder.engine.has_work, 5)
    assert len(cycles) < 1000  # of 1500
    time.sleep(0.1)
    n_cycles = len(cycles)
    assert running.post("/v1/completions", SHORT).status_code == 200
    assert len(cycles) - n_cycles <= 4


def test_a_cancelled_text_gets_no_cycle_after_the_next_step(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker may be about to step when it hears of it, and be at a cycle."""
    cycles = count_cycles(running.decoder)
    ended: list[int] = []
    close = Jobs.close

    def closed(jobs: Jobs, job: Job) -> None:
        close(jobs, job)
        ended.append(len(cycles))

    monkeypatch.setattr(Jobs, "close", closed)
    client, _ = begun(running)
    client.close()
    until(lambda: bool(ended) and not running.decoder.engine.has_work)
    assert len(cycles) <= ended[0] + 2


def connect(running: Running, body: Any) -> socket.socket:
    """A client of no library that has sent a request and reads nothing."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    content = httpx.Request("POST", running.url, json=body).content
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    return connection


def test_who_does_not_read_holds_up_nobody(checkpoint: Path) -> None:
    decoder = load(checkpoint, slots=4)
    with serving(decoder) as running:
        idle = [connect(running, {**LONG, "stream": True}) for _ in range(3)]
        expected = running.post("/v1/completions", {**SHORT, "max_tokens": 40})
        assert expected.status_code == 200
        until(lambda: not decoder.engine.has_work, 60)  # what they asked for was decoded
        for connection in idle:
            connection.close()


def test_half_open_connections_hold_up_nobody(running: Running) -> None:
    host, port = running.url.removeprefix("http://").split(":")
    half_open = [socket.create_connection((host, int(port))) for _ in range(200)]
    for connection in half_open[::2]:
        connection.sendall(b"POST /v1/completions HT")
    assert running.post("/v1/completions", SHORT).status_code == 200
    for connection in half_open:
        connection.close()


def test_a_connection_that_asks_for_nothing_is_closed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that asks has its time, however long the answer takes."""
    monkeypatch.setattr(listening, "HEAD_SECONDS", 0.3)
    host, port = running.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(2)]
    silent[1].sendall(b"POST /v1/completions HTTP/1.1\r\nHos")
    client, lines = begun(running, {**LONG, "max_tokens": 400})
    for connection in silent:
        connection.settimeout(10)
        assert connection.recv(100) == b""
    assert "data: [DONE]" in list(lines)
    client.close()


# Failures


def test_an_error_of_the_device_is_told(running: Running) -> None:
    launch = running.decoder.runner.launch

    def broken(*_: Any) -> None:
        raise RuntimeError("the device is on fire")

    running.decoder.runner.launch = broken  # type: ignore[method-assign]
    response = running.post("/v1/completions", SHORT)
    assert response.status_code == 500 and "on fire" in response.text
    with pytest.raises(openai.APIError, match="on fire"):
        for _ in running.client().completions.create(model="tiny", prompt="x", stream=True):
            pass
    running.decoder.runner.launch = launch  # type: ignore[method-assign]
    assert running.post("/v1/completions", SHORT).status_code == 200


def test_an_error_of_the_worker_ends_the_texts_and_not_the_server(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("a mistake")

    monkeypatch.setattr(running.decoder, "step", broken)
    assert running.post("/v1/completions", SHORT).status_code == 500
    monkeypatch.undo()
    assert running.post("/v1/completions", SHORT).status_code == 200


# Metrics


def metric(running: Running, name: str) -> float:
    return running.metrics().get(name, 0.0)


def test_metrics_count_what_was_decoded(running: Running) -> None:
    body, begun_at = {"prompt": list(range(40)), "max_tokens": 30}, time.monotonic()
    told = running.post("/v1/completions", body).json()
    again = running.post("/v1/completions", body).json()
    running.post("/v1/completions", {"prompt": 5})
    httpx.get(f"{running.url}/secret-path")
    found = running.metrics()
    cycles = sum(one["choices"][0]["orthrus"]["cycles"] for one in (told, again))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 39
    assert found['orthrus_requests_total{path="/v1/completions",status="200"}'] == 2
    assert found['orthrus_requests_total{path="/v1/completions",status="400"}'] == 1
    assert found['orthrus_requests_total{path="other",status="404"}'] == 1
    assert found["orthrus_tokens_total"] == 60 and found["orthrus_prompt_tokens_total"] == 80
    assert found["orthrus_reused_tokens_total"] == 39
    assert found["orthrus_cycles_total"] == cycles
    assert found["orthrus_first_token_seconds_count"] == 2
    waited = [found[f"orthrus_{of}_seconds_sum"] for of in ("first_token", "gap")]
    assert min(waited) > 0 and sum(waited) < time.monotonic() - begun_at
    assert found["orthrus_gap_seconds_count"] == cycles
    assert found["orthrus_tokens_per_cycle_count"] == 2
    assert found['orthrus_texts_total{reason="length"}'] == 2
    positions = [v for name, v in found.items() if name.startswith("orthrus_accepted_total")]
    assert 58 - cycles <= sum(positions) <= 60 - cycles  # the last cycle of a text may be cut


def test_the_gauges_fall_back_to_nought(running: Running) -> None:
    client, _ = begun(running)
    assert metric(running, "orthrus_running") == 1
    client.close()
    until(lambda: metric(running, "orthrus_running") == 0)
    assert metric(running, "orthrus_waiting") == 0


# The end, and processes that die


def test_what_runs_is_finished_before_the_end(checkpoint: Path) -> None:
    with fronting(load(checkpoint)) as (running, front):
        client, lines = begun(running, {**LONG, "max_tokens": 300})
        front.end()
        assert "data: [DONE]" in list(lines)
        client.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_the_end_does_not_wait_for_ever(checkpoint: Path) -> None:
    with fronting(load(checkpoint), drain=0) as (running, front):
        client, lines = begun(running)
        front.end()
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
        client.close()


def test_a_front_that_dies_ends_the_server(checkpoint: Path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    front = Front(listener, drain_seconds=5)
    assert front.start(load(checkpoint), settings_of())
    front._process.kill()
    front.decode()  # and returns
    with pytest.raises(OrthrusError, match="front ended with code -9"):
        front.join()


def test_a_front_that_dies_at_once_is_told_of(checkpoint: Path) -> None:
    front = Front(socket.create_server(("127.0.0.1", 0)), drain_seconds=5)
    front._process.kill()
    assert not front.start(load(checkpoint), settings_of())
    with pytest.raises(OrthrusError, match="front ended with code -9"):
        front.join()


def test_an_engine_that_has_failed_refuses_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rank has died: health says why, and so does every answer."""
    with fronting(load(checkpoint)) as (running, _):
        client, lines = begun(running)
        monkeypatch.setattr(Engine, "failure", "rank 1 has ended")
        assert "rank 1 has ended" in [line for line in lines if line][-1]
        client.close()
        health = httpx.get(f"{running.url}/health")
        assert health.status_code == 503 and health.json()["status"] == "rank 1 has ended"
        refused = running.post("/v1/completions", SHORT)
        assert refused.status_code == 500 and "rank 1 has ended" in refused.text


def test_a_job_that_is_left_while_its_grammar_is_compiled_never_begins(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, told, go_on = load(checkpoint), list[News](), threading.Event()
    worker = Worker(decoder, told.extend)
    monkeypatch.setattr(decoder, "compile_grammar", lambda grammar: go_on.wait(20))
    thread = threading.Thread(target=worker.run)
    thread.start()
    params = SamplingParams(grammar=Grammar("regex", "a+"))
    worker.order(Begin(1, [Task([1], 5, params, None)], ""))
    worker.order(Leave(1))
    until(lambda: not worker._orders)
    go_on.set()
    worker.order(Begin(2, [Task([1], 2, SamplingParams(), None)], ""))
    until(lambda: any(isinstance(one, Piece) and one.result for one in told))
    worker.stop()
    thread.join()
    assert {one.job for one in told if not isinstance(one, Ended)} == {2}
    assert not worker._left and not worker._compiling and not worker._streams


def test_what_comes_after_a_job_was_left_counts_for_nothing() -> None:
    """The worker may have told it before it heard of that."""
    orders: list[Any] = []

    async def leave() -> Jobs:
        jobs = Jobs(slots=1, max_waiting=1, watch=lambda piece: None)
        jobs.order = orders.append
        submitting = asyncio.create_task(jobs.submit([Task([1], 5, SamplingParams(), None)], ""))
        await asyncio.sleep(0)
        jobs.hear([Begun(1, None)])
        job = await submitting
        assert jobs.n_running == 1
        job.close()
        jobs.hear([Piece(1, 0, NOTHING, Generation.failed(OrthrusError(""), None), 0.1, True)])
        job.close()
        return jobs

    jobs = asyncio.run(leave())
    assert jobs.n_texts == jobs.n_running == jobs.n_waiting == 0 and not jobs._jobs
    assert [type(one) for one in orders] == [Begin, Leave]
