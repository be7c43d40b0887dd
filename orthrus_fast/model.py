"""Qwen3 with two attention views, in one file.

Every layer holds two sets of attention projections over one residual stream, one MLP and one KV
cache. The autoregressive view decides the text; the draft view (Orthrus, arXiv 2605.12825) proposes
a block in one pass. What has more than one implementation comes from ``Kernels``: read
``kernels.plain`` beside this file. Rounding follows transformers' Qwen3, so that logits are equal.

Shapes: B slots, R sequences of a pass, T rows of each, P partial sums, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orthrus_fast.cache import KVCache
from orthrus_fast.config import ModelConfig, RopeConfig
from orthrus_fast.kernels.interface import Kernels, Weight, k_split
from orthrus_fast.kernels.plain import wide_dtype

Named = Callable[[], dict[str, Tensor]]  # tensors by their names in a checkpoint


class PassPositions(NamedTuple):
    """Positions, slots and RoPE rows of one forward pass; made once, read by every layer."""

    start: Tensor  # [R] int32: position of each sequence's first row
    slot: Tensor  # [R] int64: each sequence's slot in the cache
    positions: Tensor  # [R, T] int64
    cos: Tensor  # [R, T, head_dim], as sin: the rotary table's rows at ``positions``
    sin: Tensor


class Linear(nn.Module):
    """A weight [N, K], uninitialised, in the words of ``kernels.interface.Weight``.

    The kernels multiply with it. ``quantization`` puts fewer bits and their scales in its place.
    K is one rank's share where ``n_ranks`` have one each, N where ``n_shares`` have.
    """

    scale: Tensor | None
    group_scale: Tensor | None

    def __init__(self, n_inputs: int, n_outputs: int, n_ranks: int = 1, n_shares: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_outputs, n_inputs))
        self.register_parameter("scale", None)
        self.register_parameter("group_scale", None)
        self.n_inputs, self.n_ranks, self.n_shares = n_inputs, n_ranks, n_shares
        self.split = k_split(n_outputs * n_shares, n_inputs * n_ranks)
        # Whether all ranks' partial sums are those of the whole weight on one.
        self.sums_as_one = n_ranks == 1 or n_inputs % self.split == 0
        if not self.sums_as_one:
            self.split = n_inputs
        self.format = ""
        self.whole: Weight | None = None


class RMSNorm(nn.Module):
    """The weight of a norm, uninitialised; the kernels compute it (``plain.rms_norm``)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps


class Attention(nn.Module):
    """One view's projections: hidden -> q, k, v -> attention over the cache -> hidden."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim
        n_all = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, n_all, n_shares=config.n_ranks)
        self.o = Linear(config.n_heads * config.head_dim, config.hidden_size, config.n_ranks)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        at: PassPositions,
        k_cache: Tensor,
        v_cache: Tensor,
        kernels: Kernels,
        causal: bool,
    ) -> Tensor:
        """x [R, T, hidden_size] -> partials [P, R, T, hidden_size].

        The rows' K and V are written to the caches first.
        """
        q = kernels.qk_norm_rope_write(
            kernels.products.partials(x, self.qkv),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            at.cos,
            at.sin,
            at.positions,
            at.slot,
            k_cache,
            v_cache,
        )
        mixed = kernels.attend(q, k_cache, v_cache, at.start, at.slot, self.o.weight, causal=causal)
        return kernels.products.partials(mixed.flatten(-2), self.o)

    def tensors(self, suffix: str) -> dict[str, Tensor]:
        """Checkpoint names within ``self_attn.`` -> the slices that hold these tensors."""
        n_query, n_key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        q, k, v = torch.split(self.qkv.weight, [n_query, n_key, n_key])
        named = {
            "q_proj": q,
            "k_proj": k,
            "v_proj": v,
            "o_proj": self.o.weight,
            "q_norm": self.q_norm.weight,
            "k_norm": self.k_norm.weight,
        }
        return {f"{name}{suffix}.weight": tensor for name, tensor in named.items()}


class MLP(nn.Module):
    """SwiGLU between two products: hidden -> intermediate -> hidden."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_all = 2 * config.intermediate_size
        self.gate_up = Linear(config.hidden_size, n_all, n_shares=config.n_ranks)
        self.down = Linear(config.intermediate_size, config.hidden_size, config.n_ranks)

    def forward(self, x: Tensor, kernels: Kernels) -> Tensor:
        """x [R, T, hidden_size] -> partials [P, R, T, hidden_size]."""
        hidden = kernels.products.swiglu(x, self.gate_up, self.down.weight)
        return kernels.products.partials(hidden, self.down)

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint names within ``mlp.`` -> the slices that hold these tensors."""
        gate, up = self.gate_up.weight.chunk(2)
        named = {"gate_proj": gate, "up_proj": up, "down_proj": self.down.weight}
        return {f"{name}.weight": tensor for name, tensor in named.items()}


class Layer(nn.Module):
    """A decoder block of one view; ``causal``: rows see the positions up to their own."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        update: Tensor,
        at: PassPositions,
        k_cache: Tensor,
        v_cache: Tensor,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x and the last layer's ``update`` to it -> the same, a layer later.

        An update is the partials [P, R, T, hidden_size] of a product; the next norm adds them up.
        """
        norm = self.attention_norm
        x, normed = kernels.add_norm(x, update, norm.weight, norm.eps, self.attention.qkv.weight)
        update = self.attention(normed, at, k_cache, v_cache, kernels, self.causal)
        norm = self.mlp_norm
        x, normed = kernels.add_norm(x, update, norm.weight, norm.eps, self.mlp.gate_up.weight)
        return x, self.mlp(normed, kernels)

    def linears(self) -> list[Linear]:
        """What a pass multiplies with, in order."""
        return [self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down]


class Stack(nn.Module):
    """All layers of one view, its last norm and its output head."""

    layers: nn.ModuleList  # of Layer

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        n_logits = config.vocab_size // config.n_ranks
        self.lm_head = Linear(config.hidden_size, n_logits, n_shares=config.n_ranks)

    def share(self, other: Stack) -> None:
        """Take all from ``other`` but attention, which each view has for itself."""
        self.norm, self.lm_head = other.norm, other.lm_head
        for own, layer in zip(self.layers, other.layers, strict=True):
            for name in ("attention_norm", "mlp_norm", "mlp"):
                setattr(own, name, getattr(layer, name))

    def linears(self) -> list[Linear]:
        """What a pass multiplies with, in order; the output head comes last."""
        linears: list[Linear] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            linears += layer.linears()
        return [*linears, self.lm_head]


class Transformer(nn.Module):
    """The whole model. Parameters are uninitialised until a checkpoint is loaded into them.

    ``verifier`` is the autoregressive view: causal, and its K and V are what gets committed. The
    ``drafter`` sees its whole block, and its K and V serve one pass alone; it is None where the
    config has no draft view, or ``draft_view`` is False. Both share all but attention, until
    ``quantization`` gives the drafter weights of its own.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, draft_view: bool = True) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.embed_tokens = Linear(config.hidden_size, config.vocab_size)  # its rows are looked up
        self.verifier = Stack(config, causal=True)
        self.drafter: Stack | None = None
        if config.tie_word_embeddings:
            self.tie_head()
        if draft_view and config.has_draft_view:
            self.drafter = Stack(config, causal=False)
            self.drafter.share(self.verifier)
        self.rope_cos = self.rope_sin = torch.empty(0, config.head_dim)
        self.run_layer: Callable[..., tuple[Tensor, Tensor]] = Layer.forward

    @property
    def has_draft_view(self) -> bool:
        """Whether the model can draft."""
        return self.drafter is not None

    def tie_head(self) -> None:
        """Make the embedding, or this rank's share of its rows, the output head."""
        weight, config = self.embed_tokens.weight, self.config
        if config.n_ranks > 1:
            weight = nn.Parameter(weight.detach().chunk(config.n_ranks)[config.rank], False)
        self.verifier.lm_head.weight = weight

    def set_capacity(self, capacity: int) -> None:
        """Make the RoPE tables, [capacity, head_dim] each, on the weights' device and dtype."""
        weight = self.embed_tokens.weight
        cos, sin = rope_table(self.config, capacity, weight.dtype)
        self.rope_cos, self.rope_sin = cos.to(weight.device), sin.to(weight.device)

    def compiled(self, kernels: Kernels, compile: Callable[..., Any]) -> Transformer:
        """The same model over the same weights, with ``compile`` applied to the parts of a pass.

        One layer is compiled, not the stack: its code serves them all, so that compiling takes
        seconds at any depth. ``kernels`` must be custom operators or code for the compiler to see.
        ``compile`` is told the sizes of each argument's dimensions by name: R and T vary.
        """
        twin = copy.copy(self)
        twin.kernels = kernels
        embed = compile(twin.embed, "RT", "R", "R")
        # Views, because other compiled steps know the sizes of the tensors themselves.
        twin.embed = lambda *of: embed(*(t.view_as(t) for t in of))  # type: ignore[method-assign]
        at = PassPositions("R", "R", "RT", "RT.", "RT.")  # type: ignore[arg-type]
        twin.run_layer = compile(Layer.forward, None, "RT.", ".RT.", at)
        twin.final_norm = compile(twin.final_norm, None, "RT.", ".RT.")  # type: ignore[method-assign]
        return twin

    def forward(
        self, tokens: Tensor, start: Tensor, slot: Tensor, cache: KVCache, stack: Stack
    ) -> Tensor:
        """tokens [R, T] at positions ``start[r] …`` of ``slot[r]`` -> hidden [R, T, hidden_size].

        The pass of ``stack`` writes its K and V to the cache at those positions, then attends; rows
        of the slot below ``start`` must be committed.
        """
        x, at = self.embed(tokens, start, slot)
        update = torch.zeros_like(x)[None]
        for layer, k_cache, v_cache in zip(stack.layers, cache.k, cache.v, strict=True):
            x, update = self.run_layer(layer, x, update, at, k_cache, v_cache, self.kernels)
        return self.final_norm(stack, x, update)

    def embed(self, tokens: Tensor, start: Tensor, slot: Tensor) -> tuple[Tensor, PassPositions]:
        """The embeddings [R, T, hidden_size] of the tokens, and where the rows sit."""
        tables = (self.embed_tokens.weight, self.rope_cos, self.rope_sin)
        x, *rows = self.kernels.embed(tokens, start, *tables)
        return x, PassPositions(start, slot, *rows)

    def final_norm(self, stack: Stack, x: Tensor, update: Tensor) -> Tensor:
        """The norm of the residual stream after the last update."""
        return self.kernels.add_norm(x, update, stack.norm.weight, stack.norm.eps)[1]

    def greedy(
        self, hidden: Tensor, return_logits: bool, stack: Stack | None = None
    ) -> tuple[Tensor, Tensor]:
        """hidden [..., hidden_size] -> the greedy ids [...], and the logits [..., V], if asked for.

        Logits are of the model's dtype, those of padding rows of the vocabulary included. ``stack``
        None is the verifier.
        """
        head = (stack or self.verifier).lm_head
        return self.kernels.products.lm_head_argmax(hidden, head, return_logits)

    def tensors(self) -> dict[str, Tensor]:
        """Checkpoint name -> the slice of the fused parameters that the tensor fills.

        Slices along the first dimension are views, so copying into one fills the parameter. A tied
        ``lm_head.weight`` is not among them.
        """
        return {name: tensor for _, named in self.parts() for name, tensor in named().items()}

    def parts(self) -> Iterator[tuple[nn.Module, Named]]:
        """The modules that hold the parameters, each with what gives its share of ``tensors``."""
        tied, stack = self.config.tie_word_embeddings, self.verifier
        yield _part(self.embed_tokens, "model.embed_tokens.")
        yield _part(stack.norm, "model.norm.")
        if not tied:
            yield _part(stack.lm_head, "lm_head.")
        for index, layer in enumerate(stack.layers):
            assert isinstance(layer, Layer)
            prefix = f"model.layers.{index}."
            yield _part(layer.attention_norm, prefix + "input_layernorm.")
            yield _part(layer.mlp_norm, prefix + "post_attention_layernorm.")
            yield _part(layer.mlp, prefix + "mlp.", layer.mlp.tensors)
            attention = layer.attention
            yield _part(attention, prefix + "self_attn.", partial(attention.tensors, ""))
            if self.drafter is not None:
                drafting = self.drafter.layers[index]
                assert isinstance(drafting, Layer)
                attention = drafting.attention
                named = partial(attention.tensors, "_diff")
                yield _part(attention, prefix + "self_attn.", named)


def _part(module: nn.Module, prefix: str, tensors: Named | None = None) -> tuple[nn.Module, Named]:
    """A module, and what gives its tensors by their names in a checkpoint."""

    def named() -> dict[str, Tensor]:
        own = {"weight": module.weight} if tensors is None else tensors()
        return {prefix + name: tensor.detach() for name, tensor in own.items()}  # type: ignore[operator]

    return module, named


def rope_table(config: ModelConfig, n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [n_rows, head_dim] of the positions 0 … n_rows - 1, on the CPU.

    Made there for every device, so that all see the same bits.
    """
    wide = wide_dtype(dtype)
    frequencies, scale = _rope_frequencies(config.rope, config.head_dim, wide)
    angles = torch.arange(n_rows, dtype=wide, device="cpu")[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _rope_frequencies(rope: RopeConfig, dim: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Angle per position [dim / 2], and the scale of cos and sin, which only yarn has.

    YaRN (arXiv 2309.00071) turns fast dimensions as trained, slow ones by 1 / factor, and blends
    linearly between the dimensions that turn beta_fast and beta_slow times in the original context.
    """
    exponents = torch.arange(0, dim, 2, dtype=dtype, device="cpu") / dim
    base = rope.theta**exponents
    if rope.type == "default":
        return 1.0 / base, 1.0

    def dimension_turning(n_turns: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (n_turns * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001  # as transformers does, so that equal ends do not divide by zero
    slow = ((torch.arange(dim // 2, dtype=dtype, device="cpu") - low) / span).clamp(0, 1)
    keep = 1 - slow
    return 1.0 / (rope.factor * base) * (1 - keep) + 1.0 / base * keep, _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
