"""hub.py against a small Hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.errors import CheckpointError
from tests.checkpoints import edit_json, edit_weight_map, kernels_for, write_checkpoint
from tests.marks import slow_but

# What asks it is another process, because huggingface_hub reads its environment when imported.


class FakeHub(ThreadingHTTPServer):
    """Serves ``repositories``: name -> commit -> directory; ``main`` has the branch's commits."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.repositories: dict[str, dict[str, Path]] = {}
        self.main: dict[str, list[str]] = {}  # what each look at main finds; the last one stays
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, directory: Path, commit: str = "a" * 40) -> None:
        self.repositories.setdefault(name, {})[commit] = directory
        self.main.setdefault(name, []).append(commit)


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {'/'.join(parts)}")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        name, verb, revision, *rest = "/".join(parts[:2]), *parts[2:], *(["", ""])
        if name == "org/broken":
            return self.refuse(500, "Oops")
        if name not in self.server.repositories:
            return self.refuse(401, "RepoNotFound")
        if revision in ("main", ""):
            looks = self.server.main[name]
            revision = looks.pop(0) if len(looks) > 1 else looks[0]
        directory = self.server.repositories[name].get(revision)
        if directory is None:
            return self.refuse(404, "RevisionNotFound")
        found = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        files = {path.relative_to(directory).as_posix(): path for path in found}
        if verb == "tree":
            return self.answer(
                [
                    {"type": "file", "path": n, "size": f.stat().st_size, "oid": self.etag(f)}
                    for n, f in files.items()
                ]
            )
        if api:
            siblings = [{"rfilename": n, "size": f.stat().st_size} for n, f in files.items()]
            return self.answer({"id": name, "sha": revision, "siblings": siblings})
        if name == "org/gated":
            return self.refuse(403, "GatedRepo")
        file = files["/".join(rest).strip("/")]
        self.answer(file.read_bytes(), X_Repo_Commit=revision, ETag=f'"{self.etag(file)}"')

    do_HEAD = do_GET

    @staticmethod
    def etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()


CLIENT = """
import json, logging, sys
from orthrus_fast.checkpoint import open_checkpoint
from orthrus_fast.errors import CheckpointError
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("orthrus_fast").addHandler(handler)
logging.getLogger("orthrus_fast").setLevel(logging.INFO)
assert "huggingface_hub" not in sys.modules
answers = []
for repository, revision in json.loads(sys.argv[1]):
    lines.clear()
    try:
        found = open_checkpoint(repository, revision=revision)
        answers.append([found.commit, str(found.directory), list(lines)])
    except CheckpointError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask(
    cache: Path, endpoint: str, *repositories: tuple[str, str | None], **environment: str
) -> list[Any]:
    """What ``open_checkpoint`` finds or says of each repository, in a fresh process."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    env |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.getcwd(), **environment}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(repositories)],
        env=env,
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answers: list[Any] = json.loads(result.stdout)
    assert all(answer.isprintable() for answer in answers if isinstance(answer, str))
    return answers


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    server = FakeHub()
    for n_shards, name in ((1, "org/single"), (3, "org/sharded"), (1, "org/gated")):
        path = write_checkpoint(root / name, n_shards=n_shards, tokenizer=True)
        for extra in ("README.md", "pytorch_model.bin", "other.safetensors", "modeling.py"):
            (path / extra).write_text("not for us")
        (path / "additional_chat_templates").mkdir()
        (path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
        server.add(name, path)
    server.add("org/sharded", write_checkpoint(root / "newer", seed=1), "b" * 40)
    path = write_checkpoint(root / "pickled")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    server.add("org/pickled", path)
    path = write_checkpoint(root / "hostile", n_shards=2)
    edit_weight_map(path, model__norm__weight="../../refs/main")
    server.add("org/hostile", path)
    path = write_checkpoint(root / "foreign")
    edit_json(path / "config.json", model_type="llama")
    server.add("org/foreign", path)
    server.add("org/empty", write_checkpoint(root / "empty"))
    (root / "empty" / "config.json").unlink()
    for name in ("org/gguf", "org/gguf-with-config"):
        (root / name).mkdir(parents=True)
        (root / name / "model-Q8_0.gguf").write_text("GGUF")
        server.add(name, root / name)
    (root / name / "config.json").write_text((root / "hostile" / "config.json").read_text())
    yield server
    server.shutdown()
    server.server_close()


def look_again(hub: FakeHub, cache: Path, single: list[Any], newer: list[Any]) -> None:
    """What is there already is not fetched again, and needs no network."""
    hub.requests.clear()
    again, absent = ask(cache, hub.url, ("org/single", None), ("org/single", "v9"))
    assert again == [*single[:2], []] and "org/single: no revision 'v9'" in absent
    assert not [line for line in hub.requests if "resolve" in line]

    wanted = (("org/single", None), ("org/sharded", "b" * 40), ("org/empty", None))
    found, pinned, absent = ask(cache, "http://127.0.0.1:9", *wanted)
    assert found == [*single[:2], []] and pinned == [*newer[:2], []]
    assert absent.startswith("org/empty: cannot be fetched (ConnectError: [Errno 111]")
    assert "check the network, or give a local directory" in absent


@pytest.mark.parametrize("whole", slow_but([False], [False, True]))
def test_the_hub_then_its_cache(hub: FakeHub, tmp_path: Path, whole: bool) -> None:
    """Downloads, then the same cache without network and in offline mode; a process for each."""
    single, sharded, newer = ask(
        tmp_path, hub.url, ("org/single", None), ("org/sharded", None), ("org/sharded", "b" * 40)
    )
    snapshots = tmp_path / "hub" / "models--org--single" / "snapshots"
    assert single[:2] == ["a" * 40, str(snapshots / ("a" * 40))]
    assert single[2] == [f"downloading org/single at commit {'a' * 40}: 0.2 MB of weights"]
    assert newer[0] == "b" * 40
    found = (path for path in Path(single[1]).rglob("*") if path.is_file())
    names = sorted(path.relative_to(single[1]).as_posix() for path in found)
    texts = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names == ["additional_chat_templates/tool_use.jinja", *texts]
    # main moved on after the first look at it: all files are still of that first commit.
    assert sharded[0] == "a" * 40 and len(list(Path(sharded[1]).glob("*.safetensors"))) == 3
    assert not [line for line in hub.requests if "modeling.py" in line or ".bin" in line]
    cpu = torch.device("cpu")
    kernels = kernels_for("sdpa", cpu, torch.float32, 16)
    load_model(open_checkpoint(Path(sharded[1])), kernels, device=cpu, dtype=torch.float32)

    if whole:
        look_again(hub, tmp_path, single, newer)
    wanted = (("org/single", None), ("org/sharded", "b" * 40), ("org/empty", None))
    hub.requests.clear()
    for blob in (tmp_path / "hub" / "models--org--single" / "blobs").iterdir():
        if blob.stat().st_size > 50_000:
            blob.unlink()  # the weights: an interrupted download leaves such a snapshot
    partial, pinned, absent = ask(tmp_path, hub.url, *wanted, HF_HUB_OFFLINE="1")
    assert pinned == [*newer[:2], []] and not hub.requests
    for name, answer in (("org/single", partial), ("org/empty", absent)):
        assert answer.startswith(f"{name}: not (wholly) in the cache {tmp_path}/hub")
        assert "HF_HUB_OFFLINE" in answer and "give a local directory" in answer


def test_what_the_hub_refuses(hub: FakeHub, tmp_path: Path) -> None:
    names = ("absent", "gated", "pickled", "hostile", "foreign", "empty", "broken", "a..b")
    names += ("gguf", "gguf-with-config")
    answers = ask(tmp_path, hub.url, *((f"org/{name}", None) for name in names))
    found = dict(zip(names, answers, strict=True))
    assert found["absent"].startswith("org/absent: no such repository, or a private one")
    assert found["gated"].startswith("org/gated: access is restricted; accept the terms at ")
    assert "org/pickled: has only pickled weights (pytorch_model.bin)" in found["pickled"]
    assert "weight_map: ../../refs/main is not a .safetensors file" in found["hostile"]
    assert "config.json: model_type: 'llama' is not supported" in found["foreign"]
    assert found["empty"].endswith("config.json: file not found")
    assert found["broken"].startswith("org/broken: cannot be fetched (")
    assert found["a..b"].startswith("org/a..b: not a Hub repository of the form org/name")
    for name in ("gguf", "gguf-with-config"):
        assert found[name].startswith(f"org/{name}: GGUF (model-Q8_0.gguf) is llama.cpp's format")
    downloaded = [line for line in hub.requests if line.startswith("GET org/foreign/resolve")]
    assert downloaded == [f"GET org/foreign/resolve/{'a' * 40}/config.json"]


@pytest.mark.parametrize("asks_the_hub", [False, True])
def test_a_commit_in_the_cache_of_an_older_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asks_the_hub: bool
) -> None:
    """No refs, no listing of the commit's files; huggingface_hub 2.0 looks for that one first."""
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    write_checkpoint(snapshot, tokenizer=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if asks_the_hub:

        def ask_the_hub(*_: Any, **__: Any) -> str:
            raise errors.OfflineModeIsEnabled("offline mode is enabled")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", ask_the_hub)
    found = open_checkpoint("org/name", revision=commit)
    assert (found.directory, found.commit) == (snapshot, commit)
    for repository, revision in (("org/name", "9" * 40), ("org/other", commit)):
        with pytest.raises(CheckpointError, match=r"not \(wholly\) in the cache .* HF_HUB_OFFLINE"):
            open_checkpoint(repository, revision=revision)
