"""Qwen3 with two attention views, in one file.

Every layer holds two sets of attention projections over one residual stream, one MLP and one KV
cache. The autoregressive view decides the text; the draft view (Orthrus, arXiv 2605.12825) proposes
a block in one pass. Rounding follows transformers' Qwen3, so that logits are equal: norms, softmax
and RoPE tables in float32 (float64 for float64 weights), cast back before the weight is applied.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orthrus_fast.attention import Attend
from orthrus_fast.cache import KVCache, write_rows
from orthrus_fast.config import ModelConfig, RopeConfig


class View(enum.Enum):
    """Which attention weights and mask a pass uses."""

    AUTOREGRESSIVE = (
        "autoregressive"  # causal over cache and block; its K/V are what gets committed
    )
    DRAFT = "draft"  # bidirectional within the block; its K/V serve this pass alone


class Places(NamedTuple):
    """Where a pass's rows sit: made once a pass, read by every layer."""

    start: Tensor  # [R] int32: position of each sequence's first row
    slot: Tensor  # [R] int64: the cache's slot of each sequence
    positions: Tensor  # [R, T] int64
    cos: Tensor  # [R, T, head_dim], as sin: the rotary table's rows at ``positions``
    sin: Tensor


class QkNormRopeWrite(Protocol):
    """What follows the qkv product: q [R, T, n_heads, head_dim] returned, k and v cached.

    The signature of ``qk_norm_rope_write``, below, and of the kernel that takes its place.
    """

    def __call__(
        self,
        parts: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slot: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor: ...


class Products(Protocol):
    """The products of x [..., K] and a weight [N, K], with what follows each."""

    has_own: ClassVar[bool]  # whether there are kernels of ours to take the library's place

    def parts(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product as the sum of P parts [P, ..., N], for ``add_norm`` or qk_norm_rope_write.

        A kernel may split the inner dimension; whoever reads the parts adds them up, in order.
        They are float32 then, else of x's dtype.
        """
        ...

    def swiglu(self, x: Tensor, weight: Tensor, ahead: Tensor | None = None) -> Tensor:
        """SwiGLU (arXiv 2002.05202) of the product's halves, gate and up: [..., N / 2].

        ``ahead`` is the weight that will be read next, for a kernel that can make use of it.
        """
        ...

    def greatest(self, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """ids [...] of each row's greatest value, the lowest at a tie, and the product [..., N].

        Without ``keep`` the product is of no use.
        """
        ...

    def is_own(self, n_rows: int, weight: Tensor) -> bool:
        """Whether a kernel of ours does a product of ``n_rows`` rows, not the library."""
        ...

    def without_library(self, shapes: frozenset[tuple[int, int]]) -> Products:
        """The same, but that the library does no product of these shapes (N, K)."""
        ...


class AddNorm(Protocol):
    """The signature of ``add_norm``, below, and of the kernel that takes its place.

    ``ahead`` is the weight that will be read next, for a kernel that can make use of it.
    """

    def __call__(
        self, x: Tensor, parts: Tensor, weight: Tensor, eps: float, ahead: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Kernels:
    """What of a pass has more than one implementation; ``plain_kernels`` has PyTorch's."""

    attend: Attend
    qk_norm_rope_write: QkNormRopeWrite
    add_norm: AddNorm
    products: Products


class RMSNorm(nn.Module):
    """The weight of a norm; ``rms_norm`` is the norm."""

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
        n_all_heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = nn.Linear(config.hidden_size, n_all_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.n_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        places: Places,
        k_cache: Tensor,
        v_cache: Tensor,
        kernels: Kernels,
        causal: bool,
    ) -> Tensor:
        """x [R, T, hidden_size] -> parts [P, R, T, hidden_size]; K and V go to the caches first."""
        q = kernels.qk_norm_rope_write(
            kernels.products.parts(x, self.qkv.weight),
            self.q_norm.weight,
            self.k_norm.weight,
            self.q_norm.eps,
            places.cos,
            places.sin,
            places.positions,
            places.slot,
            k_cache,
            v_cache,
        )
        caches, where = (k_cache, v_cache), (places.start, places.slot)
        mixed = kernels.attend(q, *caches, *where, self.o.weight, causal=causal)
        return kernels.products.parts(mixed.flatten(-2), self.o.weight)


class Layer(nn.Module):
    """A decoder block; ``draft_attention`` is None where there is no draft view."""

    def __init__(self, config: ModelConfig, draft_view: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.draft_attention = Attention(config) if draft_view else None
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        update: Tensor,
        places: Places,
        k_cache: Tensor,
        v_cache: Tensor,
        kernels: Kernels,
        view: View,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream x and the last layer's ``update`` to it -> the same, a layer later.

        An update is a product's parts [P, R, T, hidden_size]; the sum is left to the next norm.
        """
        causal = view is View.AUTOREGRESSIVE
        attention = self.attention if causal else self.draft_attention
        assert attention is not None  # the decoder refuses to draft without the draft view
        norm, products = self.attention_norm, kernels.products
        x, normed = kernels.add_norm(x, update, norm.weight, norm.eps, attention.qkv.weight)
        update = attention(normed, places, k_cache, v_cache, kernels, causal)
        norm = self.mlp_norm
        x, normed = kernels.add_norm(x, update, norm.weight, norm.eps, self.gate_up.weight)
        hidden = products.swiglu(normed, self.gate_up.weight, self.down.weight)
        return x, products.parts(hidden, self.down.weight)


class Transformer(nn.Module):
    """The whole model. Parameters are uninitialised until a checkpoint is loaded into them.

    ``draft_view`` False leaves the draft view out, though the config has one.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, draft_view: bool = True) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.has_draft_view = draft_view and config.has_draft_view
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, self.has_draft_view) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.rope_cos = self.rope_sin = torch.empty(0, config.head_dim)
        self.run_layer: Callable[..., tuple[Tensor, Tensor]] = Layer.forward

    def set_capacity(self, capacity: int) -> None:
        """Make the RoPE tables, [capacity, head_dim] each, on the weights' device and dtype."""
        weight = self.embed_tokens.weight
        cos, sin = rope_table(self.config, capacity, weight.dtype)
        self.rope_cos, self.rope_sin = cos.to(weight.device), sin.to(weight.device)

    def compiled(self, kernels: Kernels, compile: Callable[[Any], Any]) -> Transformer:
        """The same model over the same weights, with ``compile`` applied to what a pass is made of.

        One layer is compiled, not the stack: its code serves them all, so that compiling takes
        seconds at any depth. ``kernels`` must be opaque to the compiler.
        """
        twin = copy.copy(self)
        twin.kernels = kernels
        twin.run_layer = compile(Layer.forward)
        twin.enter = compile(twin.enter)  # type: ignore[method-assign]
        twin.leave = compile(twin.leave)  # type: ignore[method-assign]
        return twin

    def forward(
        self, tokens: Tensor, start: Tensor, slot: Tensor, cache: KVCache, view: View
    ) -> Tensor:
        """tokens [R, T] at positions ``start[r] …`` of ``slot[r]`` -> hidden [R, T, hidden_size].

        The pass writes its K and V to the cache at those positions, then attends; rows of the
        slot below ``start`` must be committed. ``view`` DRAFT needs a checkpoint with that view.
        """
        x, places = self.enter(tokens, start, slot)
        update = torch.zeros_like(x)[None]
        for layer, k_cache, v_cache in zip(self.layers, cache.k, cache.v, strict=True):
            x, update = self.run_layer(
                layer, x, update, places, k_cache, v_cache, self.kernels, view
            )
        return self.leave(x, update)

    def enter(self, tokens: Tensor, start: Tensor, slot: Tensor) -> tuple[Tensor, Places]:
        """The embeddings [R, T, hidden_size] of the tokens, and where the rows sit."""
        positions = start[:, None].long() + torch.arange(tokens.shape[1], device=tokens.device)
        cos, sin = self.rope_cos[positions], self.rope_sin[positions]
        return self.embed_tokens(tokens), Places(start, slot, positions, cos, sin)

    def leave(self, x: Tensor, update: Tensor) -> Tensor:
        """The final norm over the residual stream."""
        return self.kernels.add_norm(x, update, self.norm.weight, self.norm.eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden_size] -> [..., V] in the model's dtype; padding rows included."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def choose(self, hidden: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """hidden [R, T, hidden_size] -> the greedy ids [R, T], and the logits, if to be kept.

        The logits of verification come from here, not from ``logits``, which may round otherwise.
        """
        return self.kernels.products.greatest(hidden, self.lm_head.weight, keep)


def plain_kernels(attend: Attend) -> Kernels:
    """The kernels of plain PyTorch, and ``attend``."""
    return Kernels(attend, qk_norm_rope_write, add_norm, LibraryProducts())


class LibraryProducts:
    """``Products`` by the library that PyTorch calls."""

    has_own: ClassVar[bool] = False

    def parts(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)[None]

    def swiglu(self, x: Tensor, weight: Tensor, ahead: Tensor | None = None) -> Tensor:
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    def greatest(self, x: Tensor, weight: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        product = F.linear(x, weight)
        return product.argmax(dim=-1), product

    def is_own(self, n_rows: int, weight: Tensor) -> bool:
        return False

    def without_library(self, shapes: frozenset[tuple[int, int]]) -> LibraryProducts:
        return self


def add_norm(
    x: Tensor, parts: Tensor, weight: Tensor, eps: float, ahead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., hidden_size] plus the sum of ``parts`` [P, ..., hidden_size]: that, and its norm."""
    x = x + sum_parts(parts, x.dtype)
    return x, rms_norm(x, weight, eps)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The parts [P, ...] of a product, added in order and rounded once."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x scaled to unit root mean square (arXiv 1910.07467), rounded, then times the weight.

    In float32 or wider up to that rounding, as Qwen3 has it.
    """
    wide = x.to(_wide(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def qk_norm_rope_write(
    parts: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """parts [P, R, T, (n_heads + 2 n_kv_heads) · head_dim] of qkv -> q [R, T, n_heads, head_dim].

    k, normalised and rotated as q is, and v go to the caches [B, n_kv_heads, S, head_dim] at
    ``positions`` [R, T] of ``slot`` [R]. q_norm, k_norm [head_dim]; cos, sin [R, T, head_dim].
    """
    n_kv_heads = k_cache.shape[1]
    qkv = sum_parts(parts, k_cache.dtype)
    heads = qkv.view(*qkv.shape[:2], -1, q_norm.shape[0])
    n_heads = heads.shape[-2] - 2 * n_kv_heads
    q, k, v = torch.split(heads, [n_heads, n_kv_heads, n_kv_heads], dim=-2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    write_rows(k_cache, finite(rotate(rms_norm(k, k_norm, eps), cos, sin)), positions, slot)
    write_rows(v_cache, finite(v), positions, slot)
    return rotate(rms_norm(q, q_norm, eps), cos, sin)


def finite(x: Tensor) -> Tensor:
    """x with 0 for what has overflowed, as the cache wants it.

    Else it would reach rows that do not see it, and the slot's next owner.
    """
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [R, T, heads, head_dim], half-rotation form.

    ``cos`` and ``sin`` [R, T, 1, head_dim] are in x's dtype: transformers rounds them first, too.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_table(config: ModelConfig, n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [n_rows, head_dim] of the positions 0 … n_rows - 1, on the CPU.

    Made there for every device, so that all see the same bits.
    """
    wide = _wide(dtype)
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and tables: float32, or float64 where the weights are."""
    return torch.promote_types(dtype, torch.float32)
