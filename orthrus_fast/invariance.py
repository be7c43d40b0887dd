"""The invariance check: do a row's bits in the captured verify pass depend on that row alone, here?

AR and diffusion put the same token, after the same text, into different rows of the block, with
other neighbours. Their texts are equal to the bit if a row's bits don't notice. That is a property
of this GPU, these libraries and these shapes, so it is looked at wherever a decoder is built, on
the very graph that will decode.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.model import Layer, Transformer
from orthrus_fast.runners import EagerRunner, plain_arithmetic

N_REPLAYED = 64  # tokens decoded in both modes
_log = logging.getLogger("orthrus_fast")


@dataclass(frozen=True)
class Invariance:
    """What the check found. ``holds`` False: the two modes' texts may differ on this machine."""

    holds: bool
    n_rows: int  # rows of logits compared, in another place of the block or among other neighbours
    n_differing: int
    n_replayed: int  # tokens decoded in both modes, their logits and cache rows compared
    replay_equal: bool
    replaced: tuple[str, ...]  # products (N × K) taken over by a kernel of our own
    seconds: float

    def __str__(self) -> str:
        rows = f"{self.n_differing} differ" if self.n_differing else "equal to the bit"
        text = f"{self.n_rows} rows in other places {rows}; {self.n_replayed} tokens replayed "
        text += "equal to the bit" if self.replay_equal else "differ"
        if self.replaced:
            text += f"; own kernel in place of the library's: {', '.join(self.replaced)}"
        return f"{text} ({self.seconds:.1f} s)"


def secure(
    model: Transformer,
    build: Callable[[], EagerRunner],
    n_slots: int,
    width: int,
    edges: list[int],
) -> tuple[EagerRunner, Invariance]:
    """A runner prepared for ``width``, made invariant where there is a way to that.

    A library's product that fails on its own gives way to a fixed-tile kernel before anything is
    compiled; if the whole pass fails nevertheless, every product does, and it is built once more.
    """
    begin = time.perf_counter()
    n_rows = n_slots * width
    every = set(library_products(model, n_rows))
    shapes = variant_products(model, n_rows)
    replace_products(model, shapes)
    if every - shapes:
        _log.info("no tiles for %s at %d rows: the library's", _names(every - shapes), n_rows)
    on_products = time.perf_counter() - begin
    runner = build()
    runner.prepare(width)
    found = check(runner, width, edges)
    if not found.holds and shapes != every:
        _log.warning("the verify pass is not row-invariant with the library's products: %s", found)
        shapes = every
        replace_products(model, shapes)
        runner = build()
        runner.prepare(width)
        found = check(runner, width, edges)
    names = tuple(_names({shape}) for shape in sorted(shapes))
    found = replace(found, replaced=names, seconds=found.seconds + on_products)
    level = logging.INFO if found.holds else logging.WARNING
    _log.log(level, "row invariance %s: %s", "holds" if found.holds else "DOES NOT HOLD", found)
    return runner, found


def check(runner: EagerRunner, width: int, edges: list[int]) -> Invariance:
    """Compare rows of a prepared runner's verify pass. Leaves its state and cache as new.

    ``edges`` are the positions around which the attention kernel's tiles or splits begin.
    """
    begin = time.perf_counter()
    with torch.inference_mode(), plain_arithmetic(runner.device):
        probe = _Probe(runner, width)
        n_rows, n_differing = probe.rows_in_other_places(edges)
        n_replayed, replay_equal = probe.replay(edges)
        runner.state.reset()
        runner.cache.reset()
    holds = n_differing == 0 and replay_equal
    seconds = time.perf_counter() - begin
    return Invariance(holds, n_rows, n_differing, n_replayed, replay_equal, (), seconds)


class _Probe:
    """Runs the verify pass by hand over random tokens and a cache full of random rows."""

    def __init__(self, runner: EagerRunner, width: int) -> None:
        self.runner, self.width = runner, width
        self.random = torch.Generator(runner.device).manual_seed(0)
        for rows in (*runner.cache.k, *runner.cache.v):
            rows.normal_(generator=self.random)
        self.text = self._tokens(runner.cache.capacity)

    def _tokens(self, n: int) -> Tensor:
        """Random ids [B, n]."""
        shape = (len(self.runner.state.slots), n)
        vocab_size = self.runner.model.config.vocab_size
        return torch.randint(vocab_size, shape, generator=self.random, device=self.runner.device)

    def _pass(self, start: int, n_true: int, drafting: bool = True) -> Tensor:
        """Logits [B, K, V] of one pass at ``start``: n_true tokens of the text, then neighbours.

        In AR the neighbours are copies of the anchor, else they are drawn anew. Slot b begins b
        positions later, so that lengths differ. Every slot is done, so nothing is committed.
        """
        state = self.runner.state
        state.reset()
        at = start + state.slots[:, None] + torch.arange(self.width, device=self.runner.device)
        block = torch.cat(
            (self.text.gather(1, at)[:, :n_true], self._tokens(self.width - n_true)), 1
        )
        state.length.add_(start + state.slots)
        state.anchor.copy_(block[:, 0])
        state.proposals.copy_(block[:, 1:])
        state.drafting.fill_(drafting)
        self.runner.verify(self.width)
        return self.runner.logits

    def rows_in_other_places(self, edges: list[int]) -> tuple[int, int]:
        """Rows compared, and rows that differed, around each edge.

        A block across the edge; the same text a third of a block later, in earlier rows, before
        random neighbours; and as AR has it, one real row, on either side of the edge.
        """
        width, last = self.width, self.runner.cache.capacity - 2 * self.width - len(self.text)
        shift = width // 3 + 1
        n_rows, differing = 0, []
        for edge in edges if width > 1 else []:
            start = edge - width // 2
            if not 0 <= start <= last:
                continue
            whole = self._pass(start, width).clone()
            compared = [(whole[:, shift:], self._pass(start + shift, width - shift).clone())]
            for t in (edge - 1 - start, edge - start):
                compared.append(
                    (whole[:, t, None], self._pass(start + t, 1, drafting=False).clone())
                )
            for expected, got in compared:
                n = expected.shape[1]
                differing.append((bits_of(expected) != bits_of(got[:, :n])).any(-1).sum())
                n_rows += n * len(self.text)
        return n_rows, int(torch.stack(differing).sum()) if differing else 0

    def replay(self, edges: list[int]) -> tuple[int, bool]:
        """Tokens decoded in AR and again with drafts that are 85% right, across an edge.

        The second value: whether tokens, logits and committed cache rows are equal to the bit.
        """
        room = self.runner.cache.capacity - self.width
        begins = [edge - N_REPLAYED // 2 for edge in edges]
        begins = [begin for begin in begins if 0 < begin < room - N_REPLAYED] or [1]
        begin = begins[len(begins) // 2]
        n = min(N_REPLAYED, room - begin - 1)
        self._open(begin, n)
        expected = self._decode(n, None)
        ended = bool(self.runner.state.done.all())
        self._open(begin, n)
        got = self._decode(n, self.runner.state.tokens.clone())
        equal = ended and bool(self.runner.state.done.all())
        equal = equal and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        return int(expected[0].sum()), equal

    def _open(self, begin: int, n: int) -> None:
        """Put every slot at ``begin``, to decode n tokens, with garbage past it in the cache."""
        state = self.runner.state
        tokens = state.tokens.clone()
        state.reset()
        state.tokens.copy_(tokens)
        state.length.fill_(begin)
        state.anchor.copy_(self.text[:, begin])
        state.limit.fill_(begin + 1 + n)
        state.done.fill_(False)
        for rows in (*self.runner.cache.k, *self.runner.cache.v):
            rows[:, :, begin:].normal_(generator=self.random)

    def _decode(self, n: int, known: Tensor | None) -> list[Tensor]:
        """Tokens emitted [B], their ids, their logits' bits, and the committed cache rows' bits.

        ``known`` [B, S]: the text to make drafts from; None: AR.
        """
        state, cache = self.runner.state, self.runner.cache
        begin = int(state.length[0])
        shape = (len(state.slots), n + self.width, self.runner.model.config.vocab_size)
        logits = torch.zeros(shape, dtype=cache.k[0].dtype, device=self.runner.device)
        state.drafting.fill_(known is not None)
        for _ in range(n):  # a cycle emits a token at least, or something is wrong
            if bool(state.done.all()):
                break
            before = (state.length - begin).tolist()
            if known is not None:
                state.proposals.copy_(self._drafts(known))
            self.runner.verify(self.width)
            after = (state.length - begin).tolist()
            for slot, (first, end) in enumerate(zip(before, after, strict=True)):
                n_new = min(end - first, self.width)
                logits[slot, first : first + n_new] = self.runner.logits[slot, :n_new]
        emitted = state.length - begin
        kept = torch.arange(n, device=emitted.device) < emitted[:, None]  # [B, n]
        past = ~kept[:, None, :, None]
        both = (*cache.k, *cache.v)
        rows = [t[:, :, begin : begin + n].masked_fill(past, 0) for t in both]
        ids = state.tokens[:, begin + 1 : begin + 1 + n] * kept
        return [emitted, ids, bits_of(logits[:, :n]), *map(bits_of, rows)]

    def _drafts(self, known: Tensor) -> Tensor:
        """Proposals [B, K-1] after each slot's anchor, 85% of them the known tokens."""
        offset = torch.arange(1, self.width, device=known.device)
        right = known.gather(1, self.runner.state.length[:, None] + offset)
        draw = torch.rand(right.shape, generator=self.random, device=known.device)
        return torch.where(draw < 0.85, right, self._tokens(self.width - 1))


def variant_products(model: Transformer, n_rows: int) -> set[tuple[int, int]]:
    """Shapes [N, K] that the library serves at ``n_rows`` rows, and whose rows are not alike."""
    from orthrus_fast.kernels.product import rows_are_alike

    with plain_arithmetic(model.embed_tokens.weight.device):
        return {
            (n, k)
            for (n, k), weight in library_products(model, n_rows).items()
            if not rows_are_alike(
                partial(F.linear, weight=weight), n_rows, k, weight.dtype, weight.device
            )
        }


def replace_products(model: Transformer, shapes: set[tuple[int, int]]) -> None:
    """Put the fixed-tile kernel in place of the library's for these shapes, where there is one."""
    products = model.kernels.products.without_library(frozenset(shapes))
    model.kernels = replace(model.kernels, products=products)


def library_products(model: Transformer, n_rows: int) -> dict[tuple[int, int], Tensor]:
    """A weight of each shape [N, K] that the library serves and a kernel of ours could."""
    products = model.kernels.products
    if not products.has_own:
        return {}
    return {
        shape: weight
        for shape, weight in _weights(model).items()
        if not products.is_own(n_rows, weight)
    }


def own_products(model: Transformer, n_rows: int) -> list[str]:
    """The products (N × K) of a verify pass that kernels of ours do."""
    products = model.kernels.products
    shapes = {s for s, weight in _weights(model).items() if products.is_own(n_rows, weight)}
    return [_names({shape}) for shape in sorted(shapes)]


def _weights(model: Transformer) -> dict[tuple[int, int], Tensor]:
    """A weight of each shape [N, K] that a verify pass multiplies with."""
    modules: list[Any] = [model.lm_head]
    for layer in model.layers:
        assert isinstance(layer, Layer)
        modules += [layer.attention.qkv, layer.attention.o, layer.gate_up, layer.down]
    return {tuple(module.weight.shape): module.weight for module in modules}


def _names(shapes: set[tuple[int, int]]) -> str:
    return ", ".join(f"{rows} × {columns}" for rows, columns in sorted(shapes))


def bits_of(x: Tensor) -> Tensor:
    """x as integers: equal only where sign and payload are, too."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
