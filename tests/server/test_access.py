"""Who may ask, and what a server does with bodies that are no requests."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from orthrus_fast.errors import RequestError
from orthrus_fast.server import app
from orthrus_fast.server.access import Access, policy_of
from tests.server.serving import Running, load, serving, write_chatting

BODY: Any = {"prompt": [3, 4], "max_tokens": 2}
KEYS = ("first-key-0123456789", "second-key-0123456789")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatting(tmp_path_factory.mktemp("chatting") / "model")


@pytest.fixture(scope="module")
def running(checkpoint: Path) -> Iterator[Running]:
    with serving(load(checkpoint)) as running:
        yield running


@pytest.fixture(scope="module")
def locked(checkpoint: Path) -> Iterator[Running]:
    with serving(load(checkpoint), access=Access(keys=KEYS)) as running:
        yield running


def message_of(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


# Hosts and origins


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil:80"]
)
def test_another_name_in_the_host_header_is_refused(running: Running, host: str) -> None:
    response = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
    assert response.status_code == 403 and "--allowed-host" in message_of(response)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:80"])
def test_loopbacks_names_are_answered(running: Running, host: str) -> None:
    response = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
    assert response.status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://"])
@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/v1/completions"])
def test_a_page_of_another_site_is_refused(running: Running, origin: str, path: str) -> None:
    response = httpx.request("POST", f"{running.url}{path}", json=BODY, headers={"Origin": origin})
    assert response.status_code == 403 and "another site" in message_of(response)


def test_the_servers_own_page_may_ask(running: Running) -> None:
    headers = {"Origin": running.url}
    assert running.post("/v1/completions", BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "text/json"]
)
def test_what_a_form_can_send_is_no_request(running: Running, kind: str) -> None:
    headers = {"Content-Type": kind}
    url = f"{running.url}/v1/completions"
    response = httpx.post(url, content=json.dumps(BODY), headers=headers)
    assert response.status_code == 415


def test_hosts_that_were_named_are_answered() -> None:
    access = Access(hosts=("Model.local",))
    assert access.refusal("/", {b"host": b"model.local:8000"}) is None
    everywhere = Access("0.0.0.0", KEYS)
    assert everywhere.refusal("/", {b"host": b"any.example"}) is None
    named = Access("0.0.0.0", KEYS, ("model.local",))
    assert named.refusal("/", {b"host": b"any.example"}) is not None


# Keys


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/completions", "/nowhere"])
@pytest.mark.parametrize("given", [None, "Bearer wrong-key-0123456789", "Bearer", "Basic x"])
def test_nothing_but_the_page_and_health_is_open(
    locked: Running, path: str, given: str | None
) -> None:
    headers = {} if given is None else {"Authorization": given}
    response = httpx.get(f"{locked.url}{path}", headers=headers)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


def test_a_key_opens_the_server(locked: Running) -> None:
    for key in KEYS:
        assert locked.client(key).models.list().data[0].id == "tiny"
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{locked.url}/metrics", headers=headers).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        locked.client("wrong").models.list()
    assert httpx.get(f"{locked.url}/").status_code == 200
    assert httpx.get(f"{locked.url}/health").json() == {"status": "ok"}


def test_cached_rows_are_shared_by_requests_of_one_key_alone(locked: Running) -> None:
    """Else the time of an answer would tell what others have asked."""
    prompt: Any = [*range(50, 150)]

    def cached(key: str) -> int:
        how = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
        usage: Any = locked.client(key).completions.create(**how).usage  # type: ignore
        return int(usage.prompt_tokens_details.cached_tokens)

    assert [cached(KEYS[0]), cached(KEYS[1]), cached(KEYS[1])] == [0, 0, 99]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "model.local"])
def test_others_need_a_key(host: str) -> None:
    with pytest.raises(RequestError, match="ORTHRUS_API_KEY"):
        Access(host)
    Access(host, KEYS)


@pytest.mark.parametrize("key", ["short", "with a space in it!", "schlüssel-schlüssel", "x\n" * 10])
def test_a_key_is_long_and_plain(key: str) -> None:
    with pytest.raises(RequestError, match="16 characters"):
        Access(keys=(key,))


# Bodies

GARBAGE = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[1, 2]",
    b"null",
    b'{"prompt": "\\ud800"}',
    b'{"prompt": NaN}',
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": [1, "x"]}',
    b'{"prompt": [-1]}',
    b'{"prompt": [99999999999999999999999]}',
    b'{"prompt": [true]}',
    b'{"prompt": "x", "seed": 1e400}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "n": 1000000}',
    b'{"prompt": {"a": 1}}',
    b'{"prompt": []}',
    b'{"prompt": ["", ""]}',
]


@pytest.mark.parametrize("content", GARBAGE, ids=lambda content: repr(content)[:30])
def test_garbage_is_refused_in_words(running: Running, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{running.url}/v1/completions", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert 5 < len(message_of(response)) < 1100


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_long_is_refused(running: Running, chunked: bool) -> None:
    whole = b'{"prompt": "' + b"x" * (app.MAX_BODY + 2**21) + b'"}'
    parts = (whole[i : i + 2**20] for i in range(0, len(whole), 2**20))
    headers = {"Content-Type": "application/json"}
    url = f"{running.url}/v1/completions"
    response = httpx.post(url, content=parts if chunked else whole, headers=headers, timeout=30)
    assert response.status_code == 413


def test_a_long_prompt_within_the_limit_is_refused_with_the_arithmetic(running: Running) -> None:
    response = running.post("/v1/completions", {"prompt": "x" * 10**6})
    assert response.status_code == 400
    assert "1000000 tokens + max_new_tokens 16 = 1000016" in message_of(response)


def test_a_body_must_come_in_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    host, port = running.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n{{".encode())
        connection.settimeout(10)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def test_unknown_paths_and_methods_are_errors_of_the_same_form(running: Running) -> None:
    assert "Not Found" in message_of(httpx.get(f"{running.url}/v1/embeddings"))
    assert httpx.get(f"{running.url}/v1/completions").status_code == 405
    assert httpx.get(f"{running.url}/docs").status_code == 404
    assert httpx.get(f"{running.url}/openapi.json").status_code == 404


# The page


def test_the_page_may_do_nothing_but_ask_this_server(running: Running) -> None:
    response = httpx.get(f"{running.url}/")
    policy = response.headers["content-security-policy"]
    assert policy == policy_of(response.text)
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert response.headers["x-content-type-options"] == "nosniff"


def test_no_text_becomes_markup_on_the_page(running: Running) -> None:
    page = httpx.get(f"{running.url}/").text
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|srcdoc"
    assert re.findall(markup, page) == []
    assert re.findall(r"\son\w+=", page) == [] and "style=" not in page
    assert re.findall(r"(?:src|href)=|url\(|@import|https?://", page) == []
