"""Writes and reads the checkpoint directory, in the Hub's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from scripts.embedded.net import OrthrusLM, Shape
from scripts.embedded.tokens import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, end_tokens


def config_fields(shape: Shape, turn_end: int) -> dict[str, Any]:
    """Return the fields of config.json."""
    return {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": True,
        "rms_norm_eps": shape.eps,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "use_cache": True,
    }


def tokenizer_fields(shape: Shape) -> dict[str, Any]:
    """Return the fields of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [TURN_START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions,
    }


def write_checkpoint(net: OrthrusLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Write weights (bfloat16), configuration, tokenizer and chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {
        name: w.detach().to("cpu", torch.bfloat16).contiguous()
        for name, w in net.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    ends = end_tokens(tokenizer)
    _write_json(directory / "config.json", config_fields(net.shape, ends[0]))
    _write_json(directory / "generation_config.json", {"do_sample": False, "eos_token_id": ends})
    _write_json(directory / "tokenizer_config.json", tokenizer_fields(net.shape))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def read_checkpoint(directory: Path, shape: Shape) -> OrthrusLM:
    """Return the network of a checkpoint directory, in float32."""
    net = OrthrusLM(shape)
    net.load_state_dict(
        {name: w.float() for name, w in load_file(directory / "model.safetensors").items()}
    )
    return net


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
