"""Decoding on a CUDA device: graphs, kernels and the promise in bf16, to the bit.

Everything here also runs at real sizes in ``orthrus_fast.bench``; these are the small ones.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import orthrus_fast
from orthrus_fast import SamplingParams, invariance, steps
from orthrus_fast.attention import Backend, find_backend
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.kernels.plain import PlainProducts
from orthrus_fast.kernels.select import register_custom_ops
from orthrus_fast.loading import Options, build_decoder
from orthrus_fast.model import Transformer, View
from orthrus_fast.runners import GraphRunner, full_precision_matmul
from tests.checkpoints import kernels_for, tile_boundaries, write_checkpoint
from tests.embedded import HELD_OUT, MODEL, differing_prompts
from tests.judge import Judge, dense_attention, follows

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
        return find_backend(name, CUDA, dtype, head_dim).attend
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
    around = [e + d for e in tile_boundaries("triton", capacity) for d in (-width, -1, 0, 1)]
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
        one = dense_attention(q[0], k[0], v[0], 30, causal)
        assert torch.allclose(dense_on_device(q[0], k[0], v[0], 30, causal), one, atol=1e-12)


@pytest.mark.parametrize("name", ["triton", "flash"])
def test_a_rows_bits_do_not_depend_on_its_block(name: str) -> None:
    attend, capacity, width = backend(name, torch.bfloat16, 64), 4096, 16
    q, k, v = random_inputs(torch.bfloat16, capacity)
    slot = torch.tensor([0, 1, 2], device=CUDA)
    for edge in tile_boundaries("triton", capacity):
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
        self.runner = decoder.runner
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


def both_modes(
    decoder: Decoder, prompts: list[Any], n_tokens: int, sampling: Any = None
) -> dict[str, list[Any]]:
    """The results in each mode, which are equal to the bit.

    Tokens, logits of every emitted position, committed cache rows.
    """
    recorder = Recorder(decoder)
    results, taken = {}, {}
    for mode in ("ar", "diffusion"):
        results[mode] = decoder.generate(prompts, n_tokens, sampling, mode=mode)
        taken[mode] = recorder.take()
    del decoder.runner.verify  # the class's again
    tokens = {mode: [result.tokens for result in results[mode]] for mode in results}
    assert tokens["ar"] == tokens["diffusion"]
    assert all(torch.equal(a, b) for a, b in zip(taken["ar"], taken["diffusion"], strict=True))
    return results


PROMPTS = ["def f(n):\n", "import os\n", "x" * 900, "class A:\n"]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_bf16_is_equal_to_the_bit_in_both_modes(slots: int, attention: str) -> None:
    backend(attention, torch.bfloat16, 64)
    decoder = orthrus_fast.load(MODEL, slots=slots, attention=attention)
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.invariance is not None and decoder.invariance.holds
    results = both_modes(decoder, PROMPTS[:slots], 150)
    assert len(results["ar"][0].tokens) > 20


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("block_size", [2, 8])
def test_a_narrower_block_is_equal_to_the_bit_in_both_modes(slots: int, block_size: int) -> None:
    decoder = orthrus_fast.load(MODEL, slots=slots, block_size=block_size)
    assert decoder.configuration["block_size"] == block_size
    assert decoder.invariance is not None and decoder.invariance.holds
    results = both_modes(decoder, PROMPTS[:slots], 150)
    accepted = [n for result in results["diffusion"] for n in result.stats.accepted]
    assert 0 < max(accepted) <= block_size - 1
    assert set(decoder.runner._verify_graphs) == {(block_size, False)}


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("slots", [1, 4])
def test_sampled_bf16_is_equal_to_the_bit_in_both_modes(slots: int, temperature: float) -> None:
    decoder = orthrus_fast.load(MODEL, slots=slots)
    settings = [
        SamplingParams(temperature=temperature, seed=i, top_k=top_k, top_p=top_p)
        for i, (top_k, top_p) in enumerate([(None, None), (20, 0.8), (None, 0.9), (5, None)])
    ][:slots]
    both_modes(decoder, PROMPTS[:slots], 100, settings)
    assert set(decoder.runner._verify_graphs) == {(16, False), (16, True)}


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
    assert differing_prompts(decoder, HELD_OUT, 128) == []


def test_tensors_go_to_the_device_and_the_default_dtype_is_the_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, torch_dtype="bfloat16")
    decoder = orthrus_fast.load(directory)
    assert decoder.configuration["device"] == "cuda:0"
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.configuration["runner"] == "graph"
    assert decoder.configuration["attention"] == "triton"
    weights = list(decoder.runner.model.parameters())
    assert {weight.device.type for weight in weights} == {"cuda"}
    assert decoder.runner.model.lm_head.weight is decoder.runner.model.embed_tokens.weight


def test_graphs_serve_any_prompt_length_and_mode_without_recapture(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, max_seq_len=400)
    runner = decoder.runner
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
    state, cache = decoder.runner.state, decoder.runner.cache
    length = state.length.clone()

    def committed() -> list[Tensor]:
        tensors = [state.length, state.anchor, state.tokens, state.done, state.max_length]
        for rows in (*cache.k, *cache.v):
            tensors += [rows[slot, :, :n] for slot, n in enumerate(length.tolist())]
        return [tensor.clone() for tensor in tensors]

    before = committed()
    for drafting in (True, False):
        decoder.runner.launch(drafting, 16)
        assert [output.tokens for output in decoder.runner.read()] == [[], []]
    assert all(torch.equal(a, b) for a, b in zip(committed(), before, strict=True))


def test_a_dropped_stream_leaves_the_decoder_usable(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny)
    expected = decoder.generate([9, 9], 30).tokens
    stream = decoder.stream([1, 2], 60)
    next(stream), next(stream)
    assert decoder.runner.in_flight > 0  # a cycle ahead of the reader
    del stream
    assert decoder.runner.in_flight == 0
    assert decoder.generate([9, 9], 30).tokens == expected
    assert decoder.generate([9, 9], 30, mode="ar").tokens == expected


def test_one_row_ar_is_captured_when_it_is_asked_for(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, dtype="float64")
    assert set(decoder.runner._verify_graphs) == {(16, False)}
    assert (
        decoder.generate_one_row([1, 2, 3], 40).tokens == Judge(tiny).generate([1, 2, 3], 40, ())[0]
    )
    assert set(decoder.runner._verify_graphs) == {(16, False), (1, False)}
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
    gc.collect()  # so that nothing of an earlier test goes between the two looks
    before = torch.cuda.memory_allocated()
    with pytest.raises(RequestError, match=r"needs weights .* KV cache .* passes .* free on cuda"):
        orthrus_fast.load(MODEL, slots=1_000_000)
    assert torch.cuda.memory_allocated() == before


# The check itself, made to fail. A plant that makes its own start clones q after it: the kernel
# launched last must not be the one that writes what attention reads first.

Attend = Callable[..., Tensor]


def one_wider(attend: Attend) -> Attend:
    """A mask one wide: each row also sees the one after it."""

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        later = start + 1
        return attend(q.clone(), k, v, later, slot, causal=causal)

    return wrong


def stale_length(attend: Attend) -> Attend:
    """Attention that goes by the start of the call before."""
    last = torch.zeros(1, dtype=torch.int32, device=CUDA)

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        before = last.clone()
        last.copy_(start)
        return attend(q.clone(), k, v, before, slot, causal=causal)

    return wrong


def reads_scratch(attend: Attend) -> Attend:
    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        return attend(q, k, v, start, slot, causal=False)

    return wrong


def splits_by_length(attend: Attend) -> Attend:
    """Split boundaries that are a function of where the block begins."""
    from orthrus_fast.attention import triton

    def wrong(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        tiles = triton.Tiles(16, 64, 4, 2)
        other = triton.attend(q, k, v, start, slot, causal=causal, bands=((64, None),), tiles=tiles)
        own = triton.attend(q, k, v, start, slot, causal=causal, bands=((192, None),), tiles=tiles)
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
    runner = decoder.runner
    kernels = runner.model.kernels
    kernels = dataclasses.replace(kernels, attend=plant(kernels.attend))
    name = f"planted_{request.node.callspec.id.replace(' ', '_').replace('-', '_')}"
    backend = Backend(name, kernels.attend, lambda capacity: [])
    kernels = register_custom_ops(kernels, backend.custom_op())
    faulty = GraphRunner(runner.model, runner.state, runner.cache, kernels)
    faulty.prepare(16)
    found = invariance.check(faulty, 16, tile_boundaries("triton", runner.cache.capacity))
    assert found.holds is holds
    assert found.n_rows > 0 and found.n_replayed > 0


def test_a_failing_product_is_replaced_by_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The embedded model's shapes are in no table: the library's, as long as they do no harm."""
    with caplog.at_level(logging.INFO, "orthrus_fast"):
        plain = orthrus_fast.load(MODEL)
    assert "at 16 rows: cuBLAS" in caplog.text
    layer: Any = plain.runner.model.layers[0]
    weight = layer.mlp.down.weight
    shape = tuple(weight.shape)
    assert shape in invariance.cublas_products(plain.runner.model, 16)
    monkeypatch.setattr(invariance, "variant_products", lambda model, n_rows: {shape})
    with caplog.at_level(logging.INFO, "orthrus_fast"):
        own = orthrus_fast.load(MODEL)
    assert own.invariance is not None and own.invariance.holds
    assert own.invariance.replaced == (f"{shape[0]} × {shape[1]}",)
    assert own.configuration["custom_products"] == list(own.invariance.replaced)
    assert "custom kernels in place of cuBLAS" in caplog.text
    assert own.runner.model.kernels.products.is_custom(16, weight)
    assert own.runner.passes.kernels.products.is_custom(16, weight)
    results = both_modes(own, ["def f(n):\n"], 60)
    assert max(results["diffusion"][0].stats.accepted) > 0


# Products at the sizes of the public models, with the committed table of tiles. Bounds on rounding:
# U is bfloat16's unit roundoff. SUM is the error of a sum in float32, as a share of the sum of its
# terms' sizes: 64 times float32's own roundoff, because matrix units cut off what they shift out;
# a lost tile of the inner dimension would be thousands of times that.

U, SUM = 2.0**-8, 2.0**-18
BF16 = torch.bfloat16


def custom_products() -> Any:
    """What a decoder has on this chip; skips the test where that is the library's alone."""
    products: Any = kernels_for("auto", CUDA, BF16, 128).products
    if not getattr(products, "table", None):
        pytest.skip(f"no table of tiles for {torch.cuda.get_device_name(CUDA)}")
    return products


def product_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """[N, K] of a verify pass's products."""
    config = shape_config(shape)
    hidden, heads = config.hidden_size, config.n_heads * config.head_dim
    return {
        "qkv": (heads + 2 * config.n_kv_heads * config.head_dim, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * config.intermediate_size, hidden),
        "down": (hidden, config.intermediate_size),
        "lm_head": (config.vocab_size, hidden),
    }


def lowest_greatest(logits: Tensor) -> Tensor:
    """The lowest index of each row's greatest value; of torch's argmax that is not promised."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    greatest = logits == logits.amax(-1, keepdim=True)
    return torch.where(greatest, ids, logits.shape[-1]).amin(-1)


@pytest.mark.parametrize("n_rows", [32, 31])  # a block's, and its drafts'
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "lm_head"])
@pytest.mark.parametrize("shape", ["1.7B", "4B", "8B"])
def test_a_product_of_a_public_model_is_within_rounding_of_float64(
    shape: str, name: str, n_rows: int
) -> None:
    """Every value, with what follows the product; and a row has the same bits anywhere."""
    from orthrus_fast.invariance import rows_are_invariant

    products = custom_products()
    n_columns, n_inner = product_shapes(shape)[name]
    random = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(n_rows, n_inner, generator=random, device=CUDA, dtype=BF16)
    weight = torch.empty(n_columns, n_inner, device=CUDA, dtype=BF16)
    weight.normal_(0, n_inner**-0.5, generator=random)
    assert products.is_custom(n_rows, weight)
    with full_precision_matmul(CUDA):
        exact = x.double() @ weight.double().T
        error = SUM * (x.double().abs() @ weight.double().abs().T)  # of the sum, not rounded yet

    if name == "gate_up":
        got = products.swiglu(x, weight, weight)  # which changes nothing, of course
        (gate, up), (gate_error, up_error) = exact.chunk(2, -1), error.chunk(2, -1)
        silu = torch.nn.functional.silu(gate)
        exact = silu * up
        gate_error, up_error = gate_error + U * gate.abs(), up_error + U * up.abs()
        # silu is at most 1.1 steep; its own rounding, and the product's; a little for what is
        # small of second order.
        error = 1.1 * gate_error * up.abs() + silu.abs() * up_error + 2 * U * exact.abs()
        error *= 1.05

        def linear(x: Tensor) -> Tensor:
            out: Tensor = products.swiglu(x, weight)
            return out
    elif name == "lm_head":
        ids, got = products.lm_head_argmax(x, weight, return_logits=True)
        error += U * exact.abs()
        assert torch.equal(ids, lowest_greatest(got))
        assert torch.equal(products.lm_head_argmax(x, weight, return_logits=False)[0], ids)

        def linear(x: Tensor) -> Tensor:
            out: Tensor = products.lm_head_argmax(x, weight, return_logits=True)[1]
            return out
    else:
        parts = products.partials(x, weight)
        assert parts.dtype == (torch.float32 if len(parts) > 1 else BF16)
        got = parts.sum(0, dtype=torch.float64)
        error += U * exact.abs() * (len(parts) == 1)

        def linear(x: Tensor) -> Tensor:
            out: Tensor = products.partials(x, weight)
            return out.movedim(0, 1).flatten(1)

    assert got.shape == exact.shape
    wrong = (got.double() - exact).abs() > error
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first {wrong.nonzero()[0]}"
    assert rows_are_invariant(linear, n_rows, n_inner, BF16, CUDA)


@pytest.fixture(scope="module")
def large() -> Decoder:
    """Random weights of shape 1.7B, cut to two layers; every product is ours."""
    custom_products()
    config = dataclasses.replace(shape_config("1.7B"), n_layers=2)

    def make_model(*of: Any) -> Transformer:
        return random_model(*of, 0)

    return build_decoder("random", config, make_model, Options(max_seq_len=2048))


def test_every_product_of_a_public_shape_is_ours(large: Decoder) -> None:
    """And the pass is invariant with them, so that none gives way to another one."""
    assert invariance.cublas_products(large.runner.model, 32) == {}
    assert large.invariance is not None and large.invariance.holds
    assert large.invariance.n_rows > 0 and large.invariance.n_replayed > 0
    assert large.invariance.replaced == ()


def test_the_greedy_ids_are_those_of_the_logits(large: Decoder) -> None:
    """The kept logits, the ids without keeping them, and a tie, which the lowest id wins."""
    model, random = large.runner.model, torch.Generator(CUDA).manual_seed(1)
    shape = (1, 32, model.config.hidden_size)
    hidden = torch.randn(shape, generator=random, device=CUDA, dtype=BF16)
    with torch.inference_mode(), full_precision_matmul(CUDA):
        for rows in (hidden, hidden[:, :-1]):  # verification's, the draft's
            ids, logits = model.greedy(rows, return_logits=True)
            assert logits.shape == (1, rows.shape[1], model.config.vocab_size)
            assert torch.equal(ids, lowest_greatest(logits))
            assert torch.equal(ids, model.greedy(rows, return_logits=False)[0])
        ids, logits = model.greedy(torch.zeros_like(hidden), return_logits=True)
        assert not ids.any() and not logits.any()


def test_a_pass_agrees_with_the_librarys_products(large: Decoder) -> None:
    """Hidden rows after two layers, the same cache before them.

    Each of some ten roundings on a value's way may fall to the other side: U of it, or 2^-8. So the
    root mean square of the difference is bounded by 4 U of the rows' own, and each value by 32 U
    of that. On a CPU, other orders of summation differ by 1.2 U and 9 U.
    """
    runner, random = large.runner, torch.Generator(CUDA).manual_seed(2)
    model, cache, own = runner.model, runner.cache, runner.model.kernels
    tokens = torch.randint(model.config.vocab_size, (1, 32), generator=random, device=CUDA)
    start = torch.full((1,), 300, dtype=torch.int32, device=CUDA)
    cached = torch.randn(cache.k[0].shape, generator=random, device=CUDA, dtype=BF16)
    hidden = []
    try:
        for products in (own.products, PlainProducts()):
            model.kernels = dataclasses.replace(own, products=products)
            for rows in (*cache.k, *cache.v):
                rows.copy_(cached)
            with torch.inference_mode(), full_precision_matmul(CUDA):
                out = model(tokens, start, runner.state.slots, cache, View.AUTOREGRESSIVE)
            hidden.append(out.double())
    finally:
        model.kernels = own
        cache.reset()
    size = float(hidden[1].square().mean().sqrt())
    difference = (hidden[0] - hidden[1]).abs()
    assert size > 0.5  # a norm is the last thing in it
    assert 0 < float(difference.square().mean().sqrt()) < 4 * U * size
    assert float(difference.max()) < 32 * U * size


def test_a_public_shape_is_equal_to_the_bit_in_both_modes(
    large: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With drafts that are 85% right, as random weights draft nothing that is accepted."""
    random = torch.Generator(CUDA).manual_seed(3)
    vocab_size, n_tokens = large.config.vocab_size, 150
    prompt = torch.randint(vocab_size, (700,), generator=random, device=CUDA).tolist()
    text = prompt + large.generate(prompt, n_tokens, mode="ar").tokens
    known = torch.tensor([*text, *[0] * 32], device=CUDA)
    state = large.runner.state

    def replay(sampling: bool = False) -> None:
        offset = torch.arange(1, 32, device=CUDA)
        right = known[(state.length[:, None] + offset).clamp(max=len(known) - 1)]
        draw = torch.rand(right.shape, generator=random, device=CUDA)
        state.proposals.copy_(torch.where(draw < 0.85, right, (right + 1) % vocab_size))

    monkeypatch.setattr(large.runner, "draft", replay)
    results = both_modes(large, [prompt], n_tokens)
    assert len(results["ar"][0].tokens) == n_tokens
    stats = results["diffusion"][0].stats
    assert max(stats.accepted) > 5 and stats.cycles < n_tokens / 2


def test_prefill_commits_the_same_rows_whatever_was_there(tiny: Path) -> None:
    decoder = orthrus_fast.load(tiny, dtype="bfloat16")
    prompt = [(i * 7) % 50 for i in range(300)]
    first = decoder.next_logits(prompt)
    for rows in (*decoder.runner.cache.k, *decoder.runner.cache.v):
        rows.normal_()
    assert torch.equal(decoder.next_logits(prompt), first)
    assert steps.PREFILL_CHUNK >= 300
