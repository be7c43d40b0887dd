"""Batched greedy AR decoding of a network in training, which writes the answers for phase 2.

The package decodes a finished checkpoint, bit for bit alike in every pass. This module decodes
thousands of prompts at once, in autocast, before there is a draft view. No figure of the card is
measured with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scripts.embedded.net import KeyValue, OrthrusLM, new_cache


@torch.no_grad()
def greedy_batch(
    net: OrthrusLM, prompts: Sequence[list[int]], max_new: int, ends: Sequence[int]
) -> list[list[int]]:
    """Return the AR answers to several prompts at once, one row each; end tokens are included."""
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
    read.
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
