"""The network in training form: Qwen3 with a second set of attention projections for the draft
view.

Module names equal the tensor names of the checkpoint, so `state_dict()` is what is saved (without
the tied head).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Mask = Tensor | BlockMask | None  # bool [R, 1, T, S], True where a row attends; None: causal
KeyValue = tuple[Tensor, Tensor]  # [R, n_kv_heads, S, head_dim] each


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the network; most names are those of the Hub's config.json."""

    vocab_size: int = 4096
    n_entries: int = 4080  # of the tokenizer; the mask token is the first row past them
    hidden_size: int = 320
    intermediate_size: int = 896
    n_layers: int = 8
    n_heads: int = 6
    n_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    max_positions: int = 2048
    rope_theta: float = 100_000.0
    eps: float = 1e-6

    @property
    def mask_token_id(self) -> int:
        return self.n_entries


class RMSNorm(nn.Module):
    """Computed in float32, cast back, then multiplied by the weight, as in Qwen3."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rope(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [R, 1, T, head_dim] each, float32, of positions [R, T]."""
    exponent = torch.arange(0, shape.head_dim, 2, device=positions.device).float() / shape.head_dim
    angle = positions[:, None, :, None].float() / shape.rope_theta**exponent
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply half-rotation RoPE to x [R, H, T, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """query [R, n_heads, T, D], key and value [R, n_kv_heads, S, D] -> [R, n_heads, T, D]."""
    if isinstance(mask, BlockMask):
        out = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and mask is not None:
        # The heads of a group become rows, so that the cache is not copied.
        grouped = query.view(len(query), -1, groups, query.shape[-1])
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        return out.reshape(query.shape)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


class Attention(nn.Module):
    """The projections of both views. `view` is the suffix of the tensors' names: "" (AR) or "_diff"
    (draft).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        wide, narrow = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        for view in ("", "_diff"):
            self.add_module("q_proj" + view, nn.Linear(shape.hidden_size, wide, bias=False))
            self.add_module("k_proj" + view, nn.Linear(shape.hidden_size, narrow, bias=False))
            self.add_module("v_proj" + view, nn.Linear(shape.hidden_size, narrow, bias=False))
            self.add_module("o_proj" + view, nn.Linear(wide, shape.hidden_size, bias=False))
            self.add_module("q_norm" + view, RMSNorm(shape.head_dim, shape.eps))
            self.add_module("k_norm" + view, RMSNorm(shape.head_dim, shape.eps))

    def _heads(self, name: str, x: Tensor) -> Tensor:
        projected: Tensor = getattr(self, name)(x)
        return projected.view(*x.shape[:2], -1, self.head_dim)

    def project(
        self, x: Tensor, cos: Tensor, sin: Tensor, view: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, T, hidden] -> query, key, value, [R, heads, T, head_dim] each."""
        query = getattr(self, "q_norm" + view)(self._heads("q_proj" + view, x)).transpose(1, 2)
        key = getattr(self, "k_norm" + view)(self._heads("k_proj" + view, x)).transpose(1, 2)
        value = self._heads("v_proj" + view, x).transpose(1, 2)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    def output(self, attended: Tensor, view: str) -> Tensor:
        """attended [R, n_heads, T, head_dim] -> [R, T, hidden]."""
        out: Tensor = getattr(self, "o_proj" + view)(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape)


class Backbone(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.eps)


def finish_layer(layer: Layer, x: Tensor, attended: Tensor, view: str) -> Tensor:
    """Apply output projection and MLP to the residual stream x [R, T, hidden]."""
    x = x + layer.self_attn.output(attended, view)
    out: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
    return out


def draft_layer(
    layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue, mask: Mask
) -> Tensor:
    """Apply one layer of the draft view to x [R, T, hidden] after the cached context `past`."""
    query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin, "_diff")
    key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    return finish_layer(layer, x, attend(query, key, value, mask), "_diff")


DraftLayer = Callable[[Layer, Tensor, Tensor, Tensor, KeyValue, Mask], Tensor]


class OrthrusLM(nn.Module):
    """A model with two attention views; the output head is tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)

    def initialise(self, seed: int) -> None:
        """Draw normal weights; those that write to the residual stream are scaled by its depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.named_parameters()):
            if parameter.dim() == 2:
                writes = ("o_proj" in name) or ("down_proj" in name)
                std = 0.02 / math.sqrt(2 * self.shape.n_layers) if writes else 0.02
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def named_view_parameters(self, draft: bool) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters of the draft view, or all the others."""
        return [(name, p) for name, p in self.named_parameters() if ("_diff." in name) == draft]

    def start_draft_from_ar(self) -> None:
        """Copy the AR attention weights into the draft view."""
        weights = self.state_dict()
        for name, weight in weights.items():
            if "_diff." in name:
                weight.copy_(weights[name.replace("_diff", "")])

    def round_weights(self) -> None:
        """Round all weights to bfloat16 in place, so that training continues from what is saved."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(parameter.bfloat16().float())

    def ar(self, tokens: Tensor) -> tuple[Tensor, list[KeyValue]]:
        """Run the AR view on whole sequences [R, T] -> (hidden [R, T, hidden], keys and values of
        each layer).
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        cos, sin = rope(positions, self.shape)
        x, cache = self.model.embed_tokens(tokens), []
        for layer in self._layers():
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin, "")
            cache.append((key, value))
            x = finish_layer(layer, x, attend(query, key, value, None), "")
        return self.model.norm(x), cache

    def draft(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: list[KeyValue],
        mask: Mask,
        run_layer: DraftLayer | None = None,
    ) -> Tensor:
        """Run the draft view on blocks [R, T] after cached context -> hidden [R, T, hidden].

        `mask` covers the cache's S columns, then the T of the blocks themselves. `run_layer` is
        `draft_layer` or a compiled form of it.
        """
        run_layer = run_layer or draft_layer
        cos, sin = rope(positions, self.shape)
        x = self.model.embed_tokens(tokens)
        if torch.is_grad_enabled():
            # The embedding is frozen; without this the first layer would be compiled separately.
            x.requires_grad_()
        for layer, past in zip(self._layers(), cache, strict=True):
            x = run_layer(layer, x, cos, sin, past, mask)
        out: Tensor = self.model.norm(x)
        return out

    def extend(
        self, tokens: Tensor, positions: Tensor, cache: list[KeyValue], mask: Tensor
    ) -> Tensor:
        """Run the AR view on tokens [R, T] and write them into a preallocated cache at `positions`
        [R, T] -> hidden [R, T, hidden].
        """
        cos, sin = rope(positions, self.shape)
        rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
        x = self.model.embed_tokens(tokens)
        for layer, (keys, values) in zip(self._layers(), cache, strict=True):
            query, key, value = layer.self_attn.project(layer.input_layernorm(x), cos, sin, "")
            keys[rows, :, positions] = key.transpose(1, 2).to(keys.dtype)
            values[rows, :, positions] = value.transpose(1, 2).to(values.dtype)
            x = finish_layer(
                layer, x, attend(query, keys.to(query.dtype), values.to(query.dtype), mask), ""
            )
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the output head: [..., hidden] -> [..., vocab_size]."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def _layers(self) -> list[Any]:
        return list(self.model.layers)


def new_cache(
    shape: Shape, n_rows: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> list[KeyValue]:
    """Return zeroed keys and values, [n_rows, n_kv_heads, capacity, head_dim] for each layer."""
    size = (n_rows, shape.n_kv_heads, capacity, shape.head_dim)
    return [
        (
            torch.zeros(size, device=device, dtype=dtype),
            torch.zeros(size, device=device, dtype=dtype),
        )
        for _ in range(shape.n_layers)
    ]
