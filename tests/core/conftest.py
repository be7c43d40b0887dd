"""The grammars of the embedded checkpoint's tokenizer."""

from __future__ import annotations

import pytest

from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.matching import Grammars
from orthrus_fast.tokenizer import Tokenizer
from tests.embedded import EOS, VOCAB


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(embedded_checkpoint())


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB, [EOS])
