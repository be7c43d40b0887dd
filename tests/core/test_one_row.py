"""One row, one result: on the CPU a row's bits follow from its tokens, however it is computed.

The runner is driven by hand here: the same text as one chunk, ragged chunks, blocks and single
rows, in any slot beside random neighbours, and over whatever an earlier text has left in the cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orthrus_fast import SamplingParams, steps
from orthrus_fast.attention import sdpa
from orthrus_fast.cache import KVCache
from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.kernels import plain, plain_sampling
from orthrus_fast.kernels.formats import Stored
from orthrus_fast.kernels.interface import Attend
from orthrus_fast.options import DRAFT_WEIGHTS, WEIGHTS
from orthrus_fast.quantization import CHECKPOINT, Formats, Quantizer
from orthrus_fast.runners import EagerRunner
from tests.checkpoints import kernels_for, write_checkpoint
from tests.decoders import prefill_logits, start
from tests.judge import follows
from tests.quantized import judge_of

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64]
VOCABULARY = 272
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
FORMATS = [Formats(drafter=name) for name in DRAFT_WEIGHTS] + [Formats(n, n) for n in WEIGHTS[1:]]
Pieces = list[tuple[str, int]]  # how a text is computed: ("chunk" or "block", how many rows) each


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Within, PyTorch uses ``n`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def invariant_library() -> None:
    """Skips where this machine's library gives a row other bits at other multiples of rows."""
    torch.manual_seed(0)
    for dtype in DTYPES:
        for n, k in ((96, 20), (VOCABULARY, 32), (32, 50), (640, 320)):
            x, weight = torch.randn(320, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            whole = F.linear(x, weight)
            for begin in range(0, 320, 16):  # and not ROW_MULTIPLE: a wrong one must fail, not skip
                part = F.linear(x[begin : begin + 16].clone(), weight)
                if not torch.equal(part, whole[begin : begin + 16]):
                    pytest.skip(f"this CPU's {dtype} products follow the number of rows")


# The same text, computed in other ways


def build(
    directory: Path,
    dtype: torch.dtype,
    capacity: int,
    n_slots: int = 1,
    formats: Formats = CHECKPOINT,
    **changed: Any,
) -> EagerRunner:
    """A runner whose cache is full of what others have left; ``changed`` kernels."""
    checkpoint = open_checkpoint(str(directory))
    config = checkpoint.config
    kernels = replace(kernels_for("sdpa", CPU, dtype, config.head_dim), **changed)
    model = load_model(checkpoint, kernels, CPU, dtype, Quantizer(formats))
    model.set_capacity(capacity)
    cache = KVCache(config, n_slots, capacity, dtype, CPU)
    for rows in (*cache.k, *cache.v):
        rows.normal_()
    state = steps.State.create(n_slots, capacity, config.block_size or 1, CPU)
    return EagerRunner(model, state, cache)


@torch.inference_mode()
def compute(runner: EagerRunner, slot: int, text: Tensor, pieces: Pieces) -> tuple[Tensor, Tensor]:
    """text [n] in ``pieces`` -> logits [n, V] after each token, and what the slot has committed."""
    logits, begin = [], 0
    for kind, width in pieces:
        part = text[begin : begin + width]
        if kind == "chunk":
            hidden = runner.prefill_chunk(part[None], begin, slot)[0]
            logits.append(runner.model.greedy(hidden, return_logits=True)[1])
        else:
            logits.append(verify(runner, slot, part, begin, width))
        begin += len(part)
    assert begin == len(text)
    # [layers, K and V, KV, n, D]
    caches = [torch.stack(pair) for pair in zip(runner.cache.k, runner.cache.v, strict=True)]
    return torch.cat(logits), torch.stack(caches)[:, :, slot, :, :begin].clone()


def verify(runner: EagerRunner, slot: int, part: Tensor, begin: int, width: int) -> Tensor:
    """A block with ``part`` at ``begin`` of ``slot``, all else random -> the part's logits."""
    state, n_slots = runner.state, len(runner.state.slots)
    room = runner.cache.capacity - width - 1
    state.length.copy_(torch.randint(room, (n_slots,)))
    state.length[slot] = begin
    blocks = torch.randint(VOCABULARY, (n_slots, state.proposals.shape[1] + 1))
    blocks[slot, : len(part)] = part
    state.anchor.copy_(blocks[:, 0])
    state.proposals.copy_(blocks[:, 1:])
    state.drafting.fill_(True)
    state.done.copy_(torch.rand(n_slots) < 0.3)
    state.max_length.fill_(runner.cache.capacity)
    runner.verify(width)
    return runner.logits[slot, : len(part)].clone()


def n_differing(a: Tensor, b: Tensor) -> int:
    """How many numbers differ in a bit."""
    integers = torch.int32 if a.dtype == torch.float32 else torch.int64
    return int((a.contiguous().view(integers) != b.contiguous().view(integers)).sum())


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of a small config.json."""
    n_kv_heads = draw(st.sampled_from([1, 2]))
    return {
        "seed": draw(st.integers(0, 1000)),
        "tied": draw(st.booleans()),
        "hidden_size": draw(st.sampled_from([20, 32, 64])),
        "intermediate_size": draw(st.sampled_from([36, 48, 50])),
        "num_hidden_layers": draw(st.sampled_from([1, 2])),
        "num_attention_heads": n_kv_heads * draw(st.sampled_from([1, 2, 3])),
        "num_key_value_heads": n_kv_heads,
        "head_dim": draw(st.sampled_from([16, 32])),
        "block_size": draw(st.sampled_from([4, 8, 16, 24])),
        "max_position_embeddings": 2048,
        "eos_token_id": [],
    }


@st.composite
def cuts(draw: st.DrawFn, n_tokens: int, block_size: int) -> Pieces:
    """Ways to compute a text: more than a few rows one by one would take long."""
    pieces: Pieces = []
    while n_tokens > 0:
        widest = st.sampled_from([1, 2, 4, block_size])
        piece = draw(
            st.tuples(st.just("block"), widest)
            | st.tuples(st.just("chunk"), st.integers(1, 40) | st.integers(64, 700))
        )
        n_times = draw(st.integers(1, 6)) if piece[0] == "block" else 1
        pieces += [piece] * n_times
        n_tokens -= piece[1] * n_times
        if len(pieces) > 40:
            pieces.append(("chunk", max(n_tokens, 1)))
            break
    return pieces


def fitted(pieces: Pieces, n_tokens: int) -> Pieces:
    """The pieces up to ``n_tokens``; the last may reach past it if it is a block."""
    out: Pieces = []
    for kind, width in pieces:
        if n_tokens <= 0:
            break
        out.append((kind, min(width, n_tokens) if kind == "chunk" else width))
        n_tokens -= width
    return out


@few
@given(
    st.data(), shapes(), st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.sampled_from(WEIGHTS)
)
def test_a_row_has_the_same_bits_however_it_is_computed(
    data: st.DataObject, shape: dict[str, Any], dtype: torch.dtype, n_threads: int, weights: str
) -> None:
    formats = Formats(weights, weights)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    n_tokens = data.draw(st.integers(2, 60) | st.integers(480, 560) | st.integers(1000, 1100))
    n_slots, block_size = data.draw(st.integers(1, 3)), shape["block_size"]
    pieces = fitted(data.draw(cuts(n_tokens, block_size)), n_tokens)
    capacity = steps.cache_rows(n_tokens, block_size)
    text = torch.randint(VOCABULARY, (n_tokens,))
    with tempfile.TemporaryDirectory() as temporary, threads(n_threads):
        directory = write_checkpoint(Path(temporary) / "model", **shape)
        first = build(directory, dtype, capacity, 1, formats)
        expected = compute(first, 0, text, [("chunk", n_tokens)])
        capacity += data.draw(st.sampled_from([0, 64, 512, 640]))
        runner = build(directory, dtype, capacity, n_slots, formats)
        slot = data.draw(st.integers(0, n_slots - 1))
        found = compute(runner, slot, text, pieces)
        whole = prefill_logits(runner, text, slot, begin=data.draw(st.integers(0, n_tokens - 1)))
    for a, b in zip(expected, found, strict=True):
        assert n_differing(a, b) == 0
    assert n_differing(expected[0][-1], whole) == 0


# The same text, decoded in other ways


def decode(
    runner: EagerRunner, prompts: list[list[int]], n_new: int, width: int, params: SamplingParams
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities after a prompt in each slot; a width of 1 is AR decoding."""
    sampling, drafting = params.temperature > 0, width > 1
    texts = []
    for slot, prompt in enumerate(prompts):
        first = start(runner, prompt, slot, len(prompt) + n_new, params, drafting)
        texts.append((list(first.tokens), list(first.logprobs)))
    while not runner.state.done.all():
        runner.launch(drafting, width, sampling)
        for text, output in zip(texts, runner.read(), strict=True):
            text[0].extend(output.tokens)
            text[1].extend(output.logprobs)
    return texts


@few
@given(shapes(), st.sampled_from(DTYPES), st.integers(1, 3), st.sampled_from([0.0, 0.8]), st.data())
def test_texts_are_the_judges_at_every_width(
    shape: dict[str, Any], dtype: torch.dtype, n_slots: int, temperature: float, data: st.DataObject
) -> None:
    ids = st.integers(0, VOCABULARY - 1)
    prompts = [data.draw(st.lists(ids, min_size=1, max_size=12)) for _ in range(n_slots)]
    params = SamplingParams(temperature, seed=data.draw(ids), logprobs=temperature > 0)
    n_new, block_size, formats = 16, shape["block_size"], data.draw(st.sampled_from(FORMATS))
    with tempfile.TemporaryDirectory() as temporary:
        directory = write_checkpoint(Path(temporary) / "model", **shape)
        judge = judge_of(directory, formats.verifier)
        runner = build(directory, dtype, steps.cache_rows(60, block_size), n_slots, formats)
        texts = decode(runner, prompts, n_new, 1, params)
        for width in {2, 4, min(8, block_size), block_size}:
            assert decode(runner, prompts, n_new, width, params) == texts, width
        near_tie = 0.0 if dtype == torch.float64 else 1e-5
        for prompt, (tokens, _) in zip(prompts, texts, strict=True):
            expected, gaps = judge.generate(prompt, n_new, (), params)
            assert follows(tokens, expected, gaps, near_tie=near_tie)


# Parts of it, at sizes that PyTorch shares among its threads


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_log_probabilities_follow_no_number_of_rows(n_threads: int) -> None:
    """One row of a large vocabulary is a sum that PyTorch would share among threads."""
    torch.manual_seed(0)
    logits, tokens = torch.randn(40, 151_003) - 13, torch.randint(151_003, (40,))
    logits[torch.arange(40), tokens] = -0.6  # about half of the sum, whose log is near 0: fine bits
    with threads(n_threads):
        together = plain_sampling.logprobs(logits.view(2, 20, -1), tokens.view(2, 20)).flatten()
        alone = [plain_sampling.logprobs(*row) for row in zip(logits, tokens, strict=True)]
        pairs = [plain_sampling.logprobs(logits[i : i + 2], tokens[i : i + 2]) for i in (0, 17)]
    assert n_differing(torch.stack(alone), together) == 0
    assert n_differing(torch.cat(pairs), together[[0, 1, 17, 18]]) == 0
    wanted = logits.double().log_softmax(-1)[torch.arange(40), tokens]
    assert torch.allclose(together.double(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_swiglu_follows_no_number_of_rows(dtype: torch.dtype, n_threads: int) -> None:
    """A thread's share of many rows ends within one, after a number of columns that is odd."""
    torch.manual_seed(0)
    x, weight = torch.randn(200, 16, dtype=dtype), torch.randn(2 * 1002, 16, dtype=dtype)
    products = plain.PlainProducts()
    with threads(n_threads):
        alone = torch.cat([products.swiglu(row[None], Stored(weight)) for row in x])
        for n_rows in range(35, 201, 3):
            assert n_differing(products.swiglu(x[:n_rows], Stored(weight)), alone[:n_rows]) == 0
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    assert torch.allclose(alone, F.silu(gate) * up, atol=1e-5)


# Faults that the comparison must see


def attend_at(move: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Attend:
    """sdpa's attention of blocks put elsewhere by ``move``: width, start, slot -> start, slot."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, **how: Any
    ) -> Tensor:
        return sdpa.attend(q, k, v, *move(q.shape[1], start, slot), **how)

    return attend


def attend_untiled(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, **how: Any
) -> Tensor:
    """A block's queries at once, as many as there are."""
    last = start[:, None] + torch.arange(q.shape[1])
    mask = sdpa._mask(last, q.shape[2] // k.shape[1], 576, q.dtype)
    return sdpa._attend_rows(q, k[slot, :, :576], v[slot, :, :576], mask)


FAULTS: dict[str, dict[str, Any]] = {
    "products of as many rows as there are": {"products": plain.PlainProducts(row_multiple=1)},
    "queries of as many rows as there are": {"attend": attend_untiled},
    "a mask one wide": {"attend": attend_at(lambda width, start, slot: (start + 1, slot))},
    "a stale length": {
        "attend": attend_at(lambda width, start, slot: (start - (width == 8) * 1, slot))
    },
    "the first slot's cache": {
        "attend": attend_at(lambda width, start, slot: (start, torch.zeros_like(slot)))
    },
}


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    return write_checkpoint(directory, seed=8, max_position_embeddings=1024, eos_token_id=[])


def differing(directory: Path, **changed: Any) -> int:
    """Numbers that differ in a text of 540 tokens: as a chunk, and blocks after a chunk of 500."""
    torch.manual_seed(1)
    text = torch.randint(VOCABULARY, (540,))
    whole = build(directory, torch.float32, 576, **changed)
    expected = compute(whole, 0, text, [("chunk", 540)])
    pieces = [("chunk", 500), *[("block", 8)] * 2, *[("block", 1)] * 8, *[("block", 4)] * 4]
    found = compute(build(directory, torch.float32, 640, 3, **changed), 2, text, pieces)
    return sum(n_differing(a, b) for a, b in zip(expected, found, strict=True))


def test_without_a_fault_nothing_differs(plain_model: Path) -> None:
    assert differing(plain_model) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(plain_model: Path, fault: str) -> None:
    assert differing(plain_model, **FAULTS[fault]) > 0


def test_keys_of_any_number_are_seen(plain_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "KEY_MULTIPLE", 1)
    assert differing(plain_model) > 0
