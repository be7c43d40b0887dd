"""The invariance check: is a row of a pass a function of its tokens alone, here?

A token may come as one row, in a block of any width, in any slot or in a chunk of a prompt. A text
is the same in all cases if the token's K, V and logits are, to the bit. That is a property of the
processor, the libraries and the shapes, so every decoder checks it when it is built, on the very
passes that will decode.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orthrus_fast.model import Transformer
from orthrus_fast.runners import (
    CompiledRunner,
    EagerRunner,
    GraphRunner,
    compiler_limits,
    full_precision_matmul,
)


@dataclass(frozen=True)
class Invariance:
    """What the check found. ``holds`` False: a text may depend on how it was decoded here."""

    holds: bool
    widths: tuple[int, ...]  # of the blocks compared
    prefill: bool  # whether they were compared with prefill, too
    n_rows: int  # rows compared: K and V in every layer, logits, the token chosen
    n_differing: int
    n_replayed: int  # tokens decoded twice, their logits and cache rows compared
    replay_equal: bool
    seconds: float

    def __str__(self) -> str:
        passes = f"blocks of {', '.join(map(str, self.widths))}"
        passes += " and prefill" if self.prefill else ""
        rows = f"{self.n_differing} differ" if self.n_differing else "equal to the bit"
        replay = "equal to the bit" if self.replay_equal else "differ"
        text = f"{self.n_rows} rows in {passes} {rows}; {self.n_replayed} tokens replayed {replay}"
        return f"{text} ({self.seconds:.1f} s)"


CAPTURED, STEPWISE = 140, 36  # passes that a check may take: of graphs, and kernel by kernel
N_LAYERS = 2  # that are checked kernel by kernel: all layers share their arithmetic


def check(
    runner: EagerRunner, widths: Sequence[int], boundaries: list[int], prefill: bool = True
) -> Invariance:
    """Compare rows of a prepared runner's passes. Leaves its state and cache as new.

    ``widths``, ascending, are those of the blocks that it may verify; ``prefill`` whether its rows
    must be the same. ``boundaries`` are positions at which attention's tiles or splits begin.
    """
    begin = time.perf_counter()
    captured = isinstance(runner, GraphRunner)
    n_passes, looked_at = (CAPTURED, runner) if captured else (STEPWISE, _first_layers(runner))
    n_replayed = n_passes // 5  # twice
    limits = compiler_limits() if isinstance(runner, CompiledRunner) else contextlib.nullcontext()
    with torch.inference_mode(), full_precision_matmul(runner.device), limits:
        probe = _Probe(looked_at, widths, prefill)
        chosen = probe.choose(boundaries, n_passes - 2 * n_replayed)
        for boundary in reversed(chosen):  # what a pass leaves above is not read below
            probe.around(boundary)
        n_replayed, equal = probe.replay(chosen, n_replayed)
        n_differing = int(probe.n_differing)
        runner.state.reset()
        looked_at.cache.reset()
    holds, seconds = n_differing == 0 and equal, time.perf_counter() - begin
    compared = (tuple(widths), prefill, probe.n_rows, n_differing)
    return Invariance(holds, *compared, n_replayed, equal, seconds)


def _first_layers(runner: EagerRunner) -> EagerRunner:
    """The same runner over the first layers of its model and cache."""
    twin = copy.copy(runner)
    twin.cache = copy.copy(runner.cache)
    twin.cache.k, twin.cache.v = runner.cache.k[:N_LAYERS], runner.cache.v[:N_LAYERS]
    for name, model in vars(runner).items():
        if isinstance(model, Transformer):
            shallow = copy.copy(model)
            stack = copy.copy(model.verifier)
            stack._modules = {**stack._modules, "layers": stack.layers[:N_LAYERS]}
            shallow._modules = {**model._modules, "verifier": stack}
            setattr(twin, name, shallow)
    return twin


class _Rows(NamedTuple):
    """What every pass must give at positions ``begin`` … ``begin`` + n - 1; all but ids as bits."""

    begin: int
    logits: Tensor  # [n, V]
    ids: Tensor  # [n]
    cached: list[Tensor]  # [1, n_kv_heads, n, head_dim], of K and V in every layer
    caches: list[Tensor]  # views [B, n_kv_heads, n, head_dim] of where these rows belong


class _Probe:
    """Runs passes by hand over one random text, after random cached rows alike in all slots.

    Every slot is done, so nothing is committed, until the replay.
    """

    def __init__(self, runner: EagerRunner, widths: Sequence[int], prefill: bool) -> None:
        self.prefill = prefill
        self.runner, self.state, self.device = runner, runner.state, runner.device
        self.widths, self.width, self.capacity = widths, widths[-1], runner.cache.capacity
        self.random = torch.Generator(self.device).manual_seed(0)
        self.caches = (*runner.cache.k, *runner.cache.v)
        shape, dtype = self.caches[0][:1].shape, self.caches[0].dtype
        noise = torch.randn(shape, generator=self.random, dtype=dtype, device=self.device)
        self.garbage = bits_of(-noise[:, :, : 2 * self.width])
        for index, rows in enumerate(self.caches):
            rows.copy_(noise.roll(index, dims=2))
        self.text = self._tokens(self.capacity)
        self.state.reset()
        self.n_slots = len(self.state.slots)
        self.n_rows, self.chunk_widths = 0, set[int]()
        self.n_differing = torch.zeros((), dtype=torch.int64, device=self.device)

    def _tokens(self, *shape: int) -> Tensor:
        vocab_size = self.runner.model.config.vocab_size
        return torch.randint(vocab_size, shape, generator=self.random, device=self.device)

    def choose(self, boundaries: list[int], n_passes: int) -> list[int]:
        """Those to look at: the first, the last, where their distance changes, and some others."""
        room = range(self.width, self.capacity - 2 * self.width)
        usable = sorted(set(boundaries) & set(room)) or list(room[:1])
        n = max(1, n_passes // (len(self._places()) + (4 if self.prefill else 2)))
        triples = zip(usable, usable[1:], usable[2:], strict=False)
        edges = [b for a, b, c in triples if b - a != c - b]
        edges = _evenly(sorted({*usable[:1], *edges, *usable[-1:]}), n)
        rest = [boundary for boundary in usable if boundary not in edges]
        return sorted(edges + _evenly(rest, n - len(edges)))

    def _places(self) -> list[tuple[int, int, int]]:
        """A pass each: width, first row relative to a boundary, rows of the text before others.

        A row is first, last or in the middle then. Beside one row of the text, as in AR, the
        others are copies of the anchor.
        """
        places = [(self.width, -(self.width // 2), self.width - self.width // 4)]
        if len(self.widths) == 1:
            places += [(self.width, -1, 1), (self.width, 0, 1)]
        for n in self.widths[:-1]:
            places += [(n, -n, n), (n, 0, n), (n, -(n // 2), n - n // 4)]
        return list(dict.fromkeys(places))

    def around(self, boundary: int) -> None:
        """Compare passes of every width, and of prefill, with the widest ones' rows."""
        expected = self._expected(boundary)
        for width, first, n_true in self._places():
            starts = boundary + first + self.state.slots % self.width  # lengths differ
            self._restore(expected, starts)
            logits, ids = self._verify(starts, width, n_true)
            differ = self._caches_differ(expected)
            for slot in range(self.n_slots):
                row = self.width + first + slot % self.width
                n = min(n_true, len(expected.ids) - row)
                self._count(expected, row, differ[slot, row:][:n], logits[slot, :n], ids[slot, :n])
        if self.prefill:
            self._chunk(expected, 0, slot=0)
            self._chunk(expected, self.width - 1, slot=self.n_slots - 1)

    def _expected(self, boundary: int) -> _Rows:
        """The first slot's rows of two passes of the widest blocks, up to ``boundary`` and on."""
        begin, end, passes = boundary - self.width, boundary + self.width, []
        for start in (begin, boundary):
            starts = torch.full_like(self.state.slots, start)
            logits, ids = self._verify(starts, self.width, self.width)
            passes.append((logits[0].clone(), ids[0].clone()))
        logits, ids = (torch.cat(both) for both in zip(*passes, strict=True))
        caches = [bits_of(rows[:, :, begin:end]) for rows in self.caches]
        return _Rows(begin, logits, ids, [rows[:1].clone() for rows in caches], caches)

    def _verify(self, starts: Tensor, width: int, n_true: int) -> tuple[Tensor, Tensor]:
        """A pass with slot b at ``starts[b]`` -> bits of logits [B, T, V], tokens chosen [B, T]."""
        state = self.state
        offset = torch.arange(width, device=self.device)
        text = self.text[starts[:, None] + offset]
        block = torch.where(offset < n_true, text, self._tokens(*text.shape))
        state.length.copy_(starts)
        state.anchor.copy_(block[:, 0])
        state.proposals[:, : width - 1].copy_(block[:, 1:])
        state.drafting.fill_(n_true > 1)
        ids = self.runner.verify(width)[:, :width]
        return bits_of(self.runner.logits), ids

    def _restore(self, expected: _Rows, starts: Tensor) -> None:
        """Put the expected rows below ``starts`` [B] of each slot, and garbage above."""
        position = expected.begin + torch.arange(len(expected.ids), device=self.device)
        is_cached = (position < starts[:, None])[:, None, :, None]
        for rows, cached in zip(expected.caches, expected.cached, strict=True):
            rows.copy_(torch.where(is_cached, cached, self.garbage))

    def _caches_differ(self, expected: _Rows) -> Tensor:
        """Which cache rows [B, n] are not the expected ones."""
        pairs = zip(expected.caches, expected.cached, strict=True)
        return torch.stack([(rows != cached).any(-1).any(1) for rows, cached in pairs]).any(0)

    def _count(
        self, expected: _Rows, row: int, differ: Tensor, logits: Tensor, ids: Tensor
    ) -> None:
        """Count rows from ``row`` on, and those of them whose caches ``differ``, or logits or ids.

        These, bits [m, V] and ids [m], may be of the last m of the rows only.
        """
        own = slice(row + len(differ) - len(ids), row + len(differ))
        wrong = (logits != expected.logits[own]).any(dim=-1) | (ids != expected.ids[own])
        differ[len(differ) - len(ids) :] |= wrong
        self.n_differing += differ.sum()
        self.n_rows += len(differ)

    def _chunk(self, expected: _Rows, row: int, slot: int) -> None:
        """Compare a prefill pass over the text from an expected ``row`` on, and padding.

        Widths that have not run yet come first. Logits are, as in prefill, the last token's alone.
        """
        start, widths = expected.begin + row, self.runner.prefill_widths
        widths = widths or (2 * self.width + 3, self.width + 5)
        fitting = [width for width in widths if start + width <= self.capacity]
        if not fitting:
            return
        width = next((width for width in fitting if width not in self.chunk_widths), fitting[0])
        self.chunk_widths.add(width)
        n = min(width, len(expected.ids) - row)
        self._restore(expected, torch.full_like(self.state.slots, start))
        tokens = torch.cat((self.text[start : start + n], self._tokens(width - n)))
        hidden = self.runner.prefill_chunk(tokens[None], start, slot)
        token, logits = self.runner.model.greedy(hidden[0, n - 1], return_logits=True)
        differ = self._caches_differ(expected)[slot, row:][:n]
        self._count(expected, row, differ, bits_of(logits)[None], token[None])

    def replay(self, boundaries: list[int], n: int) -> tuple[int, bool]:
        """Tokens decoded in AR and again with drafts, five of six right, across a boundary.

        The second value: whether tokens, logits and committed cache rows are equal to the bit.
        """
        room = self.capacity - self.width
        n = min(n, room - 2)
        begins = [b - n // 2 for b in boundaries if 0 < b - n // 2 < room - n] or [1]
        begin = begins[(len(begins) - 1) // 2]
        anchor = self._tokens(self.n_slots)
        expected = self._decode(begin, n, anchor, None)
        got = self._decode(begin, n, anchor, self.state.tokens.clone())
        have_ended = bool(expected[0].all())
        return int(expected[1].sum()), have_ended and all(map(torch.equal, expected, got))

    def _decode(self, begin: int, n: int, anchor: Tensor, known: Tensor | None) -> list[Tensor]:
        """Decode n tokens after ``anchor`` [B] at ``begin``, over fresh garbage past it.

        ``known`` [B, S]: the text to make drafts from; None: AR. Returns whether each slot ended,
        the number of its tokens, their ids, their logits' bits, and its new cache rows' bits.
        """
        state = self.state
        for rows in self.caches:
            rows[:, :, begin:].neg_()
        state.tokens.zero_()
        state.length.fill_(begin)
        state.anchor.copy_(anchor)
        state.max_length.fill_(begin + 1 + n)
        state.drafting.fill_(known is not None)
        state.done.fill_(False)
        width = self.widths[0] if known is None else self.width
        shape = (len(anchor), n, self.runner.model.config.vocab_size)
        logits = torch.zeros(shape, dtype=self.caches[0].dtype, device=self.device)
        for _ in range(n):  # a cycle emits a token at least, or something is wrong
            if bool(state.done.all()):
                break
            before = (state.length - begin).tolist()
            if known is not None:
                state.proposals[:, : width - 1].copy_(self._drafts(known, width))
            n_new = self.runner.verify(width)[:, width].tolist()
            for slot, (first, n_emitted) in enumerate(zip(before, n_new, strict=True)):
                new = logits[slot, first : first + n_emitted]
                new.copy_(self.runner.logits[slot, : len(new)])
        emitted = state.length - begin
        is_kept = torch.arange(n, device=self.device) < emitted[:, None]  # [B, n]
        beyond = ~is_kept[:, None, :, None]
        caches = [rows[:, :, begin : begin + n].masked_fill(beyond, 0) for rows in self.caches]
        ids = state.tokens[:, begin + 1 : begin + 1 + n] * is_kept
        return [state.done.clone(), emitted, ids, *map(bits_of, (logits, *caches))]

    def _drafts(self, known: Tensor, width: int) -> Tensor:
        """Proposals [B, width - 1] after each slot's anchor: the known tokens, but every sixth."""
        positions = self.state.length[:, None] + torch.arange(1, width, device=self.device)
        right = known.gather(1, positions)
        wrong = (right + 1) % self.runner.model.config.vocab_size
        is_wrong = (positions + self.state.slots[:, None]) % 6 == 0
        return torch.where(is_wrong, wrong, right)


def _evenly(values: list[int], n: int) -> list[int]:
    """At most n of the values, the first and the last among them."""
    if len(values) <= n or n < 2:
        return values[: max(n, 0)]
    return [values[index * (len(values) - 1) // (n - 1)] for index in range(n)]


def bits_of(x: Tensor) -> Tensor:
    """x as integers: equal only where sign and payload are, too."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
