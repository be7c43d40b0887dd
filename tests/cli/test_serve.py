"""orthrus serve: what it refuses before it loads, what it answers, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orthrus_fast.cli.serve import OF_RAY
from orthrus_fast.errors import RequestError
from orthrus_fast.fingerprint import fingerprint
from orthrus_fast.server.access import read_keys
from orthrus_fast.server.protocol import served_name
from tests.cli.test_generate import ROOT, assert_refused, run
from tests.engine.solo import load
from tests.server.serving import until, write_chatting

KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chatting(tmp_path_factory.mktemp("chatting") / "my-model")


def test_a_host_that_others_reach_needs_a_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORTHRUS_API_KEY", raising=False)
    assert_refused(run(capsys, "serve", "--host", "0.0.0.0"), "ORTHRUS_API_KEY", "--api-key-file")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--api-key", KEY], "--api-key-file, or ORTHRUS_API_KEY"),
        (["--port", "70000"], "--port 70000 is out of range"),
        (["--replicas", "0"], "--replicas 0 is out of range"),
        (["--replicas", "2", "--device", "cuda:1"], "--device cuda:1 does not go with --replicas"),
        (["--max-waiting", "-1"], "--max-waiting -1 is out of range"),
        (["--host", "no such host"], "no such host"),
        (["--temperature", "1"], "--temperature: no such flag here"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_flags_are_refused_before_loading(
    capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert_refused(run(capsys, "serve", *flags), said)


def test_replicas_need_ray(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*OF_RAY, "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "x")  # what the command sets in place of it ends with the test
    monkeypatch.delitem(sys.modules, "orthrus_fast.server.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run(capsys, "serve", "--replicas", "2", "--port", "0", "--device", "cpu")
    assert_refused(done, "ray is not installed", "'.[ray]'")


def test_a_port_that_is_taken_is_said_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(run(capsys, "serve", "--port", port), f"--port {port}", "in use")


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# mine\n{KEY}\n\n other-key-0123456789 \n")
    monkeypatch.setenv("ORTHRUS_API_KEY", "from-the-environment")
    assert read_keys(str(file)) == (KEY, "other-key-0123456789")
    assert read_keys(None) == ("from-the-environment",)
    monkeypatch.setenv("ORTHRUS_API_KEY", "")
    assert read_keys(None) == ()
    file.write_text("# none\n")
    with pytest.raises(RequestError, match="no key in it"):
        read_keys(str(file))


def test_a_models_name_tells_no_path(checkpoint: Path) -> None:
    assert served_name(None) == "embedded"
    assert served_name(str(checkpoint)) == "my-model"
    assert served_name("chiennv/Orthrus-Qwen3-1.7B") == "chiennv/Orthrus-Qwen3-1.7B"


def test_the_fingerprint_is_of_what_decides_texts(checkpoint: Path, tmp_path: Path) -> None:
    one = fingerprint(load(checkpoint))
    assert re.fullmatch("fp_[0-9a-f]{12}", one)
    assert fingerprint(load(checkpoint, slots=3, max_seq_len=100, block_size=4)) == one
    other = write_chatting(tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert fingerprint(load(other)) != one
    wider = load(checkpoint)
    wider.configuration["dtype"] = "bfloat16"
    assert fingerprint(wider) != one


class Served:
    """``orthrus serve`` as a process."""

    def __init__(self, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "orthrus_fast", "serve", "--port", "0", *flags]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        how: Any = {"cwd": ROOT, "env": variables, "start_new_session": True, **pipes}
        self.process = subprocess.Popen(command, **how)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"at (http://\S+)/$", line.strip())
        assert found is not None, line or self.process.communicate()[1]
        self.url = found[1]

    @contextlib.contextmanager
    def streaming(self, max_tokens: int) -> Iterator[Iterator[str]]:
        """The lines of a text of one token a cycle, of which the first one has come."""
        body = {"prompt": "x", "max_tokens": max_tokens, "stream": True, "mode": "ar"}
        url = f"{self.url}/v1/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            yield lines

    def end(self, number: int) -> tuple[int, str]:
        """The exit code after a signal, and standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_end_and_exits_with_0(checkpoint: Path, number: int) -> None:
    served = Served("--checkpoint", str(checkpoint), "--device", "cpu")
    with served.streaming(max_tokens=400) as lines:
        code = served.end(number)
        events = [line for line in lines if line]
    assert code[0] == 0, code
    assert events[-1] == "data: [DONE]"
    tokens = [json.loads(line[6:])["choices"][0]["orthrus"]["n_tokens"] for line in events[:-1]]
    assert sum(tokens) >= 399
    assert "Traceback" not in code[1]


def test_a_second_ctrl_c_ends_the_server_at_once(checkpoint: Path) -> None:
    """A terminal sends it to both processes."""
    served = Served("--checkpoint", str(checkpoint), "--device", "cpu")
    with served.streaming(max_tokens=1500) as lines:
        os.killpg(served.process.pid, signal.SIGINT)
        until(lambda: not listens(served.url))
        os.killpg(served.process.pid, signal.SIGINT)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    assert served.process.wait(20) == 0
    assert served.process.communicate()[1] == "Ctrl-C ends the server\n"


def test_nothing_is_left_of_a_server_whose_decoder_dies(checkpoint: Path) -> None:
    served = Served("--checkpoint", str(checkpoint), "--device", "cpu")
    with served.streaming(max_tokens=1500) as lines:
        served.process.kill()
        assert "the process that has the decoder has ended" in [line for line in lines if line][-1]
    until(lambda: not listens(served.url))
    served.process.communicate(timeout=20)  # the front holds its outputs


def listens(url: str) -> bool:
    """Quick, for a text that is decoded meanwhile must not end before."""
    try:
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_readmes_examples_work_against_the_embedded_model() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    curl = re.search(r"^curl .*?\n```", readme, re.MULTILINE | re.DOTALL)
    client = re.search(r"```python\n(from openai.*?)```", readme, re.DOTALL)
    assert curl is not None and client is not None
    served = Served("--device", "cpu")
    here = served.url.removeprefix("http://")
    commands = (
        ["bash", "-c", curl[0].removesuffix("```").replace("127.0.0.1:8000", here)],
        [sys.executable, "-c", client[1].replace("127.0.0.1:8000", here)],
    )
    outputs = [subprocess.check_output(one, text=True, timeout=60) for one in commands]
    assert served.end(signal.SIGTERM) == (0, "Ctrl-C ends the server\n")
    told = json.loads(outputs[0])["choices"][0]["message"]["content"]
    assert json.loads(told) == [{"name": "Ann", "age": 31}, {"name": "Bob", "age": 45}]
    assert outputs[1] == told
