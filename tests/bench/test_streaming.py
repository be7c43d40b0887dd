"""The bytes that a pass reads, counted by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.bench.streaming import bytes_read, shares
from orthrus_fast.model import Transformer


# Every matrix that a token passes through: qkv, o, gate and up, down of each layer; the head.
@pytest.mark.parametrize(
    ("shape", "layer", "n_layers", "head", "gigabytes"),
    [
        ("1.7B", 4096 * 2048 + 2048 * 2048 + 3 * 2048 * 6144, 28, 151936 * 2048, 3.44),
        ("4B", 6144 * 2560 + 4096 * 2560 + 3 * 2560 * 9728, 36, 151936 * 2560, 8.04),
        ("8B", 6144 * 4096 + 4096 * 4096 + 3 * 4096 * 12288, 36, 151936 * 4096, 15.14),
    ],
)
def test_streamed_bytes_are_those_counted_by_hand(
    shape: str, layer: int, n_layers: int, head: int, gigabytes: float
) -> None:
    config, nothing = shape_config(shape), SimpleNamespace()
    with torch.device("meta"):
        model = Transformer(config, nothing, True).to(torch.bfloat16)  # type: ignore[arg-type]
    session: Any = SimpleNamespace(
        runner=SimpleNamespace(model=model),
        decoder=SimpleNamespace(slots=2, config=config),
        width=32,
    )
    for stack in (model.verifier, model.drafter):
        assert stack is not None
        read = bytes_read(session, stack, 968)
        assert read["weights_bytes"] == 2 * (n_layers * layer + head)
        assert round(read["weights_bytes"] / 1e9, 2) == gigabytes
        assert read["cache_bytes"] == 2 * (2 * n_layers * 8 * 128 * 1000 * 2)


def test_shares_by_hand() -> None:
    found = shares({"weights_bytes": 2e9, "cache_bytes": 5e8}, ms=2.0, rate=2.5e12)
    assert found["share_by_weights"] == pytest.approx(0.4)
    assert found["share_by_weights_and_cache"] == pytest.approx(0.5)
