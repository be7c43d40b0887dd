"""Runners on the CPU: the compiled one against the eager one, what they refuse, cycles in flight.

torch.compile's work is shared by all decoders of the same shapes in a process, so the tests keep to
a few shapes. Where only what dynamo does matters, ``plain_compile`` leaves the C++ compiler out; of
those that need it, one smoke test is not slow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import orthrus_fast
from orthrus_fast import Decoder, runners, steps
from orthrus_fast.attention import find_backend, sdpa
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import count_weights, open_checkpoint
from orthrus_fast.errors import RequestError, UnsupportedError
from orthrus_fast.invariance import check
from orthrus_fast.kernels.interface import Kernels, Weight
from orthrus_fast.kernels.plain import PlainProducts, padded_linear, plain_kernels
from orthrus_fast.kernels.plain import add_norm as plain_add_norm
from orthrus_fast.kernels.select import register_custom_ops
from orthrus_fast.loading import memory_needed
from orthrus_fast.options import COMPILE_MODES, ONE_ROW, RUNNERS
from orthrus_fast.results import Generation
from orthrus_fast.runners import check_runner
from orthrus_fast.sampling import Settings
from tests.checkpoints import write_checkpoint
from tests.decoders import always_drafting, committed, contents, prefill_logits, start, unchecked
from tests.embedded import HELD_OUT, MODEL, prompt_of
from tests.judge import Judge
from tests.marks import slow_but

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ENDS = [270, 271]  # ids past the tokenizer's: texts hardly ever end, but may
PROMPTS = [[i + 1] * (1 + 17 * i % 70) for i in range(7)]  # more than slots, lengths apart
SHAPES = [("float64", 1), ("float32", 4)]
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "drafts that copy": {"agreement": 1.0, "tied": False},
    "drafts at random": {"agreement": 0.0},
}


def load(directory: Path, dtype: str = "float32", **options: Any) -> Decoder:
    with unchecked():
        return checked(directory, dtype, **options)


def checked(directory: Path, dtype: str = "float32", **options: Any) -> Decoder:
    options = always_drafting(directory, {"device": "cpu", "dtype": dtype, **options})
    return orthrus_fast.load(directory, **options)


def both(directory: Path, dtype: str = "float32", **options: Any) -> tuple[Decoder, Decoder]:
    """The same checkpoint, eager and compiled."""
    eager, compiled = (load(directory, dtype, runner=r, **options) for r in ("eager", "compiled"))
    return eager, compiled


def n_graphs() -> int:
    """Graphs compiled in this process so far."""
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("variants")
    common: dict[str, Any] = {"seed": 3, "block_size": 16, "eos_token_id": ENDS}
    return {n: write_checkpoint(base / n, **common, **fields) for n, fields in VARIANTS.items()}


@pytest.fixture(scope="module")
def tiny(variants: dict[str, Path]) -> Path:
    return variants["tied"]


@pytest.fixture
def plain_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as it is, but dynamo's graphs run as they stand: no C++ compiler."""
    compile = torch.compile

    def traced(function: Any, *, options: dict[str, Any], **settings: Any) -> Any:
        return compile(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)


# The compiled runner decodes what the eager one does


@pytest.mark.parametrize(
    "variant, dtype, slots",
    [
        pytest.param(variant, *shape, marks=[pytest.mark.slow] if case else [])
        for case, (variant, shape) in enumerate(product(VARIANTS, SHAPES))
    ],
)
def test_compiled_decodes_what_eager_and_the_judge_decode(
    variants: dict[str, Path], variant: str, dtype: str, slots: int
) -> None:
    eager, compiled = both(variants[variant], dtype, slots=slots)
    expected = [result.tokens for result in eager.generate(PROMPTS, 30, mode="ar")]
    for mode in ("ar", "diffusion"):
        results = compiled.generate(PROMPTS, 30, mode=mode)
        assert [result.tokens for result in results] == expected, mode
        assert [r.stats.cycles for r in results] == [
            r.stats.cycles for r in eager.generate(PROMPTS, 30, mode=mode)
        ]
    if dtype == "float64":
        judge = Judge(variants[variant])
        assert expected == [judge.generate(p, 30, tuple(ENDS))[0] for p in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, slots", SHAPES)
def test_compiled_ends_where_eager_ends(tiny: Path, tmp_path: Path, dtype: str, slots: int) -> None:
    free = [result.tokens for result in load(tiny, "float64").generate(PROMPTS, 30)]
    ends = [free[1][10], free[4][3]]
    directory = write_checkpoint(tmp_path / "model", seed=3, block_size=16, eos_token_id=ends)
    eager, compiled = both(directory, dtype, slots=slots)
    judge = Judge(directory)
    expected = [judge.generate(prompt, 30, tuple(ends))[0] for prompt in PROMPTS]
    assert min(map(len, expected)) < 30
    for mode in ("ar", "diffusion"):
        for decoder in (eager, compiled):
            results = decoder.generate(PROMPTS, 30, mode=mode)
            assert [result.tokens for result in results] == expected
            assert [result.finish_reason for result in results] == [
                "eos" if tokens[-1] in ends else "length" for tokens in expected
            ]


def test_a_plain_qwen3_compiled(tmp_path: Path, plain_compile: None) -> None:
    """No draft view, and one row a pass."""
    directory = write_checkpoint(tmp_path / "model", draft=False, tied=False, eos_token_id=ENDS)
    compiled = load(directory, runner="compiled", slots=2)
    expected = [r.tokens for r in load(directory, slots=2).generate(PROMPTS, 30, mode="ar")]
    before = n_graphs()
    assert [r.tokens for r in compiled.generate(PROMPTS, 30, mode="ar")] == expected
    assert n_graphs() == before
    with pytest.raises(UnsupportedError, match="plain Qwen3"):
        compiled.generate([1, 2], 10, mode="diffusion")


@pytest.mark.slow
def test_the_embedded_checkpoint_compiled() -> None:
    eager, compiled = both(MODEL, max_seq_len=1024)
    for example in (HELD_OUT[0], HELD_OUT[-1]):
        prompt = prompt_of(example)
        expected = eager.generate(prompt, 48)
        for mode in ("ar", "diffusion"):
            result = compiled.generate(prompt, 48, mode=mode)
            assert (result.tokens, result.text) == (expected.tokens, expected.text)
        assert expected.stats.tokens_per_cycle > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype, slots", SHAPES)
def test_a_compiled_row_is_a_function_of_its_tokens(tiny: Path, dtype: str, slots: int) -> None:
    """What the check compares; and a whole text, prefilled and decoded in both modes."""
    if checked(tiny, dtype, slots=slots).configuration["promise"] != ONE_ROW:
        pytest.skip("this CPU's rows depend on more than their tokens in eager code, too")
    compiled = checked(tiny, dtype, slots=slots, runner="compiled")
    assert compiled.configuration["promise"] == ONE_ROW, str(compiled.invariance)
    rows, text = [], [1, 2, 3]
    for mode in ("ar", "diffusion", "prefill"):
        if mode == "prefill":
            compiled.next_logits(text)
        else:
            tokens = compiled.generate([1, 2, 3], 150, mode=mode).tokens
            text = [1, 2, 3, *tokens[:-1]]
        rows.append([tensor.clone() for layer in range(2) for tensor in committed(compiled, layer)])
    assert len(rows[0][0]) == len(text)
    for others in rows[1:]:
        assert all(torch.equal(a, b) for a, b in zip(rows[0], others, strict=True))


def test_what_is_prepared_late_moves_no_text(tiny: Path, plain_compile: None) -> None:
    """Sampling, and another width, while a text is under way."""
    eager, compiled = both(tiny, slots=2)
    expected = eager.generate(PROMPTS[1], 40).tokens
    stream = compiled.stream(PROMPTS[1], 40)
    next(stream), next(stream)
    settings = orthrus_fast.SamplingParams(0.8, seed=4)
    beside = compiled.generate(PROMPTS[2], 12, settings).tokens
    assert beside == eager.generate(PROMPTS[2], 12, settings).tokens
    for _ in stream:
        pass
    assert stream.result.tokens == expected


def test_startup_and_configuration_say_what_was_compiled(tiny: Path, plain_compile: None) -> None:
    eager, compiled = both(tiny, slots=4)
    assert set(eager.startup) == {"weights", "check"}
    assert set(compiled.startup) == {"weights", "compile", "check"}
    assert eager.configuration["compile_mode"] is None
    assert compiled.configuration["compile_mode"] == "default"
    assert compiled.configuration["runner"] == "compiled"


# What is compiled, and when


def test_nothing_is_compiled_after_load(tiny: Path, plain_compile: None) -> None:
    compiled = load(tiny, runner="compiled", slots=4)
    prompts = [[7] * n for n in (1, 2, 15, 16, 17, 63, 64, 65, 130, 200, 300)]
    expected = [result.tokens for result in compiled.generate(prompts, 8, mode="ar")]
    before = n_graphs()
    surroundings: list[Callable[[], Any]] = [
        contextlib.nullcontext,
        torch.enable_grad,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ]
    for surrounding in surroundings:
        for mode in ("ar", "diffusion"):
            with surrounding():
                results = compiled.generate(prompts, 8, mode=mode)
            assert [result.tokens for result in results] == expected
    assert compiled.generate(prompts[3], 7).tokens == expected[3][:7]
    stream = compiled.stream(prompts[5], 60)
    next(stream), next(stream)
    stream.close()
    compiled.next_logits(prompts[4])
    assert n_graphs() == before


def test_each_function_is_compiled_once_for_all_widths(tmp_path: Path, plain_compile: None) -> None:
    """Of one row, where compilers like to know a size, of prompts and of slots, too."""
    directory = write_checkpoint(
        tmp_path / "model", hidden_size=16, block_size=16, vocab_size=301, eos_token_id=[]
    )
    before, runner = n_graphs(), load(directory, "float64", runner="compiled").runner
    # embed, the layer in both views, the last norm, accept_and_commit
    assert n_graphs() - before == 5
    runner.prepare(16, sampling=True)  # sample_block, and accept_and_commit with it
    assert n_graphs() - before == 7
    expected = load(directory, "float64").runner
    for width, prompt in ((8, [5] * 33), (16, [5, 6]), (2, [7]), (1, [5] * 100)):
        for sampling in (False, True):
            runner.prepare(width, sampling)
            params = orthrus_fast.SamplingParams(temperature=0.7 * sampling, seed=3)
            outputs = []
            for one in (runner, expected):
                outputs.append([start(one, prompt, 0, 200, params, drafting=True)])
                one.launch(True, width, sampling)
                outputs[-1] += one.read()
            assert [output.tokens for output in outputs[0]] == [o.tokens for o in outputs[1]]
    assert n_graphs() - before == 7
    load(directory, "float64", runner="compiled", slots=3)
    assert n_graphs() - before == 10  # the cache's and the state's size is known


@pytest.mark.slow
def test_another_default_dtype_changes_no_text_and_compiles_once(
    tmp_path: Path, plain_compile: None
) -> None:
    """torch guards every artifact on the process's default dtype: one more set for a new one.

    Torch's own limit of artifacts is not in the way, prefill's neither.
    """
    directory = write_checkpoint(tmp_path / "model", hidden_size=56, eos_token_id=[])
    compiled = load(directory, runner="compiled", slots=3)
    expected = [result.tokens for result in compiled.generate(PROMPTS, 20)]
    n_loaded = n_graphs()
    torch.set_default_dtype(torch.float64)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            for _ in range(2):
                assert [result.tokens for result in compiled.generate(PROMPTS, 20)] == expected
                n_more = n_graphs() - n_loaded
                assert n_more in (0, 5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [result.tokens for result in compiled.generate(PROMPTS, 20)] == expected
    assert n_graphs() == n_loaded + n_more


@pytest.mark.slow
def test_one_layers_code_serves_all_layers(tmp_path: Path, plain_compile: None) -> None:
    n_new = []
    for n_layers, hidden_size in ((1, 24), (2, 40), (7, 48)):  # other shapes: nothing is shared
        directory = write_checkpoint(
            tmp_path / f"{n_layers}",
            num_hidden_layers=n_layers,
            hidden_size=hidden_size,
            block_size=hidden_size // 8,
            vocab_size=300 + hidden_size,
        )
        before = n_graphs()
        load(directory, runner="compiled")
        n_new.append(n_graphs() - before)
    assert n_new[0] > 0
    assert len(set(n_new)) == 1


def test_a_second_decoder_of_the_same_shapes_compiles_nothing(
    variants: dict[str, Path], plain_compile: None
) -> None:
    load(variants["tied"], runner="compiled", slots=4)
    before = n_graphs()
    load(variants["untied"], runner="compiled", slots=4)
    assert n_graphs() == before


@pytest.mark.slow
def test_more_decoders_than_torchs_limit(
    tmp_path: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes all different, so that each needs artifacts of its own for the same functions."""
    n_decoders = 11
    assert n_decoders > torch._dynamo.config.recompile_limit
    directory = write_checkpoint(tmp_path / "model", draft=False, num_hidden_layers=1)
    expected = load(directory, "float64").generate([1, 2], 9, mode="ar").tokens
    compiled = [
        load(directory, "float64", slots=5 + i, runner="compiled") for i in range(n_decoders)
    ]
    before = n_graphs()
    for decoder in compiled:  # the first ones, too, still have their own
        assert decoder.generate([1, 2], 9, mode="ar").tokens == expected
    assert n_graphs() == before
    monkeypatch.setattr(runners, "compiler_limits", contextlib.nullcontext)
    refused = (UnsupportedError, torch._dynamo.exc.FailOnRecompileLimitHit)
    with pytest.raises(refused, match="Hard failure|torch.compile failed"):
        load(directory, "float64", slots=5 + n_decoders, runner="compiled")


@pytest.mark.slow
def test_compiled_decoders_in_two_threads(tmp_path: Path, plain_compile: None) -> None:
    """Each loads, and so compiles, while the other does."""
    directory = write_checkpoint(tmp_path / "model", hidden_size=44, eos_token_id=[])
    expected = load(directory).generate([1, 2], 40).tokens
    before = torch._dynamo.config.recompile_limit

    def decode(slots: int) -> list[int]:
        decoder = load(directory, slots=slots, runner="compiled")
        assert torch._dynamo.config.recompile_limit == before
        return decoder.generate([1, 2], 40).tokens

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(decode, (1, 2))) == [expected, expected]
    assert torch._dynamo.config.recompile_limit == before


# torch's own settings


def torchs_settings() -> dict[str, Any]:
    backends = torch.backends
    precisions = (torch.backends, backends.cuda.matmul, backends.mkldnn.matmul)
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # it refuses where the newer settings were used
        legacy = "refused"
    return {
        "dynamo": torch._dynamo.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "precisions": [backend.fp32_precision for backend in precisions],
        "legacy precision": legacy,
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "python's random": random.getstate(),
    }


@pytest.fixture
def restored_precisions() -> Iterator[None]:
    backends = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.slow
@pytest.mark.parametrize("switched", ["nothing", "legacy", "tf32"])
def test_compiling_and_decoding_leave_torch_as_they_found_it(
    tmp_path: Path, switched: str, restored_precisions: None
) -> None:
    """With the real compiler, on a shape of this test's own."""
    directory = write_checkpoint(
        tmp_path / "model", draft=False, num_hidden_layers=1, hidden_size=8
    )
    torch.manual_seed(11)
    if switched == "legacy":
        torch.set_float32_matmul_precision("high")
    elif switched == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = torchs_settings()
    compiled = load(directory, runner="compiled")
    assert torchs_settings() == before
    expected = load(directory).generate([1, 2], 5, mode="ar").tokens
    tokens = []
    for chunk in compiled.stream([1, 2], 5, mode="ar"):
        assert torchs_settings() == before
        tokens += chunk.tokens
    assert tokens == expected
    assert torchs_settings() == before


def test_a_failed_load_leaves_torch_as_it_found_it(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torchs_settings()
    monkeypatch.setattr(torch, "compile", failing(BACKEND_FAILED))
    with pytest.raises(UnsupportedError):
        load(tiny, runner="compiled")
    assert torchs_settings() == before


# Refusals


@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("cuda", 1)])
@pytest.mark.parametrize("mode", COMPILE_MODES)
@pytest.mark.parametrize("runner", ["auto", *RUNNERS])
def test_every_runner_and_compile_mode(runner: str, mode: str, device: torch.device) -> None:
    if runner == "graph" and device.type == "cpu":
        with pytest.raises(UnsupportedError, match="'graph' needs a CUDA device, not cpu; use 'ea"):
            check_runner(runner, mode, device)
        return
    automatic = "graph" if device.type == "cuda" else "eager"
    expected = automatic if runner == "auto" else runner
    if mode == "default" or expected == "compiled":
        assert check_runner(runner, mode, device) == expected
    else:
        problem = f"compile_mode '{mode}': runner '{expected}' has none; use runner 'compiled'"
        with pytest.raises(UnsupportedError, match=problem) as caught:
            check_runner(runner, mode, device)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_the_compiler_is_told_what_torchs_modes_mean(mode: str) -> None:
    options = runners.compiler_options(mode)
    of_mode = torch._inductor.list_mode_options(mode)
    assert of_mode.items() <= options.items()
    assert options["triton.cudagraphs"] == (mode in ("reduce-overhead", "max-autotune"))
    tunes = mode.startswith("max-autotune")
    assert options["max_autotune"] == options["coordinate_descent_tuning"] == tunes
    assert options.get("deterministic", False) != tunes  # which lets nothing be timed
    assert ("max_autotune_gemm" in options) != tunes  # a False would forbid what the mode asks for


@pytest.mark.parametrize("mode", slow_but(["max-autotune"], COMPILE_MODES))
def test_each_compile_mode_decodes_what_eager_decodes(
    mode: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On dynamo's graphs as they stand; what the compiler was told is looked at."""
    told = []
    compile = torch.compile

    def traced(function: Any, *, options: dict[str, Any], **settings: Any) -> Any:
        told.append(options)
        return compile(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)
    eager = load(tiny, "float64")
    compiled = load(tiny, "float64", runner="compiled", compile_mode=mode)
    assert told and all(options == runners.compiler_options(mode) for options in told)
    assert compiled.configuration["compile_mode"] == mode
    for decoding in ("ar", "diffusion"):
        expected = eager.generate(PROMPTS[0], 20, mode=decoding)
        assert compiled.generate(PROMPTS[0], 20, mode=decoding).tokens == expected.tokens


def test_torchs_own_graphs_hear_of_each_pass(
    tiny: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    mark = torch.compiler.cudagraph_mark_step_begin
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(mark()))
    runner = load(tiny, "float64", runner="compiled", compile_mode="reduce-overhead").runner
    assert begun == []  # a CPU has no graphs
    assert isinstance(runner, runners.CompiledRunner)
    runner._cudagraph_trees = True
    with torch.inference_mode(), runners.compiler_limits():  # as ``prepare`` calls it
        runner._warm_up(16, False)
    assert len(begun) == 2 * runners.CALLS_TO_RECORD
    runner.launch(True, 16)
    assert len(begun) == 2 * runners.CALLS_TO_RECORD + 2


@pytest.mark.parametrize("runner", ["", "Eager", "cudagraph", None, 3])
def test_a_runner_that_is_none(runner: Any) -> None:
    with pytest.raises(RequestError, match="runner: .* is not one of 'auto', 'eager', "):
        check_runner(runner, "default", CPU)


@pytest.mark.parametrize("mode", ["", "Default", "max", None, 3])
def test_a_compile_mode_that_is_none(mode: Any) -> None:
    with pytest.raises(RequestError, match="compile_mode: .* is not one of"):
        check_runner("auto", mode, CPU)


def test_the_graph_runner_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="runner 'graph' needs a CUDA device"):
        load(tmp_path / "absent", runner="graph")


LONG = "first line\n  second line\n" + "x" * 5000
BACKEND_FAILED = torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError(LONG), None)


def failing(error: Exception) -> Callable[..., Any]:
    """A torch.compile whose work fails, as it does: in the first call of what it returns."""

    def compile(function: Any, **_: Any) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise error

        return call

    return compile


@pytest.mark.parametrize(
    "error",
    [
        BACKEND_FAILED,
        torch._inductor.exc.InductorError(RuntimeError(LONG), None),
        torch._dynamo.exc.Unsupported(LONG),
        torch._dynamo.exc.InternalTorchDynamoError(LONG),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_compiler_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(torch, "compile", failing(error))
    with pytest.raises(UnsupportedError, match="torch.compile failed .*first line.*use runner 'ea"):
        load(tiny, runner="compiled")
    try:
        load(tiny, runner="compiled")
    except UnsupportedError as refusal:
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 1200
        assert refusal.__cause__ is error


def test_no_cpp_compiler_is_one_line(tmp_path: Path) -> None:
    """With the real torch.compile, on a shape that nothing has compiled yet."""
    directory = write_checkpoint(tmp_path / "model", draft=False, hidden_size=12)
    absent = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",)})
    with absent, pytest.raises(UnsupportedError, match="No working C.. compiler.*use runner 'eage"):
        load(directory, runner="compiled")
    assert load(directory).generate([1], 3, mode="ar").tokens


# Without the draft view


@pytest.mark.parametrize(
    "tied, n_shards", slow_but([(True, 1), (False, 3)], product((True, False), (1, 3)))
)
def test_without_the_draft_view_its_weights_are_not_read(
    tmp_path: Path, tied: bool, n_shards: int
) -> None:
    directory = write_checkpoint(
        tmp_path / "model", seed=3, tied=tied, n_shards=n_shards, block_size=16, eos_token_id=ENDS
    )
    calls: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    decoders = {}
    for view in (True, False):
        seen = calls[view]
        decoders[view] = load(
            directory,
            draft_view=view,
            progress=lambda done, total, seen=seen: seen.append((done, total)),  # type: ignore[misc]
        )
    hidden, head_dim, n_heads, n_kv_heads, n_layers = 32, 16, 4, 2, 2
    projections = hidden * head_dim * (2 * n_heads + 2 * n_kv_heads)  # q, o; k, v
    n_draft = n_layers * (projections + 2 * head_dim)  # and the two norms
    sizes = {v: sum(p.numel() for p in d.runner.model.parameters()) for v, d in decoders.items()}
    assert sizes[True] - sizes[False] == n_draft
    config = decoders[True].config
    assert count_weights(config) == sizes[True]
    assert count_weights(config, draft_view=False) == sizes[True] - n_draft
    assert len(calls[True]) - len(calls[False]) == n_layers * 6
    for view in (True, False):
        n_bytes = 4 * sizes[view]
        assert calls[view][-1] == (n_bytes, n_bytes)
        assert {total for _, total in calls[view]} == {n_bytes}
        assert [done for done, _ in calls[view]] == sorted({done for done, _ in calls[view]})
    checkpoint = open_checkpoint(directory)
    assert checkpoint.draft_bytes == 4 * n_draft
    assert checkpoint.weight_bytes == 4 * sizes[True]
    for prompt in PROMPTS:
        expected = decoders[True].generate(prompt, 20, mode="ar").tokens
        assert decoders[False].generate(prompt, 20, mode="ar").tokens == expected


def test_without_the_draft_view_no_drafting(tiny: Path, plain_compile: None) -> None:
    for runner in ("eager", "compiled"):
        half = load(tiny, "float64", draft_view=False, runner=runner)
        whole = load(tiny, "float64")
        assert half.config == whole.config
        with pytest.raises(UnsupportedError, match="loaded with draft_view=False"):
            half.generate([1, 2], 10, mode="diffusion")
        with pytest.raises(UnsupportedError, match="draft_view=False"):
            half.stream([1, 2], 10, mode="diffusion")
        with pytest.raises(UnsupportedError, match="draft_view=False"):
            half.generate([[1, 2]], 10, mode="diffusion")
        expected = whole.generate([1, 2], 30, mode="ar").tokens
        assert half.generate([1, 2], 30, mode="ar").tokens == expected


def test_a_plain_qwen3_takes_either_setting_of_draft_view(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False)
    assert open_checkpoint(directory).draft_bytes == 0
    texts = [
        load(directory, draft_view=view).generate([5], 9, mode="ar").tokens for view in (True, 0)
    ]
    assert texts[0] == texts[1]
    with pytest.raises(UnsupportedError, match="plain Qwen3"):
        load(directory, draft_view=False).generate([5], 9, mode="diffusion")


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2), ("float64", 8)])
@pytest.mark.parametrize("slots", [1, 3])
def test_memory_by_hand(tiny: Path, dtype: str, size: int, slots: int) -> None:
    config = open_checkpoint(tiny).config
    torch_dtype = getattr(torch, dtype)
    attention = 32 * 16 * (4 + 2 + 2 + 4) + 2 * 16
    layer = attention + 3 * 32 * 48 + 2 * 32
    n_autoregressive = 272 * 32 + 2 * layer + 32
    rows = 320  # 200 tokens and a padded chunk of 64, rounded up to a multiple of 64
    cache = slots * rows * 2 * 2 * 2 * 16  # k and v, layers, heads, head_dim
    for view, n_weights in ((True, n_autoregressive + 2 * attention), (False, n_autoregressive)):
        memory = memory_needed(config, torch_dtype, CPU, 200, slots, draft_view=view)
        assert memory == (n_weights * size, cache * size, 0)
        on_gpu = memory_needed(config, torch_dtype, CUDA, 200, slots, draft_view=view)
        assert on_gpu[:2] == memory[:2]
        decoder = load(tiny, dtype, max_seq_len=200, slots=slots, draft_view=view)
        runner = decoder.runner
        weights = sum(p.nbytes for p in runner.model.parameters())
        caches = sum(rows.nbytes for rows in (*runner.cache.k, *runner.cache.v))
        assert (weights, caches) == memory[:2]


def test_memory_spelled_out() -> None:
    memory = orthrus_fast.loading.Memory(1_500_000_000, 250_000_000, 0)
    assert str(memory) == "weights 1.50 GB + KV cache 0.25 GB = 1.75 GB"
    memory = memory._replace(passes=600_000_000)
    assert str(memory) == "weights 1.50 GB + KV cache 0.25 GB + passes 0.60 GB = 2.35 GB"


def test_memory_of_a_gpus_passes_is_that_of_the_graphs_that_are_kept() -> None:
    """Each further slot's: logits of three graphs a width, and of sampling; attention's splits.

    And the rows of a pass under a grammar, whose graphs share no memory with others.
    """
    config = shape_config("1.7B")
    passes = [
        memory_needed(config, torch.bfloat16, CUDA, 4096, slots).passes for slots in (1, 2, 32)
    ]
    logits = 2 * config.vocab_size
    masks = 2 * 32 * config.vocab_size
    splits = 32 * 16 * 18 * (128 + 2) * 4  # rows, heads, of 4160 keys
    n_logits = 3 * (1 + 4 + 8 + 16 + 32) + 3 * 32
    row = 2 * (4 * 2048 + 2 * 2048 + 6144) + 4 * 4 * 4096  # bytes; four partial sums in float32
    assert passes[1] - passes[0] == n_logits * logits + masks + splits + 32 * row
    assert passes[2] - passes[0] == 31 * (passes[1] - passes[0])
    assert passes[0] < 800_000_000


# A cycle ahead of the reader, as the graph runner is


def runs_ahead(decoder: Decoder) -> Decoder:
    decoder.runner.lookahead = 1  # type: ignore[misc]
    return decoder


def facts(result: Generation) -> tuple[Any, ...]:
    """All of a result that does not come from the clock."""
    stats = result.stats
    assert stats is not None
    return result.text, result.tokens, result.finish_reason, stats.cycles, stats.accepted


@pytest.mark.parametrize("slots", slow_but([3], [1, 3, 4, 9]))
@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_cycle_ahead_gives_the_same_results(
    tiny: Path, tmp_path: Path, slots: int, mode: str
) -> None:
    free = [result.tokens for result in load(tiny).generate(PROMPTS, 30)]
    ends = [free[1][10], free[4][3]]
    directory = write_checkpoint(
        tmp_path / "model", seed=3, block_size=16, eos_token_id=ends, tokenizer=True
    )
    plain, ahead = load(directory, slots=slots), runs_ahead(load(directory, slots=slots))
    for budget in (1, 3, 40):
        expected = [facts(result) for result in plain.generate(PROMPTS, budget, mode=mode)]
        got = [facts(result) for result in ahead.generate(PROMPTS, budget, mode=mode)]
        assert got == expected
    reasons = {reason for _, _, reason, *_ in expected}
    assert reasons == {"eos", "length"}


def test_a_cycle_ahead_streams_the_same_chunks(tiny: Path) -> None:
    plain, ahead = load(tiny, slots=2), runs_ahead(load(tiny, slots=2))
    for prompt in PROMPTS[:3]:
        for mode in ("ar", "diffusion"):
            expected = list(plain.stream(prompt, 25, mode=mode))
            assert list(ahead.stream(prompt, 25, mode=mode)) == expected


def test_a_second_cycle_is_launched_before_the_first_is_read(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = ""
    decoder = runs_ahead(load(tiny))
    launch, read = decoder.runner.launch, decoder.runner.read

    def noted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal events
            events += name
            return function(*arguments)

        return call

    monkeypatch.setattr(decoder.runner, "launch", noted("L", launch))
    monkeypatch.setattr(decoder.runner, "read", noted("R", read))
    cycles = decoder.generate([1, 2], 5, mode="ar").stats.cycles
    assert cycles == 4
    assert events == "LR" * 4 + "R"  # the prompt's, and four cycles'; none in vain
    decoder.runner.lookahead = 0  # type: ignore[misc]
    events = ""
    decoder.generate([1, 2], 5, mode="ar")
    assert events == "R" + "LR" * cycles


@pytest.mark.parametrize(
    "n_read, leave", slow_but([(1, "del"), (5, "close")], product((0, 1, 2, 5), ("close", "del")))
)
def test_a_stream_dropped_half_way_leaves_nothing_behind(
    tiny: Path, n_read: int, leave: str
) -> None:
    plain, ahead = load(tiny, slots=2), runs_ahead(load(tiny, slots=2))
    expected = [facts(result) for result in plain.generate(PROMPTS, 20)]
    stream = ahead.stream([1, 2], 60)
    for _ in range(n_read):
        next(stream)
    assert ahead.runner.in_flight == (1 if n_read else 0)
    partial = stream.result.tokens
    if leave == "close":
        stream.close()
        assert stream.result.tokens == partial
    del stream
    assert [facts(result) for result in ahead.generate(PROMPTS, 20)] == expected
    assert [facts(ahead.generate(prompt, 20, mode="ar"))[1] for prompt in PROMPTS] == [
        tokens for _, tokens, *_ in expected
    ]
    while ahead.engine.has_work:
        ahead.engine.step()
    assert ahead.runner.in_flight == 0


@pytest.mark.parametrize("where", ["read", "launch", "start", "open"])
def test_an_interrupted_call_leaves_the_decoder_usable(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    decoder = runs_ahead(load(tiny, slots=2))
    expected = [facts(result) for result in decoder.generate(PROMPTS, 20)]
    runner, n_calls = decoder.runner, 0
    function = getattr(runner, where)

    def interrupted(*arguments: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            raise KeyboardInterrupt
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoder.generate(PROMPTS, 20)
    assert [facts(result) for result in decoder.generate(PROMPTS, 20)] == expected


@pytest.mark.parametrize("runner", ["eager", "compiled"])
@pytest.mark.parametrize("drafting", [True, False])
def test_a_cycle_past_the_end_changes_nothing(
    tiny: Path, tmp_path: Path, plain_compile: None, runner: str, drafting: bool
) -> None:
    free = [result.tokens for result in load(tiny).generate(PROMPTS[:4], 12)]
    ends = [free[1][5], free[3][7]]
    directory = write_checkpoint(tmp_path / "model", seed=3, block_size=16, eos_token_id=ends)
    decoder = load(directory, slots=4, runner=runner)
    results = decoder.generate(PROMPTS[:4], 12)
    assert {result.finish_reason for result in results} == {"eos", "length"}
    one = decoder.runner
    before = contents(one.state)
    assert before[0].tolist() == [  # though a text that ended early has room left
        len(prompt) + len(result.tokens) - 1
        for prompt, result in zip(PROMPTS, results, strict=False)
    ]
    assert before[-1].all()
    rows = [tensor.clone() for layer in range(2) for tensor in committed(decoder, layer)]
    for _ in range(3):
        one.launch(drafting, 16)
    for _ in range(3):
        assert one.read() == [runners.SlotOutput([], 0, True, [])] * 4
    assert all(map(torch.equal, contents(one.state), before))
    after = [tensor for layer in range(2) for tensor in committed(decoder, layer)]
    assert all(map(torch.equal, after, rows))


def test_a_cycle_past_the_end_at_full_capacity(tiny: Path) -> None:
    """The last block reaches past max_seq_len: there are rows for it, and it commits none."""
    decoder = runs_ahead(load(tiny, max_seq_len=112))
    roomy = load(tiny, max_seq_len=300)
    for n_tokens in (100, 111):
        prompt = list(range(n_tokens))
        result = decoder.generate(prompt, 112 - n_tokens)
        assert facts(result) == facts(roomy.generate(prompt, 112 - n_tokens))
        assert int(decoder.runner.state.length[0]) == 111


# The mailbox


def report(number: int, n_slots: int = 2) -> Tensor:
    return torch.full((n_slots, 5), number, dtype=torch.int64)


def test_the_mailbox_keeps_the_order() -> None:
    mailbox: Any = runners._Mailbox(CPU)
    assert len(mailbox) == 0
    for round_ in range(3):
        for number in range(3):
            mailbox.send(report(10 * round_ + number), list)
        assert len(mailbox) == 3 and not mailbox.has_arrived
        for number in range(3):
            assert mailbox.receive() == report(10 * round_ + number).tolist()
        assert len(mailbox) == 0
    with pytest.raises(IndexError):
        mailbox.receive()


class Event:
    """What the mailbox asks of a torch.cuda.Event; waiting for it may be interrupted."""

    n_waits = 0
    interrupt = False

    def __init__(self) -> None:
        self.recorded = False

    def record(self, stream: object) -> None:
        self.recorded = True

    def query(self) -> bool:
        return Event.n_waits > 0

    def synchronize(self) -> None:
        assert self.recorded
        Event.n_waits += 1
        if Event.interrupt:
            raise KeyboardInterrupt


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One that takes itself for a GPU's: the ring is there, only neither pinned nor awaited."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(Event, "n_waits", 0)
    monkeypatch.setattr(Event, "interrupt", False)
    yield runners._Mailbox(CUDA)


def test_a_ring_serves_any_number(mailbox: Any) -> None:
    mailbox.send(report(0), list)
    static = report(0)  # as a graph's output: the next replay overwrites it
    for number in range(1, 9):
        static.fill_(number)
        mailbox.send(static, list)
        assert len(mailbox) == 2
        assert mailbox.receive() == report(number - 1).tolist()
    static.fill_(99)
    assert mailbox.receive() == report(8).tolist()
    assert len(mailbox) == 0
    assert Event.n_waits == 9
    assert len(mailbox._ring) == 3


def test_only_so_many_are_unread_on_a_device(mailbox: Any) -> None:
    for number in range(3):
        mailbox.send(report(number), list)
    with pytest.raises(AssertionError):
        mailbox.send(report(3), list)
    assert [mailbox.receive() for _ in range(3)] == [report(n).tolist() for n in range(3)]


def test_reports_of_any_shape_share_the_ring_with_launches_that_have_none(mailbox: Any) -> None:
    sent = [report(0), None, report(1, n_slots=3), torch.tensor([5, 1]), report(2, n_slots=3)]
    mailbox.send(sent[0], lambda rows: rows)
    assert not mailbox.has_arrived
    for before, now in pairwise(sent):
        mailbox.send(now, lambda rows: rows)
        assert mailbox.receive() == (None if before is None else before.tolist())
        assert mailbox.has_arrived


def test_a_report_whose_wait_was_interrupted_is_still_there(mailbox: Any) -> None:
    mailbox.send(report(4), list)
    Event.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        mailbox.receive()
    assert len(mailbox) == 1
    Event.interrupt = False
    assert mailbox.receive() == report(4).tolist()


# Kernels: which ones, and made ready before they are needed


@pytest.mark.parametrize("sampling", [False, True])
def test_a_pass_multiplies_all_slots_at_once(tiny: Path, sampling: bool) -> None:
    """Slot by slot, as torch does what is not contiguous, each would read the weight again."""
    runner = load(tiny, slots=3).runner
    weights = {weight.untyped_storage().data_ptr() for weight in runner.model.parameters()}
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            with self:  # inference_mode leaves linear and matmul whole
                made = func.decompose(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
            held = {of.untyped_storage().data_ptr() for of in args if isinstance(of, Tensor)}
            if weights & held and func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                products.append(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    for drafting in (True, False):
        with torch.inference_mode(), Products():
            if drafting:
                runner.draft(16, sampling)
            else:
                runner.verify(16, sampling)
        # qkv, o, gate_up and down of each layer, and the output head
        assert products == [torch.ops.aten.mm] * (4 * len(runner.model.verifier.layers) + 1), (
            drafting
        )
        products.clear()


def as_custom_ops(kernels: Kernels) -> Kernels:
    attend = find_backend("sdpa", CPU, torch.float32, 16).custom_op()
    return register_custom_ops(kernels, attend)


def test_plain_kernels_are_left_for_the_compiler_to_see_through() -> None:
    """But for those whose bits must be eager code's: products, attention, sampling."""
    plain = plain_kernels(sdpa.attend)
    opaque = as_custom_ops(plain)
    products = dataclasses.replace(opaque.products, linear=padded_linear)  # type: ignore[type-var]
    assert products == plain.products
    left = dataclasses.replace(
        plain, **{name: getattr(opaque, name) for name in ("attend", "sample", "logprobs")}
    )
    assert dataclasses.replace(opaque, products=plain.products) == left
    assert len({opaque.attend, plain.attend, opaque.sample, plain.sample}) == 4


def test_opaque_sampling_is_plain_sampling() -> None:
    plain, opaque = plain_kernels(sdpa.attend), as_custom_ops(plain_kernels(sdpa.attend))
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    settings = Settings.create(2, CPU)
    settings.put(1, orthrus_fast.SamplingParams(0.9, top_k=7, seed=5))
    position = torch.arange(6).view(2, 3)
    tokens = plain.sample(logits, position, settings)
    assert torch.equal(opaque.sample(logits, position, settings), tokens)
    assert torch.equal(opaque.logprobs(logits, tokens), plain.logprobs(logits, tokens))


def test_custom_kernels_become_custom_operators() -> None:
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    from orthrus_fast.kernels import norm, rope
    from orthrus_fast.kernels.custom import CompiledProducts, CustomProducts

    products = CustomProducts()
    own = dataclasses.replace(
        plain_kernels(sdpa.attend),
        qk_norm_rope_write=rope.qk_norm_rope_write,
        add_norm=norm.add_norm,
        products=products,
    )
    opaque = as_custom_ops(own)
    assert isinstance(opaque.products, CompiledProducts)
    assert opaque.attend is as_custom_ops(own).attend
    assert opaque.qk_norm_rope_write is rope.qk_norm_rope_write_op
    assert opaque.add_norm is norm.add_norm_op


def test_graphs_are_captured_of_the_models_own_kernels(
    tiny: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler sees them, so what follows the number of rows, or talks to other GPUs, may."""
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    from orthrus_fast.kernels.custom import CompiledProducts, CustomProducts

    class Shared(CustomProducts): ...

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    old = load(tiny).runner
    of = (old.model, old.state, old.cache, sdpa.backend(CPU, torch.float32, 16))
    for products in (CustomProducts(), Shared()):
        old.model.kernels = dataclasses.replace(old.model.kernels, products=products)
        runner = runners.make_runner("graph", *of)
        assert runner.passes.kernels.products is products
        compiled = runners.make_runner("compiled", *of)
        assert isinstance(compiled.passes.kernels.products, CompiledProducts)


@pytest.mark.parametrize("slots", [1, 3])
def test_kernels_are_built_for_what_passes_call_and_change_nothing(
    tiny: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each product and norm its own end, of as many rows; of both views, and for prompts."""
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    called: list[tuple[str, tuple[int, ...], tuple[int, ...], bool]] = []

    plain = PlainProducts()

    class Noting:
        def partials(self, x: Tensor, weight: Weight) -> Tensor:
            called.append(("partials", tuple(x.shape), tuple(weight.weight.shape), False))
            return plain.partials(x, weight)

        def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
            assert any(prefetch is down for down in downs)  # other bytes to fetch: another binary
            called.append(("swiglu", tuple(x.shape), tuple(weight.weight.shape), False))
            return plain.swiglu(x, weight, prefetch)

        def lm_head_argmax(
            self, x: Tensor, weight: Weight, return_logits: bool
        ) -> tuple[Tensor, Tensor]:
            called.append(("argmax", tuple(x.shape), tuple(weight.weight.shape), return_logits))
            return plain.lm_head_argmax(x, weight, return_logits)

    def attend(q: Tensor, *rest: Any, causal: bool) -> Tensor:
        assert any(rest[-1] is output for output in outputs)
        called.append(("attend", tuple(q.shape), tuple(rest[0].shape), causal))
        out: Tensor = sdpa.attend(q, *rest, causal=causal)
        return out

    def add_norm(x: Tensor, partials: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        next_weight = tuple(rest[2].shape) if len(rest) > 2 else ()
        called.append(("norm", tuple(x.shape), (len(partials), *next_weight), False))
        return plain_add_norm(x, partials, *rest)

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    old = load(tiny, slots=slots, max_seq_len=200).runner
    noting = {"attend": attend, "add_norm": add_norm, "products": Noting()}
    kernels = dataclasses.replace(old.model.kernels, **noting)
    old.model.kernels = kernels
    assert old.model.drafter is not None
    layers: Any = [*old.model.verifier.layers, *old.model.drafter.layers]
    downs = [layer.mlp.down.weight for layer in layers]
    outputs = [layer.attention.o.weight for layer in layers]
    runner = runners.CompiledRunner(old.model, old.state, old.cache, kernels)
    before = contents(runner.state)
    runner.compile_kernels([1, 16])
    built, called[:] = set(called), []
    assert all(map(torch.equal, contents(runner.state), before))
    with torch.inference_mode():
        for width in (1, 16):
            old.verify(width)
        old.draft(16)
        # The draft's search is of one row less, by the same kernel.
        called[-1] = ("argmax", (slots, 16, *called[-1][1][2:]), *called[-1][2:])
        assert len(set(called)) == 20
        for width in (64, 256):  # of a cache of 320 rows
            old.prefill_chunk(torch.zeros(1, width, dtype=torch.int64), 0, 0)
    assert len(built) == 20 + 2 * 8
    assert built == set(called)


def test_graphs_of_custom_kernels_need_no_compiler(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    stand_in(monkeypatch, stand_in_capture)
    old, plain = load(tiny).runner, PlainProducts()
    products = SimpleNamespace(
        partials=plain.partials, swiglu=plain.swiglu, lm_head_argmax=plain.lm_head_argmax
    )
    kernels = dataclasses.replace(old.model.kernels, products=products)
    old.model.kernels = kernels
    before = dict(counters["stats"])
    runner = runners.GraphRunner(old.model, old.state, old.cache, kernels)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    held = contents(runner.state)
    runner.compile_kernels([1, 8])
    assert all(map(torch.equal, contents(runner.state), held))
    for width in (8, 1):
        runner.prepare(width)
    assert check(runner, (1, 8), [64], prefill=False).holds
    assert dict(counters["stats"]) == before


def test_no_kernel_is_compiled_twice() -> None:
    """Jobs of all threads skip what another has begun; nobody else does."""
    triton = pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    from orthrus_fast.kernels.select import each_compiled_once

    def launch(key: str) -> None:
        if not runtime.jit_cache_hook(key=key, fn=SimpleNamespace(module="m", name="kernel")):
            compiled.append(key)

    runtime, compiled = triton.knobs.runtime, list[str]()
    before = runtime.jit_cache_hook
    keys = ["a", "b"] * 20
    with each_compiled_once() as run, ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [partial(launch, key) for key in keys]))
        assert sorted(compiled) == ["a", "b"]
        launch("a")
        list(pool.map(launch, keys[:8]))
        assert len(compiled) == 2 + 1 + 8
    assert runtime.jit_cache_hook is before


def test_kernels_that_cannot_be_kept_are_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

    class Unwritable:
        def partials(self, *_: Any) -> Tensor:
            raise PermissionError(13, "denied", "cache")

        swiglu = lm_head_argmax = partials

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    old = load(tiny).runner
    kernels = dataclasses.replace(old.model.kernels, products=Unwritable())  # type: ignore[arg-type]
    old.model.kernels = kernels
    runner = runners.CompiledRunner(old.model, old.state, old.cache, kernels)
    with pytest.raises(UnsupportedError, match="denied.*TRITON_CACHE_DIR"):
        runner.compile_kernels([1, 16])


# The graph runner's own lines, with a stand-in for CUDA graphs


class StandInGraph:
    """Replays by running the captured step again and writing over what capturing returned.

    And over what graphs returned that were captured later into the same pool: they may have got
    memory in which this one computes.
    """

    def __init__(self, runner: Any, step: Callable[[], Any], pool: Any) -> None:
        self.runner, self.step, self.n_replays = runner, step, 0
        self.read = runner.logits  # by the step, unless it writes its own
        self.out = step()
        self.logits = None if runner.logits is self.read else runner.logits
        self.graphs = runner.__dict__.setdefault("graphs_of_pools", {}).setdefault(pool, [])
        self.graphs.append(self)

    def replay(self) -> None:
        self.n_replays += 1
        for later in self.graphs[self.graphs.index(self) + 1 :]:
            for tensor in (later.out, later.logits):
                if tensor is not None:
                    tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        held, self.runner.logits = self.runner.logits, self.read
        fresh = self.step()
        if self.out is not None:
            self.out.copy_(fresh)
        if self.logits is not None:
            self.logits.copy_(self.runner.logits)
        self.runner.logits = held  # a graph runs no Python


def stand_in_capture(
    runner: Any, step: Callable[[], Any], pool: Any = None
) -> tuple[StandInGraph, Any]:
    graph = StandInGraph(runner, step, pool or runner._pool)
    return graph, graph.out


def stand_in(monkeypatch: pytest.MonkeyPatch, capture: Callable[[Any, Any], Any]) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(runners.GraphRunner, "_capture", capture)
    monkeypatch.setattr(
        runners.GraphRunner, "lookahead", 0
    )  # a CPU has no copy of a report in flight


def graph_runner_of(decoder: Decoder) -> runners.GraphRunner:
    """One over the decoder's own model, state and cache."""
    old = decoder.runner
    kernels = as_custom_ops(old.model.kernels)
    return runners.GraphRunner(old.model, old.state, old.cache, kernels)


def test_the_graph_runner_replays_what_it_captured(
    tmp_path: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampling graphs of each width, each captured once, and replayed by its calls."""

    stand_in(monkeypatch, stand_in_capture)
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=ENDS)
    eager, decoder = load(directory, "float64", slots=2), load(directory, "float64", slots=2)
    runner = graph_runner_of(decoder)
    for width in (1, 8):
        runner.prepare(width)
    runner.prepare_prefill()
    assert check(runner, (1, 8), [64]).holds
    decoder.engine.runner = runner
    sampling = [None, *(orthrus_fast.SamplingParams(temperature=t, seed=3) for t in (0.5, 1.0))]
    for mode in ("ar", "diffusion"):
        for settings in (None, sampling):
            expected = eager.generate(PROMPTS[:3], 12, settings, mode)
            got = decoder.generate(PROMPTS[:3], 12, settings, mode)
            assert [r.tokens for r in got] == [r.tokens for r in expected]
            assert [r.stats.accepted for r in got] == [r.stats.accepted for r in expected]
    assert set(runner._verify_graphs) == set(product((1, 8), (False, True)))
    assert set(runner._draft_graphs) == set(product((8,), (False, True)))
    before = {key: entry[0].n_replays for key, entry in runner._verify_graphs.items()}
    drafts = [graph.n_replays for graph in runner._draft_graphs.values()]
    n_cycles = decoder.generate(PROMPTS[0], 10, mode="ar").stats.cycles
    after = {key: entry[0].n_replays for key, entry in runner._verify_graphs.items()}
    assert after == {**before, (1, False): before[1, False] + n_cycles}
    assert drafts == [graph.n_replays for graph in runner._draft_graphs.values()]  # AR never drafts


@pytest.mark.parametrize("ahead", [0, 1])
def test_graphs_of_passes_and_of_what_follows_under_grammars(
    tmp_path: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Apart where one text decodes alone; beside a text without a grammar one after the other."""
    stand_in(monkeypatch, stand_in_capture)
    monkeypatch.setattr(runners.GraphRunner, "lookahead", ahead)
    send = runners._Mailbox.send  # a graph writes its next report over the last one
    copy = lambda box, report, parse: send(box, None if report is None else report.clone(), parse)  # noqa: E731
    monkeypatch.setattr(runners._Mailbox, "send", copy)
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True)
    eager, decoder = (load(directory, slots=2, prefix_reuse=False) for _ in range(2))
    runner = decoder.engine.runner = graph_runner_of(decoder)
    for width in (1, 8):
        runner.prepare(width)
    runner.prepare_prefill()  # whose graphs run while masks are made
    grammar = orthrus_fast.Grammar("json_object")
    params = [orthrus_fast.SamplingParams(t, seed=5, grammar=grammar) for t in (0.0, 1.5)]
    for mode in ("ar", "diffusion"):
        for settings in ([params[0], None], [params[1], params[1]]):
            prompts = PROMPTS[:2]
            expected = eager.generate(prompts, 30, settings, mode)
            got = decoder.generate(prompts, 30, settings, mode)
            assert [r.error for r in got] == [None, None]
            assert [r.tokens for r in got] == [r.tokens for r in expected]
    assert set(runner._judge_graphs) == set(product((1, 8), (False, True)))
    assert set(runner._score_graphs) == {1, 8}


def test_prompts_are_prefilled_by_graphs_of_a_few_widths(
    tmp_path: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any row of any slot on; what else is in the graphs' inputs is seen nowhere."""

    stand_in(monkeypatch, stand_in_capture)
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=ENDS)
    eager, other = (load(directory, max_seq_len=400, slots=3) for _ in range(2))
    runner = graph_runner_of(other)
    runner.prepare_prefill()
    assert list(runner.prefill_widths) == [64, 256, 512]  # as the cache has rows

    def n_replays() -> list[int]:
        graphs: Any = [graph for graph, _ in runner._prefill_graphs.values()]
        return [graph.n_replays for graph in graphs]

    text = torch.arange(330) * 7 % 250
    for begin, end, slot, replays in ((0, 330, 2, [0, 2, 0]), (70, 75, 2, [1, 0, 0])):
        before = n_replays()
        got = prefill_logits(runner, text[:end], slot, begin)
        assert [b - a for a, b in zip(before, n_replays(), strict=True)] == replays
        assert torch.equal(got, prefill_logits(eager.runner, text[:end], slot))
        for rows, expected in zip(runner.cache.k, eager.runner.cache.k, strict=True):
            assert torch.equal(rows[slot, :, :end], expected[slot, :, :end])
    before = n_replays()
    runner.prefill_chunk(text[None, :100], 0, 1)  # no captured width: kernel by kernel
    assert n_replays() == before


def test_each_kind_of_block_is_warmed_up_once(
    tiny: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of what has not been warmed up would be captured while it compiles."""
    runner = load(tiny, runner="compiled", block_size=2).runner
    assert isinstance(runner, runners.CompiledRunner)
    warmed: list[tuple[int, bool]] = []
    monkeypatch.setattr(runner, "_warm_up", lambda *of: warmed.append(of))
    for trees, expected in (
        (False, [(3, True), (1, True)]),  # load has prepared greedy ones: one row, and several
        (True, [*product((3, 4), (False, True))]),  # torch's own graphs are of one size
    ):
        runner._cudagraph_trees = trees
        for width, sampling in product((3, 4, 1), (False, True)):
            runner.prepare(width, sampling)
        runner.prepare(3, sampling=True)
        assert warmed == expected
        warmed.clear()


def test_a_report_has_log_probabilities_of_what_was_emitted_alone() -> None:
    bits = torch.tensor([-0.5, -1.5, -2.5]).view(torch.int32).tolist()
    expected = runners.SlotOutput([7, 8], 1, False, [-0.5, -1.5])
    assert runners._parse_cycle([[7, 8, 9, 2, 1, 0, *bits]], sampling=True) == [expected]
    assert runners._parse_cycle([[7, 8, 9, 2, 1, 0]], sampling=False) == [
        expected._replace(logprobs=[])
    ]
    assert runners._parse_first([7, 1, bits[0]]) == [runners.SlotOutput([7], None, True, [-0.5])]


def test_a_capture_that_was_interrupted_is_made_up_for(
    tmp_path: Path, plain_compile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(self: Any, step: Callable[[], Any], pool: Any = None) -> Any:
        attempts.append(step)
        if len(attempts) == 2:  # the draft is captured, verification is not
            raise KeyboardInterrupt
        return stand_in_capture(self, step)

    attempts: list[Any] = []
    stand_in(monkeypatch, capture)
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=ENDS)
    eager, decoder = load(directory), load(directory)
    decoder.engine.runner = graph_runner_of(decoder)
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(PROMPTS[1], 12)
    assert decoder.generate(PROMPTS[1], 12).tokens == eager.generate(PROMPTS[1], 12).tokens


def test_no_pass_multiplies_in_less_than_full_precision(tmp_path: Path) -> None:
    """Whatever the caller has chosen, which is put back."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    decoder = load(write_checkpoint(tmp_path / "model"))
    model, seen = decoder.runner.model, []
    model.register_forward_pre_hook(lambda *_: seen.append(matmul.fp32_precision))
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        decoder.generate(PROMPTS[1], 3)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before
    assert set(seen) == {"ieee"} and len(seen) >= 3  # prefill, a draft, a verification


def test_the_first_token_is_drawn_on_the_runners_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels start on the current device, which ``full_precision_matmul`` sets."""
    inside: list[bool] = []
    depth = 0

    @contextlib.contextmanager
    def noting(device: torch.device) -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    def first_token(*arguments: Any) -> Any:
        inside.append(depth > 0)
        return true_first_token(*arguments)

    true_first_token = steps.first_token
    monkeypatch.setattr(runners, "full_precision_matmul", noting)
    monkeypatch.setattr(steps, "first_token", first_token)
    decoder = load(write_checkpoint(tmp_path / "model"))
    decoder.generate(PROMPTS[1], 2, orthrus_fast.SamplingParams(0.7, seed=1))
    assert inside == [True]


def test_a_stop_string_ends_a_text_of_a_decoder_made_in_inference_mode(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", tokenizer=True, eos_token_id=ENDS)
    with torch.inference_mode():
        decoder = load(directory)
    text = decoder.generate(PROMPTS[1], 12).text
    stop = orthrus_fast.SamplingParams(stop=(text[-1],))
    assert decoder.generate(PROMPTS[1], 12, stop).finish_reason == "stop"


def test_an_overflow_is_gone_with_its_request(tmp_path: Path) -> None:
    """Keys and values of float16 that are no numbers do not stay in the slot for the next one."""
    directory = write_checkpoint(tmp_path / "model", eos_token_id=ENDS)
    decoder = load(directory, "float16")
    expected = decoder.generate(PROMPTS[1], 12).tokens
    embedding = decoder.runner.model.embed_tokens.weight
    held = embedding.clone()
    with torch.no_grad():
        embedding[PROMPTS[2][0]] = float("inf")
    decoder.generate(PROMPTS[2], 4)
    assert all(
        bool(rows.isfinite().all()) for rows in (*decoder.runner.cache.k, *decoder.runner.cache.v)
    )
    with torch.no_grad():
        embedding.copy_(held)
    assert decoder.generate(PROMPTS[1], 12).tokens == expected
