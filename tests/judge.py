"""The judge: a plain AR loop and a plain draft view, written apart from ``orthrus_fast.model``.

It reads the checkpoint's files by itself and shares no code with the package: one token a pass, one
head at a time, keys and values in growing lists, everything in float64. What orthrus_fast decodes
is held against it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


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
        self, prompt: list[int], max_new_tokens: int, eos: tuple[int, ...]
    ) -> tuple[list[int], list[float]]:
        """Greedy tokens, and at each the gap between the two best logits."""
        self.forget()
        logits = self.feed(prompt)
        tokens: list[int] = []
        gaps: list[float] = []
        while True:
            best = logits.topk(2).values
            tokens.append(int(logits.argmax()))
            gaps.append(float(best[0] - best[1]))
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


def follows(tokens: list[int], expected: list[int], gaps: list[float], *, near_tie: float) -> bool:
    """Whether ``tokens`` equal the judge's, or first differ where its own choice was a near-tie.

    ``near_tie`` is 0 in float64; 1e-5 in float32, where rounding may turn such a choice.
    """
    if tokens == expected:
        return True
    pairs = zip(tokens, expected, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    return first is not None and gaps[first] < near_tie
