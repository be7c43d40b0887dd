"""The shapes of the public models, and random weights for them."""

import torch
from torch import Tensor

from orthrus_fast.checkpoint import build_on_meta, make_model, own_slices
from orthrus_fast.config import ModelConfig, RopeConfig
from orthrus_fast.kernels.interface import Kernels
from orthrus_fast.model import Transformer
from orthrus_fast.quantization import Quantizer


def shape_config(shape: str) -> ModelConfig:
    """Return the config of a public model; "tiny" is for tests of the benchmark alone."""
    is_tiny = shape == "tiny"
    hidden_size, intermediate_size, n_layers, n_heads, tied, vocab_size = {
        "tiny": (64, 128, 2, 4, True, 512),
        "1.7B": (2048, 6144, 28, 16, True, 151936),
        "4B": (2560, 9728, 36, 32, True, 151936),
        "8B": (4096, 12288, 36, 32, False, 151936),
    }[shape]
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=2 if is_tiny else 8,
        head_dim=16 if is_tiny else 128,
        rms_norm_eps=1e-6,
        max_position_embeddings=4096 if is_tiny else 40960,
        tie_word_embeddings=tied,
        rope=RopeConfig(theta=1e6),
        dtype="bfloat16",
        block_size=8 if is_tiny else 32,
        mask_token_id=511 if is_tiny else 151669,
    )


def random_model(
    config: ModelConfig,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    quantizer: Quantizer,
    *,
    seed: int,
) -> Transformer:
    """Draw weights on the device with a standard deviation of 0.02; the weights of norms are 1.

    For "tiny" the deviation is 0.2: so small a model would repeat its last token for ever. A rank
    draws what the whole model has, and keeps its share.
    """
    generator = torch.Generator(device).manual_seed(seed)
    deviation = 0.02 if config.hidden_size >= 2048 else 0.2
    wholes = build_on_meta(config.whole).tensors() if config.n_ranks > 1 else {}

    def fill(name: str, weight: Tensor) -> None:
        if "norm" in name:
            weight.fill_(1.0)
        elif name in wholes and (shape := tuple(wholes[name].shape)) != tuple(weight.shape):
            whole = weight.new_empty(shape).normal_(0.0, deviation, generator=generator)
            weight.copy_(whole[own_slices(tuple(weight.shape), shape, config.rank)])
        else:
            weight.normal_(0.0, deviation, generator=generator)

    return make_model(config, kernels, device, dtype, fill, quantizer)
