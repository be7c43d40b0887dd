"""The invariance check: do a row's bits in the captured verify pass depend on that row alone, here?

AR and diffusion put the same token, after the same text, into different rows of the block, with
other neighbours. Their texts are equal to the bit if a row's bits do not depend on that. This is a
property of the GPU, the libraries and the shapes, so every decoder checks it when it is built, on
the very graph that will decode.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast.model import Transformer, View
from orthrus_fast.runners import EagerRunner, full_precision_matmul

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
    replaced: tuple[str, ...]  # products (N × K) that a custom kernel computes instead of cuBLAS
    seconds: float

    def __str__(self) -> str:
        rows = f"{self.n_differing} differ" if self.n_differing else "equal to the bit"
        text = f"{self.n_rows} rows in other places {rows}; {self.n_replayed} tokens replayed "
        text += "equal to the bit" if self.replay_equal else "differ"
        if self.replaced:
            text += f"; custom kernels in place of cuBLAS: {', '.join(self.replaced)}"
        return f"{text} ({self.seconds:.1f} s)"


def ensure_row_invariance(
    model: Transformer,
    build: Callable[[], EagerRunner],
    n_slots: int,
    width: int,
    boundaries: list[int],
) -> tuple[EagerRunner, Invariance]:
    """A runner prepared for ``width``, made invariant where that is possible, and what was found.

    A product of cuBLAS that is not invariant on its own is replaced by a custom kernel before
    anything is compiled. If the whole pass fails nevertheless, all products are replaced, and the
    runner is built once more.
    """
    begin = time.perf_counter()
    n_rows = n_slots * width
    every = set(cublas_products(model, n_rows))
    shapes = variant_products(model, n_rows)
    replace_products(model, shapes)
    if every - shapes:
        _log.info("no tiles for %s at %d rows: cuBLAS", _names(every - shapes), n_rows)
    on_products = time.perf_counter() - begin
    runner = build()
    runner.prepare(width)
    found = check(runner, width, boundaries)
    if not found.holds and shapes != every:
        _log.warning("the verify pass is not row-invariant with products of cuBLAS: %s", found)
        shapes = every
        replace_products(model, shapes)
        runner = build()
        runner.prepare(width)
        found = check(runner, width, boundaries)
    names = tuple(_names({shape}) for shape in sorted(shapes))
    found = replace(found, replaced=names, seconds=found.seconds + on_products)
    level = logging.INFO if found.holds else logging.WARNING
    _log.log(level, "row invariance %s: %s", "holds" if found.holds else "DOES NOT HOLD", found)
    return runner, found


def check(runner: EagerRunner, width: int, boundaries: list[int]) -> Invariance:
    """Compare rows of a prepared runner's verify pass. Leaves its state and cache as new.

    ``boundaries`` are the positions around which the attention kernel's tiles or splits begin.
    """
    begin = time.perf_counter()
    with torch.inference_mode(), full_precision_matmul(runner.device):
        probe = _Probe(runner, width)
        n_rows, n_differing = probe.rows_in_other_places(boundaries)
        n_replayed, replay_equal = probe.replay(boundaries)
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

    def rows_in_other_places(self, boundaries: list[int]) -> tuple[int, int]:
        """Rows compared, and rows that differed, around each boundary.

        A block across the boundary; the same text a third of a block later, in earlier rows, before
        random neighbours; and as AR has it, one real row, on either side of the boundary.
        """
        width, last = self.width, self.runner.cache.capacity - 2 * self.width - len(self.text)
        shift = width // 3 + 1
        n_rows, differing = 0, []
        for boundary in boundaries if width > 1 else []:
            start = boundary - width // 2
            if not 0 <= start <= last:
                continue
            whole = self._pass(start, width).clone()
            compared = [(whole[:, shift:], self._pass(start + shift, width - shift).clone())]
            for t in (boundary - 1 - start, boundary - start):
                compared.append(
                    (whole[:, t, None], self._pass(start + t, 1, drafting=False).clone())
                )
            for expected, got in compared:
                n = expected.shape[1]
                differing.append((bits_of(expected) != bits_of(got[:, :n])).any(-1).sum())
                n_rows += n * len(self.text)
        return n_rows, int(torch.stack(differing).sum()) if differing else 0

    def replay(self, boundaries: list[int]) -> tuple[int, bool]:
        """Tokens decoded in AR and again with drafts that are 85% right, across an boundary.

        The second value: whether tokens, logits and committed cache rows are equal to the bit.
        """
        room = self.runner.cache.capacity - self.width
        begins = [boundary - N_REPLAYED // 2 for boundary in boundaries]
        begins = [begin for begin in begins if 0 < begin < room - N_REPLAYED] or [1]
        begin = begins[len(begins) // 2]
        n = min(N_REPLAYED, room - begin - 1)
        self._start(begin, n)
        expected = self._decode(n, None)
        ended = bool(self.runner.state.done.all())
        self._start(begin, n)
        got = self._decode(n, self.runner.state.tokens.clone())
        equal = ended and bool(self.runner.state.done.all())
        equal = equal and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        return int(expected[0].sum()), equal

    def _start(self, begin: int, n: int) -> None:
        """Put every slot at ``begin``, to decode n tokens, with garbage past it in the cache."""
        state = self.runner.state
        tokens = state.tokens.clone()
        state.reset()
        state.tokens.copy_(tokens)
        state.length.fill_(begin)
        state.anchor.copy_(self.text[:, begin])
        state.max_length.fill_(begin + 1 + n)
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
    """Shapes (N, K) that cuBLAS computes at ``n_rows`` rows, and whose rows are not invariant."""
    with full_precision_matmul(model.embed_tokens.weight.device):
        return {
            (n, k)
            for (n, k), weight in cublas_products(model, n_rows).items()
            if not rows_are_invariant(
                partial(F.linear, weight=weight), n_rows, k, weight.dtype, weight.device
            )
        }


def rows_are_invariant(
    linear: Callable[[Tensor], Tensor],
    n_rows: int,
    n_columns: int,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether a row of ``linear(x)`` [n_rows, N], x [n_rows, n_columns], depends on its row alone.

    Compares bits on random rows: one row at every index, rows permuted, and each row among zeros.
    Draws from its own generator and waits for the device once.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n_rows, n_columns, generator=generator, dtype=dtype, device=device)
    expected = linear(x)
    same = linear(x[:1].repeat(n_rows, 1)) == expected[0]
    invariant = same.all()
    for _ in range(4):
        order = torch.randperm(n_rows, generator=generator, device=device)
        invariant &= (linear(x[order]) == expected[order]).all()
    for row in range(n_rows):
        alone = torch.zeros_like(x)
        alone[row] = x[row]
        invariant &= (linear(alone)[row] == expected[row]).all()
    return bool(invariant)


def replace_products(model: Transformer, shapes: set[tuple[int, int]]) -> None:
    """Have custom kernels, where there are any, compute the products of these shapes."""
    products = model.kernels.products.without_cublas(frozenset(shapes))
    model.kernels = replace(model.kernels, products=products)


def cublas_products(model: Transformer, n_rows: int) -> dict[tuple[int, int], Tensor]:
    """A weight of each shape (N, K) that cuBLAS multiplies with and a custom kernel could."""
    products = model.kernels.products
    if not products.has_custom:
        return {}
    return {
        shape: weight
        for shape, weight in _weights(model).items()
        if not products.is_custom(n_rows, weight)
    }


def custom_products(model: Transformer, n_rows: int) -> list[str]:
    """The products (N × K) of a verify pass that custom kernels compute."""
    products = model.kernels.products
    shapes = {s for s, weight in _weights(model).items() if products.is_custom(n_rows, weight)}
    return [_names({shape}) for shape in sorted(shapes)]


def _weights(model: Transformer) -> dict[tuple[int, int], Tensor]:
    """A weight of each shape (N, K) that a verify pass multiplies with."""
    linears = model.linears(View.AUTOREGRESSIVE)
    return {(len(linear.weight), linear.weight.shape[1]): linear.weight for linear in linears}


def _names(shapes: set[tuple[int, int]]) -> str:
    return ", ".join(f"{rows} × {columns}" for rows, columns in sorted(shapes))


def bits_of(x: Tensor) -> Tensor:
    """x as integers: equal only where sign and payload are, too."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
