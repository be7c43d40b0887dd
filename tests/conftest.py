"""Settings of every test run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny products gain nothing from threads, and lose seconds where cores are shared."""
    torch.set_num_threads(1)
