"""Commands under torchrun: all its processes share the model, of which the first one speaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from orthrus_fast.cli.main import main
from orthrus_fast.launch import launched
from tests.checkpoints import write_checkpoint
from tests.cli.test_generate import ROOT, Run, assert_refused, run
from tests.conftest import CHAT
from tests.processes import children_of, free_port, wait_for_end
from tests.ranks import ThreadRanks, decoder_of, on_ranks

SLOW = pytest.mark.slow
TWO = ("--tensor-parallel", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared") / "my-model"
    shape = {"num_attention_heads": 8, "intermediate_size": 256}
    write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=[], **shape)
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory


def place(monkeypatch: pytest.MonkeyPatch, rank: int, size: int = 2) -> None:
    """Make this process one of torchrun's; what it closes is put back at the end."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "x"], "torchrun started 4 processes; --tensor-parallel 4 has them share"),
        (["chat"], "torchrun started 4 processes"),
        (["serve", "--port", "0"], "torchrun started 4 processes"),
        (["serve", "--replicas", "2", *TWO], "--replicas does not go with torchrun"),
        (["serve", "--port", "0", *TWO], "2, but torchrun started 4 processes"),
    ],
)
def test_processes_that_cannot_share_are_refused_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, rank=0, size=4)
    assert_refused(run(capsys, *words), said)


def test_a_chat_on_a_terminal_keeps_its_ctrl_c(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, rank=0)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert_refused(run(capsys, "chat", *TWO), "chat: under torchrun", "without it")


def test_tuning_is_for_one_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, rank=0)
    assert main(["tune"]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["info"], ["--version"], ["generate", "--no-such-flag"]])
def test_a_process_beside_the_first_prints_nothing(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place(monkeypatch, rank=1)
    assert main(words) == (2 if "--no-such-flag" in words else 0)
    assert capfd.readouterr() == ("", "")


def test_a_cluster_that_numbers_its_hosts_is_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    place(monkeypatch, rank=1, size=4)
    assert launched() == (1, 4)
    monkeypatch.delenv("LOCAL_RANK")
    assert launched() == (0, 1)


# Processes


class Torchrun:
    """Two processes of a command."""

    def __init__(self, *words: str, program: str = "orthrus_fast", text: str | None = None) -> None:
        of_two = ("--standalone", "--nproc-per-node", "2", "-m", program)
        command = [sys.executable, "-m", "torch.distributed.run", *of_two, *words]
        pipes: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.text = text

    def end(self, number: int | None = None) -> Run:
        """What was printed, once all have ended, after a signal if there is to be one."""
        children = children_of(self.process.pid)
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(self.text, timeout=120)
        for child in children:
            wait_for_end(child)
        return Run(code=self.process.returncode, out=out, err=err)


def errors_of(done: Run) -> list[str]:
    """Lines that are not torchrun's own."""
    return [line for line in done.err.splitlines() if line.startswith(("error", "rank", "ERROR"))]


def texts(directory: Path, *prompts: str) -> list[list[int]]:
    """Answers of one process, with the same products as several have."""

    def generate(ranks: ThreadRanks) -> Any:
        results = decoder_of(directory, ranks, max_seq_len=512).generate(list(prompts), 9)
        return [result.tokens for result in results]

    [found] = on_ranks(1, generate)
    return list(found)


@SLOW
def test_one_prompt(checkpoint: Path) -> None:
    flags = ("--checkpoint", str(checkpoint), "--raw", "--max-new-tokens", "9", "--json")
    done = Torchrun("generate", *TWO, *flags, text="abc").end()
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    found = json.loads(lines[-1])
    assert [found["tokens"]] == texts(checkpoint, "abc")
    assert done.out.count('"configuration"') == 1 == done.err.count("tokens per cycle")


@SLOW
def test_a_file_of_prompts(checkpoint: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text('{"ids": [97, 98]}\n{"ids": [99]}\n')
    flags = ("--prompts-file", str(prompts), "--output", str(output), "--max-new-tokens", "9")
    done = Torchrun("generate", *TWO, "--checkpoint", str(checkpoint), *flags).end()
    assert done.code == 0 and done.out == "" and done.err.count("2 prompts") == 1, done.err
    _, *results = map(json.loads, output.read_text().splitlines())
    by_index = {result["index"]: result["tokens"] for result in results}
    assert len(results) == 2 and [by_index[0], by_index[1]] == texts(checkpoint, "ab", "c")


@SLOW
def test_a_chat(checkpoint: Path) -> None:
    flags = ("--checkpoint", str(checkpoint), "--max-new-tokens", "9")
    done = Torchrun("chat", *TWO, *flags, text="ab\ncd\n").end()
    assert done.code == 0 and done.err.count("tokens per cycle") == 2, done.err


@SLOW
def test_the_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    flags = ("--shape", "tiny", "--parts", "identity", "--new-tokens", "12", "--json", str(path))
    done = Torchrun("bench", *TWO, "--max-seq-len", "200", *flags).end()
    assert done.code == 0 and done.out.count("cache rows differing") == 1, done.err
    part = json.loads(path.read_text())["parts"]["identity"]
    assert part["cache_rows"] > 0 == part["cache_rows_differing"] == part["rows_differing"]
    assert done.err.count("partial sums") == 1  # the warning


@SLOW
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "--prompt", ""], "prompt: empty"),
        (["generate", "--prompt", "x", "--checkpoint", "nowhere"], "nowhere"),
        (["serve", "--host", "no such host"], "no such host"),
    ],
)
def test_an_error_before_or_while_loading_ends_all(words: list[str], said: str) -> None:
    done = Torchrun(*words, *TWO).end()
    [line] = errors_of(done)
    assert said in line and done.code == 1 and done.out == ""
    assert "forcefully exiting" not in done.err  # as torchrun ends those that do not by themselves


class Served(Torchrun):
    """``serve`` with a text on its way."""

    def __init__(self, checkpoint: Path) -> None:
        port = str(free_port())  # which one process alone can have
        super().__init__("serve", "--port", port, *TWO, "--checkpoint", str(checkpoint))
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"at (http://\S+)/$", line.strip())
        assert found is not None, line or self.process.communicate()[1]
        self.url = f"{found[1]}/v1/completions"

    def stream(self, n: int) -> Any:
        body = {"prompt": "x", "max_tokens": n, "stream": True, "mode": "ar"}
        return httpx.stream("POST", self.url, json=body, timeout=60)


@SLOW
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_is_one_and_ends_at_a_signal(checkpoint: Path, number: int) -> None:
    served = Served(checkpoint)
    for mode in ("ar", "diffusion"):
        body = {"prompt": "abc", "max_tokens": 9, "mode": mode, "temperature": 0}
        answer = httpx.post(served.url, json=body, timeout=60).json()
        [tokens] = texts(checkpoint, "abc")
        assert answer["choices"][0]["text"] == bytes(tokens).decode(errors="replace")
    with served.stream(300) as response:
        lines = response.iter_lines()
        next(lines)
        done = served.end(number)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert done.out == "" and errors_of(done) == []
    assert done.err.count("Ctrl-C ends the server") == 1


@SLOW
def test_a_rank_that_dies_ends_the_server(checkpoint: Path) -> None:
    served = Served(checkpoint)
    with served.stream(400) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(other_rank(served), signal.SIGKILL)
        events = [line for line in lines if line]
    assert "rank 1 has ended" in events[-1]
    done = served.end()
    assert done.out == "" and errors_of(done) == []


def other_rank(torchrun: Torchrun) -> int:
    """The process of rank 1."""
    [found] = [
        child
        for child in children_of(torchrun.process.pid)
        if b"\0RANK=1\0" in Path(f"/proc/{child}/environ").read_bytes()
    ]
    return found
