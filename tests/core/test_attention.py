"""Every attention backend against a dense computation in float64, and its rows' invariance."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast.attention import find_backend, flash, sdpa
from orthrus_fast.errors import RequestError, UnsupportedError
from tests.judge import dense_attention

# test_triton_attention.py has those of the Triton kernels.
BACKENDS = {"sdpa": sdpa.attend, "sdpa as on a GPU": sdpa._attend_whole}
CAPACITY = 1088


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
    attend = BACKENDS[backend]
    q, k, v = make_inputs(1, 5, 1, torch.float64)
    got = attend(q, k, v, torch.tensor([start]), torch.tensor([0]), causal=causal)
    assert torch.allclose(got[0], dense_attention(q[0], k[0], v[0], start, causal), atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_heads, n_kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads_and_slots_of_different_lengths(
    backend: str, n_heads: int, n_kv_heads: int
) -> None:
    attend = BACKENDS[backend]
    q, k, v = make_inputs(3, 4, 5, torch.float64, n_heads, n_kv_heads)
    start, slot = torch.tensor([7, 600, 0], dtype=torch.int32), torch.tensor([4, 0, 2])
    for causal in (True, False):
        got = attend(q, k, v, start, slot, causal=causal)
        for r in range(3):
            s = int(slot[r])
            expected = dense_attention(q[r], k[s], v[s], int(start[r]), causal)
            assert torch.allclose(got[r], expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_past_the_block_are_never_read(backend: str) -> None:
    attend = BACKENDS[backend]
    q, k, v = make_inputs(1, 4, 1, torch.float32)
    start, slot = torch.tensor([100]), torch.tensor([0])
    before = attend(q, k, v, start, slot, causal=False)
    k[:, :, 104:], v[:, :, 104:] = 1e4, -1e4
    assert torch.equal(attend(q, k, v, start, slot, causal=False), before)
    k[:, :, 101:], v[:, :, 101:] = -1e4, 1e4
    causal = attend(q, k, v, start, slot, causal=True)
    assert torch.allclose(causal[:, 0], dense_row(q, k, v, 100), atol=1e-5)


def dense_row(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    return dense_attention(q[0, :1].double(), k[0].double(), v[0].double(), start, True).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_block(dtype: torch.dtype) -> None:
    """The same query at the same position, from every row of the block, around every tile edge."""
    width = 16
    q, k, v = make_inputs(1, width, 1, dtype)
    for position in [15, 40, 63, 64, 70, 127, 128, 300, 511, 512, 513, 520, 1023, 1024, 1030]:
        rows = []
        for t in range(width):
            neighbours = torch.randn_like(q)
            neighbours[:, t] = q[:, 0]
            start = torch.tensor([position - t], dtype=torch.int32)
            rows.append(sdpa.attend(neighbours, k, v, start, torch.tensor([0]), causal=True)[0, t])
        assert all(torch.equal(row, rows[0]) for row in rows), position


@pytest.mark.parametrize("causal", [True, False])
def test_how_many_tiles_attend_at_once_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    """A long chunk's mask is made piece by piece."""
    q, k, v = make_inputs(1, 75, 1, torch.float32)
    at = torch.tensor([480]), torch.tensor([0])
    together = sdpa.attend(q, k, v, *at, causal=causal)
    n_calls = len(list(sdpa._calls((480,), 75, 5, 8, causal)))
    monkeypatch.setattr(sdpa, "MASK_BYTES", 1)
    assert len(list(sdpa._calls((480,), 75, 5, 8, causal))) == 5 > n_calls
    assert torch.equal(sdpa.attend(q, k, v, *at, causal=causal), together)


def test_slots_side_by_side_are_not_copied() -> None:
    k = make_inputs(1, 1, 4, torch.float32)[1]
    for slots in ([2], [0, 1, 2, 3], [1, 2]):
        keys = sdpa._first_keys(k, slots, 1024)
        assert keys.data_ptr() == k[slots[0]].data_ptr()
        assert torch.equal(keys, k[slots, :, :1024])
    assert torch.equal(sdpa._first_keys(k, [3, 1], 512), k[[3, 1], :, :512])


class FakeFlash:
    """Computes what ``flash_attn_with_kvcache`` promises to, densely, and keeps its arguments."""

    def __init__(self, *, as_tuple: bool = False) -> None:
        self.as_tuple = as_tuple
        self.calls: list[dict[str, Any]] = []

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        causal: bool,
        num_splits: int,
    ) -> Any:
        assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert k_cache.shape[2] < k_cache.shape[1]  # [B, S, n_kv_heads, head_dim]
        self.calls.append({"causal": causal, "num_splits": num_splits, "k_cache": k_cache})
        out = torch.empty_like(q)
        for r, (length, s) in enumerate(
            zip(cache_seqlens.tolist(), cache_batch_idx.tolist(), strict=True)
        ):
            k, v = k_cache[s].transpose(0, 1), v_cache[s].transpose(0, 1)
            rows = dense_attention(
                q[r].double(), k.double(), v.double(), length - q.shape[1], causal
            )
            out[r] = rows.to(q.dtype)
        return (out, torch.zeros(())) if self.as_tuple else out


CUDA = torch.device("cuda")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, FakeFlash], None]]:
    """Puts a FlashAttention library in place by name; all are absent at first. On a Hopper."""
    for name in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    flash.backend.cache_clear()
    yield lambda name, fake: monkeypatch.setitem(sys.modules, name, fake)
    flash.backend.cache_clear()


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_gets_lengths_slots_layout_and_splits(
    install: Callable[[str, FakeFlash], None], causal: bool, as_tuple: bool
) -> None:
    fake = FakeFlash(as_tuple=as_tuple)
    install("flash_attn", fake)
    attend = flash.backend(CUDA, torch.bfloat16, 16).attend
    q, k, v = make_inputs(3, 4, 5, torch.bfloat16)
    start, slot = torch.tensor([7, 600, 0], dtype=torch.int32), torch.tensor([4, 0, 2])
    got = attend(q, k, v, start, slot, causal=causal)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    for r in range(3):
        s = int(slot[r])
        wanted = dense_attention(q[r].double(), k[s].double(), v[s].double(), int(start[r]), causal)
        assert torch.equal(got[r], wanted.bfloat16())
    assert fake.calls[0]["causal"] is causal
    assert fake.calls[0]["num_splits"] == (1 if causal else 0)
    assert fake.calls[0]["k_cache"].data_ptr() == k.data_ptr()  # a view: nothing was copied


@pytest.mark.parametrize(
    "capability, dtype, installed, wanted",
    [
        ((9, 0), "bfloat16", "flash_attn_interface fa3_fwd_interface flash_attn", 0),
        ((9, 0), "bfloat16", "flash_attn fa3_fwd_interface", 1),
        ((9, 0), "float16", "flash_attn fa3_fwd_interface", 0),
        ((9, 0), "float16", "flash_attn flash_attn_interface", 1),
        ((8, 0), "bfloat16", "flash_attn_interface fa3_fwd_interface flash_attn", 2),
        ((12, 0), "bfloat16", "flash_attn_interface flash_attn", 1),
    ],
)
def test_flash_takes_version_3_on_hopper_and_2_elsewhere(
    install: Callable[[str, FakeFlash], None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: str,
    installed: str,
    wanted: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    fakes = [FakeFlash() for _ in installed.split()]
    for name, fake in zip(installed.split(), fakes, strict=True):
        install(name, fake)
    attend = flash.backend(CUDA, getattr(torch, dtype), 16).attend
    q, k, v = make_inputs(1, 2, 1, getattr(torch, dtype))
    attend(q, k, v, torch.tensor([3]), torch.tensor([0]), causal=True)
    assert [len(fake.calls) for fake in fakes] == [int(i == wanted) for i in range(len(fakes))]


@pytest.mark.parametrize(
    "device, dtype, head_dim, capability, message",
    [
        ("cpu", torch.bfloat16, 64, (9, 0), "needs a CUDA device"),
        ("cuda", torch.float32, 64, (9, 0), "needs bfloat16 or float16"),
        ("cuda", torch.bfloat16, 264, (9, 0), "head_dim 264"),
        ("cuda", torch.bfloat16, 64, (7, 5), "compute capability"),
        ("cuda", torch.bfloat16, 64, (8, 6), "pip install flash-attn"),
        ("cuda", torch.bfloat16, 64, (9, 0), "flash_attn_interface or fa3_fwd_interface or"),
    ],
)
def test_flash_is_refused_where_it_cannot_serve(
    install: Callable[[str, FakeFlash], None],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UnsupportedError, match=message) as error:
        flash.backend(torch.device(device), dtype, head_dim)
    assert "\n" not in str(error.value)


def test_backends_are_found_by_name() -> None:
    cpu = torch.device("cpu")
    for name in ("auto", "sdpa"):
        backend = find_backend(name, cpu, torch.float32, 64)
        assert (backend.name, backend.attend) == ("sdpa", sdpa.attend)
    for name in ("triton", "flash"):
        with pytest.raises(UnsupportedError, match=f"'{name}'.*CUDA"):
            find_backend(name, cpu, torch.float32, 64)
    for name in ("eager", ""):
        with pytest.raises(RequestError, match=repr(name)):
            find_backend(name, cpu, torch.float32, 64)
