"""The invariance check: is a row of a pass a function of its tokens alone, here?

A token may come as one row, in a block of any width, in any slot or in a chunk of a prompt. A text
is the same in all cases if the token's K, V and logits are, to the bit. That is a property of the
processor, the libraries and the shapes, so every decoder checks it when it is built, on the very
passes that will decode.
"""

from __future__ import annotations

import contextlib
import copy
import logging
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

_log = logging.getLogger("orthrus_fast")


@dataclass(frozen=True)
class Invariance:
    """What the check found. ``holds`` False: a text may depend on how it was decoded here."""

    holds: bool
    widths: tuple[int, ...]  # of the blocks compared; several: prefill is, too
    n_rows: int  # rows compared: K and V in every layer, logits, the token chosen
    n_differing: int
    n_replayed: int  # tokens decoded twice, their logits and cache rows compared
    replay_equal: bool
    seconds: float

    def __str__(self) -> str:
        passes = f"blocks of {', '.join(map(str, self.widths))}"
        passes += " and prefill" if len(self.widths) > 1 else ""
        rows = f"{self.n_differing} differ" if self.n_differing else "equal to the bit"
        replay = "equal to the bit" if self.replay_equal else "differ"
        text = f"{self.n_rows} rows in {passes} {rows}; {self.n_replayed} tokens replayed {replay}"
        return f"{text} ({self.seconds:.1f} s)"


class Effort(NamedTuple):
    """What a check may cost."""

    n_passes: int
    n_boundaries: int
    n_replayed: int  # tokens a slot


CAPTURED = Effort(n_passes=150, n_boundaries=12, n_replayed=32)
STEPWISE = Effort(n_passes=36, n_boundaries=3, n_replayed=8)  # kernel by kernel, which is slow
N_LAYERS = 2  # that are checked there: all layers share their arithmetic


def check(runner: EagerRunner, widths: Sequence[int], boundaries: list[int]) -> Invariance:
    """Compare rows of a prepared runner's passes. Leaves its state and cache as new.

    ``widths``, ascending, are those of the blocks that it may verify; with only one, it promises
    nothing of prefill. ``boundaries`` are positions at which attention's tiles or splits begin.
    """
    begin = time.perf_counter()
    effort = CAPTURED if isinstance(runner, GraphRunner) else STEPWISE
    compiles = isinstance(runner, CompiledRunner)
    limits = compiler_limits() if compiles else contextlib.nullcontext()
    with torch.inference_mode(), full_precision_matmul(runner.device), limits:
        probe = _Probe(runner if effort is CAPTURED else _first_layers(runner), widths)
        chosen = probe.choose(boundaries, effort)
        for boundary in reversed(chosen):  # what a pass leaves above is not read below
            probe.around(boundary)
        n_replayed, replay_equal = probe.replay(chosen, effort.n_replayed)
        n_differing = int(probe.n_differing)
        runner.state.reset()
        probe.runner.cache.reset()
    holds, seconds = n_differing == 0 and replay_equal, time.perf_counter() - begin
    of_rows = (tuple(widths), probe.n_rows, n_differing)
    found = Invariance(holds, *of_rows, n_replayed, replay_equal, seconds)
    level = logging.INFO if holds else logging.WARNING
    _log.log(level, "row invariance %s: %s", "holds" if holds else "DOES NOT HOLD", found)
    return found


def _first_layers(runner: EagerRunner) -> EagerRunner:
    """The same runner over the first layers of its model and cache."""
    twin = copy.copy(runner)
    twin.cache = copy.copy(runner.cache)
    twin.cache.k, twin.cache.v = runner.cache.k[:N_LAYERS], runner.cache.v[:N_LAYERS]
    for name, model in vars(runner).items():
        if isinstance(model, Transformer):
            shallow = copy.copy(model)
            shallow._modules = {**model._modules, "layers": model.layers[:N_LAYERS]}
            setattr(twin, name, shallow)
    return twin


class _Place(NamedTuple):
    """A verify pass by a boundary: the text from ``start`` on, relative to it, then neighbours."""

    width: int
    start: int
    n_true: int  # rows of the text
    drafting: bool = True  # else the neighbours are copies of the anchor, as in AR


class _Rows(NamedTuple):
    """What every other pass must give at the positions ``begin`` … ``end`` - 1."""

    begin: int
    end: int
    logits: Tensor  # bits [end - begin, V]
    ids: Tensor  # [end - begin]
    caches: list[Tensor]  # [1, n_kv_heads, end - begin, head_dim], of K and V of every layer


class _Probe:
    """Runs passes by hand over one random text, after random cached rows alike in all slots.

    Every slot is done, so nothing is committed, until the replay.
    """

    def __init__(self, runner: EagerRunner, widths: Sequence[int]) -> None:
        self.runner, self.state, self.device = runner, runner.state, runner.device
        self.widths, self.width = tuple(widths), widths[-1]
        assert list(widths) == sorted(set(widths))
        self.random = torch.Generator(self.device).manual_seed(0)
        self.caches = (*runner.cache.k, *runner.cache.v)
        noise = self._noise(runner.cache.capacity)
        for index, rows in enumerate(self.caches):
            rows.copy_(noise.roll(index, dims=2))
        self.text = self._tokens(runner.cache.capacity)
        self.state.reset()
        self.offset = self.state.slots % self.width  # slot b runs so many positions later
        self.offsets = [slot % self.width for slot in range(len(self.state.slots))]
        self.n_rows = 0
        self.n_differing = torch.zeros((), dtype=torch.int64, device=self.device)

    def _tokens(self, *shape: int) -> Tensor:
        vocab_size = self.runner.model.config.vocab_size
        return torch.randint(vocab_size, shape, generator=self.random, device=self.device)

    def _noise(self, n_rows: int) -> Tensor:
        """Rows [1, n_kv_heads, n_rows, head_dim] for a slot's K or V."""
        rows = self.caches[0]
        shape = (1, rows.shape[1], n_rows, rows.shape[3])
        return torch.randn(shape, generator=self.random, dtype=rows.dtype, device=self.device)

    def choose(self, boundaries: list[int], effort: Effort) -> list[int]:
        """Those to look at: the first, the last, where their distance changes, and some others."""
        room = range(self.width, self.runner.cache.capacity - 2 * self.width)
        usable = sorted(boundary for boundary in set(boundaries) if boundary in room)
        n_passes = effort.n_passes - effort.n_replayed * 3 // 2
        n_passes //= len(self._places()) + (4 if len(self.widths) > 1 else 2)
        n = max(1, min(effort.n_boundaries, n_passes))
        triples = zip(usable, usable[1:], usable[2:], strict=False)
        edges = [b for a, b, c in triples if b - a != c - b]
        edges = _evenly(sorted({*usable[:1], *edges, *usable[-1:]}), n)
        rest = [boundary for boundary in usable if boundary not in edges]
        return sorted(edges + _evenly(rest, n - len(edges)))

    def _places(self) -> list[_Place]:
        """Where a row is first, last or in the middle of a block of each width."""
        most = self.width - self.width // 4
        places = [_Place(self.width, -(self.width // 2), most)]
        if len(self.widths) == 1:
            return [*places, *(_Place(self.width, start, 1, drafting=False) for start in (-1, 0))]
        for width in self.widths[:-1]:
            places += [_Place(width, -width, width), _Place(width, 0, width)]
            if width > 1:
                places.append(_Place(width, -(width // 2), width - width // 4))
        return places

    def around(self, boundary: int) -> None:
        """Compare passes of every width, and of prefill, with the widest ones' rows."""
        expected = self._expected(boundary)
        for place in self._places():
            start = boundary + place.start
            self._restore(expected, start + self.offset)
            logits, ids = self._verify(place, start + self.offset)
            starts = [start + offset for offset in self.offsets]
            self._compare(expected, starts, place.n_true, logits, ids)
        if len(self.widths) > 1:
            self._chunk(expected, 0, expected.begin, slot=0)
            self._chunk(expected, 1, boundary - 1, slot=len(self.offsets) - 1)

    def _expected(self, boundary: int) -> _Rows:
        """The first slot's rows of two passes of the widest blocks, up to ``boundary`` and on."""
        begin, end, passes = boundary - self.width, boundary + self.width, []
        for start in (begin, boundary):
            place = _Place(self.width, 0, self.width)
            logits, ids = self._verify(place, torch.full_like(self.offset, start))
            passes.append((logits[0].clone(), ids[0].clone()))
        logits, ids = (torch.cat(both) for both in zip(*passes, strict=True))
        caches = [bits_of(rows[:1, :, begin:end]).clone() for rows in self.caches]
        return _Rows(begin, end, logits, ids, caches)

    def _verify(self, place: _Place, starts: Tensor) -> tuple[Tensor, Tensor]:
        """A pass with slot b at ``starts[b]`` -> bits of logits [B, T, V], tokens chosen [B, T]."""
        state, width = self.state, place.width
        offset = torch.arange(width, device=self.device)
        is_text = offset < place.n_true
        text = self.text[starts[:, None] + offset]
        block = torch.where(is_text, text, self._tokens(*text.shape))
        state.length.copy_(starts)
        state.anchor.copy_(block[:, 0])
        state.proposals[:, : width - 1].copy_(block[:, 1:])
        state.drafting.fill_(place.drafting)
        ids = self.runner.verify(width)[:, :width]
        return bits_of(self.runner.logits), ids

    def _restore(self, expected: _Rows, starts: Tensor) -> None:
        """Put the expected rows below ``starts`` [B] of each slot, and garbage above."""
        begin, end = expected.begin, expected.end
        position = torch.arange(begin, end, device=self.device)
        is_cached = (position < starts[:, None])[:, None, :, None]
        noise = bits_of(self._noise(end - begin))
        for rows, cached in zip(self.caches, expected.caches, strict=True):
            bits_of(rows[:, :, begin:end]).copy_(torch.where(is_cached, cached, noise))

    def _compare(
        self, expected: _Rows, starts: list[int], n_true: int, logits: Tensor, ids: Tensor
    ) -> None:
        """Count a pass's rows, ``n_true`` of slot b from ``starts[b]`` on, and those that differ.

        As far as they are expected: bits of logits [B, T, V], ids [B, T], and the caches'.
        """
        caches_differ = self._caches_differ(expected)
        for slot, start in enumerate(starts):
            n = min(n_true, expected.end - start)
            own = slice(start - expected.begin, start - expected.begin + n)
            differ = (logits[slot, :n] != expected.logits[own]).any(dim=-1)
            differ |= ids[slot, :n] != expected.ids[own]
            self.n_differing += (differ | caches_differ[slot, own]).sum()
            self.n_rows += n

    def _caches_differ(self, expected: _Rows) -> Tensor:
        """Which cache rows [B, end - begin] are not the expected ones."""
        shape = (len(self.offsets), expected.end - expected.begin)
        differ = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for rows, same in zip(self.caches, expected.caches, strict=True):
            differ |= (bits_of(rows[:, :, expected.begin : expected.end]) != same).any(-1).any(1)
        return differ

    def _chunk(self, expected: _Rows, nth: int, start: int, slot: int) -> None:
        """Compare a prefill pass of ``nth`` width over the text from ``start`` on, then padding.

        The logits are compared where prefill asks for them: after the last token.
        """
        ragged = (2 * self.width + 3, self.width + 5)
        widths = self.runner.prefill_widths or ragged
        fitting = [width for width in widths if start + width <= self.runner.cache.capacity]
        if not fitting:
            return
        width = fitting[min(nth, len(fitting) - 1)]
        n = min(width, expected.end - start)
        self._restore(expected, torch.full_like(self.offset, start))
        tokens = torch.cat((self.text[start : start + n], self._tokens(width - n)))
        hidden = self.runner.prefill_chunk(tokens[None], start, slot)
        token, logits = self.runner.model.greedy(hidden[0, n - 1], return_logits=True)
        last = start + n - 1 - expected.begin
        differ = self._caches_differ(expected)[slot, last + 1 - n : last + 1]
        differ[-1] |= (bits_of(logits) != expected.logits[last]).any()
        differ[-1] |= token != expected.ids[last]
        self.n_differing += differ.sum()
        self.n_rows += n

    def replay(self, boundaries: list[int], n: int) -> tuple[int, bool]:
        """Tokens decoded in AR and again with drafts that are 85% right, across a boundary.

        The second value: whether tokens, logits and committed cache rows are equal to the bit.
        """
        room = self.runner.cache.capacity - self.width
        n = min(n, room - 2)
        begins = [b - n // 2 for b in boundaries if 0 < b - n // 2 < room - n] or [1]
        begin = begins[(len(begins) - 1) // 2]
        anchor = self._tokens(len(self.offsets))
        expected = self._decode(begin, n, anchor, None)
        got = self._decode(begin, n, anchor, self.state.tokens.clone())
        ended = bool((expected[0] & got[0]).all())
        equal = ended and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        return int(expected[1].sum()), equal

    def _decode(self, begin: int, n: int, anchor: Tensor, known: Tensor | None) -> list[Tensor]:
        """Decode n tokens after ``anchor`` [B] at ``begin``, over fresh garbage past it.

        ``known`` [B, S]: the text to make drafts from; None: AR. Returns whether each slot ended,
        the number of its tokens, their ids, their logits' bits, and its new cache rows' bits.
        """
        state = self.state
        for rows in self.caches:
            rows[:, :, begin:].neg_()
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
            self.runner.verify(width)
            after = (state.length - begin).tolist()
            for slot, (first, end) in enumerate(zip(before, after, strict=True)):
                new = logits[slot, first : min(end, first + width)]
                new.copy_(self.runner.logits[slot, : len(new)])
        emitted = state.length - begin
        is_kept = torch.arange(n, device=self.device) < emitted[:, None]  # [B, n]
        beyond = ~is_kept[:, None, :, None]
        caches = [rows[:, :, begin : begin + n].masked_fill(beyond, 0) for rows in self.caches]
        ids = state.tokens[:, begin + 1 : begin + 1 + n] * is_kept
        return [state.done.clone(), emitted, ids, *map(bits_of, (logits, *caches))]

    def _drafts(self, known: Tensor, width: int) -> Tensor:
        """Proposals [B, width - 1] after each slot's anchor, 85% of them the known tokens."""
        offset = torch.arange(1, width, device=self.device)
        right = known.gather(1, self.state.length[:, None] + offset)
        draw = torch.rand(right.shape, generator=self.random, device=self.device)
        return torch.where(draw < 0.85, right, self._tokens(*right.shape))


def _evenly(values: list[int], n: int) -> list[int]:
    """At most n of the values, the first and the last among them."""
    if len(values) <= n or n < 2:
        return values[: max(n, 0)]
    return [values[index * (len(values) - 1) // (n - 1)] for index in range(n)]


def bits_of(x: Tensor) -> Tensor:
    """x as integers: equal only where sign and payload are, too."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
