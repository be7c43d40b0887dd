"""Small random checkpoints on disk, in the Hub's format, for tests of everything that loads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orthrus_fast.attention import find_backend
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.kernels.select import select_kernels

TINY: dict[str, Any] = {
    "architectures": ["OrthrusLM"],
    "model_type": "qwen3",
    "vocab_size": 272,  # 256 bytes, the end token, the mask, and padding rows past them
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads, as in Qwen3 4B
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 256,
    "block_size": 8,
    "mask_token_id": 257,
}


def tiny_config(*, draft: bool = True, tied: bool = True, **overrides: Any) -> dict[str, Any]:
    """config.json's fields; an override replaces a field, or removes it where it is None."""
    fields = TINY | {"tie_word_embeddings": tied}
    if not draft:
        fields |= {"architectures": ["Qwen3ForCausalLM"], "block_size": None, "mask_token_id": None}
    return {name: value for name, value in (fields | overrides).items() if value is not None}


def write_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    draft: bool = True,
    tied: bool = True,
    n_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    agreement: float = 0.9,
    tokenizer: bool = False,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint with weights drawn from ``seed`` and return its directory.

    ``agreement`` mixes the draft view's weights: a copy of the autoregressive view's at 1.0, drawn
    anew at 0.0. Right drafts are rare at 0.5, and even at 1.0 a cycle yields some two tokens: a
    draft row sees masks where the verifying row sees tokens. ``tokenizer`` adds a
    byte-level one of 257 entries (the ids of text are its UTF-8 bytes, 256 is ``<|end|>``), so that
    the default vocabulary has padding past it, as the public checkpoints do. ``config_overrides``
    are config.json's own field names.
    """
    config = tiny_config(draft=draft, tied=tied, **config_overrides)
    tensors = random_tensors(config, seed=seed, dtype=dtype, agreement=agreement)
    write_files(directory, config, tensors, n_shards=n_shards)
    if tokenizer:
        write_byte_tokenizer(directory)
    return directory


def write_files(
    directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, n_shards: int = 1
) -> None:
    """config.json and the tensors: one safetensors file, or ``n_shards`` of them and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if n_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = names[shard::n_shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that config.json's fields ask for, spelled out by hand."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = vocabulary
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (mlp, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, mlp)
        for suffix in ("", "_diff") if "block_size" in config else ("",):
            shapes[f"{prefix}self_attn.q_proj{suffix}.weight"] = (q_size, hidden)
            shapes[f"{prefix}self_attn.k_proj{suffix}.weight"] = (kv_size, hidden)
            shapes[f"{prefix}self_attn.v_proj{suffix}.weight"] = (kv_size, hidden)
            shapes[f"{prefix}self_attn.o_proj{suffix}.weight"] = (hidden, q_size)
            shapes[f"{prefix}self_attn.q_norm{suffix}.weight"] = (head_dim,)
            shapes[f"{prefix}self_attn.k_norm{suffix}.weight"] = (head_dim,)
    return shapes


def random_tensors(
    config: dict[str, Any], *, seed: int, dtype: torch.dtype, agreement: float
) -> dict[str, Tensor]:
    """Weights under which the next token depends on the context more than on the last token.

    Hence the scales: with large embeddings (tied ones above all) a model repeats its input, and a
    draft view, whose input is masks, would never agree.
    """
    scales = {"embed_tokens": 0.1, "o_proj": 4.0, "down_proj": 0.5, "q_norm": 0.6}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            tensor = 1 + 0.1 * noise
        else:
            tensor = noise if "embed_tokens" in name else noise / shape[1] ** 0.5
        if "_diff" in name:
            own = tensors[name.replace("_diff", "")]
            centre = 1.0 if "norm" in name else 0.0
            fresh = 1 - agreement
            copied = (1 - fresh**2) ** 0.5  # so that the sum has the variance of its parts
            tensor = centre + copied * (own - centre) + fresh * (tensor - centre)
        tensors[name] = tensor
    for name, tensor in tensors.items():
        tensor *= next((scale for part, scale in scales.items() if part in name), 1.0)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_byte_tokenizer(directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json of 256 bytes and the special token <|end|>."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel stands for byte b by a printable character: b itself, or the next free one past 255.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    vocabulary = {chr(b if b in printable else next(spare)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def kernels_for(attention: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """What a model is built with on that device."""
    attend = find_backend(attention, device, dtype, head_dim).attend
    return select_kernels(attend, device, dtype, head_dim)


def tile_boundaries(attention: str, capacity: int) -> list[int]:
    """Where the tiles and splits of a backend begin; triton's needs a GPU."""
    device = torch.device("cuda" if attention == "triton" else "cpu")
    return find_backend(attention, device, torch.float32, 64).tile_boundaries(capacity)


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file's object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weight_map(directory: Path, **entries: Any) -> None:
    """Set entries of the index, "__" standing for "." in their names; None removes one."""
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for name, file in entries.items():
        name = name.replace("__", ".")
        index["weight_map"] = {**index["weight_map"], name: file}
        if file is None:
            del index["weight_map"][name]
    path.write_text(json.dumps(index))
