"""Decoding on a CUDA device: graphs, kernels and one row, one result, to the bit.

Everything here also runs at real sizes in ``orthrus_fast.bench``; these are the small ones.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import orthrus_fast
from orthrus_fast import Grammar, SamplingParams, invariance
from orthrus_fast.attention import find_backend
from orthrus_fast.bench.shapes import random_model, shape_config
from orthrus_fast.checkpoint import weight_bytes
from orthrus_fast.decoder import Decoder
from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.invariance import bits_of
from orthrus_fast.kernels.formats import AT_ONCE, Stored, dequantize
from orthrus_fast.kernels.interface import Weight, k_split
from orthrus_fast.kernels.plain import PlainProducts, sum_partials
from orthrus_fast.loading import Options, build_decoder
from orthrus_fast.model import Transformer
from orthrus_fast.options import DRAFT_WEIGHTS, MODES, ONE_ROW, ONE_WIDTH, TILED_ROWS, WEIGHTS
from orthrus_fast.quantization import Formats, Quantizer
from orthrus_fast.runners import EagerRunner, GraphRunner, compiler_limits, full_precision_matmul
from tests.checkpoints import kernels_for, tile_boundaries, write_checkpoint
from tests.core.test_one_row import Pieces, compute, decode
from tests.decoders import always_drafting, prefill_logits, unchecked
from tests.embedded import HELD_OUT, MODEL, differing_prompts, prompt_of
from tests.engine.solo import Solo, check_requests, check_rows, unpredictable
from tests.judge import Judge, dense_attention, follows
from tests.quantized import stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(
        directory, seed=3, block_size=16, max_position_embeddings=2048, eos_token_id=[]
    )


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
def test_a_rows_bits_do_not_depend_on_its_place_in_a_block(name: str) -> None:
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


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("n_heads", [16, 32])
def test_attention_of_a_row_has_the_same_bits_at_every_width(
    n_heads: int, dtype: torch.dtype
) -> None:
    """As one row, and in blocks beside two others, as in a chunk; where tiles and splits begin."""
    attend, capacity = backend("triton", dtype, 128), 10_240
    random = torch.Generator(CUDA).manual_seed(0)
    shapes = [(capacity, n_heads, 128), (3, 8, capacity, 128), (3, 8, capacity, 128)]
    q, k, v = (torch.randn(s, generator=random, device=CUDA, dtype=dtype) for s in shapes)

    def rows_from(begin: int, width: int, others: tuple[int, ...] = ()) -> Tensor:
        starts = torch.tensor([*others, begin], dtype=torch.int32, device=CUDA)
        block = torch.stack([q[start : start + width] for start in starts.tolist()])
        slot = torch.tensor([2, 0, 1], device=CUDA)[-len(starts) :]
        out: Tensor = attend(block, k, v, starts, slot, causal=True)
        return bits_of(out[-1])

    for edge in (128, 256, 1280, 4352, 4864, 8448, 9472):
        first = max(edge - 500, 0)
        expected = rows_from(first, 1000)
        for width in (1, 32, 100):
            for begin in (edge - width, edge - width // 2, edge):
                for others in ((), (7, 5000)):
                    got = rows_from(begin, width, others)
                    assert torch.equal(got, expected[begin - first :][:width]), (width, begin)


def load(directory: Path, **options: Any) -> Decoder:
    """One that drafts in every cycle of mode diffusion, and computes every row."""
    options = {"prefix_reuse": False, **always_drafting(directory, options)}
    return orthrus_fast.load(directory, **options)


@pytest.mark.parametrize("runner", ["graph", "compiled", "eager"])
@pytest.mark.parametrize("dtype, near_tie", [("float64", 0.0), ("float32", 1e-5)])
@pytest.mark.parametrize("slots", [1, 4])
def test_both_modes_decode_what_the_judge_decodes(
    tiny: Path, runner: str, dtype: str, near_tie: float, slots: int
) -> None:
    decoder = load(tiny, dtype=dtype, slots=slots, runner=runner)
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
        for name in ("verify", "judge"):  # what ends a cycle
            setattr(self.runner, name, self._recording(getattr(self.runner, name)))

    def _recording(self, step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def recording(width: int, *how: bool) -> Tensor:
            report = step(width, *how)
            for slot, n_new in enumerate(report[:, width].tolist()):
                self.logits[slot].append(self.runner.logits[slot, :n_new].clone())
            return report

        return recording

    def take(self) -> list[Tensor]:
        """Per slot: logits by position, then the committed rows of every layer."""
        taken = [torch.cat(rows) for rows in self.logits]
        self.logits = [[] for _ in taken]
        cache, lengths = self.runner.cache, self.runner.state.length.tolist()
        for tensor in (*cache.k, *cache.v):
            taken += [tensor[slot, :, :n].clone() for slot, n in enumerate(lengths)]
        return [bits_of(tensor) for tensor in taken]


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
    del decoder.runner.verify, decoder.runner.judge  # the class's again
    tokens = {mode: [result.tokens for result in results[mode]] for mode in results}
    assert tokens["ar"] == tokens["diffusion"]
    assert all(torch.equal(a, b) for a, b in zip(taken["ar"], taken["diffusion"], strict=True))
    return results


PROMPTS = ["def f(n):\n", "import os\n", "x" * 900, "class A:\n"]


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("attention", ["triton", "flash"])
def test_bf16_is_equal_to_the_bit_in_both_modes(slots: int, attention: str) -> None:
    backend(attention, torch.bfloat16, 64)
    decoder = load(MODEL, slots=slots, attention=attention)
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.invariance is not None and decoder.invariance.holds
    results = both_modes(decoder, PROMPTS[:slots], 150)
    assert len(results["ar"][0].tokens) > 20


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("block_size", [2, 8])
def test_a_narrower_block_is_equal_to_the_bit_in_both_modes(slots: int, block_size: int) -> None:
    decoder = load(MODEL, slots=slots, block_size=block_size)
    assert decoder.configuration["block_size"] == block_size
    assert decoder.invariance is not None and decoder.invariance.holds
    results = both_modes(decoder, PROMPTS[:slots], 150)
    accepted = [n for result in results["diffusion"] for n in result.stats.accepted]
    assert 0 < max(accepted) <= block_size - 1
    assert isinstance(decoder.runner, GraphRunner)
    assert set(decoder.runner._verify_graphs) == {(1, False), (block_size, False)}


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("slots", [1, 4])
def test_sampled_bf16_is_equal_to_the_bit_in_both_modes(slots: int, temperature: float) -> None:
    decoder = load(MODEL, slots=slots)
    settings = [
        SamplingParams(temperature=temperature, seed=i, top_k=top_k, top_p=top_p)
        for i, (top_k, top_p) in enumerate([(None, None), (20, 0.8), (None, 0.9), (5, None)])
    ][:slots]
    both_modes(decoder, PROMPTS[:slots], 100, settings)
    assert isinstance(decoder.runner, GraphRunner)
    assert set(decoder.runner._draft_graphs) == {(16, False), (16, True)}
    assert set(decoder.runner._verify_graphs) == {(1, False), (1, True), (16, False), (16, True)}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("slots", [1, 4])
def test_a_grammars_texts_are_equal_to_the_bit_in_both_modes(
    slots: int, temperature: float
) -> None:
    """One of the texts has none."""
    decoder = load(MODEL, slots=slots)
    grammars = [Grammar("json_object"), Grammar("regex", "(twenty|ten)( words)+[.]"), None]
    settings = [SamplingParams(temperature, seed=i, grammar=grammars[i % 3]) for i in range(slots)]
    both_modes(decoder, PROMPTS[:slots], 100, settings)
    assert isinstance(decoder.runner, GraphRunner)
    sampling = temperature > 0
    assert {(1, sampling), (16, sampling)} <= set(decoder.runner._judge_graphs)
    while decoder.engine.has_work:
        decoder.engine.step()
    assert decoder.runner.in_flight == 0


# One row, one result: a runner driven by hand, and texts

DTYPES = [BF16, torch.float32, torch.float16]
WAYS: list[Pieces] = [
    [("chunk", 64), ("chunk", 1), ("chunk", 100), ("chunk", 256), ("chunk", 279)],
    [
        ("chunk", 500),
        *[("block", 1)] * 20,
        *[("block", 2)] * 10,
        *[("block", 4)] * 5,
        *[("block", 8)] * 5,
        *[("block", 16)] * 6,
        ("block", 8),
    ],
    [("block", 16)] * 44,
    [("block", 1)] * 300 + [("chunk", 400)],
]


def runner_of(directory: Path, dtype: torch.dtype, slots: int, **options: Any) -> EagerRunner:
    """A runner whose cache is full of what others have left."""
    with unchecked():
        runner = load(directory, dtype=dtype, slots=slots, **options).runner
    for rows in (*runner.cache.k, *runner.cache.v):
        rows.normal_()
    return runner


def computed(runner: EagerRunner, slot: int, text: Tensor, pieces: Pieces) -> list[Tensor]:
    """The bits of the logits after each token, and of all cache rows."""
    with full_precision_matmul(CUDA), compiler_limits():
        return [bits_of(rows) for rows in compute(runner, slot, text, pieces)]


def are_equal(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", ["embedded", "tiny"])
def test_a_row_has_the_same_bits_however_it_is_computed(
    tiny: Path, checkpoint: str, dtype: torch.dtype
) -> None:
    """One slot and another capacity, a chunk; four, and pieces, beside random neighbours."""
    torch.manual_seed(0)
    directory = MODEL if checkpoint == "embedded" else tiny
    one = runner_of(directory, dtype, 1, max_seq_len=800)
    four = runner_of(directory, dtype, 4, max_seq_len=2000)
    for width in (2, 4, 8):
        four.prepare(width)
    text = torch.randint(272, (700,), device=CUDA)
    expected = computed(one, 0, text, [("chunk", 700)])
    for slot, pieces in enumerate(WAYS):
        assert are_equal(computed(four, slot, text, pieces), expected), slot
    for runner, slot, begin in ((one, 0, 0), (four, 3, 123), (four, 3, 699), (four, 1, 0)):
        assert torch.equal(bits_of(prefill_logits(runner, text, slot, begin)), expected[0][-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_texts_and_log_probabilities_are_equal_at_every_width(
    tiny: Path, dtype: torch.dtype
) -> None:
    one, four = runner_of(tiny, dtype, 1, max_seq_len=800), runner_of(tiny, dtype, 4)
    params = SamplingParams(0.7, top_k=20, seed=5, logprobs=True)
    prompts = [[5, 6, 7], [1] * 270, [9], list(range(100))]
    one.prepare(1, sampling=True)
    expected = [decode(one, [prompt], 60, 1, params)[0] for prompt in prompts]
    assert [len(text[1]) for text in expected] == [60] * 4
    for width in (1, 2, 4, 8, 16):
        four.prepare(width, sampling=True)
        assert decode(four, prompts, 60, width, params) == expected, width


def test_runners_give_equal_bits() -> None:
    torch.manual_seed(0)
    text = torch.randint(272, (320,), device=CUDA)
    pieces: Pieces = [("chunk", 256), *[("block", 16)] * 2, *[("block", 1)] * 32]
    params = SamplingParams(0.7, seed=5, logprobs=True)
    bits, texts = {}, {}
    for name in ("eager", "compiled", "graph"):
        runner = runner_of(MODEL, BF16, 2, runner=name)
        bits[name] = computed(runner, 1, text, pieces)
        for width in (1, 16):
            runner.prepare(width, sampling=True)
            texts[name, width] = decode(runner, [[5, 6, 7], [9]], 60, width, params)
    assert are_equal(bits["compiled"], bits["eager"])
    assert are_equal(bits["graph"], bits["eager"])
    assert all(text == texts["eager", 1] for text in texts.values())


TEXTS = [prompt_of(example) for example in HELD_OUT[:6]]


def texts_of(decoder: Decoder, mode: str) -> list[tuple[list[int], list[float] | None]]:
    """Tokens and log-probabilities of TEXTS, greedy and then sampled, as many at once as fit."""
    settings = [
        SamplingParams(temperature, top_k=20, seed=seed, logprobs=True)
        for temperature in (0.0, 0.7)
        for seed in range(len(TEXTS))
    ]
    results = decoder.generate(TEXTS * 2, 60, settings, mode=mode)
    return [(result.tokens, result.logprobs) for result in results]


@pytest.fixture(scope="module")
def expected_texts() -> Any:
    return texts_of(load(MODEL, max_seq_len=400), "ar")


@pytest.mark.parametrize(
    "block_size, slots, max_seq_len", [(16, 1, 400), (16, 4, 2000), (8, 4, 400), (4, 1, 2000)]
)
def test_a_text_depends_on_its_prompt_and_settings_alone(
    expected_texts: Any, block_size: int, slots: int, max_seq_len: int
) -> None:
    decoder = load(MODEL, block_size=block_size, slots=slots, max_seq_len=max_seq_len)
    assert decoder.configuration["promise"] == ONE_ROW and decoder.ar_width == 1
    for mode in MODES:
        assert texts_of(decoder, mode) == expected_texts, mode


FORMATS = [{"draft_weights": name} for name in DRAFT_WEIGHTS] + [
    {"weights": n} for n in WEIGHTS[1:]
]


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_every_format_is_equal_to_the_bit_in_both_modes(
    expected_texts: Any, options: dict[str, Any]
) -> None:
    """A drafter's changes no text at all; those of both views have texts of their own."""
    decoder = orthrus_fast.load(MODEL, slots=4, **options)
    assert decoder.configuration["promise"] == ONE_ROW and decoder.invariance.holds
    assert options.items() <= decoder.configuration.items()
    results = both_modes(decoder, PROMPTS, 150)
    assert max(n for result in results["diffusion"] for n in result.stats.accepted) > 3
    first = orthrus_fast.load(MODEL, max_seq_len=400, **options)
    expected = expected_texts if "draft_weights" in options else texts_of(first, "ar")
    for mode in MODES:
        assert texts_of(decoder, mode) == expected, mode


@pytest.mark.parametrize(
    "options", [{"attention": "sdpa"}, {"attention": "flash"}, {"dtype": "float64"}], ids=str
)
def test_what_cannot_keep_to_a_row_keeps_to_one_width(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if "attention" in options:
        backend(options["attention"], BF16, 64)
    with caplog.at_level(logging.WARNING, "orthrus_fast"):
        decoder = load(MODEL, slots=2, **options)
    assert decoder.configuration["promise"] == ONE_WIDTH
    assert "both modes decode by blocks of 16 rows" in caplog.text
    assert decoder.ar_width == decoder.block_width == 16
    assert isinstance(decoder.runner, GraphRunner)
    assert set(decoder.runner._verify_graphs) == {(16, False)}
    assert not decoder.invariance.prefill and decoder.invariance.widths == (16,)
    for sampling in (None, SamplingParams(0.7, seed=3)):
        ar, diffusion = (
            [result.tokens for result in decoder.generate(TEXTS[:3], 60, sampling, mode=mode)]
            for mode in ("ar", "diffusion")
        )
        assert ar == diffusion


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_modes_agree_on_every_held_out_prompt(dtype: str) -> None:
    decoder = load(MODEL, dtype=dtype, slots=8)
    assert differing_prompts(decoder, HELD_OUT, 128) == []


def test_tensors_go_to_the_device_and_the_default_dtype_is_the_configs(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", dtype=torch.bfloat16, torch_dtype="bfloat16")
    decoder = load(directory)
    assert decoder.configuration["device"] == "cuda:0"
    assert decoder.configuration["dtype"] == "bfloat16"
    assert decoder.configuration["runner"] == "graph"
    assert decoder.configuration["attention"] == "triton"
    assert decoder.configuration["promise"] == ONE_ROW
    weights = list(decoder.runner.model.parameters())
    assert {weight.device.type for weight in weights} == {"cuda"}
    assert decoder.runner.model.verifier.lm_head.weight is decoder.runner.model.embed_tokens.weight


def test_graphs_serve_any_prompt_length_and_mode_without_recapture(tiny: Path) -> None:
    decoder = load(tiny, max_seq_len=400)
    runner = decoder.runner
    assert isinstance(runner, GraphRunner)
    assert set(runner._draft_graphs) == {(16, False)}
    assert set(runner._verify_graphs) == {(1, False), (16, False)}

    def captured() -> list[dict[Any, Any]]:
        graphs = (runner._draft_graphs, runner._verify_graphs, runner._prefill_graphs)
        return [dict(of) for of in graphs]

    before = captured()
    assert all(before)
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
    assert captured() == before
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_a_cycle_past_the_end_changes_nothing(tiny: Path) -> None:
    decoder = load(tiny, slots=2)
    decoder.generate([[1, 2], [3]], 20)
    state, cache = decoder.runner.state, decoder.runner.cache
    length = state.length.clone()

    def committed() -> list[Tensor]:
        tensors = [state.length, state.anchor, state.tokens, state.done, state.max_length]
        for rows in (*cache.k, *cache.v):
            tensors += [rows[slot, :, :n] for slot, n in enumerate(length.tolist())]
        return [tensor.clone() for tensor in tensors]

    before = committed()
    for drafting, width in ((True, 16), (False, 16), (False, 1)):
        decoder.runner.launch(drafting, width)
        assert [output.tokens for output in decoder.runner.read()] == [[], []]
    assert all(torch.equal(a, b) for a, b in zip(committed(), before, strict=True))


def test_a_dropped_stream_leaves_the_decoder_usable(tiny: Path) -> None:
    decoder = load(tiny)
    expected = decoder.generate([9, 9], 30).tokens
    stream = decoder.stream([1, 2], 60)
    next(stream), next(stream)
    assert decoder.runner.in_flight > 0  # a cycle ahead of the reader
    del stream
    assert decoder.generate([9, 9], 30).tokens == expected
    while decoder.engine.has_work:
        decoder.engine.step()
    assert decoder.runner.in_flight == 0
    assert decoder.generate([9, 9], 30, mode="ar").tokens == expected


def test_two_decoders_in_one_process(tiny: Path) -> None:
    one = load(tiny)
    expected = one.generate([1, 2], 50).tokens
    other = load(MODEL, slots=2)
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
    load(tiny).generate([1], 10)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    after = torch._dynamo.config.recompile_limit, torch.backends.cuda.matmul.fp32_precision
    assert after == before


def test_what_does_not_fit_is_refused_before_anything_is_allocated() -> None:
    gc.collect()  # so that nothing of an earlier test goes between the two looks
    before = torch.cuda.memory_allocated()
    with pytest.raises(RequestError, match=r"needs weights .* KV cache .* passes .* free on cuda"):
        load(MODEL, slots=1_000_000)
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
def test_the_invariance_check_sees_planted_faults(plant: Any, holds: bool) -> None:
    with unchecked():
        runner = load(MODEL).runner
    kernels = runner.model.kernels
    kernels = dataclasses.replace(kernels, attend=plant(kernels.attend))
    faulty = GraphRunner(runner.model, runner.state, runner.cache, kernels)
    for width in (1, 16):
        faulty.prepare(width)
    found = invariance.check(faulty, (1, 16), tile_boundaries("triton", runner.cache.capacity))
    assert found.holds is holds
    assert found.n_rows > 0 and found.n_replayed > 0


# Faults in the launches of narrow blocks alone, in every part of a pass

NARROW = 16  # rows of a product, and of queries per KV head, up to which a fault sets in
Patch = pytest.MonkeyPatch


def other_tiles(patch: Patch, rows: int, keys: int) -> None:
    """Attention of narrow blocks with tiles of other rows or keys, on four warps."""
    from orthrus_fast.attention import triton

    choose_tiles = triton.choose_tiles

    def wrong(n_rows: int, *of: Any) -> triton.Tiles:
        return triton.Tiles(rows, keys, 4, 2) if n_rows <= NARROW else choose_tiles(n_rows, *of)

    patch.setattr(triton, "choose_tiles", wrong)


def tiles_of_few_rows(patch: Patch) -> None:
    """Four warps side by side over the keys: another order of summation."""
    other_tiles(patch, rows=16, keys=64)


def tiles_of_few_keys(patch: Patch) -> None:
    other_tiles(patch, rows=64, keys=32)


def splits_are_joined_backwards(patch: Patch) -> None:
    """The first three of them, where a row of a narrow block has seen these."""
    from orthrus_fast.attention import triton

    join_kernel: Any = triton._join_kernel

    class Backwards:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                partials, (start, _, width) = arguments[:3], arguments[3:6]
                if width < NARROW:
                    seen = start >= 512  # splits begin at 0, 128, 256, 512
                    partials = tuple(backwards(partial, seen) for partial in partials)
                join_kernel[grid](*partials, *arguments[3:], **options)

            return launch

    def backwards(partial: Tensor, seen: Tensor) -> Tensor:
        other = torch.cat((partial[:, :, :3].flip(2), partial[:, :, 3:]), 2)
        return torch.where(seen.view(-1, *[1] * (partial.dim() - 1)), other, partial)

    patch.setattr(triton, "_join_kernel", Backwards())


def k_splits_follow_the_rows(patch: Patch) -> None:
    """Few rows want more programs, and so more partial sums."""
    from orthrus_fast.kernels import products

    launch = products.launch

    def wrong(x: Tensor, weight: Tensor, split: int, tiles: Any, **how: Any) -> Any:
        is_narrow = x.numel() // x.shape[-1] <= NARROW and 0 < split < x.shape[-1]
        return launch(x, weight, split // 2 if is_narrow else split, tiles, **how)

    patch.setattr(products, "launch", wrong)


@pytest.fixture(scope="module")
def many_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16, which keeps more of a sum's last bits; splits of K are 128 columns or more."""
    return write_checkpoint(
        tmp_path_factory.mktemp("many_heads") / "model",
        seed=8,
        dtype=torch.float16,
        torch_dtype="float16",
        tied=False,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        block_size=16,
        max_position_embeddings=1024,
        eos_token_id=[],
    )


@pytest.mark.parametrize(
    "plant",
    [
        None,
        tiles_of_few_rows,
        tiles_of_few_keys,
        splits_are_joined_backwards,
        k_splits_follow_the_rows,
    ],
    ids=lambda plant: plant.__name__ if plant else "sound",
)
def test_the_invariance_check_sees_what_follows_the_width(
    many_heads: Path, plant: Callable[[Patch], None] | None, monkeypatch: Patch
) -> None:
    if plant is not None:
        plant(monkeypatch)
    with unchecked():
        runner = load(many_heads, slots=4, max_seq_len=1000).runner
    assert isinstance(runner, GraphRunner) and runner.prefill_widths
    for width in (2, 4):
        runner.prepare(width)
    boundaries = tile_boundaries("triton", runner.cache.capacity)
    found = invariance.check(runner, (1, 2, 4, 16), boundaries)
    assert found.holds is (plant is None), str(found)


def test_a_decoder_that_fails_the_check_keeps_to_one_width(
    many_heads: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    tiles_of_few_keys(monkeypatch)
    with caplog.at_level(logging.WARNING, "orthrus_fast"):
        decoder = load(many_heads, slots=4)
    assert "a row's bits depend on more than its tokens here" in caplog.text
    assert decoder.configuration["promise"] == ONE_WIDTH and decoder.ar_width == 16
    both_modes(decoder, [[1, 2, 3], [9] * 200], 60)


# Products at the sizes of the public models, with the committed table of tiles. Bounds on rounding:
# U is bfloat16's unit roundoff. SUM is the error of a sum in float32, as a share of the sum of its
# terms' sizes: 64 times float32's own roundoff, because matrix units cut off what they shift out;
# a lost tile of the inner dimension would be thousands of times that.

U, SUM = 2.0**-8, 2.0**-18


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


def multiplier(name: str, weight: Weight) -> Callable[[Tensor], Tensor]:
    """x [M, K] -> what a pass makes of its product with ``weight``, rounded."""
    products = kernels_for("auto", CUDA, BF16, 128).products

    def multiply(x: Tensor) -> Tensor:
        if name == "gate_up":  # fetching which changes nothing, of course
            return products.swiglu(x, weight, weight.weight)
        if name == "lm_head":
            return products.lm_head_argmax(x, weight, return_logits=True)[1]
        return sum_partials(products.partials(x, weight), x.dtype)

    return multiply


def exact_product(name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same in float64, and the error that rounding may cause."""
    with full_precision_matmul(CUDA):
        exact = x.double() @ weight.double().T
        error = SUM * (x.double().abs() @ weight.double().abs().T)  # of the sum, not rounded yet
    if name != "gate_up":
        return exact, error + U * exact.abs()
    (gate, up), (gate_error, up_error) = exact.chunk(2, -1), error.chunk(2, -1)
    silu = torch.nn.functional.silu(gate)
    exact = silu * up
    gate_error, up_error = gate_error + U * gate.abs(), up_error + U * up.abs()
    # silu is at most 1.1 steep; its own rounding, and the product's; a little for what is small of
    # second order.
    error = 1.1 * gate_error * up.abs() + silu.abs() * up_error + 2 * U * exact.abs()
    return exact, 1.05 * error


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "lm_head"])
@pytest.mark.parametrize("shape", ["1.7B", "8B"])
@pytest.mark.parametrize("format", DRAFT_WEIGHTS)
def test_a_product_of_a_public_model(shape: str, name: str, format: str) -> None:
    """A row has the same bits among any number of others; a few rows are held to float64."""
    n_columns, n_inner = product_shapes(shape)[name]
    random = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(TILED_ROWS[-1], n_inner, generator=random, device=CUDA, dtype=BF16)
    weight = torch.empty(n_columns, n_inner, device=CUDA, dtype=BF16)
    weight.normal_(0, n_inner**-0.5, generator=random)
    of: Weight = Stored(weight, n_inputs=n_inner, split=k_split(n_columns, n_inner))
    if format != "checkpoint":
        of = stored(weight, format)
        weight = dequantize(of, torch.float32)
    multiply = multiplier(name, of)
    expected = torch.cat([multiply(rows) for rows in x.split(32)])
    for n_rows in TILED_ROWS:
        for rows in (slice(n_rows), slice(len(x) - n_rows, None)):
            got = multiply(x[rows])
            assert torch.equal(bits_of(got), bits_of(expected[rows])), n_rows
    few = slice(33)
    exact, error = exact_product(name, x[few], weight)
    assert expected[few].shape == exact.shape
    wrong = (expected[few].double() - exact).abs() > error
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()}, first {wrong.nonzero()[0]}"


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_log_probabilities_follow_no_number_of_rows(dtype: torch.dtype) -> None:
    logprobs = kernels_for("auto", CUDA, dtype, 128).logprobs
    random = torch.Generator(CUDA).manual_seed(0)
    logits = 3 * torch.randn(40, 151_936, generator=random, device=CUDA, dtype=dtype)
    tokens = torch.randint(151_936, (40,), generator=random, device=CUDA)
    together = logprobs(logits.view(2, 20, -1), tokens.view(2, 20)).flatten()
    alone = [logprobs(*row) for row in zip(logits, tokens, strict=True)]
    assert torch.equal(bits_of(torch.stack(alone)), bits_of(together))
    wanted = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.allclose(together.double(), wanted, atol=2e-5, rtol=0)


@pytest.fixture(scope="module")
def large() -> Decoder:
    """Random weights of shape 1.7B, cut to two layers."""
    config = dataclasses.replace(shape_config("1.7B"), n_layers=2)

    def make_model(*of: Any) -> Transformer:
        return random_model(*of, seed=0)

    options = Options(max_seq_len=2048, drafting=32, prefix_reuse=False)
    return build_decoder("random", config, make_model, options)


def test_a_public_shape_keeps_the_promise(large: Decoder) -> None:
    assert large.configuration["promise"] == ONE_ROW
    assert large.invariance.holds and large.invariance.prefill
    assert large.invariance.widths == (1, 32)
    assert large.invariance.n_rows > 0 and large.invariance.n_replayed > 0


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


def test_a_pass_agrees_with_plain_products(large: Decoder) -> None:
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
                out = model(tokens, start, runner.state.slots, cache, model.verifier)
            hidden.append(out.double())
    finally:
        model.kernels = own
        cache.reset()
    size = float(hidden[1].square().mean().sqrt())
    difference = (hidden[0] - hidden[1]).abs()
    assert size > 0.5  # a norm is the last thing in it
    assert 0 < float(difference.square().mean().sqrt()) < 4 * U * size
    assert float(difference.max()) < 32 * U * size


@pytest.mark.parametrize("format", DRAFT_WEIGHTS)
def test_draft_logits_agree_with_plain_products_of_the_same_weights(format: str) -> None:
    """Which multiply with weights rounded to bfloat16: another rounding on a value's way."""
    config = dataclasses.replace(shape_config("1.7B"), n_layers=2)
    options = Options(max_seq_len=2048, draft_weights=format)
    runner = build_decoder("random", config, partial(random_model, seed=0), options).runner
    model, own, stack = runner.model, runner.model.kernels, runner.model.drafter
    assert stack is not None and {linear.format for linear in stack.linears()} == {
        format.replace("checkpoint", "")
    }
    random = torch.Generator(CUDA).manual_seed(2)
    tokens = torch.randint(config.vocab_size, (1, 32), generator=random, device=CUDA)
    start = torch.zeros(1, dtype=torch.int32, device=CUDA)
    found = []
    for products in (own.products, PlainProducts()):
        model.kernels = dataclasses.replace(own, products=products)
        with torch.inference_mode(), full_precision_matmul(CUDA):
            hidden = model(tokens, start, runner.state.slots, runner.cache, stack)
            found.append(model.greedy(hidden, True, stack)[1].double())
    size = float(found[1].square().mean().sqrt())
    difference = (found[0] - found[1]).abs()
    assert float(difference.square().mean().sqrt()) < 8 * U * size
    assert float(difference.max()) < 64 * U * size


@pytest.mark.parametrize("formats", [Formats(drafter="int4"), Formats("int4", "int4")], ids=str)
def test_loading_takes_little_more_than_what_stays(formats: Formats) -> None:
    """A part of a layer, and what quantizing some rows of it takes."""
    config = dataclasses.replace(shape_config("1.7B"), n_layers=8)
    kernels = kernels_for("auto", CUDA, BF16, config.head_dim)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = random_model(config, kernels, CUDA, BF16, Quantizer(formats), seed=0)
    need = torch.cuda.memory_allocated() - before
    assert need == pytest.approx(sum(weight_bytes(model)), rel=0.01)
    part = 3 * config.intermediate_size * config.hidden_size * 2
    assert torch.cuda.max_memory_allocated() - before <= need + part + 40 * AT_ONCE


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

    def replay(width: int, sampling: bool = False) -> None:
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
    decoder = load(tiny, dtype="bfloat16")
    prompt = [(i * 7) % 50 for i in range(300)]
    first = decoder.next_logits(prompt)
    for rows in (*decoder.runner.cache.k, *decoder.runner.cache.v):
        rows.normal_()
    assert torch.equal(decoder.next_logits(prompt), first)


@pytest.mark.parametrize("slots", [1, 8])
def test_requests_are_told_what_they_are_told_alone(slots: int) -> None:
    """In bf16, with graphs a launch ahead, widths and chunks as the engine chooses them."""
    solo = Solo(orthrus_fast.load(MODEL, max_seq_len=400, prefix_reuse=False))
    engine = orthrus_fast.load(MODEL, max_seq_len=400, slots=slots).engine
    check_requests(engine, solo, 500 if slots > 1 else 100, seed=slots)
    assert check_rows(engine, solo) > 0


def test_any_width_and_any_cut_of_a_prompt(tiny: Path) -> None:
    solo = Solo(orthrus_fast.load(tiny, prefix_reuse=False))
    engine = orthrus_fast.load(tiny, slots=4).engine
    unpredictable(engine, seed=1, ahead=1)
    check_requests(engine, solo, 100, seed=1)
    assert check_rows(engine, solo) > 0


def test_times_are_measured_at_start(tiny: Path) -> None:
    runner = orthrus_fast.load(tiny).runner
    assert set(runner.cycle_seconds) == {1, 4, 8, 16}
    assert set(runner.chunk_seconds) == set(runner.prefill_widths)
    assert min(*runner.cycle_seconds.values(), *runner.chunk_seconds.values()) > 0
