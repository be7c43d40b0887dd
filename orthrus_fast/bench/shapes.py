"""Shapes of the public models, to be filled with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orthrus_fast.config import ModelConfig, RopeConfig

if TYPE_CHECKING:
    import torch

    from orthrus_fast.model import Kernels, Transformer


def shape_config(shape: str) -> ModelConfig:
    """The config of a public model; "tiny" is for tests of this program alone."""
    if shape == "tiny":
        return _config(64, 128, 2, 4, True, 512, n_kv_heads=2, head_dim=16, block_size=8)
    hidden_size, intermediate_size, n_layers, n_heads, tied = {
        "1.7B": (2048, 6144, 28, 16, True),
        "4B": (2560, 9728, 36, 32, True),
        "8B": (4096, 12288, 36, 32, False),
    }[shape]
    return _config(hidden_size, intermediate_size, n_layers, n_heads, tied, 151936)


def _config(
    hidden_size: int,
    intermediate_size: int,
    n_layers: int,
    n_heads: int,
    tied: bool,
    vocab_size: int,
    n_kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 32,
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position_embeddings=40960 if vocab_size > 151669 else 4096,
        tie_word_embeddings=tied,
        rope=RopeConfig(theta=1e6),
        dtype="bfloat16",
        block_size=block_size,
        mask_token_id=min(151669, vocab_size - 1),
    )


def random_model(
    config: ModelConfig, kernels: Kernels, device: torch.device, dtype: torch.dtype, seed: int
) -> Transformer:
    """Weights drawn on the device with standard deviation 0.02; norms at 1.

    With "tiny" it is 0.2: a model that small would repeat its last token for ever.
    """
    import torch

    from orthrus_fast.checkpoint import allocate

    model = allocate(config, kernels, device, dtype, draft_view=True)
    generator = torch.Generator(device).manual_seed(seed)
    deviation = 0.02 if config.hidden_size >= 2048 else 0.2
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, deviation, generator=generator)
    return model
