"""Settings of every test run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from orthrus_fast import matching
from tests.checkpoints import write_checkpoint

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if enable_thinking is defined %}[thinking {{ enable_thinking }}]{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny products gain nothing from threads, and lose seconds where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def ctrl_c() -> None:
    """A background job of a script ignores it, and so would every program that a test starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine refuses no grammar."""
    monkeypatch.setattr(matching, "PATIENCE", 120.0)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a byte tokenizer and no chat template."""
    directory = tmp_path_factory.mktemp("raw") / "model"
    return write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=[])


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chat") / "model"
    write_checkpoint(directory, seed=3, tokenizer=True, eos_token_id=[])
    (directory / "chat_template.jinja").write_text(CHAT)
    return directory
