"""Weights in fewer bits: what formats keep, where the drafter's show, and what loading takes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import orthrus_fast
from orthrus_fast import Decoder, SamplingParams, loading, quantization
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import (
    build_on_meta,
    count_bytes,
    load_model,
    open_checkpoint,
    weight_bytes,
)
from orthrus_fast.cli.main import main
from orthrus_fast.errors import RequestError
from orthrus_fast.kernels import formats as kernel_formats
from orthrus_fast.kernels.formats import dequantize, quantize
from orthrus_fast.loading import Options, Settings, choose_formats, memory_needed
from orthrus_fast.model import Layer, Linear, Transformer
from orthrus_fast.options import PUBLIC_SHAPES
from orthrus_fast.quantization import Formats, Quantizer
from tests.checkpoints import kernels_for, write_checkpoint
from tests.decoders import committed, start, unchecked
from tests.judge import Judge
from tests.marks import slow_but
from tests.quantized import QUANTIZED, judge_of, stored

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [7] * 20, [250, 0, 9, 9]]
Patch = pytest.MonkeyPatch


def load(directory: Path, dtype: str = "float32", **options: Any) -> Decoder:
    with unchecked():
        return orthrus_fast.load(directory, device="cpu", dtype=dtype, **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied; K of a step and a bit, of less than a group, and of one and a half."""
    return write_checkpoint(
        tmp_path_factory.mktemp("tiny") / "model",
        seed=3,
        tied=False,
        hidden_size=96,
        intermediate_size=330,
        eos_token_id=[],
    )


# What a format keeps of a weight


def random_weight(n: int, k: int) -> Tensor:
    """Rows of very different sizes, columns too: a neighbour's scale would be far off."""
    random = torch.Generator().manual_seed(n * 1000 + k)
    rows = 10 ** torch.linspace(-3, 1, n)[torch.randperm(n, generator=random), None]
    groups = 2 ** torch.randint(-1, 2, (1, -(-k // 64)), generator=random).float()
    groups = groups.repeat_interleave(64, dim=1)[:, :k]
    return rows * groups * torch.randn(n, k, generator=random)


def error_bound(weight: Tensor, format: str) -> Tensor:
    """How far [N, K] a value may be from what it was."""
    most = weight.abs().amax(1, keepdim=True)
    if format == "int8":
        return 0.5001 * most / 127
    if format == "fp8":  # half a unit of three bits after the first, or of the least exponent
        return torch.maximum(weight.abs() * 2**-4, most / 448 * 2**-10) * 1.0001
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight, (0, -k % 64)).view(n, -1, 64).abs().amax(2) / 7
    # Half a step of the group, its scale's own rounding, and what a shrunken scale cuts off.
    bound = 0.5 * groups + 7 * most / 7 / 255 / 2 + 0.2 * 7 * groups
    return bound.repeat_interleave(64, dim=1)[:, :k]


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize("n, k", [(1, 1), (3, 63), (40, 64), (5, 65), (70, 320), (33, 1000)])
def test_a_weight_comes_back_within_its_formats_error(format: str, n: int, k: int) -> None:
    weight = random_weight(n, k)
    of = stored(weight, format)
    back = dequantize(of, torch.float64)
    assert back.shape == weight.shape and of.n_inputs == k
    assert bool(((back - weight).abs() <= error_bound(weight, format)).all())
    error = (back - weight).square().mean(1) / weight.square().mean(1)
    most = {"fp8": 3e-3, "int8": 3e-4, "int4": 2.5e-2}[format]
    assert k == 1 or bool((error < most).all()), error.max()
    on_meta = quantize(weight.to("meta"), format)
    for shape, tensor in zip(on_meta, (of.weight, of.scale, of.group_scale), strict=True):
        assert (shape is None) == (tensor is None)
        if shape is not None and tensor is not None:
            assert (shape.shape, shape.nbytes) == (tensor.shape, tensor.nbytes)


@pytest.mark.parametrize("format", QUANTIZED)
def test_zeros_stay_zeros_and_rows_are_quantized_apart(format: str, monkeypatch: Patch) -> None:
    weight = random_weight(70, 320)
    weight[3] = 0.0
    whole = dequantize(stored(weight, format), torch.float64)
    assert not whole[3].any() and bool(whole.isfinite().all())
    alone = [dequantize(stored(row[None], format), torch.float64) for row in weight]
    assert torch.equal(torch.cat(alone), whole)
    monkeypatch.setattr(kernel_formats, "AT_ONCE", 320 * 9)  # nine rows at a time
    assert torch.equal(dequantize(stored(weight, format), torch.float64), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", QUANTIZED)
def test_weights_of_every_dtype_are_quantized(format: str, dtype: torch.dtype) -> None:
    weight = random_weight(8, 130).to(dtype)
    back = dequantize(stored(weight, format), dtype)
    assert back.dtype == dtype
    error = (back.double() - weight.double()).square().mean() / weight.double().square().mean()
    assert float(error) < 2.5e-2


# Which Linears are swapped, and what they share


def linears_of(model: Transformer) -> dict[str, list[Linear]]:
    assert model.drafter is not None
    return {"verifier": model.verifier.linears(), "drafter": model.drafter.linears()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", QUANTIZED)
def test_a_drafter_has_weights_of_its_own_beside_an_untouched_verifier(
    tmp_path: Path, tied: bool, format: str
) -> None:
    directory = write_checkpoint(tmp_path / "model", tied=tied)
    plain = load(directory).runner.model
    model = load(directory, draft_weights=format).runner.model
    both, before = linears_of(model), linears_of(plain)
    for ours, theirs in zip(both["verifier"], before["verifier"], strict=True):
        assert ours.format == "" and torch.equal(ours.weight, theirs.weight)
    for ours, theirs in zip(both["drafter"], before["drafter"], strict=True):
        assert ours.format == format and ours.n_inputs == theirs.n_inputs
        expected = dequantize(stored(theirs.weight, format), torch.float32)
        assert torch.equal(dequantize(ours, torch.float32), expected)
    assert (model.verifier.lm_head.weight is model.embed_tokens.weight) == tied
    assert model.drafter is not None and model.drafter.norm is model.verifier.norm
    # What the verifier multiplies with anyway is there for blocks of many rows.
    attention = {id(one) for layer in model.drafter.layers for one in layer.linears()[:2]}
    for ours, theirs in zip(both["drafter"], both["verifier"], strict=True):
        if id(ours) in attention:
            assert ours.whole is None
        else:
            assert ours.whole is not None and ours.whole.weight is theirs.weight
            assert (ours.whole.split, ours.whole.format) == (theirs.split, "")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_quantized_views_share_what_the_checkpoint_shares(
    tmp_path: Path, tied: bool, format: str
) -> None:
    model = load(write_checkpoint(tmp_path / "model", tied=tied), weights=format).runner.model
    assert model.drafter is not None
    for ours, theirs in zip(model.verifier.layers, model.drafter.layers, strict=True):
        assert isinstance(ours, Layer) and isinstance(theirs, Layer)
        assert ours.mlp.down.weight is theirs.mlp.down.weight
        assert ours.attention.o.weight is not theirs.attention.o.weight
    assert model.verifier.lm_head.weight is model.drafter.lm_head.weight
    linears = [linear for of in linears_of(model).values() for linear in of]
    assert {(linear.format, linear.whole) for linear in linears} == {(format, None)}
    assert model.embed_tokens.format == "" and model.embed_tokens.weight.dtype == torch.float32


# The drafter decides nothing


@pytest.fixture(scope="module")
def expected(tiny: Path) -> dict[Any, Any]:
    """Texts, and slot 0's cache rows, with the checkpoint's own drafter, by dtype and settings."""
    found = {}
    for dtype, temperature in product(("float32", "float64"), (0.0, 0.8)):
        decoder = load(tiny, dtype)
        results = decoder.generate(PROMPTS, 30, sampling(temperature))
        found[dtype, temperature] = ([r.tokens for r in results], rows_of(decoder))
    return found


def sampling(temperature: float) -> list[SamplingParams]:
    return [SamplingParams(temperature, seed=seed) for seed in range(len(PROMPTS))]


def rows_of(decoder: Decoder) -> list[Tensor]:
    return [rows.clone() for layer in range(2) for rows in committed(decoder, layer)]


@pytest.mark.parametrize(
    "dtype, temperature",
    slow_but([("float32", 0.0), ("float64", 0.8)], product(("float32", "float64"), (0.0, 0.8))),
)
@pytest.mark.parametrize("format", QUANTIZED)
def test_texts_and_cache_rows_are_those_with_the_checkpoints_drafter(
    tiny: Path, expected: dict[Any, Any], format: str, dtype: str, temperature: float
) -> None:
    texts, rows = expected[dtype, temperature]
    decoder = load(tiny, dtype, draft_weights=format)
    assert decoder.configuration["draft_weights"] == format
    for mode in ("diffusion", "ar"):
        results = decoder.generate(PROMPTS, 30, sampling(temperature), mode)
        assert [result.tokens for result in results] == texts, mode
        assert all(map(torch.equal, rows_of(decoder), rows))
        accepted = [n for result in results for n in result.stats.accepted]
        assert max(accepted) > 0 if mode == "diffusion" else not any(accepted)
    for options in ({"slots": 3}, {"block_size": 3}, {"max_seq_len": 100, "slots": 2}):
        other = load(tiny, dtype, draft_weights=format, **options)
        results = other.generate(PROMPTS, 30, sampling(temperature))
        assert [result.tokens for result in results] == texts, options


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_a_quantized_verifier_decodes_what_the_judge_of_its_weights_does(
    tiny: Path, format: str
) -> None:
    judge = judge_of(tiny, format)
    texts = [judge.generate(prompt, 30, ())[0] for prompt in PROMPTS]
    assert texts != [Judge(tiny).generate(prompt, 30, ())[0] for prompt in PROMPTS]
    for options in ({}, {"slots": 3}, {"block_size": 2}, {"draft_view": False}):
        decoder = load(tiny, "float64", weights=format, **options)
        for mode in ("ar", "diffusion") if options != {"draft_view": False} else ("ar",):
            results = decoder.generate(PROMPTS, 30, mode=mode)
            assert [result.tokens for result in results] == texts, (options, mode)


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_the_check_holds_with_quantized_weights(tiny: Path, format: str) -> None:
    for options in ({"draft_weights": format}, {"weights": format}):
        decoder = orthrus_fast.load(tiny, device="cpu", **options)
        assert decoder.invariance.holds, (options, str(decoder.invariance))


@pytest.fixture
def traced(monkeypatch: Patch) -> None:
    """torch.compile as it is, but dynamo's graphs run as they stand: no C++ compiler."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda of, *, options, **more: compile(of, backend="eager", **more)
    )


@pytest.mark.parametrize(
    "options",
    slow_but(
        [{"draft_weights": "int4"}],
        [{"draft_weights": format} for format in QUANTIZED] + [{"weights": "int4"}],
    ),
)
def test_the_compiled_runner_decodes_the_same(
    tiny: Path, traced: None, options: dict[str, Any]
) -> None:
    options = {"drafting": 8, **options}
    eager, compiled = (load(tiny, runner=runner, **options) for runner in ("eager", "compiled"))
    expected = [(r.tokens, r.stats.accepted) for r in eager.generate(PROMPTS, 12)]
    assert [(r.tokens, r.stats.accepted) for r in compiled.generate(PROMPTS, 12)] == expected


# Faults in quantization, which no text shows: drafts agree less with those of the plain weights


MOST_ERROR = {"fp8": 0.05, "int8": 0.0125, "int4": 0.19}  # of the draft logits, root mean square


def draft_error(directory: Path, format: str) -> float:
    """The draft logits' root mean square error over their size, against the checkpoint's."""
    judge = Judge(directory)
    judge.feed(PROMPTS[1])
    wanted = judge.draft_logits(5, 8)
    decoder = load(directory, "float64", draft_weights=format)
    runner, state = decoder.runner, decoder.runner.state
    start(runner, PROMPTS[1], 0, 60)
    inputs = torch.tensor([[5] + [257] * 7])
    with torch.inference_mode():
        stack = runner.model.drafter
        assert stack is not None
        hidden = runner.model(inputs, state.length, state.slots, runner.cache, stack)
        got = runner.model.greedy(hidden, True, stack)[1][0]
    centred = wanted - wanted.mean(-1, keepdim=True)
    return float((got - wanted).square().mean().sqrt() / centred.square().mean().sqrt())


@pytest.mark.parametrize("format", QUANTIZED)
def test_draft_logits_agree_with_those_of_the_checkpoints_weights(tiny: Path, format: str) -> None:
    error = draft_error(tiny, format)
    assert MOST_ERROR[format] / 2 < error < MOST_ERROR[format]


Parts = tuple[Tensor, Tensor, Tensor | None]
Fault = Callable[[Tensor, Tensor, Tensor | None], Parts]


def nibbles_are_swapped(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    return (data << 4) | (data >> 4), scale, groups


def one_row_has_its_nibbles_swapped(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    data = data.clone()
    data[::8] = (data[::8] << 4) | (data[::8] >> 4)
    return data, scale, groups


def a_row_has_its_neighbours_scale(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    return data, scale.roll(1), groups


def groups_are_off_by_one(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    assert groups is not None
    steps = groups[..., None].contiguous().view(torch.uint8).roll(1, dims=-1)
    return data, scale, steps.contiguous().view(torch.int32)[..., 0]


def groups_are_the_neighbour_rows(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    assert groups is not None
    return data, scale, groups.roll(1, dims=1)


def columns_are_off_by_one(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    return data.view(torch.uint8).roll(1, dims=1).view(data.dtype), scale, groups


def signs_are_lost(data: Tensor, scale: Tensor, groups: Tensor | None) -> Parts:
    mask = 0x77 if groups is not None else 0x7F
    return (data.view(torch.uint8) & mask).view(data.dtype), scale, groups


OF_ALL = [a_row_has_its_neighbours_scale, columns_are_off_by_one, signs_are_lost]
OF_INT4 = [nibbles_are_swapped, one_row_has_its_nibbles_swapped, groups_are_off_by_one]
OF_INT4 += [groups_are_the_neighbour_rows]
PLANTS = [*product(OF_ALL, QUANTIZED), *product(OF_INT4, ["int4"])]


@pytest.mark.parametrize(
    "fault, format", PLANTS, ids=lambda of: of if isinstance(of, str) else of.__name__
)
def test_a_fault_in_quantization_shows_in_the_draft_logits(
    tiny: Path, monkeypatch: Patch, fault: Fault, format: str
) -> None:
    honest = quantize
    monkeypatch.setattr(quantization, "quantize", lambda *of: fault(*honest(*of)))
    assert draft_error(tiny, format) > 1.4 * MOST_ERROR[format]


# Memory


class Allocator(TorchDispatchMode):
    """Counts the bytes of storages that live; ``peak``: the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.most = 0  # of which the latter counts what may be gone already

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [of for of in tree_leaves(out) if isinstance(of, Tensor) and not of.is_meta]
        for storage in (of.untyped_storage() for of in made):
            self.living[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
            self.most += storage.nbytes()
        if self.most > self.peak:
            self.living = {at: of for at, of in self.living.items() if not of[0].expired()}
            self.most = sum(size for _, size in self.living.values())
            self.peak = max(self.peak, self.most)
        return out


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose layers weigh more than all else; its shards hold parts of every layer."""
    return write_checkpoint(
        tmp_path_factory.mktemp("deep") / "model",
        n_shards=3,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        head_dim=32,
    )


def peak_over_need(directory: Path, formats: Formats) -> tuple[int, int]:
    """The bytes that loading took at most beyond what stays, and the room that it may take."""
    checkpoint, quantizer = open_checkpoint(directory), Quantizer(formats)
    with Allocator() as allocator:
        model = load_model(
            checkpoint, kernels_for("sdpa", CPU, torch.float32, 32), CPU, torch.float32, quantizer
        )
    need = sum(weight_bytes(model))
    assert need == sum(count_bytes(checkpoint.config, torch.float32, formats))
    largest = 3 * 128 * 384 * 4  # the MLP's weights
    one_tensor, at_work = 128 * 384 * 4, 15 * 4 * kernel_formats.AT_ONCE
    return allocator.peak - need, largest + one_tensor + at_work


FORMATS = [Formats(drafter=name) for name in ("checkpoint", *QUANTIZED)]
FORMATS += [Formats(name, name) for name in ("fp8", "int4")]


@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_loading_never_takes_more_than_a_part_of_a_layer_beyond_its_need(
    deep: Path, monkeypatch: Patch, formats: Formats
) -> None:
    monkeypatch.setattr(kernel_formats, "AT_ONCE", 2**14)
    taken, room = peak_over_need(deep, formats)
    assert taken <= room


def test_parts_that_stay_after_they_are_quantized_are_noticed(
    deep: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(kernel_formats, "AT_ONCE", 2**14)
    honest = Transformer.parts
    monkeypatch.setattr(Transformer, "parts", lambda model: iter(list(honest(model))))
    taken, room = peak_over_need(deep, Formats("int4", "int4"))
    assert taken > 3 * room


@pytest.mark.parametrize("shape", PUBLIC_SHAPES)
def test_the_readme_says_the_public_models_memory(shape: str) -> None:
    """Weights; these and the cache, as they are, with an int4 drafter and of int4 altogether."""
    config, dtype = shape_config(shape), torch.bfloat16
    needed = [
        memory_needed(config, dtype, CPU, 4096, 1, formats)
        for formats in (Formats(), Formats(drafter="int4"), Formats("int4", "int4"))
    ]
    sizes = [needed[0].weights, *map(sum, needed)]
    row = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
    assert f"Orthrus-Qwen3-{shape}` | {row} |" in Path("README.md").read_text(encoding="utf-8")


def test_8_bits_are_half_of_16_and_4_little_more_than_a_quarter() -> None:
    config = shape_config("8B")
    sizes = {name: count_bytes(config, torch.bfloat16, Formats(drafter=name)) for name in QUANTIZED}
    read = sum(2 * linear.weight.numel() for linear in build_on_meta(config).verifier.linears())
    shares = {name: of.drafter / read for name, of in sizes.items()}
    assert shares == pytest.approx({"fp8": 0.5, "int8": 0.5, "int4": 0.258}, abs=0.001)
    assert len({of.verifier for of in sizes.values()}) == 1


# What is chosen, said and refused


def settings_on(device: str, dtype: torch.dtype = torch.bfloat16) -> Settings:
    backend: Any = None
    where = (torch.device(device), dtype, 4096, 1, "graph", backend, "default")
    return Settings(shape_config("8B"), *where, Formats(), "auto", True, True)


def test_auto_takes_the_fastest_drafter_that_fits(monkeypatch: Patch) -> None:
    def chosen(settings: Settings, available: int, **options: Any) -> tuple[str, str]:
        monkeypatch.setattr(loading, "available_memory", lambda _: available)
        formats = choose_formats(Options(**options), settings)
        return formats.verifier, formats.drafter

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    gpu, unchanged = settings_on("cuda"), ("checkpoint", "checkpoint")
    room = sum(memory_needed(*gpu[:1], gpu.dtype, gpu.device, 4096, 1, Formats(drafter="int4")))
    assert chosen(gpu, room) == ("checkpoint", "int4")
    assert chosen(gpu, room - 1) == unchanged
    assert chosen(gpu, room - 1, draft_weights="fp8") == ("checkpoint", "fp8")  # as asked for
    assert chosen(gpu, room - 1, weights="fp8") == ("fp8", "fp8")
    assert chosen(gpu, room, draft_view=False) == unchanged
    assert chosen(gpu, room, draft_weights="checkpoint") == unchanged
    for dtype in (torch.float16, torch.float32, torch.float64):  # slower, or no kernels
        assert chosen(settings_on("cuda", dtype), 10**12) == unchanged
    assert chosen(settings_on("cpu"), 10**12) == unchanged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int8"}, "weights: 'int8' is not one of 'checkpoint', 'fp8', 'int4'"),
        ({"weights": None}, "weights: None is not one of"),
        (
            {"draft_weights": "fp4"},
            "draft_weights: 'fp4' is not one of 'auto', 'checkpoint', 'fp8', 'int8', 'int4'",
        ),
        (
            {"weights": "int4", "draft_weights": "fp8"},
            "draft_weights 'fp8': with weights 'int4' both views have the same; leave",
        ),
        ({"weights": "fp8", "draft_weights": "checkpoint"}, "draft_weights 'checkpoint': with"),
        (
            {"draft_weights": "int8", "draft_view": False},
            "draft_weights: 'int8', but without the draft view nothing drafts",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    tiny: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        load(tiny, **options)
    assert str(caught.value).startswith(message) and str(caught.value).isprintable()


def test_a_plain_qwen3_has_no_drafter_to_quantize(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False)
    with pytest.raises(RequestError, match="draft_weights: 'int4', but a plain Qwen3 has nothing"):
        load(directory, draft_weights="int4")
    decoder = load(directory, weights="int4")
    assert decoder.configuration["weights"] == decoder.configuration["draft_weights"] == "int4"
    assert decoder.configuration["weight_bytes"]["drafter"] == 0
    assert decoder.generate([1, 2, 3], 8).tokens


def test_the_choice_its_bytes_and_its_time_are_said(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "orthrus_fast")
    decoder = load(tiny)
    assert not caplog.messages and "quantize" not in decoder.startup
    decoder = load(tiny, draft_weights="int4")
    sizes = count_bytes(decoder.config, torch.float32, Formats(drafter="int4"))
    assert decoder.configuration["weight_bytes"] == sizes._asdict()
    assert sum(sizes) == sum(p.nbytes for p in decoder.runner.model.parameters())
    assert 0 < decoder.startup["quantize"] < 60
    (line,) = caplog.messages
    assert line.startswith(
        "weights: verifier checkpoint, 0.00 GB; drafter int4, 0.00 GB of its own"
    )
    caplog.clear()
    load(tiny, weights="fp8")
    _, warning = caplog.messages
    assert warning == f"weights fp8: this is another model than {tiny}, and its texts may differ"
    assert caplog.records[1].levelno == logging.WARNING


def test_the_command_line_takes_and_shows_them(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", str(tiny), "--device", "cpu"]
    assert main(["info", *words[:2], "--draft-weights", "int4"]) == 0
    lines = dict(
        line.split(maxsplit=1)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("weights", "--"))
    )
    assert lines["weights"] == "verifier checkpoint, drafter int4"
    assert [part.split()[0] for part in lines["--draft-weights"].split(", ")] == [
        *("checkpoint", "fp8", "int8", "int4")
    ]
    assert [part.split()[0] for part in lines["--weights"].split(", ")] == [
        *("checkpoint", "fp8", "int4")
    ]
    embedded = ["generate", "--prompt", "a,b", "--max-new-tokens", "4", "--device", "cpu", "--json"]
    assert main([*embedded, "--draft-weights", "int4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["configuration"]["draft_weights"] == "int4" and found["startup"]["quantize"] > 0
    assert main([*embedded, "--draft-weights", "int4", "--mode", "ar"]) == 2
    assert "without the draft view nothing drafts" in capsys.readouterr().err
