"""The judge: a plain AR loop and a plain draft view, written apart from ``orthrus_fast.model``.

It reads the checkpoint's files by itself and shares no code with the package: one token a pass, one
head at a time, keys and values in growing lists, everything in float64. It samples in plain Python,
with its own noise and filters. What orthrus_fast decodes is held against it.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from orthrus_fast.sampling import SamplingParams


class Judge:
    """A checkpoint with default RoPE, decoded token by token; ``keys[layer][position]`` [KV, D]."""

    def __init__(self, directory: Path) -> None:
        self.fields = json.loads((directory / "config.json").read_text())
        self.weights: dict[str, Tensor] = {}
        for path in sorted(directory.glob("*.safetensors")):
            self.weights |= {name: t.double() for name, t in load_file(path).items()}
        self.n_layers = self.fields["num_hidden_layers"]
        self.forget()

    def forget(self, n_kept: int = 0) -> None:
        """Drop all cached positions from ``n_kept`` on."""
        if n_kept == 0:
            self.keys: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
            self.values: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        else:
            self.keys = [rows[:n_kept] for rows in self.keys]
            self.values = [rows[:n_kept] for rows in self.values]

    @property
    def position(self) -> int:
        return len(self.keys[0])

    def step(self, token: int) -> Tensor:
        """Logits [V] after ``token``, which is appended to the cache."""
        position = self.position
        x = self.weights["model.embed_tokens.weight"][token]
        for layer in range(self.n_layers):
            q, k, v = self._project(layer, x, position, "")
            self.keys[layer].append(k)
            self.values[layer].append(v)
            x = self._finish_layer(layer, x, q, self.keys[layer], self.values[layer], "")
        return self._logits(x)

    def feed(self, tokens: list[int]) -> Tensor:
        """Logits [V] after the last of ``tokens``."""
        for token in tokens:
            logits = self.step(token)
        return logits

    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        eos: tuple[int, ...],
        sampling: SamplingParams | None = None,
    ) -> tuple[list[int], list[float]]:
        """Tokens, greedy without ``sampling`` (which has a seed), and at each how near a tie was.

        That is, for greedy tokens, the gap between the two best logits; else ``judged``'s.
        """
        self.forget()
        logits = self.feed(prompt)
        tokens: list[int] = []
        gaps: list[float] = []
        while True:
            if sampling is None or sampling.temperature == 0:
                best = logits.topk(2).values
                tokens.append(int(logits.argmax()))
                gaps.append(float(best[0] - best[1]))
            else:
                assert sampling.seed is not None
                position = len(prompt) + len(tokens)
                token, gap = judged(logits, sampling.seed, position, sampling)
                tokens.append(token)
                gaps.append(gap)
            if tokens[-1] in eos or len(tokens) == max_new_tokens:
                return tokens, gaps
            logits = self.step(tokens[-1])

    def draft_logits(self, anchor: int, width: int) -> Tensor:
        """The draft view's logits [width, V] for a block after the cached positions."""
        block = [anchor] + [self.fields["mask_token_id"]] * (width - 1)
        start = self.position
        rows = [self.weights["model.embed_tokens.weight"][token] for token in block]
        for layer in range(self.n_layers):
            projected = [self._project(layer, x, start + i, "_diff") for i, x in enumerate(rows)]
            # The mask, written out: every row sees the cache before the block and all of the block.
            keys = self.keys[layer] + [k for _, k, _ in projected]
            values = self.values[layer] + [v for _, _, v in projected]
            rows = [
                self._finish_layer(layer, x, q, keys, values, "_diff")
                for x, (q, _, _) in zip(rows, projected, strict=True)
            ]
        return torch.stack([self._logits(x) for x in rows])

    def _project(
        self, layer: int, x: Tensor, position: int, suffix: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._norm(x, f"model.layers.{layer}.input_layernorm")
        prefix = f"model.layers.{layer}.self_attn."
        size = self.fields["head_dim"]

        def heads(name: str) -> Tensor:
            return (self.weights[f"{prefix}{name}_proj{suffix}.weight"] @ x).reshape(-1, size)

        q = torch.stack([self._norm(h, f"{prefix}q_norm{suffix}") for h in heads("q")])
        k = torch.stack([self._norm(h, f"{prefix}k_norm{suffix}") for h in heads("k")])
        return self._rotate(q, position), self._rotate(k, position), heads("v")

    def _finish_layer(
        self,
        layer: int,
        x: Tensor,
        q: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        suffix: str,
    ) -> Tensor:
        n_heads, size = q.shape
        group = n_heads // keys[0].shape[0]
        mixed = []
        for head in range(n_heads):
            k = torch.stack([row[head // group] for row in keys])
            v = torch.stack([row[head // group] for row in values])
            weights = ((k @ q[head]) / math.sqrt(size)).softmax(0)
            mixed.append(weights @ v)
        prefix = f"model.layers.{layer}."
        x = x + self.weights[f"{prefix}self_attn.o_proj{suffix}.weight"] @ torch.cat(mixed)
        y = self._norm(x, f"{prefix}post_attention_layernorm")
        gate = self.weights[f"{prefix}mlp.gate_proj.weight"] @ y
        up = self.weights[f"{prefix}mlp.up_proj.weight"] @ y
        down = self.weights[f"{prefix}mlp.down_proj.weight"]
        return x + down @ (gate * torch.sigmoid(gate) * up)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = torch.sqrt((x * x).mean() + self.fields["rms_norm_eps"])
        return x / scale * self.weights[f"{name}.weight"]

    def _rotate(self, x: Tensor, position: int) -> Tensor:
        """Each pair (i, i + D/2) turned by its angle, as a complex number."""
        half = x.shape[-1] // 2
        theta = self.fields["rope_parameters"]["rope_theta"]
        angles = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(
            torch.ones(half).double(), angles
        )
        return torch.cat((turned.real, turned.imag), dim=-1)

    def _logits(self, x: Tensor) -> Tensor:
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return head @ self._norm(x, "model.norm")


def dense_attention(q: Tensor, k: Tensor, v: Tensor, start: int, causal: bool) -> Tensor:
    """Attention of one sequence, one head at a time: q [T, H, D], k and v [KV, S, D]."""
    width, n_heads, head_dim = q.shape
    out = torch.empty_like(q)
    for t in range(width):
        n_visible = start + t + 1 if causal else start + width
        for head in range(n_heads):
            keys = k[head * k.shape[0] // n_heads, :n_visible]
            values = v[head * k.shape[0] // n_heads, :n_visible]
            out[t, head] = (keys @ q[t, head] / head_dim**0.5).softmax(0) @ values
    return out


def follows(tokens: list[int], expected: list[int], gaps: list[float], *, near_tie: float) -> bool:
    """Whether ``tokens`` equal the judge's, or first differ where its own choice was a near-tie.

    ``near_tie`` is 0 in float64; 1e-5 in float32, where rounding may turn such a choice.
    """
    if tokens == expected:
        return True
    pairs = zip(tokens, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return first is not None and gaps[first] < near_tie


def sampled(logits: Tensor, seed: int, position: int, params: SamplingParams) -> int:
    """The token at ``position`` from logits [V]; the seed is the argument, not ``params.seed``."""
    return judged(logits, seed, position, params)[0]


def judged(row: Tensor, seed: int, position: int, params: SamplingParams) -> tuple[int, float]:
    """The token of ``sampled``, and how near another one was, from logits ``row`` [V].

    The nearness is the least of: the gap between the two best scores, and how far each filter was
    from letting one token more or less through (a logit for top-k and min-p, a probability for
    top-p).
    """
    logits: list[float] = row.tolist()
    if params.temperature == 0:
        first, second = sorted(logits, reverse=True)[:2]
        return logits.index(first), first - second
    kept, margin = judged_filters(logits, params)
    noise = judged_noise(seed, position, len(logits))
    scores = {token: logits[token] + params.temperature * noise[token] for token in kept}
    ranking = sorted(scores, key=lambda token: (-scores[token], token))
    if len(ranking) > 1:
        margin = min(margin, scores[ranking[0]] - scores[ranking[1]])
    return ranking[0], margin


def judged_filters(logits: list[float], params: SamplingParams) -> tuple[list[int], float]:
    """The tokens that the filters leave, and the least margin by which a filter decided."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    margins = [math.inf]

    def cut(n_kept: int) -> list[int]:
        """The first ``n_kept`` of ``order``, and all that tie with the last of them."""
        while n_kept < len(order) and logits[order[n_kept]] == logits[order[n_kept - 1]]:
            n_kept += 1
        return order[:n_kept]

    if params.top_k is not None and params.top_k < len(order):
        cut_off = cut(params.top_k)
        if len(cut_off) < len(order):
            margins.append(logits[cut_off[-1]] - logits[order[len(cut_off)]])
        order = cut_off
    best = logits[order[0]]
    weights = [math.exp((logits[token] - best) / params.temperature) for token in order]
    if params.top_p is not None and params.top_p < 1:
        total = math.fsum(weights)
        above = 0.0  # the probability of the tokens before this one
        n_kept = 0
        for weight in weights:
            margins.append(abs(above - params.top_p))
            if above >= params.top_p:
                break
            n_kept += 1
            above += weight / total
        order = cut(n_kept)
    if params.min_p:
        floor = best + params.temperature * math.log(params.min_p)
        margins += [abs(logits[token] - floor) for token in order if logits[token] != best]
        order = [token for token in order if logits[token] >= floor]
    return order, min(margins)


def judged_noise(seed: int, position: int, vocab_size: int) -> list[float]:
    """Gumbel noise of each token at ``position``, rounded to float32 at each logarithm."""
    noise = []
    for token in range(vocab_size):
        if token % 4 == 0:
            words = judged_philox((token // 4, position, 0, 0), (seed % 2**32, seed >> 32))
        uniform = ((words[token % 4] >> 9) + 0.5) / 2**23
        noise.append(_float32(-math.log(_float32(-math.log(uniform)))))
    return noise


def judged_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as Salmon et al. print it: the key is bumped between the ten rounds."""
    a, b, c, d = counter
    for round_ in range(10):
        left = (key[0] + round_ * 0x9E3779B9) % 2**32
        right = (key[1] + round_ * 0xBB67AE85) % 2**32
        high_a, low_a = divmod(a * 0xD2511F53, 2**32)
        high_c, low_c = divmod(c * 0xCD9E8D57, 2**32)
        a, b, c, d = high_c ^ b ^ left, low_c, high_a ^ d ^ right, low_a
    return a, b, c, d


def _float32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
