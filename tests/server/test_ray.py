"""Replicas under Ray Serve: the same texts, who gets which request, and replicas that die."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from orthrus_fast import Decoder, SamplingParams, load
from orthrus_fast.cli.serve import OF_RAY
from orthrus_fast.errors import RequestError
from orthrus_fast.fingerprint import fingerprint
from orthrus_fast.server.metrics import merged
from tests.server.serving import Access, Served, serving_app, until

os.environ.update(OF_RAY, RAY_AUTH_TOKEN=secrets.token_hex(32))  # which Ray reads on import
ray = pytest.importorskip("ray", reason="ray is not installed: pip install -e '.[ray]'")

from ray import serve  # noqa: E402
from ray.exceptions import ActorDiedError  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from orthrus_fast.server import ray as replicas  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TABLES = [f"Convert to JSON:\n\nname,age\nAnn,{age}\nBob,{90 - age}" for age in range(31, 47)]

ARGUMENTS = replicas.Arguments(slots=4, load={"device": "cpu"}, model="embedded")


def chat(table: str, **settings: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": table}], "max_tokens": 64, "temperature": 0.8}
    return {**body, "seed": len(table), **settings}


# Without a cluster


def test_requests_of_a_conversation_begin_alike() -> None:
    system, first = {"role": "system", "content": "s"}, {"role": "user", "content": "a"}
    more = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]

    def beginning(**body: Any) -> str:
        return replicas.what_is_asked(json.dumps(body).encode())[0]

    one = beginning(messages=[system, first])
    assert one and one == beginning(messages=[system, first, *more], stream=True, seed=3)
    assert one != beginning(messages=[first]) and one != beginning(messages=[system, more[1]])
    assert beginning(prompt="x" * 600) == beginning(prompt="x" * 700) != beginning(prompt="x")
    assert beginning(prompt=[1, 2]) and beginning(messages=[system]) and not beginning()
    assert replicas.what_is_asked(b'{"system_fingerprint": "fp_1"}') == ("", "fp_1")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'{"messages": 3}', b'{"messages": [3]}', b"[" * 9999, b"\xff"]
)
def test_a_body_that_is_no_request_has_no_beginning(body: bytes) -> None:
    assert replicas.what_is_asked(body) == ("", None)


def chosen(monkeypatch: pytest.MonkeyPatch, asked: str | None, ring: str, queues: str) -> list[str]:
    """Names of replicas, in the order in which they are asked; a name's letter is its chip's."""
    of = {
        name: SimpleNamespace(
            replica_id=name, routing_stats={} if name[0] == "?" else {"fingerprint": name[0]}
        )
        for name in ring.split()
    }

    async def ranks(*_: Any) -> list[list[Any]]:
        return [[one] for one in of.values()]

    monkeypatch.setattr(replicas.ConsistentHashRouter, "choose_replicas", ranks)
    router: Any = replicas.ConversationRouter.__new__(replicas.ConversationRouter)
    lengths = dict(zip(of, map(int, queues.split()), strict=True))
    router._replica_queue_len_cache, router._busy_at = lengths, 4
    request: Any = SimpleNamespace(args=[{}, b"", asked])
    groups = asyncio.run(router.choose_replicas(list(of.values()), request))
    return [",".join(one.replica_id for one in group) for group in groups if group]


def test_the_router_goes_round_the_ring_past_who_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, None, "a1 a2 b1", "0 0 0") == ["a1", "a2", "b1"]
    assert chosen(monkeypatch, None, "a1 a2 b1", "4 3 0") == ["a2", "b1", "a1"]
    assert chosen(monkeypatch, None, "a1 a2 b1", "4 5 0") == ["b1", "a1,a2"]
    assert chosen(monkeypatch, None, "a1 a2", "9 9") == ["a1,a2"]


def test_the_router_knows_kinds_of_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, "b", "a1 b1 a2 b2", "0 0 0 0") == ["b1", "b2"]
    assert chosen(monkeypatch, "b", "a1 b1 a2 b2", "0 9 0 9") == ["b1,b2"]
    assert chosen(monkeypatch, "b", "a1 ?1", "0 0") == ["?1"]  # one that has not said yet
    assert chosen(monkeypatch, "c", "a1 b1", "0 0") == ["a1", "b1"]  # which refuses it by name


def test_a_replica_that_dies_ends_a_stream_with_an_error() -> None:
    async def parts(second: bytes) -> AsyncIterator[bytes]:
        yield second
        raise ActorDiedError

    async def all_of_it(second: bytes, is_stream: bool = True) -> list[bytes]:
        return [part async for part in replicas.rest(b"one", parts(second), is_stream)]

    whole = b"data: {}\n\ndata: [DONE]\n\n"  # it dies before it can say that this is all
    assert asyncio.run(all_of_it(whole)) == [b"one", whole]
    assert asyncio.run(all_of_it(b"two", is_stream=False)) == [b"one", b"two"]
    one, two, end = asyncio.run(all_of_it(b"two"))
    assert (one, two) == (b"one", b"two")
    told = json.loads(end.removeprefix(b"data: "))["error"]
    assert told["type"] == "server_error" and "died" in told["message"]


def test_metrics_are_merged_by_replica() -> None:
    def counted(n: int) -> list[Any]:
        registry = CollectorRegistry()
        Counter("orthrus_things", "Things", ["kind"], registry=registry).labels("x").inc(n)
        return list(registry.collect())

    text = merged([("one", counted(1)), ("two", counted(2))]).decode()
    assert 'orthrus_things_total{kind="x",replica="one"} 1.0' in text
    assert 'orthrus_things_total{kind="x",replica="two"} 2.0' in text
    assert text.count("# TYPE orthrus_things_total ") == 1


def test_arguments_of_a_config_file_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="slot_s"):
        replicas.build({"slot_s": 3})
    monkeypatch.delenv("ORTHRUS_API_KEY", raising=False)
    with pytest.raises(RequestError, match="ORTHRUS_API_KEY"):
        replicas.build({"host": "0.0.0.0"})


@pytest.mark.parametrize("host, passes", [("127.0.0.1", True), ("192.0.2.7", False)])
def test_without_a_key_other_machines_are_refused(host: str, passes: bool) -> None:
    nothing: Any = SimpleNamespace()
    ingress = replicas.Ingress(replicas.Arguments(), nothing)
    request: Any = SimpleNamespace(client=SimpleNamespace(host=host))
    response = asyncio.run(ingress(request))
    assert isinstance(response, replicas.Passed) == passes
    assert passes or response.status_code == 403


# Under real Ray


@pytest.fixture(scope="module")
def alone() -> Decoder:
    return load(device="cpu", prefix_reuse=False)


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    with replicas.local_replicas(ARGUMENTS, 2, on_gpus=False) as handle:
        yield handle


@pytest.fixture
def served(handle: Any) -> Iterator[Served]:
    with serving_app(replicas.create_front(handle, Access())) as served:
        until(lambda: n_replicas(served) == 2, 60)
        yield served


def n_replicas(served: Served) -> int:
    return int(httpx.get(f"{served.url}/health", timeout=30).json()["replicas"])


def text_of(decoder: Decoder, body: dict[str, Any]) -> str:
    params = SamplingParams(0.8, seed=body["seed"])
    return decoder.generate(body["messages"], body["max_tokens"], params).text


def ask(served: Served, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = served.post("/v1/chat/completions", body, headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def by_replica(served: Served, name: str) -> list[float]:
    """The values of a metric, one for each replica and what else its labels tell apart."""
    return [value for key, value in served.metrics().items() if key.startswith(name + "{")]


@pytest.mark.slow
def test_texts_are_those_of_a_single_server(served: Served, alone: Decoder) -> None:
    bodies = [chat(table, seed=n) for n, table in enumerate(TABLES)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: ask(served, body), bodies))
    assert {one["system_fingerprint"] for one in answers} == {fingerprint(alone)}
    texts = [one["choices"][0]["message"]["content"] for one in answers]
    assert texts == [text_of(alone, body) for body in bodies]
    decoded = by_replica(served, "orthrus_tokens_total")
    assert len(decoded) == 2 and min(decoded) > 0
    streamed = served.client().chat.completions.create(
        model="embedded", stream=True, **{k: v for k, v in bodies[0].items()}
    )
    assert "".join(one.choices[0].delta.content or "" for one in streamed) == texts[0]


@pytest.mark.slow
def test_the_next_turn_finds_its_rows_cached(served: Served) -> None:
    for table in TABLES[:6]:
        body = chat(table, temperature=0)
        first = ask(served, body)
        message = first["choices"][0]["message"]
        more = [message, {"role": "user", "content": "Convert to JSON:\n\nname\nEve"}]
        body["messages"] += more
        second = ask(served, body)["usage"]
        kept = first["usage"]["total_tokens"] - 4
        assert second["prompt_tokens_details"]["cached_tokens"] >= kept


@pytest.mark.slow
def test_a_fingerprint_may_be_asked_for(served: Served, alone: Decoder) -> None:
    body = chat(TABLES[0])
    known = fingerprint(alone)
    assert ask(served, {**body, "system_fingerprint": known})["system_fingerprint"] == known
    response = served.post("/v1/chat/completions", {**body, "system_fingerprint": "fp_other"})
    assert response.status_code == 404 and "'fp_other' is not served here" in response.text


@pytest.mark.slow
def test_a_cluster_may_have_several_kinds_of_chips(
    handle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that say so each have a fingerprint of their own."""

    class OfItsKind(replicas.Replica):
        def __init__(self, arguments: replicas.Arguments) -> None:
            super().__init__(arguments)
            self._fingerprint = f"fp_{serve.get_replica_context().replica_id.unique_id}"
            settings = replace(self._service._settings, fingerprint=self._fingerprint)
            self._service._settings = settings

    monkeypatch.setattr(replicas, "Replica", OfItsKind)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        app = replicas.replicas_of(ARGUMENTS, num_replicas=2, ray_actor_options={"num_cpus": 0})
        several = serve.run(app, name="kinds", route_prefix=None)
    finally:
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    with serving_app(replicas.create_front(several, Access())) as served:
        until(lambda: n_replicas(served) == 2, 60)
        names = re.findall(
            r'orthrus_running{replica="(\w+)"}', httpx.get(f"{served.url}/metrics").text
        )
        kinds = {f"fp_{name}" for name in names}
        path, body = "/v1/chat/completions", chat(TABLES[0], max_tokens=4)
        for kind in kinds:  # which the router hears of soon
            asked = {**body, "system_fingerprint": kind}
            until(lambda asked=asked: served.post(path, asked).status_code == 200)
            for table in TABLES[:6]:
                asked = {**chat(table, max_tokens=4), "system_fingerprint": kind}
                assert ask(served, asked)["system_fingerprint"] == kind
        assert {
            ask(served, chat(table, max_tokens=4))["system_fingerprint"] for table in TABLES
        } == kinds
    serve.delete("kinds")


@pytest.mark.slow
def test_the_front_guards_and_answers_as_a_single_server(handle: Any) -> None:
    key = "a-key-of-some-length"
    with serving_app(replicas.create_front(handle, Access(keys=(key,)))) as served:
        path = "/v1/chat/completions"
        assert served.post(path, chat(TABLES[0])).status_code == 401
        bearer = {"Authorization": f"Bearer {key}"}
        assert served.post(path, chat(TABLES[0]), headers=bearer).status_code == 200
        refused = served.post(path, {"beams": 3}, headers=bearer)
        assert refused.status_code == 400 and "messages" in refused.text
        text = {**bearer, "Content-Type": "text/plain"}
        assert httpx.post(served.url + path, content=b"x", headers=text).status_code == 415
        assert httpx.get(served.url, headers={"Host": "example.org"}).status_code == 403
        assert httpx.get(f"{served.url}/nothing", headers=bearer).status_code == 404
        page = httpx.get(served.url)
        assert "<!doctype html>" in page.text and "content-security-policy" in page.headers
        assert page.headers.get_list("x-content-type-options") == ["nosniff"]


@pytest.mark.slow
def test_a_client_that_leaves_ends_its_text(served: Served) -> None:
    check_leaving(served)


def check_leaving(served: Served) -> None:
    """Clients that leave a stream, and before an answer."""
    body = chat(TABLES[0], max_tokens=900, temperature=5, seed=1, mode="ar", stream=True)
    url = f"{served.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()  # which ends the stream when nobody has it any more
        next(lines)
        until(lambda: sum(by_replica(served, "orthrus_running")) == 1)
    until(lambda: sum(by_replica(served, "orthrus_running")) == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={**body, "stream": False}, timeout=0.5)
    until(lambda: sum(by_replica(served, "orthrus_running")) == 0)


def stream(served: Served, body: dict[str, Any]) -> tuple[str, bool]:
    """A text as far as it came, and whether that is all of it, or an error ended it."""
    url = f"{served.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = [line[6:] for line in response.iter_lines() if line]
    *events, last = lines
    parsed = [json.loads(one) for one in events]
    choices = [one["choices"][0] for one in parsed]
    assert len({one["id"] for one in parsed}) == 1  # of one answer
    assert [one["delta"].get("role") for one in choices].count("assistant") == 1
    if last != "[DONE]":
        assert json.loads(last)["error"]["type"] == "server_error"
    return "".join(one["delta"].get("content", "") for one in choices), last == "[DONE]"


def whole(served: Served, body: dict[str, Any]) -> tuple[str, bool]:
    return ask(served, body)["choices"][0]["message"]["content"], True


class Load:
    """Clients that ask one request after another until the block ends."""

    def __init__(self, served: Served, n_clients: int) -> None:
        self.answers: list[tuple[dict[str, Any], str, bool]] = []  # body, text, whole
        self._served, self._n_clients, self._over = served, n_clients, False
        self._pool = ThreadPoolExecutor(n_clients)

    def __enter__(self) -> Load:
        self._clients = [self._pool.submit(self._ask_on, i) for i in range(self._n_clients)]
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        for client in self._clients:
            client.result()

    def _ask_on(self, client: int) -> None:
        number = client
        while not self._over:
            number += self._n_clients
            table = TABLES[number % len(TABLES)]
            body = chat(table, seed=number, max_tokens=96, stream=client % 2 == 0)
            self.answers.append((body, *(stream if body["stream"] else whole)(self._served, body)))


def check(answers: list[tuple[dict[str, Any], str, bool]], alone: Decoder) -> None:
    """Texts are whole and the right ones, or begin as these do."""
    for body, text, is_whole in answers:
        expected = text_of(alone, body)
        assert text == expected if is_whole else expected.startswith(text)


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load(served: Served, alone: Decoder) -> None:
    """What had sent nothing is asked again elsewhere, what had streamed ends with an error."""
    with Load(served, 12) as load:
        until(lambda: len(load.answers) > 12, 60)
        broken: list[Any] = []
        n_killed = 0
        while not broken and n_killed < 3:  # by chance none of its texts may be half sent
            kill_a_replica(served, load)
            n_killed += 1
            broken = [body for body, _, is_whole in list(load.answers) if not is_whole]
    assert broken and all(body["stream"] for body in broken) and len(broken) <= 6 * n_killed
    check(load.answers, alone)
    assert sum(by_replica(served, "orthrus_running")) == 0


def kill_a_replica(served: Served, load: Load) -> None:
    """And see it replaced, and others answered."""
    [victim, _] = [one for one in replica_names() if "#Replica#" in one]
    ray.kill(ray.get_actor(victim, namespace="serve"))
    n_before = len(load.answers)
    until(lambda: n_replicas(served) == 2 and victim not in replica_names(), 60)
    until(lambda: len(load.answers) > n_before + 24, 60)


def replica_names() -> list[str]:
    names = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in names if one["name"].startswith("SERVE_REPLICA")]


@pytest.mark.slow
def test_replicas_come_and_go_while_serving(served: Served, alone: Decoder) -> None:
    def scale(n: int) -> None:
        each = {"num_cpus": 1}
        more = {"ray_actor_options": each, "max_constructor_retry_count": 1}
        app = replicas.replicas_of(ARGUMENTS, num_replicas=n, **more)
        serve.run(app, name="orthrus", route_prefix=None)
        until(lambda: n_replicas(served) == n, 60)
        n_before = len(load.answers)
        until(lambda: len(load.answers) > n_before + 12, 60)

    with Load(served, 6) as load:
        for n in (1, 2):
            scale(n)
    assert all(is_whole for _, _, is_whole in load.answers)
    check(load.answers, alone)


# Commands


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A program in the clone, which is ended with the block if it has not ended."""
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    pipes["start_new_session"] = True
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, **pipes)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.slow
def test_the_command_serves_replicas_until_a_signal() -> None:
    flags = ("--replicas", "2", "--device", "cpu", "--port", "0")
    with started(sys.executable, "-m", "orthrus_fast", "serve", *flags) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://\S+)/$", line.strip())
        assert found is not None, line + process.stdout.read()
        until(lambda: httpx.get(f"{found[1]}/health").json()["replicas"] == 2, 60)
        body = chat(TABLES[0], max_tokens=200, temperature=5, seed=1, mode="ar", stream=True)
        url = f"{found[1]}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert "data: [DONE]" in list(lines)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and output in ("", "Ctrl-C ends the server\n")


@pytest.mark.slow
def test_replicas_that_do_not_start_say_why(tmp_path: Path) -> None:
    flags = ("--replicas", "2", "--device", "cpu", "--port", "0", "--checkpoint", str(tmp_path))
    with started(sys.executable, "-m", "orthrus_fast", "serve", *flags) as process:
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 2 and "config.json: file not found" in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_config_file_runs_as_it_stands(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "replicas.yaml").read_text(encoding="utf-8")
    port = free_port()
    (tmp_path / "replicas.yaml").write_text(text.replace("port: 8000", f"port: {port}"))
    url = f"http://127.0.0.1:{port}"
    script = str(Path(sys.executable).with_name("serve"))
    with started(script, "run", str(tmp_path / "replicas.yaml")):
        until(lambda: answers(f"{url}/health"), 90)
        served = Served(url)
        until(lambda: n_replicas(served) == 2, 60)
        text, is_whole = stream(served, chat(TABLES[0], stream=True, temperature=0))
        assert is_whole and json.loads(text)
        check_leaving(served)
        assert httpx.get(url, headers={"Host": "example.org"}).status_code == 403


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def test_the_config_file_of_gpus_has_known_arguments(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "docs" / "replicas-gpus.yaml").read_text(encoding="utf-8"))
    schema = ServeDeploySchema.model_validate(config)
    [application] = schema.applications
    assert application.args["host"] == schema.http_options.host == "0.0.0.0"
    assert {one.name for one in application.deployments} == {"Ingress", "Replica"}
    (tmp_path / "keys").write_text("a-key-of-some-length\n")
    replicas.build({**application.args, "api_key_file": str(tmp_path / "keys")})


def results_of(path: Path) -> list[Any]:
    """A results file, its results by their place among the prompts, without how they came about.

    That is times, and the cycles: how wide a draft is depends on times, too.
    """
    header, *lines = (json.loads(line) for line in path.read_text(encoding="ascii").splitlines())
    results = sorted(lines, key=lambda one: one["index"])
    for one in results:
        one["stats"] = one["stats"]["prompt_tokens"]
    return [header, *results]


@pytest.mark.slow
def test_ray_data_writes_what_one_machine_writes(tmp_path: Path) -> None:
    lines = (ROOT / "model" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:9]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = ["--prompts-file", str(tmp_path / "prompts.jsonl"), "--device", "cpu", "--slots", "2"]
    flags += ["--max-new-tokens", "24", "--temperature", "0.7", "--seed", "5"]

    def run(module: str, output: str) -> list[Any]:
        command = [sys.executable, "-m", module, *flags, "--output", str(tmp_path / output)]
        command[3:3] = ["generate"] if module == "orthrus_fast" else []
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=120)
        return results_of(tmp_path / output)

    expected = run("orthrus_fast", "one.jsonl")
    assert run("scripts.batch_on_ray", "many.jsonl") == expected and len(expected) == 10
    whole = (tmp_path / "many.jsonl").read_text(encoding="ascii")
    cut = whole[: whole.index("\n", len(whole) // 2) + 20]  # as a run that is killed leaves it
    (tmp_path / "many.jsonl").write_text(cut)
    assert run("scripts.batch_on_ray", "many.jsonl") == expected
    assert (tmp_path / "many.jsonl").read_text(encoding="ascii").startswith(cut[:-20])
