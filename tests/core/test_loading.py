"""What ``load`` does before and beside decoding: names, limits, memory, and what it imports."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import orthrus_fast
from orthrus_fast import Decoder, SamplingParams, checkpoint, loading, steps
from orthrus_fast.attention import Backend, sdpa
from orthrus_fast.cache import KVCache
from orthrus_fast.errors import ConfigError, PromptError, RequestError, UnsupportedError
from orthrus_fast.loading import check_memory, memory_needed, parse_dtype
from orthrus_fast.model import Transformer
from orthrus_fast.options import ONE_ROW, ONE_WIDTH
from orthrus_fast.runners import EagerRunner
from tests.checkpoints import edit_json, write_checkpoint
from tests.decoders import found
from tests.embedded import MODEL

CPU = torch.device("cpu")


def load(directory: Path, **options: Any) -> Decoder:
    return orthrus_fast.load(directory, device="cpu", **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def run(code: str, **environment: str) -> str:
    """What a fresh process prints last."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


DECODE = """
import json, sys
import orthrus_fast
decoder = orthrus_fast.load(sys.argv[1] if len(sys.argv) > 1 else None, device="cpu")
for mode in ("diffusion", "ar"):
    decoder.generate("a,b", 8, mode=mode)
names = ("sympy", "transformers", "triton", "huggingface_hub", "torch._dynamo", "torch._inductor")
print(json.dumps([decoder.name, [name for name in names if name in sys.modules]]))
"""


def test_the_eager_runner_imports_no_compiler_and_load_without_a_path_is_embedded() -> None:
    assert json.loads(run(DECODE)) == [str(MODEL), []]


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("bfloat16", "bf16", "torch.bfloat16", torch.bfloat16), torch.bfloat16),
        (("float16", "fp16", "half", "torch.float16", "torch.half", torch.half), torch.float16),
        (("float32", "fp32", "float", "torch.float32", "torch.float"), torch.float32),
        (("float64", "fp64", "double", torch.double), torch.float64),
    ],
)
def test_the_names_that_people_give_a_dtype(names: tuple[Any, ...], dtype: torch.dtype) -> None:
    assert {parse_dtype(name) for name in names} == {dtype}


@pytest.mark.parametrize("name", ["int8", "torch.int8", torch.int8, "BF16 ", "", None, 16, [1]])
def test_what_is_no_dtype(name: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse_dtype(name)
    assert str(caught.value).endswith(" is not one of float32, bfloat16, float16, float64")


def test_every_option_arrives(path: Path) -> None:
    options: dict[str, Any] = {"dtype": "bf16", "max_seq_len": 100, "slots": 3, "runner": "eager"}
    options |= {"attention": "sdpa", "compile_mode": "default", "block_size": 4}
    by_position = [value for name, value in options.items() if name != "block_size"]
    decoder = orthrus_fast.load(path, "cpu", *by_position, block_size=4, draft_view=False)
    expected = options | {"device": "cpu", "dtype": "bfloat16", "compile_mode": None}
    assert {name: decoder.configuration[name] for name in expected} == expected
    assert not decoder.runner.model.has_draft_view


def test_config_fields_to_be_ignored(path: Path) -> None:
    edit_json(path / "config.json", of_tomorrow=1)
    with pytest.raises(ConfigError, match="of_tomorrow"):
        load(path)
    assert load(path, ignore_config_fields=("of_tomorrow",)).generate([1, 2], 4).tokens


# Limits


def test_at_the_models_own_limit_nobody_is_told_to_raise_it(path: Path) -> None:
    for max_seq_len, advised in ((511, True), (512, False)):
        with pytest.raises(PromptError, match="shorten the prompt or lower max_new_tokens") as e:
            load(path, max_seq_len=max_seq_len).generate([1] * 500, 20)
        assert ("or raise max_seq_len" in str(e.value)) == advised


def test_yarn_decodes_past_what_max_position_embeddings_says(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 400}
    path = write_checkpoint(
        tmp_path / "model", rope_parameters={"rope_theta": 1e4, **rope}, eos_token_id=[]
    )
    assert len(load(path, max_seq_len=1600).generate([1] * 590, 10).tokens) == 10
    with pytest.raises(RequestError, match="1601 is not within 2 … 1600"):
        load(path, max_seq_len=1601)


def test_sampling_of_the_checkpoint_that_is_not_implemented(path: Path) -> None:
    generation = {"temperature": 0.6, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    (path / "generation_config.json").write_text(json.dumps(generation))
    decoder = load(path)
    assert decoder.generate([1], 4).tokens
    with pytest.raises(RequestError, match=r"has repetition_penalty 1\.3; no_repeat_ngram_size 3"):
        decoder.generate([1], 4, SamplingParams.from_checkpoint())


# What is promised


@pytest.fixture
def steps_of_loading(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Widths that are prepared, and the widths of each check: of several, it fails."""
    seen: list[Any] = []
    for name in ("prepare", "prepare_prefill"):
        monkeypatch.setattr(
            EagerRunner, name, lambda _, *width, name=name: seen.append(name[7:] or width[0])
        )

    def check(
        runner: EagerRunner, widths: list[int], boundaries: list[int], prefill: bool = True
    ) -> Any:
        seen.append(tuple(widths))
        return found(not prefill, widths, prefill)

    monkeypatch.setattr(loading, "check", check)
    return seen


def test_where_the_check_fails_both_modes_run_one_width(
    path: Path, steps_of_loading: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="orthrus_fast")
    decoder = load(path, slots=2)
    assert steps_of_loading == [8, 1, "_prefill", (1, 8), (8,)]
    assert decoder.configuration["promise"] == ONE_WIDTH
    assert (decoder.ar_width, decoder.block_width, decoder.runner.prefill_widths) == (8, 8, ())
    assert decoder.invariance == found(True, [8], prefill=False)
    [said] = [record.getMessage() for record in caplog.records]
    why = f"a row's bits depend on more than its tokens here ({found(False, [1, 8])}): both modes "
    assert said.startswith(why) and "by blocks of 8 rows" in said and said.isprintable()
    assert "Their texts are the same; they may change with block_size" in said
    assert caplog.records[0].levelno == logging.WARNING


def test_where_no_check_holds_nothing_is_promised(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "check", lambda *_, **__: found(False, [8]))
    assert not load(path).invariance.holds
    [said] = caplog.messages
    assert said.endswith(f"Their texts may differ even so ({found(False, [8])})")


def test_a_backend_that_cannot_promise_is_not_asked(
    path: Path,
    steps_of_loading: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Backend("flash", sdpa.attend, lambda capacity: [], row_invariant=False)
    monkeypatch.setattr(loading, "find_backend", lambda *_: backend)
    decoder = load(path, block_size=4)
    assert steps_of_loading == [4, (4,)]
    assert (decoder.configuration["promise"], decoder.ar_width) == (ONE_WIDTH, 4)
    assert caplog.messages[0].startswith("attention 'flash' sums as the number of rows suits it: ")


def test_on_a_gpu_products_of_a_library_cannot_promise(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = loading.resolve(loading.Options(device="cpu"), load(path).config)
    assert loading._why_one_width(settings) is None
    settings = settings._replace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for dtype, obstacle, tables in (
        (torch.bfloat16, None, ["committed"]),
        (torch.float64, "has no float64", None),
    ):
        other = settings._replace(dtype=dtype)
        said = loading._why_one_width(other)
        assert said == obstacle or (said or "").endswith(str(obstacle))
        assert other.described()["tiles"] == tables


@pytest.mark.parametrize(("draft", "width"), [(True, 8), (False, 1)])
def test_what_holds_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    draft: bool,
    width: int,
) -> None:
    """A plain Qwen3 has no other width to compare with. Nobody reads of it at each start."""
    caplog.set_level(logging.DEBUG, logger="orthrus_fast")
    checked: list[Any] = []
    check = loading.check

    def noting(runner: EagerRunner, widths: list[int], *rest: Any, **named: Any) -> Any:
        checked.append(widths)
        return check(runner, widths, *rest, **named)

    monkeypatch.setattr(loading, "check", noting)
    decoder = load(write_checkpoint(tmp_path / "model", draft=draft))
    assert checked[0] == sorted({1, width})
    assert decoder.invariance.widths == tuple(checked[-1])
    if len(checked) > 1:
        pytest.skip(f"this CPU's rows depend on more than their tokens: {decoder.invariance}")
    assert (decoder.configuration["promise"], decoder.ar_width) == (ONE_ROW, 1)
    assert decoder.startup["check"] == decoder.invariance.seconds > 0
    line = ("orthrus_fast", logging.DEBUG, f"row invariance holds: {decoder.invariance}")
    assert caplog.record_tuples == [line]


# Memory


ALLOCATIONS: dict[str, tuple[object, str]] = {
    "weights": (checkpoint, "_materialize"),
    "the copy of a weight": (torch.Tensor, "copy_"),
    "rotary tables": (Transformer, "set_capacity"),
    "cache": (KVCache, "__init__"),
    "state": (steps.State, "create"),
    "workspaces": (EagerRunner, "prepare"),
}
FULL: list[Exception] = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
]


@pytest.mark.parametrize(
    ("what", "error"),
    [*((what, FULL[0]) for what in ALLOCATIONS), *(("cache", error) for error in FULL[1:])],
    ids=lambda of: of if isinstance(of, str) else type(of).__name__,
)
def test_no_room_is_one_line_wherever_it_lacks(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(*ALLOCATIONS[what], fail)
    with pytest.raises(RequestError) as caught:
        load(path, slots=2)
    message = str(caught.value)
    assert message.startswith("needs weights 0.00 GB + KV cache 0.00 GB = 0.00 GB, but cpu has no")
    assert "lower max_seq_len or slots" in message and message.isprintable()


@pytest.mark.parametrize("error", ["an illegal memory access was encountered", "a fault of ours"])
def test_other_errors_are_not_taken_for_a_lack_of_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(KVCache, "__init__", fail)
    with pytest.raises(RuntimeError, match=error):
        load(path)


LIMITED = """
import resource, sys
import orthrus_fast
from orthrus_fast.errors import RequestError
decoder = orthrus_fast.load()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, -1))
try:
    orthrus_fast.load(slots=70)
except RequestError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_cache_over_the_processs_limit_is_one_line() -> None:
    said = run(LIMITED, OMP_NUM_THREADS="1")
    assert said.startswith("needs weights ") and "has no room for it; lower max_seq_len" in said


def test_a_system_without_sysconf(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows: nothing is known beforehand, and what fails to be allocated is said then."""
    monkeypatch.delattr(os, "sysconf")
    assert load(path).generate([1], 4).tokens
    config = load(path).config
    check_memory(memory_needed(config, torch.float32, CPU, 512, 10**9), CPU)
    with pytest.raises(RequestError, match="but cpu has no room for it"):
        load(path, slots=10**9)


# A compiler that cannot work


def test_a_compiler_that_is_switched_off(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "'compiled': torch.compile is switched off; unset TORCHDYNAMO_DISABLE and TORCH_COMPILE"
    off = torch._dynamo.config.patch(disable=True)  # TORCH_COMPILE_DISABLE, read at import
    with off, pytest.raises(UnsupportedError, match=said):
        load(path, runner="compiled")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UnsupportedError, match=said):
        load(path, runner="compiled")
    assert load(path).configuration["runner"] == "eager"


UNWRITABLE = """
import sys
import orthrus_fast
from orthrus_fast.errors import UnsupportedError
try:
    orthrus_fast.load(device="cpu", runner="compiled")
except UnsupportedError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_compilers_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = str(tmp_path / "file" / "cache")
    said = run(UNWRITABLE, TORCHINDUCTOR_CACHE_DIR=cache)
    assert said.startswith("runner: torch.compile failed (") and cache in said
    assert "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to directories that can be" in said


def test_a_compilers_cache_that_fails_while_compiling(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch._inductor.exc.InductorError(OSError(28, "No space left on device", "/x"), None)

    def compile(function: Any, **_: Any) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(UnsupportedError, match="No space left on device.*TORCHINDUCTOR_CACHE_DIR"):
        load(path, runner="compiled")
