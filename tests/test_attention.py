"""Every attention backend against a dense computation in float64, and its rows' invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orthrus_fast.attention import find_backend
from orthrus_fast.errors import UnsupportedError

BACKENDS = ["sdpa"]
CAPACITY = 1088


def dense(q: Tensor, k: Tensor, v: Tensor, start: int, causal: bool) -> Tensor:
    """One sequence, one head at a time: q [T, H, D], k and v [KV, S, D]."""
    width, n_heads, head_dim = q.shape
    out = torch.empty_like(q)
    for t in range(width):
        n_visible = start + t + 1 if causal else start + width
        for head in range(n_heads):
            keys = k[head * k.shape[0] // n_heads, :n_visible]
            values = v[head * k.shape[0] // n_heads, :n_visible]
            out[t, head] = (keys @ q[t, head] / head_dim**0.5).softmax(0) @ values
    return out


def make_inputs(
    n_rows: int, width: int, n_slots: int, dtype: torch.dtype, n_heads: int = 4, n_kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(width * 7 + n_rows)
    q = torch.randn(n_rows, width, n_heads, 16, dtype=dtype)
    k = torch.randn(n_slots, n_kv_heads, CAPACITY, 16, dtype=dtype)
    return q, k, torch.randn_like(k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [0, 1, 62, 63, 64, 500, 511, 512, 513, 1023, 1024, CAPACITY - 5])
def test_matches_dense_attention(backend: str, causal: bool, start: int) -> None:
    _, attend = find_backend(backend)
    q, k, v = make_inputs(1, 5, 1, torch.float64)
    got = attend(q, k, v, torch.tensor([start]), torch.tensor([0]), causal=causal)
    assert torch.allclose(got[0], dense(q[0], k[0], v[0], start, causal), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads_and_slots_of_different_lengths(
    backend: str, n_heads: int, n_kv_heads: int
) -> None:
    _, attend = find_backend(backend)
    q, k, v = make_inputs(3, 4, 5, torch.float64, n_heads, n_kv_heads)
    start, slot = torch.tensor([7, 600, 0], dtype=torch.int32), torch.tensor([4, 0, 2])
    for causal in (True, False):
        got = attend(q, k, v, start, slot, causal=causal)
        for r in range(3):
            s = int(slot[r])
            expected = dense(q[r], k[s], v[s], int(start[r]), causal)
            assert torch.allclose(got[r], expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_block_are_never_read(backend: str) -> None:
    _, attend = find_backend(backend)
    q, k, v = make_inputs(1, 4, 1, torch.float32)
    start, slot = torch.tensor([100]), torch.tensor([0])
    before = attend(q, k, v, start, slot, causal=False)
    k[:, :, 104:], v[:, :, 104:] = 1e4, -1e4
    assert torch.equal(attend(q, k, v, start, slot, causal=False), before)
    k[:, :, 101:], v[:, :, 101:] = -1e4, 1e4
    causal = attend(q, k, v, start, slot, causal=True)
    assert torch.allclose(causal[:, 0], dense_row(q, k, v, 100), atol=1e-5)


def dense_row(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return dense(q[0, :1].double(), k[0].double(), v[0].double(), start, True).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_block(backend: str, dtype: torch.dtype) -> None:
    """The same query at the same position, from every row of the block, around every tile edge."""
    _, attend = find_backend(backend)
    width = 16
    q, k, v = make_inputs(1, width, 1, dtype)
    for position in [15, 40, 63, 64, 70, 127, 128, 300, 511, 512, 513, 520, 1023, 1024, 1030]:
        rows = []
        for t in range(width):
            neighbours = torch.randn_like(q)
            neighbours[:, t] = q[:, 0]
            start = torch.tensor([position - t], dtype=torch.int32)
            rows.append(attend(neighbours, k, v, start, torch.tensor([0]), causal=True)[0, t])
        assert all(torch.equal(row, rows[0]) for row in rows), position


@pytest.mark.parametrize("name", ["triton", "flash", "eager", ""])
def test_other_backends_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=repr(name)):
        find_backend(name)
