"""Decoding on a CUDA device: graphs, kernels and the promise in bf16, to the bit.

Everything here also runs at real sizes in ``orthrus_fast.bench``; these are the small ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import orthrus_fast
from orthrus_fast import SamplingParams, invariance, steps
from orthrus_fast.attention import edges, find_backend
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.model import Kernels
from orthrus_fast.runners import GraphRunner, opaque
from tests.checkpoints import write_checkpoint
from tests.judge import Judge, follows
from tests.test_attention import dense
from tests.test_embedded import MODEL, differing_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(directory, seed=3, block_size=16, eos_token_id=[])


def backend(name: str, dtype: torch.dtype, head_dim: int) -> Any:
    try:
        return find_backend(name, CUDA, dtype, head_dim)[1]
    except UnsupportedError as error:
        pytest.skip(str(error))


def random_inputs(dtype: torch.dtype, capacity: int, width: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator(CUDA).manual_seed(0)
    shapes = [(3, width, 8, 64), (4, 2, capacity, 64), (4, 2, capacity, 64)]
    return tuple(torch.randn(s, generator=generator, device=CUDA, dtype=dtype) for s in shapes)


@pytest.mark.parametrize("name", ["sdpa", "triton", "flash"])
@pytest.mark.parametrize(
    "dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_matches_dense_attention(
    name: str, dtype: torch.dtype, atol: float, causal: bool
) -> None:
    """From an empty cache to a full one, around every edge, in slots of different lengths."""
    attend, capacity, width = backend(name, dtype, 64), 4096, 16
    q, k, v = random_inputs(dtype, capacity)
    slot = torch.tensor([3, 0, 2], device=CUDA)
    around = [e + d for e in edges("triton", capacity) for d in (-width, -1, 0, 1)]
    starts = sorted({0, 1, *around, capacity - width})
    starts = [start for start in starts if 0 <= start <= capacity - width]
    for first in range(0, len(starts), 3):
        at = (starts[first : first + 3] * 3)[:3]
        start = torch.tensor(at, device=CUDA, dtype=torch.int32)
        got = attend(q, k, v, start, slot, causal=causal)
        for r in range(3):
            rows = [t[int(slot[r])].double() for t in (k, v)]
            expected = dense_on_device(q[r].double(), *rows, at[r], causal)
            assert torch.allclose(got[r].double(), expected, atol=atol, rtol=0), at[r]


def dense_on_device(q: Tensor, k: Tensor, v: Tensor, start: int, causal: bool) -> Tensor:
    """One sequence in float64, as tests.test_attention.dense, without its loops."""
    width, n_heads, head_dim = q.shape
    k, v = (t.repeat_interleave(n_heads // t.shape[0], 0) for t in (k, v))
    scores = torch.einsum("thd,hsd->hts", q, k) / head_dim**0.5
    last = start + (torch.arange(width, device=q.device) if causal else width - 1)
    hidden = (
        torch.arange(k.shape[1], device=q.device) > torch.as_tensor(last).to(q.device)[..., None]
    )
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,hsd->thd", weights, v)


def test_the_dense_computations_agree() -> None:
    q, k, v = (t.cpu() for t in random_inputs(torch.float64, 64, 4))
    for causal in (True, False):
        one = dense(q[0], k[0], v[0], 30, causal)
        assert torch.allclose(dense_on_device(q[0], k[0], v[0], 30, causal), one, atol=1e-12)


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_a_rows_bits_do_not_depend_on_its_block(name: str) -> None:
    attend, capacity, width = backend(name, torch.bfloat16, 64), 4096, 16
    q, k, v = random_inputs(torch.bfloat16, capacity)
    slot = torch.tensor([0, 1, 2], device=CUDA)
    for edge in edges("triton", capacity):
        for position in (edge - 1, edge, edge + 1):
            rows = []
            for t in range(0, width, 3):
                block = torch.randn_like(q)
                block[0, t] = q[0, 0]
                start = torch.tensor([position - t, edge, 5], device=CUDA, dtype=torch.int32)
                rows.append(attend(block, k, v, start, slot, causal=True)[0, t])
            assert all(torch.equal(row, rows[0]) for row in rows), position


@pytest.mark.parametrize("runner", ["graph", "compiled", "eager"])
@pytest.mark.parametrize("dtype, near_tie", [("float64", 0.0), ("float32", 1e-5)])
@pytest.mark.parametrize("slots", [1, 4])
def test_both_modes_decode_what_the_judge_decodes(
    tiny: Path, runner: str, dtype: str, near_tie: float, slots: int
) -> None:
    decoder = orthrus_fast.load(tiny, dtype=dtype, slots=slots, runner=runner)
    judge = Judge(tiny)
    prompts = [[5, 6, 7], [1] * 70, [9], list(range(100)), [3, 1]]
    expected = [judge.generate(prompt, 60, ()) for prompt in prompts]
    results: dict[str, list[Any]] = {}
    for mode in ("ar", "diffusion"):
        results[mode] = [result.tokens for result in decoder.generate(prompts, 60, mode=mode)]
        for tokens, (wanted, gaps) in zip(results[mode], expected, strict=True):
            assert follows(tokens, wanted, gaps, near_tie=near_tie)
    assert results["ar"] == results["diffusion"]


class Recorder:
    """Keeps the logits' bits of every emitted position, and the committed cache rows'."""

    def __init__(self, decoder: Decoder) -> None:
        self.runner = decoder._runner
        self.logits: list[list[Tensor]] = [[] for _ in range(decoder.slots)]
        verify = self.runner.verify

        def recording(width: int, sampling: bool = False) -> Tensor:
            report = verify(width, sampling)
            for slot, n_new in enumerate(report[:, width].tolist()):
                self.logits[slot].append(self.runner.logits[slot, :n_new].clone())
            return report

        self.runner.verify = recording  # type: ignore[method-assign]

    def take(self) -> list[Tensor]:
        """Per slot: logits by position, then the committed rows of every layer."""
        taken = [torch.cat(rows) for rows in self.logits]
        self.logits = [[] for _ in taken]
        cache, lengths = self.runner.cache, self.runner.state.length.tolist()
        for tensor in (*cache.k, *cache.v):
            taken += [tensor[slot, :, :n].clone() for slot, n in enumerate(lengths)]
        return [tensor.view(torch.int16) for tensor in taken]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_bf16_is_equal_to_the_bit_in_both_modes(slots: int, attention: str) -> None:
    """Tokens, logits of every emitted position, committed cache rows."""
    backend(attention, torch.bfloat16, 64)
    decoder = orthrus_fast.load(MODEL, slots=slots, attention=attention)
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.invariance is not None and decoder.invariance.holds
    recorder = Recorder(decoder)
    prompts = ["def f(n):\n", "import os\n", "x" * 900, "class A:\n"][:slots]
    taken, tokens = {}, {}
    for mode in ("ar", "diffusion"):
        tokens[mode] = [result.tokens for result in decoder.generate(prompts, 150, mode=mode)]
        taken[mode] = recorder.take()
    assert tokens["ar"] == tokens["diffusion"]
    assert len(tokens["ar"][0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(taken["ar"], taken["diffusion"], strict=True))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("slots", [1, 4])
def test_sampled_bf16_is_equal_to_the_bit_in_both_modes(slots: int, temperature: float) -> None:
    decoder = orthrus_fast.load(MODEL, slots=slots)
    recorder = Recorder(decoder)
    prompts = ["def f(n):\n", "import os\n", "x" * 900, "class A:\n"][:slots]
    settings = [
        SamplingParams(temperature=temperature, seed=i, top_k=top_k, top_p=top_p)
        for i, (top_k, top_p) in enumerate([(None, None), (20, 0.8), (None, 0.9), (5, None)])
    ][:slots]
    taken, tokens = {}, {}
    for mode in ("ar", "diffusion"):
        results = decoder.generate(prompts, 100, settings, mode=mode)
        tokens[mode] = [result.tokens for result in results]
        taken[mode] = recorder.take()
    assert tokens["ar"] == tokens["diffusion"]
    assert all(torch.equal(a, b) for a, b in zip(taken["ar"], taken["diffusion"], strict=True))
    assert set(decoder._runner._verify_graphs) == {(16, False), (16, True)}


def test_greedy_slots_are_the_same_beside_sampling_ones() -> None:
    decoder = orthrus_fast.load(MODEL, slots=2)
    prompts = ["def f(n):\n", "import os\n"]
    alone = [result.tokens for result in decoder.generate(prompts, 80)]
    beside = decoder.generate(prompts, 80, [None, SamplingParams(temperature=1.0, seed=3)])
    assert beside[0].tokens == alone[0]
    assert beside[1].tokens != alone[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_modes_agree_on_every_held_out_prompt(dtype: str) -> None:
    decoder = orthrus_fast.load(MODEL, dtype=dtype, slots=8)
    assert differing_prompts(decoder, 128) == []


def test_tensors_go_to_the_device_and_the_default_dtype_is_the_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, torch_dtype="bfloat16")
    decoder = orthrus_fast.load(directory)
    assert decoder.configuration["device"] == "cuda:0"
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.configuration["runner"] == "graph"
    assert decoder.configuration["attention"] == "triton"
    weights = list(decoder._runner.model.parameters())
    assert {weight.device.type for weight in weights} == {"cuda"}
    assert decoder._runner.model.lm_head.weight is decoder._runner.model.embed_tokens.weight


def test_graphs_serve_any_prompt_length_and_mode_without_recapture(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, max_seq_len=400)
    runner = decoder._runner
    assert isinstance(runner, GraphRunner)
    before = (dict(runner._draft_graphs), dict(runner._verify_graphs))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    alone = {n: decoder.generate([7] * n, 30, mode="ar").tokens for n in (1, 65, 300, 2)}
    for n, tokens in alone.items():
        assert decoder.generate([7] * n, 30).tokens == tokens
        assert decoder.generate([7] * n, 11).tokens == tokens[:11]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cuda", torch.float16):
            assert decoder.generate([7], 30).tokens == alone[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert (runner._draft_graphs, runner._verify_graphs) == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_a_cycle_past_the_end_changes_nothing(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, slots=2)
    decoder.generate([[1, 2], [3]], 20)
    state, cache = decoder._runner.state, decoder._runner.cache
    length = state.length.clone()

    def committed() -> list[Tensor]:
        tensors = [state.length, state.anchor, state.tokens, state.done, state.limit]
        for rows in (*cache.k, *cache.v):
            tensors += [rows[slot, :, :n] for slot, n in enumerate(length.tolist())]
        return [tensor.clone() for tensor in tensors]

    before = committed()
    for drafting in (True, False):
        decoder._runner.launch(drafting, 16)
        assert decoder._runner.read().tokens == [[], []]
    assert all(torch.equal(a, b) for a, b in zip(committed(), before, strict=True))


def test_a_dropped_stream_leaves_the_decoder_usable(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny)
    expected = decoder.generate([9, 9], 30).tokens
    stream = decoder.stream([1, 2], 60)
    next(stream), next(stream)
    assert decoder._runner.in_flight > 0  # a cycle ahead of the reader
    del stream
    assert decoder._runner.in_flight == 0
    assert decoder.generate([9, 9], 30).tokens == expected
    assert decoder.generate([9, 9], 30, mode="ar").tokens == expected


def test_one_row_ar_is_captured_when_it_is_asked_for(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, dtype="float64")
    assert set(decoder._runner._verify_graphs) == {(16, False)}
    assert (
        decoder.generate_one_row([1, 2, 3], 40).tokens == Judge(tiny).generate([1, 2, 3], 40, ())[0]
    )
    assert set(decoder._runner._verify_graphs) == {(16, False), (1, False)}
    assert (
        decoder.generate([1, 2, 3], 40).tokens == decoder.generate([1, 2, 3], 40, mode="ar").tokens
    )


def test_two_decoders_in_one_process(tiny: Path) -> None:
    one = orthrus_fast.load(tiny)
    expected = one.generate([1, 2], 50).tokens
    other = orthrus_fast.load(MODEL, slots=2)
    text = other.generate("def f(n):\n", 40).tokens
    assert one.generate([1, 2], 50).tokens == expected
    assert other.generate("def f(n):\n", 40, mode="ar").tokens == text
    streams = one.stream([1, 2], 50), other.stream("def f(n):\n", 40)
    for _ in zip(*streams, strict=False):
        pass
    for stream in streams:
        list(stream)
    assert [stream.result.tokens for stream in streams] == [expected, text]


def test_load_leaves_torch_as_it_found_it(tiny: Path) -> None:
    torch.manual_seed(5)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    before = torch._dynamo.config.recompile_limit, torch.backends.cuda.matmul.fp32_precision
    orthrus_fast.load(tiny).generate([1], 10)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    after = torch._dynamo.config.recompile_limit, torch.backends.cuda.matmul.fp32_precision
    assert after == before


def test_what_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    before = torch.cuda.memory_allocated()
    with pytest.raises(RequestError, match=r"needs weights .* KV cache .* passes .* free on cuda"):
        orthrus_fast.load(MODEL, slots=1_000_000)
    assert torch.cuda.memory_allocated() == before


# The check itself, made to fail.

Attend = Callable[..., Tensor]


def one_wider(attend: Attend) -> Attend:
    """A mask one wide: each row also sees the one after it."""

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *, causal: bool
    ) -> Tensor:
        return attend(q, k, v, start + 1, slot, causal=causal)

    return wrong


def stale_length(attend: Attend) -> Attend:
    """Attention that goes by the start of the call before."""
    last = torch.zeros(1, dtype=torch.int32, device=CUDA)

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *, causal: bool
    ) -> Tensor:
        before = last.clone()
        last.copy_(start)
        return attend(q, k, v, before, slot, causal=causal)

    return wrong


def reads_scratch(attend: Attend) -> Attend:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *, causal: bool
    ) -> Tensor:
        return attend(q, k, v, start, slot, causal=False)

    return wrong


def splits_by_length(attend: Attend) -> Attend:
    """Split boundaries that are a function of where the block begins."""
    from orthrus_fast.attention import triton

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *, causal: bool
    ) -> Tensor:
        tiles = triton.Tiles(16, 64, 4, 2)
        other = triton._attend(q, k, v, start, slot, causal, ((64, None),), tiles)
        own = triton._attend(q, k, v, start, slot, causal, ((192, None),), tiles)
        return torch.where((start % 2 == 0)[:, None, None, None], own, other)

    return wrong


@pytest.mark.parametrize(
    "plant, holds",
    [
        (lambda attend: attend, True),
        (one_wider, False),
        (stale_length, False),
        (reads_scratch, False),
        (splits_by_length, False),
    ],
    ids=["sound", "mask one wide", "stale length", "reads scratch rows", "splits by length"],
)
def test_the_invariance_check_sees_planted_faults(plant: Any, holds: bool, request: Any) -> None:
    decoder = orthrus_fast.load(MODEL)
    runner = decoder._runner
    kernels = Kernels(plant(runner.model.kernels.attend), runner.model.kernels.qk_norm_rope_write)
    name = f"planted_{request.node.callspec.id.replace(' ', '_').replace('-', '_')}"
    faulty = GraphRunner(runner.model, runner.state, runner.cache, opaque(name, kernels))
    faulty.prepare(16)
    found = invariance.check(faulty, 16, edges("triton", runner.cache.capacity))
    assert found.holds is holds
    assert found.n_rows > 0 and found.n_replayed > 0


def test_a_failing_product_is_replaced_by_ours(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory = MODEL
    plain = orthrus_fast.load(directory)
    shape = tuple(plain._runner.model.layers[0].down.weight.shape)
    monkeypatch.setattr(invariance, "variant_products", lambda model, n_rows: {shape})
    with caplog.at_level(logging.INFO, "orthrus_fast"):
        own = orthrus_fast.load(directory)
    assert own.invariance is not None and own.invariance.holds
    assert own.invariance.replaced == (f"{shape[0]} × {shape[1]}",)
    assert own.configuration["own_products"] == list(own.invariance.replaced)
    assert "own kernel" in caplog.text
    texts = [own.generate("def f(n):\n", 60, mode=mode).tokens for mode in ("ar", "diffusion")]
    assert texts[0] == texts[1]


def test_prefill_commits_the_same_rows_whatever_was_there(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, dtype="bfloat16")
    prompt = [(i * 7) % 50 for i in range(300)]
    first = decoder.next_logits(prompt)
    for rows in (*decoder._runner.cache.k, *decoder._runner.cache.v):
        rows.normal_()
    assert torch.equal(decoder.next_logits(prompt), first)
    assert steps.PREFILL_CHUNK >= 300
