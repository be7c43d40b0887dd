"""A model that all tests of the engine share, and what its requests are told alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.solo import Solo, load, skip_without_one_row, write_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("tiny") / "model")
    skip_without_one_row(directory)
    return directory


@pytest.fixture(scope="module")
def solo(tiny: Path) -> Solo:
    return Solo(load(tiny, prefix_reuse=False))
