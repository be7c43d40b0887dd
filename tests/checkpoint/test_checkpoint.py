"""Finding, checking and loading checkpoints: whole ones, broken ones and hostile ones."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from orthrus_fast import files
from orthrus_fast.cache import KVCache
from orthrus_fast.checkpoint import Checkpoint, count_weights, load_model, open_checkpoint
from orthrus_fast.config import parse_config
from orthrus_fast.errors import CheckpointError, ConfigError, RequestError
from orthrus_fast.files import embedded_checkpoint
from orthrus_fast.model import Transformer
from tests.checkpoints import (
    edit_json,
    edit_weight_map,
    kernels_for,
    random_tensors,
    tensor_shapes,
    tiny_config,
    write_checkpoint,
    write_files,
)

CONFIGS = Path(__file__).parents[1] / "fixtures" / "configs"
CPU = torch.device("cpu")
KERNELS = kernels_for("sdpa", torch.device("cpu"), torch.float32, 16)
INDEX = "model.safetensors.index.json"


def load(path: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(open_checkpoint(path), KERNELS, device=CPU, dtype=dtype)


def refusal(path: str | Path, kind: type[Exception] = CheckpointError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        checkpoint = open_checkpoint(path, **options)
        load_model(checkpoint, KERNELS, device=CPU, dtype=torch.float32)
    message = str(caught.value)
    assert message.isprintable(), "one line, and nothing that a terminal would act on"
    return message


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


# Loading


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("draft", [True, False])
def test_every_tensor_lands_in_its_slice(
    tmp_path: Path, draft: bool, tied: bool, n_shards: int
) -> None:
    path = write_checkpoint(tmp_path / "c", draft=draft, tied=tied, n_shards=n_shards)
    checkpoint = open_checkpoint(path)
    config = tiny_config(draft=draft, tied=tied)
    expected = random_tensors(config, seed=0, dtype=torch.float32, agreement=0.9)
    assert checkpoint.tensor_files.keys() == expected.keys()
    assert len(set(checkpoint.tensor_files.values())) == n_shards
    assert checkpoint.weight_bytes == sum(t.nbytes for t in expected.values())
    assert (checkpoint.name, checkpoint.directory, checkpoint.commit) == (str(path), path, None)
    assert checkpoint.config == parse_config(config)
    model = load_model(checkpoint, KERNELS, device=CPU, dtype=torch.float32)
    views = model.tensors()
    assert views.keys() == expected.keys()
    for name, view in views.items():
        assert torch.equal(view, expected[name]), name
    attention = model.verifier.layers[1].attention
    parts = [expected[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(attention.qkv.weight, torch.cat(parts))
    gate_up = [expected[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up")]
    assert torch.equal(model.verifier.layers[0].mlp.gate_up.weight, torch.cat(gate_up))
    head = expected["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert torch.equal(model.verifier.lm_head.weight, head)
    assert (model.verifier.lm_head.weight is model.embed_tokens.weight) == tied
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count_weights(checkpoint.config)
    if draft:
        draft_q = expected["model.layers.0.self_attn.q_proj_diff.weight"]
        assert model.drafter is not None
        drafting = model.drafter.layers[0]
        assert torch.equal(drafting.attention.qkv.weight[: len(draft_q)], draft_q)
        assert drafting.mlp is model.verifier.layers[0].mlp


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_cast(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path / "c", dtype=stored, num_hidden_layers=1)
    model = load(path, dtype)
    tensors = load_file(path / "model.safetensors")
    for name, view in model.tensors().items():
        assert view.dtype == dtype and torch.equal(view, tensors[name].to(dtype))


@pytest.mark.parametrize("draft_view", [True, False])
def test_progress_counts_bytes_to_the_end(tmp_path: Path, draft_view: bool) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "c", dtype=torch.bfloat16, n_shards=2))
    calls: list[tuple[int, int]] = []
    load_model(
        checkpoint,
        KERNELS,
        device=CPU,
        dtype=torch.float32,
        draft_view=draft_view,
        progress=lambda done, total: calls.append((done, total)),
    )
    files = set(checkpoint.tensor_files.values())
    sizes = {name: t.nbytes for file in files for name, t in load_file(file).items()}
    read = [size for name, size in sizes.items() if draft_view or "_diff" not in name]
    assert calls == sorted(calls) and len(calls) == len(read)
    assert calls[-1] == (sum(read), sum(read))


def test_memory_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied lm_head never gets memory of its own, not even for a moment."""
    taken: list[int] = []
    empty = torch.empty

    def counting(*size: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*size, **options)
        taken.append(0 if tensor.is_meta else tensor.numel())
        return tensor

    path = write_checkpoint(tmp_path / "c")
    monkeypatch.setattr(torch, "empty", counting)
    assert sum(taken) == 0 and count_weights(load(path).config) == sum(taken)


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c")
    torch.set_default_dtype(torch.float64)
    try:
        state = torch.get_rng_state()
        flags = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device())
        model = load(path)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert torch.get_default_dtype() == torch.float64
        assert torch.equal(torch.get_rng_state(), state)
        assert flags == (
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            torch.get_default_device(),
        )
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_relative_path_and_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("org/name", "./org/name", "~/org/name", Path("org/name")):
        assert open_checkpoint(name).commit is None


def test_a_lack_of_memory_is_not_the_files_fault(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("orthrus_fast.checkpoint.safe_open", full)
    assert refusal(path) == f"{path}/model.safetensors: there is no memory left to open it"


# Against transformers


def transformers_model(tied: bool, rope: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    fields = tiny_config(draft=False, tied=tied, rope_parameters=rope)
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(Qwen3Config(**fields)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("rope_type", ["default", "yarn", "older yarn"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_computes_the_same(
    tmp_path: Path, tied: bool, shard_size: str, rope_type: str
) -> None:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    if "yarn" in rope_type:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    theirs = transformers_model(tied, rope)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    if rope_type == "older yarn":
        config = json.loads((tmp_path / "config.json").read_text())
        scaling = config.pop("rope_parameters")
        config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        scaling["type"] = scaling.pop("rope_type")
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert (tmp_path / INDEX).exists() == (shard_size == "20KB")
    ours = load(tmp_path)
    tokens = torch.randint(272, (1, 50), generator=torch.Generator().manual_seed(1))
    cache = KVCache(ours.config, 1, 512, torch.float32, CPU)
    ours.set_capacity(512)
    zero = torch.zeros(1, dtype=torch.int32)
    with torch.inference_mode():
        hidden = ours(tokens, zero, zero.long(), cache, ours.verifier)
        torch.testing.assert_close(
            ours.greedy(hidden, return_logits=True)[1], theirs(tokens).logits, rtol=1e-5, atol=1e-5
        )


# The public sizes, without their weights


@pytest.mark.parametrize(
    ("name", "gigabytes_per_pass"),
    [("orthrus-1.7b", 3.44), ("orthrus-4b", 8.04), ("orthrus-8b", 15.14)],
)
def test_public_sizes_on_the_meta_device(name: str, gigabytes_per_pass: float) -> None:
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    config = parse_config(fields)
    with torch.device("meta"):
        model = Transformer(config, KERNELS)
    views = model.tensors()
    assert {n: tuple(v.shape) for n, v in views.items()} == tensor_shapes(fields)
    sizes = {n: v.numel() for n, v in views.items()}
    assert (
        count_weights(config) == sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    )
    read = {n: size for n, size in sizes.items() if "_diff" not in n}
    if not config.tie_word_embeddings:
        del read["model.embed_tokens.weight"]  # a pass looks up a few rows; it streams the lm_head
    assert round(2 * sum(read.values()) / 1e9, 2) == gigabytes_per_pass


# Where a checkpoint is


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent") == f"{tmp_path}/absent: no such directory"
    assert refusal("./absent") == "./absent: no such directory"
    assert refusal("~/absent") == "~/absent: no such directory"
    (tmp_path / "file").touch()
    assert "not a directory; give the one that holds config.json" in refusal(tmp_path / "file")
    assert "config.json: file not found" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["", "model", "model/", "a/b/c", "org/na me", "org/\x1b[31m", "https://x/y", "a\0b", "x" * 999],
)
def test_strings_that_name_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "neither a directory nor a Hub repository of the form org/name" in refusal(name)


def test_a_path_object_never_reaches_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthrus_fast.checkpoint.fetch_text_files", lambda *_: pytest.fail("asked"))
    assert refusal(Path("org/name")) == "org/name: no such directory"


def test_a_revision_of_a_directory(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c")
    assert "revision 'main'" in refusal(path, RequestError, revision="main")


# Tensors that do not fit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "s", n_shards=3)


def test_missing_extra_and_wrong_tensors_are_all_listed(path: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)

    edit_tensors(path / "model.safetensors", edit)
    assert refusal(path) == (
        f"{path}: tensors do not fit config.json: model.norm.weight is missing; "
        "model.layers.0.self_attn.q_proj.bias in model.safetensors is not part of the model; "
        "model.layers.1.mlp.up_proj.weight in model.safetensors is [48, 31] instead of [48, 32]"
    )


def test_at_most_ten_are_listed(path: Path) -> None:
    edit_tensors(path / "model.safetensors", lambda t: [t.pop(name) for name in list(t)[:15]])
    message = refusal(path)
    assert message.count(" is missing") == 10 and message.endswith("; and 5 more")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (
            "num_hidden_layers",
            1,
            "model.layers.1.input_layernorm.weight in model.safetensors is not",
        ),
        ("num_hidden_layers", 3, "model.layers.2.input_layernorm.weight is missing"),
        ("vocab_size", 2**24, "[272, 32] instead of [16777216, 32]"),
        ("hidden_size", 2**17, "[272, 32] instead of [272, 131072]"),
        ("head_dim", 8, "config.json: head_dim: 8 (where absent, hidden_size / num_attention_"),
        ("head_dim", None, "heads), but the weights say 16; set it to that"),
        ("num_key_value_heads", 4, "[32, 32] instead of [64, 32]"),
        ("tie_word_embeddings", False, "lm_head.weight is missing"),
    ],
)
def test_a_config_that_asks_for_something_else(
    path: Path, field: str, value: Any, expected: str
) -> None:
    edit_json(path / "config.json", **{field: value})
    assert expected in refusal(path)


def test_a_config_that_asks_for_petabytes_is_refused_at_once(path: Path) -> None:
    edit_json(
        path / "config.json",
        num_hidden_layers=1024,
        hidden_size=2**17,
        intermediate_size=2**20,
        vocab_size=2**24,
        num_attention_heads=4096,
    )
    begin = time.monotonic()
    assert "model.layers.2.input_layernorm.weight is missing" in refusal(path)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantized_types_are_refused_by_name(path: Path, dtype: torch.dtype, name: str) -> None:
    tensor = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(path / "model.safetensors", lambda t: t.update({tensor: t[tensor].to(dtype)}))
    assert f"{tensor} in model.safetensors is {name}; only F64, F32, F16, BF16" in refusal(path)


def test_buffers_of_old_exports_are_refused(path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(path / "model.safetensors", lambda t: t.update({name: torch.ones(8)}))
    assert f"{name} in model.safetensors is not part of the model" in refusal(path)


def test_a_tensor_name_cannot_reach_the_terminal(path: Path) -> None:
    name = "\x1b[2J\n" + "x" * 5000
    edit_tensors(path / "model.safetensors", lambda t: t.update({name: torch.ones(8)}))
    message = refusal(path)
    assert "is not part of the model" in message and len(message) < 500


def test_a_tied_lm_head_must_be_the_embedding(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory that was just given back may hold the right values: no comparison with that passes.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **o: empty(*size, **o).fill_(math.nan))

    def copy(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(path / "model.safetensors", copy)
    model = load(path)
    assert model.verifier.lm_head.weight is model.embed_tokens.weight
    edit_tensors(path / "model.safetensors", lambda t: t["lm_head.weight"][5, 5].add_(1))
    message = refusal(path)
    assert "model.safetensors: lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings" in message
    edit_json(path / "config.json", tie_word_embeddings=False)
    assert not torch.equal(load(path).verifier.lm_head.weight, model.verifier.lm_head.weight)


def test_a_tied_lm_head_of_another_shape(path: Path) -> None:
    edit_tensors(
        path / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(1, 32)})
    )
    assert "lm_head.weight in model.safetensors is [1, 32] instead of [272, 32]" in refusal(path)


def test_a_draft_view_that_the_config_does_not_know(path: Path) -> None:
    (path / "config.json").write_text(json.dumps(tiny_config(draft=False)))
    message = refusal(path, ConfigError)
    assert "config.json: block_size and mask_token_id: absent" in message


def test_an_orthrus_without_its_draft_view(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", draft=False)
    (path / "config.json").write_text(json.dumps(tiny_config()))
    message = refusal(path)
    assert "no *_diff tensors" in message and "block_size and mask_token_id" in message


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite(path: Path, value: float) -> None:
    name = "model.layers.1.self_attn.k_proj_diff.weight"
    edit_tensors(path / "model.safetensors", lambda t: t[name][3, 3].fill_(value))
    expected = f"{path}/model.safetensors: {name} has values that are not finite in torch.float32"
    assert refusal(path) == expected


def test_values_that_the_dtype_cannot_hold(path: Path) -> None:
    edit_tensors(path / "model.safetensors", lambda t: t["model.norm.weight"][0].fill_(1e6))
    assert load(path).verifier.norm.weight[0] == 1e6
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight .* not finite in torch\.float16"
    ):
        load(path, torch.float16)


def test_a_file_that_changes_between_check_and_load(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    edit_tensors(
        path / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(1)})
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight changed its shape"):
        load_model(checkpoint, KERNELS, device=CPU, dtype=torch.float32)
    edit_tensors(path / "model.safetensors", lambda t: t.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*model\.norm\.weight"):
        load_model(checkpoint, KERNELS, device=CPU, dtype=torch.float32)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        load_model(checkpoint, KERNELS, device=CPU, dtype=torch.float32)


# Checkpoints of other kinds


@pytest.mark.parametrize("field", ["of_tomorrow", "lora_r"])
def test_config_fields_to_be_ignored(path: Path, field: str) -> None:
    plain = open_checkpoint(path).config
    edit_json(path / "config.json", **{field: 7})
    if field == "of_tomorrow":
        assert "config.json: of_tomorrow: not known here" in refusal(path, ConfigError)
    assert open_checkpoint(path, ignore_config_fields=("of_tomorrow",)).config == plain


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "quantized checkpoints are not supported; use the"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "quantized checkpoints are not"),
        ("model.layers.0.mlp.up_proj.scales", "quantized checkpoints are not supported"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "quantized checkpoints are not supported"),
        ("base_model.model.model.layers.0.mlp.up_proj.weight", "an adapter; merge it"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "an adapter; merge it"),
        ("score.weight", "a classifier or reranker; it generates no text"),
    ],
)
def test_tensors_that_tell_another_kind(path: Path, name: str, expected: str) -> None:
    edit_tensors(path / "model.safetensors", lambda t: t.update({name: torch.ones(1)}))
    assert refusal(path).startswith(f"{path}: {expected}")
    assert f"(tensor {name})" in refusal(path)


def test_an_embedding_model(tmp_path: Path) -> None:
    """As Qwen3-Embedding has them: the names without the model's."""
    path = write_checkpoint(tmp_path / "c", draft=False)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(path / "model.safetensors", edit)
    message = refusal(path)
    assert "a Qwen3 without its output head" in message and "as embedding models are" in message
    assert "missing;" not in message


def test_a_gguf_file_and_directory(path: Path) -> None:
    file = path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    assert open_checkpoint(path).config.n_layers == 2, "beside safetensors it does no harm"
    (path / "model.safetensors").unlink()
    for place, names in ((path, file.name), (file, str(file))):
        assert refusal(place).startswith(f"{place}: GGUF ({names}) is llama.cpp's format")
    (path / "config.json").unlink()
    assert refusal(path).startswith(f"{path}: GGUF (model-Q4_K_M.gguf) is llama.cpp's format")


def test_an_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    assert refusal(path).startswith(f"{path}: an adapter (adapter_config.json)")
    (path / "config.json").unlink()
    assert refusal(path).startswith(f"{path}: an adapter (adapter_config.json)")


def test_the_embedded_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository model/, in a wheel the package's own directory."""
    assert embedded_checkpoint() == Path(__file__).parents[2] / "model"
    package = tmp_path / "site-packages" / "orthrus_fast"
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    with pytest.raises(CheckpointError, match="orthrus_fast: came without its embedded checkpoint"):
        embedded_checkpoint()
    for directory in (package.parent / "model", package / "embedded"):
        directory.mkdir(parents=True)
        (directory / "config.json").touch()
        assert embedded_checkpoint() == directory


# Indexes


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/tmp/model.safetensors",
        "../model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "..",
        "pytorch_model.bin",
        "model.safetensors.bak",
        "*.safetensors",
        "a\n.safetensors",
        "",
        7,
        ["model.safetensors"],
        {},
    ],
)
def test_an_index_that_leads_elsewhere(sharded: Path, name: Any) -> None:
    (sharded.parent / "model.safetensors").write_bytes(b"never read")
    edit_weight_map(sharded, model__norm__weight=name)
    message = refusal(sharded)
    assert message.startswith(f"{sharded}/{INDEX}: weight_map: ")
    assert "is not a .safetensors file beside it" in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "7"])
def test_an_index_without_a_weight_map(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert f"{sharded}/{INDEX}: weight_map: not an object" in refusal(sharded)


def test_an_index_that_names_an_absent_shard(sharded: Path) -> None:
    edit_weight_map(sharded, model__norm__weight="gone.safetensors")
    assert refusal(sharded) == f"{sharded}/gone.safetensors: No such file or directory"


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in index.values() if file != index["model.norm.weight"])
    edit_weight_map(sharded, model__norm__weight=other, lm_head__weight=other)
    message = refusal(sharded)
    assert message.startswith(f"{sharded}/{INDEX}: disagrees with the files: ")
    assert f"lm_head.weight ({other}, but in none)" in message
    assert f"model.norm.weight ({other}, but in {index['model.norm.weight']})" in message
    edit_weight_map(sharded, lm_head__weight=None, model__norm__weight=None)
    assert f"model.norm.weight (nowhere, but in {index['model.norm.weight']})" in refusal(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    edit_tensors(
        sharded / "model-00003-of-00003.safetensors",
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(272, 32)}),
    )
    assert refusal(sharded) == (
        f"{sharded}/model-00003-of-00003.safetensors: model.embed_tokens.weight is also in "
        "model-00001-of-00003.safetensors"
    )


def test_an_index_beside_a_single_file(sharded: Path, path: Path) -> None:
    shutil.copy(path / "model.safetensors", sharded)
    assert f"has both model.safetensors and {INDEX}; remove one" in refusal(sharded)


# Files that are not what they seem


def test_no_weights_at_all(path: Path) -> None:
    (path / "model.safetensors").unlink()
    assert refusal(path) == f"{path}: has neither model.safetensors nor {INDEX}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_loaded(path: Path, name: str) -> None:
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(Bomb()))
    message = refusal(path)
    assert f"only pickled weights ({name})" in message
    assert "never loaded" in message and "save_pretrained" in message
    (path / name).rename(path / "model.safetensors")
    assert "model.safetensors: not a whole safetensors file" in refusal(path)


class Bomb:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


FILES = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_not_a_regular_file(path: Path, name: str, kind: str) -> None:
    (path / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    expected = "leads outside" if kind == "device" else "not a regular file"
    assert f"{path}/{name}: {expected}" in refusal(path)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_a_link_that_leads_outside(path: Path, name: str) -> None:
    outside = path.parent / "outside"
    outside.write_bytes((path / name).read_bytes() if (path / name).exists() else b"{}")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to("../outside")
    assert f"{path}/{name}: leads outside the checkpoint, to {outside}" in refusal(path)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja"])
def test_a_directory_whose_name_begins_with_the_checkpoints_is_outside(
    path: Path, name: str
) -> None:
    sibling = path.with_name(path.name + "-other")
    sibling.mkdir()
    outside = sibling / name
    outside.write_bytes((path / name).read_bytes() if (path / name).exists() else b"{}")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(f"../{sibling.name}/{name}")
    assert f"{path}/{name}: leads outside the checkpoint, to {outside}" in refusal(path)


def test_additional_templates_are_checked_like_every_file(path: Path) -> None:
    outside, folder = path.parent / "outside", path / "additional_chat_templates"
    outside.mkdir()
    (outside / "tool_use.jinja").write_text("")
    folder.symlink_to("../outside")
    name = "additional_chat_templates/tool_use.jinja"
    assert f"{path}/{name}: leads outside the checkpoint, to {outside}" in refusal(path)
    folder.unlink()
    folder.mkdir()
    os.mkfifo(path / name)
    assert f"{path}/{name}: not a regular file" in refusal(path)


@pytest.mark.parametrize("shared", [False, True])
def test_a_directory_whose_name_begins_with_that_of_the_blobs_is_outside(
    path: Path, tmp_path: Path, shared: bool
) -> None:
    cache = tmp_path / "cache"
    snapshot = hub_snapshot(cache, path, shared=shared)
    if shared:
        (cache / "blobs" / ".huggingface-shared-blobs").touch()
    assert open_checkpoint(snapshot).config.n_layers == 2
    blobs = cache / "blobs" if shared else snapshot.parent.parent / "blobs"
    sibling = blobs.with_name("blobs-other")
    sibling.mkdir()
    (snapshot / "config.json").resolve().rename(sibling / "config")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(sibling / "config")
    assert f"leads outside the checkpoint, to {sibling / 'config'}" in refusal(snapshot)


def test_links_that_are_broken_loop_or_stay_inside(path: Path) -> None:
    (path / "model.safetensors").rename(path / "weights")
    (path / "model.safetensors").symlink_to("weights")
    assert open_checkpoint(path).config.n_layers == 2
    linked = path.parent / "linked"
    linked.symlink_to(path)
    assert open_checkpoint(linked).config.n_layers == 2
    (path / "generation_config.json").symlink_to("absent")
    assert "generation_config.json: No such file or directory" in refusal(path)
    (path / "generation_config.json").unlink()
    (path / "generation_config.json").symlink_to("generation_config.json")
    assert "generation_config.json: " in refusal(path)


def hub_snapshot(cache: Path, source: Path, *, shared: bool = False) -> Path:
    """The layout of the Hub's cache; ``shared`` puts blobs into the store of all repositories."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        blob = repository / "blobs" / str(number)
        if shared:
            (cache / "blobs" / "00").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, cache / "blobs" / "00" / str(number))
            blob.symlink_to(f"../../blobs/00/{number}")
        else:
            shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_of_a_hub_snapshot(path: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", path)
    assert open_checkpoint(snapshot).commit is None  # given as a directory
    shutil.copytree(tmp_path / "hub/models--org--name/blobs", tmp_path / "hub/models--a--b/blobs")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--a--b/blobs/0")
    assert "leads outside the checkpoint" in refusal(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../refs/main")
    assert "leads outside the checkpoint" in refusal(snapshot)


def test_links_into_the_store_that_repositories_share(path: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tmp_path / "hub", path, shared=True)
    assert "leads outside the checkpoint" in refusal(snapshot)
    (tmp_path / "hub" / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert open_checkpoint(snapshot).config.n_layers == 2


def test_blobs_elsewhere_are_outside(path: Path, tmp_path: Path) -> None:
    """Without the names of the Hub's layout, a sibling called blobs is nothing special."""
    directory = tmp_path / "downloads" / "snapshots" / "x"
    shutil.copytree(path, directory)
    (tmp_path / "downloads" / "blobs").mkdir()
    (directory / "config.json").rename(tmp_path / "downloads" / "blobs" / "c")
    (directory / "config.json").symlink_to("../../blobs/c")
    assert "leads outside the checkpoint" in refusal(directory)


# Corrupt safetensors files


def rewrite_header(path: Path, edit: Callable[[dict[str, Any]], Any], pad: int = 0) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h[NORM].update(shape=[2**40]),
        lambda h: h[NORM].update(shape=[2**62, 2**62]),
        lambda h: h[NORM].update(shape=[-1]),
        lambda h: h[NORM].update(data_offsets=[0, 2**60]),
        lambda h: h[NORM].update(data_offsets=[2**63, 2**63 + 128]),
        lambda h: h[NORM].update(data_offsets=[128, 0]),
        lambda h: h[NORM].update(data_offsets=h["model.embed_tokens.weight"]["data_offsets"]),
        lambda h: h[NORM].update(dtype="F64"),
        lambda h: h[NORM].update(dtype="Q4_K"),
        lambda h: h[NORM].pop("shape"),
        lambda h: h.update({NORM: 7}),
        lambda h: h.pop(NORM),
        lambda h: h.update(extra={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}),
    ],
)
def test_a_header_that_lies(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "model.safetensors"
    rewrite_header(file, edit)
    assert refusal(path).startswith(f"{file}: not a whole safetensors file (")


@pytest.mark.parametrize("length", [0, 7, 100_000_001, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_absurd_length(path: Path, length: int) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", length) + data[8:])
    assert refusal(path).startswith(f"{file}: not a whole safetensors file (")


def test_a_header_that_repeats_a_name(path: Path) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    again = b'{"model.norm.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    text = again + data[9 : 8 + length]
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    # The last one counts, and its bytes are all there.
    assert load(path).verifier.norm.weight.shape == (32,)


@pytest.mark.parametrize("kept", [0, 1, 8, 9, 2000, -1])
def test_a_truncated_file(path: Path, kept: int) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    assert refusal(path).startswith(f"{file}: not a whole safetensors file (")
    file.write_bytes(data + b"\0")
    assert refusal(path).startswith(f"{file}: not a whole safetensors file (")


@pytest.fixture(scope="module")
def corruptible(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """A checkpoint small enough that its header is a good part of its bytes."""
    directory = tmp_path_factory.mktemp("corrupt")
    write_checkpoint(
        directory,
        num_hidden_layers=1,
        hidden_size=4,
        intermediate_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=260,
    )
    yield directory, (directory / "model.safetensors").read_bytes()


def load_or_refuse(directory: Path) -> None:
    try:
        model = load(directory)
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        fields = json.loads((directory / "config.json").read_text())
        found = {name: tuple(view.shape) for name, view in model.tensors().items()}
        assert found == tensor_shapes(fields)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_flipped_bytes_load_or_are_refused(
    corruptible: tuple[Path, bytes], data: st.DataObject
) -> None:
    directory, original = corruptible
    content = bytearray(original)
    (length,) = struct.unpack("<Q", original[:8])
    position = st.integers(0, len(content) - 1) | st.integers(0, 7 + length)
    flips = st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)
    for index, value in data.draw(flips):
        content[index] = value
    (directory / "model.safetensors").write_bytes(content)
    load_or_refuse(directory)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_files_are_refused(corruptible: tuple[Path, bytes], data: st.DataObject) -> None:
    directory, original = corruptible
    kept = data.draw(st.integers(0, len(original) - 1))
    (directory / "model.safetensors").write_bytes(original[:kept])
    assert "model.safetensors: not a whole safetensors file" in refusal(directory)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200), prefix=st.booleans())
def test_any_bytes_are_refused(
    corruptible: tuple[Path, bytes], content: bytes, prefix: bool
) -> None:
    directory, _ = corruptible
    if prefix:
        content = struct.pack("<Q", len(content)) + content
    (directory / "model.safetensors").write_bytes(content)
    refusal(directory)


def test_a_sparse_file_of_terabytes_is_not_read(path: Path) -> None:
    file = path / "model.safetensors"
    with file.open("r+b") as handle:
        handle.truncate(2**42)
    assert refusal(path).startswith(f"{file}: not a whole safetensors file (")


def test_a_checkpoint_is_written_as_described(tmp_path: Path) -> None:
    """The helper itself: seeds, agreement, and a copy at 1.0."""
    config = tiny_config()
    one = random_tensors(config, seed=1, dtype=torch.float32, agreement=1.0)
    two = random_tensors(config, seed=1, dtype=torch.float32, agreement=0.0)
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(one[f"{name}.weight"], one[f"{name}_diff.weight"])
    assert torch.equal(one[f"{name}.weight"], two[f"{name}.weight"])
    assert not torch.equal(two[f"{name}.weight"], two[f"{name}_diff.weight"])
    write_files(tmp_path / "c", config, one)
    assert isinstance(open_checkpoint(tmp_path / "c"), Checkpoint)
