"""Greedy decoding for making and judging the checkpoint: batched AR, and single-sequence block
decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.embedded.net import KeyValue, OrthrusLM, new_cache


@torch.no_grad()
def greedy_batch(
    net: OrthrusLM, prompts: Sequence[list[int]], max_new: int, ends: Sequence[int]
) -> list[list[int]]:
    """AR answers (end token included) of several prompts at once, one row each."""
    device, n_rows = next(net.parameters()).device, len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    tokens = torch.zeros(n_rows, longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    cache, newest = _prefill_batch(net, tokens.to(device), lengths, longest + max_new)
    columns = torch.arange(longest + max_new, device=device)
    stops = torch.tensor(list(ends), device=device)
    done = torch.isin(newest, stops)
    out = [newest]
    for step in range(max_new - 1):
        if step % 16 == 0 and bool(done.all()):
            break
        at = (lengths + step)[:, None]
        mask = (columns <= at)[:, None, None]
        newest = net.logits(net.extend(newest[:, None], at, cache, mask)[:, 0]).argmax(-1)
        out.append(newest)
        done |= torch.isin(newest, stops)
    return [_until_end(row, set(ends)) for row in torch.stack(out, 1).tolist()]


def _prefill_batch(
    net: OrthrusLM, tokens: Tensor, lengths: Tensor, capacity: int
) -> tuple[list[KeyValue], Tensor]:
    """Fill a cache from right-padded prompts; the padding's rows are overwritten before they are
    seen.
    """
    dtype = (
        torch.get_autocast_dtype(tokens.device.type)
        if torch.is_autocast_enabled(tokens.device.type)
        else torch.float32
    )
    cache = new_cache(net.shape, len(tokens), capacity, tokens.device, dtype)
    newest = []
    for rows in torch.split(torch.arange(len(tokens), device=tokens.device), 256):
        hidden, made = net.ar(tokens[rows])
        for (keys, values), (key, value) in zip(cache, made, strict=True):
            keys[rows, :, : tokens.shape[1]], values[rows, :, : tokens.shape[1]] = (
                key.to(dtype),
                value.to(dtype),
            )
        last = hidden[torch.arange(len(rows), device=tokens.device), lengths[rows] - 1]
        newest.append(net.logits(last).argmax(-1))
    return cache, torch.cat(newest)


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    for at, token in enumerate(tokens):
        if token in ends:
            return tokens[: at + 1]
    return tokens


@dataclasses.dataclass(frozen=True)
class Decoded:
    """New tokens (the end included), the cycles they took, and each cycle's (place of its anchor,
    draft).
    """

    tokens: list[int]
    cycles: int
    drafts: list[tuple[int, list[int]]]


class SequenceDecoder:
    """One sequence at a time in both modes, over one preallocated cache."""

    def __init__(self, net: OrthrusLM, capacity: int) -> None:
        self.net, self.capacity = net, capacity
        self.device = next(net.parameters()).device
        self.cache = new_cache(net.shape, 1, capacity, self.device, torch.float32)

    @torch.no_grad()
    def decode(
        self, prompt: list[int], max_new: int, ends: Sequence[int], drafted: bool
    ) -> Decoded:
        """Greedy answer; `drafted` proposes blocks with the draft view, otherwise one token a
        pass.
        """
        newest = int(self._extend(prompt, 0)[-1])
        tokens, cycles, drafts = [newest], 0, []
        while len(tokens) < max_new and newest not in ends:
            start = len(prompt) + len(tokens) - 1
            draft = self._draft(newest, start) if drafted else []
            target = self._extend([newest, *draft], start).tolist()
            n_accepted = next((i for i, d in enumerate(draft) if d != target[i]), len(draft))
            drafts.append((len(tokens) - 1, draft))
            tokens.extend(target[: n_accepted + 1])
            tokens = _until_end(tokens, set(ends))[:max_new]
            newest, cycles = tokens[-1], cycles + 1
        return Decoded(tokens, cycles, drafts)

    def _extend(self, tokens: list[int], start: int) -> Tensor:
        """AR argmax [T] of tokens at `start` …, written to the cache."""
        stop = start + len(tokens)
        positions = torch.arange(start, stop, device=self.device)[None]
        seen = [(keys[:, :, :stop], values[:, :, :stop]) for keys, values in self.cache]
        mask = (torch.arange(stop, device=self.device) <= positions[0, :, None])[None, None]
        hidden = self.net.extend(torch.tensor([tokens], device=self.device), positions, seen, mask)
        return self.net.logits(hidden[0]).argmax(-1)

    def _draft(self, anchor: int, start: int) -> list[int]:
        shape = self.net.shape
        block = torch.full((1, shape.block_size), shape.mask_token_id, device=self.device)
        block[0, 0] = anchor
        positions = torch.arange(start, start + shape.block_size, device=self.device)[None]
        seen = [(keys[:, :, :start], values[:, :, :start]) for keys, values in self.cache]
        everything = torch.ones(
            1, 1, shape.block_size, start + shape.block_size, dtype=torch.bool, device=self.device
        )
        hidden = self.net.draft(block, positions, seen, everything)
        drafted: list[int] = self.net.logits(hidden[0, :-1]).argmax(-1).tolist()
        return drafted
