"""What GPUs that share a model write into each other's memory within a pass.

Every rank has one buffer, which all others see. A product leaves its partial sums in all of them,
where the next norm waits for them; the output head's winners and logits travel alike. Nobody says
when something has come: words that are awaited hold ABSENT, which no result is, until it has, and
whoever has read them leaves ABSENT again. (So do the low-latency protocols of NCCL and TensorRT.)

What is sent next to the same place must not come before that. Partial sums take turns between two
areas: a rank that sends to one of them has seen what all others sent to the other one, after they
had read this one. Between two uses of the areas of the output head lies a whole pass.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthrus_fast.kernels import norm, products, quantized
from orthrus_fast.kernels.custom import CustomProducts
from orthrus_fast.kernels.interface import Weight, fitting
from orthrus_fast.kernels.norm import await_words
from orthrus_fast.kernels.overlap import overlaps, wait
from orthrus_fast.kernels.products import Room, store_everywhere
from orthrus_fast.kernels.tiles import find_tiles

ABSENT = -1  # as bits of a float a NaN that no arithmetic gives
NAN = 0x7FFF7FFF  # of logits, in 4 bytes as in 2: a GPU's own, but a library may make others
MOST_PARTS = 4  # partial sums of a product, of all ranks
GATHERERS, WORDS = 96, 2048  # programs of a gather, all of which run at once; words that each takes


@dataclass(frozen=True)
class Areas:
    """Where in a buffer each thing has its place: the first word of each, and how many in all."""

    parts: tuple[int, int]
    winners: int
    logits: int
    n_words: int

    @staticmethod
    def of(n_rows: int, n_decoded: int, hidden_size: int, logits_bytes: int, n_ranks: int) -> Areas:
        """For passes of ``n_rows`` and heads of ``n_decoded``, ``logits_bytes`` of each on all."""
        sizes = [MOST_PARTS * n_rows * hidden_size] * 2
        sizes += [2 * n_ranks * n_decoded, n_decoded * logits_bytes // 4]
        begins = [0]
        for size in sizes:
            begins.append(begins[-1] + -(-size // 32) * 32)  # whole cache lines
        return Areas((begins[0], begins[1]), begins[2], begins[3], begins[4])


class Exchange:
    """One rank's part in what ranks send each other.

    ``buffers`` [n_words] int32 are those of all ranks as this one sees them, filled with ABSENT;
    ``broken`` [1] int32 is 0 until nobody shall wait any more.
    """

    def __init__(self, rank: int, buffers: Sequence[Tensor], areas: Areas, broken: Tensor) -> None:
        self.rank, self.buffers, self.areas, self.broken = rank, buffers, areas, broken
        self.n_ranks = len(buffers)
        self._turn = 0  # the area of the next partial sums

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Within, nothing is sent and nobody waits: so kernels can be compiled side by side."""
        real = self.buffers, self.broken, self._turn
        nobody = torch.empty_like(self.buffers[self.rank])
        self.buffers, self.broken = [nobody] * self.n_ranks, torch.ones_like(self.broken)
        try:
            yield
        finally:
            self.buffers, self.broken, self._turn = real

    def _place(self, begin: int, n_words: int, index: int = 0) -> list[Tensor]:
        """The place ``index`` of those of ``n_words`` from ``begin`` on, in each buffer."""
        begin += index * n_words
        return [buffer[begin : begin + n_words] for buffer in self.buffers]

    def _sent(self, begin: int, n_words: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """What all ranks send here, as one; this rank's own in it; and that in others' buffers."""
        everything = self._place(begin, self.n_ranks * n_words)[self.rank]
        places = self._place(begin, n_words, self.rank)
        own = places.pop(self.rank)
        return everything, own, tuple(places)

    def room(self, x: Tensor, n_columns: int, n_partials: int) -> Room:
        """Where the partial sums [P, ..., N] of a product with x [..., K] go, on all ranks."""
        shape = (n_partials, *x.shape[:-1], n_columns)
        n_words = math.prod(shape)
        assert self.n_ranks * n_words <= self.areas.parts[1]
        everything, own, others = self._sent(self.areas.parts[self._turn], n_words)
        partials = everything.view(torch.float32).view(-1, *shape[1:])
        return Room(partials, own.view(torch.float32), tuple(o.view(torch.float32) for o in others))

    def add_norm(
        self,
        x: Tensor,
        partials: Tensor,
        weight: Tensor,
        eps: float,
        prefetch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``interface.AddNorm``; waits for the partial sums of a product that has had room."""
        if len(partials) == 1:  # before the first layer
            return norm.add_norm(x, partials, weight, eps, prefetch)
        self._turn = 1 - self._turn
        return norm.launch(x, partials, weight, eps, prefetch, self.broken)

    def join_argmax(
        self, tile_max: Tensor, tile_argmax: Tensor, ids: Tensor, overlap: bool, n_columns: int
    ) -> None:
        """As ``products.join_argmax``, over all ranks, of ``n_columns`` logits each."""
        n_rows, n_tiles = tile_max.shape
        everything, _, others = self._sent(self.areas.winners, 2 * n_rows)
        start: Any = _join_argmax_kernel[(n_rows,)]
        block = triton.next_power_of_2(n_tiles)
        start(
            *(tile_max, tile_argmax, everything, others, self.broken, ids, n_rows, n_tiles),
            *(self.rank * n_columns, self.rank, self.n_ranks, block, overlap),
            num_warps=1,  # more would not agree on when to stop waiting
            launch_pdl=overlap,
        )

    def gather(self, logits: Tensor) -> Tensor:
        """This rank's logits [..., V / n_ranks] -> those of all [..., V]."""
        n_columns = logits.shape[-1] * logits.itemsize // 4
        words = logits.view(torch.int32).view(-1, n_columns)
        everything, own, others = self._sent(self.areas.logits, words.numel())
        assert self.areas.logits + everything.numel() <= self.areas.n_words
        out = words.new_empty(len(words), self.n_ranks * n_columns)
        overlap = overlaps(logits.device)
        start: Any = _gather_kernel[(min(GATHERERS, triton.cdiv(words.numel(), WORDS)),)]
        start(
            *(words, everything, own, others, self.broken, out, words.numel(), n_columns),
            *(NAN, self.n_ranks, WORDS, overlap),
            num_warps=8,
            launch_pdl=overlap,
        )
        return out.view(logits.dtype).view(*logits.shape[:-1], -1)


@triton.jit(do_not_specialize=["n_rows", "first_id", "rank"])
def _join_argmax_kernel(  # type: ignore[no-untyped-def]
    tile_max, tile_argmax, winners, others, broken, out, n_rows, N_TILES: tl.constexpr,
    first_id, rank, N_RANKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row: the id of the greatest of all ranks' tiles, the lowest id where several tie.

    A rank sends its greatest and that one's id, two words.
    """
    wait(OVERLAP)
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    at = row.to(tl.int64) * N_TILES
    value = tl.load(tile_max + at + tile, mask=tile < N_TILES, other=-float("inf"))
    greatest, winner = tl.max(value, 0), tl.argmax(value, 0)
    own_id = tl.load(tile_argmax + at + winner) + first_id
    word = tl.arange(0, 2)
    pair = tl.where(word == 0, greatest.to(tl.int32, bitcast=True), own_id)
    place = (rank * n_rows + row) * 2 + word
    for other in tl.static_range(len(others)):
        # That rank's own place lies in its buffer, where this rank's does here.
        tl.store(others[other] + row * 2 + word, pair)
    tl.store(winners + place, pair)
    of_rank = winners + (tl.arange(0, N_RANKS) * n_rows + row) * 2
    value = await_words(of_rank, N_RANKS > 0, broken).to(tl.float32, bitcast=True)
    ids = await_words(of_rank + 1, N_RANKS > 0, broken)
    tl.debug_barrier()
    tl.store(of_rank, -1)
    tl.store(of_rank + 1, -1)
    greatest = tl.max(value, 0)
    tl.store(out + row, tl.min(tl.where(value == greatest, ids, 2147483647), 0).to(tl.int64))


@triton.jit(do_not_specialize=["n_words"])
def _gather_kernel(  # type: ignore[no-untyped-def]
    words, everything, own, others, broken, out, n_words, n_columns,
    NAN: tl.constexpr, N_RANKS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Send this rank's words to all, then lay the rows of all ranks beside each other."""
    wait(OVERLAP)
    first, stride = tl.program_id(0) * BLOCK, tl.num_programs(0) * BLOCK
    for begin in range(first, n_words, stride):
        at = begin + tl.arange(0, BLOCK)
        sent = tl.load(words + at, mask=at < n_words)
        sent = tl.where(sent == -1, NAN, sent)
        store_everywhere(own, others, at, sent, at < n_words)
    for begin in range(first, n_words, stride):
        at = begin + tl.arange(0, BLOCK)
        row, column = at // n_columns, at % n_columns
        target = row.to(tl.int64) * (N_RANKS * n_columns) + column
        for rank in tl.static_range(N_RANKS):
            of_rank = everything + rank * n_words + at
            came = await_words(of_rank, at < n_words, broken)
            tl.store(out + target + rank * n_columns, came, mask=at < n_words)
            tl.debug_barrier()
            tl.store(of_rank, -1, mask=at < n_words)


class SharedProducts(CustomProducts):
    """The products of a rank: what is summed, or chosen, over all ranks goes to all of them."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        weight = fitting(weight, x.numel() // x.shape[-1])
        room = self.exchange.room if weight.n_ranks > 1 else products.empty_room
        if weight.format:
            return quantized.launch(x, weight, room=room)[0]
        tiles = find_tiles(x, weight.weight)
        return products.launch(x, weight.weight, weight.split, tiles, room=room)[0]

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        weight = fitting(weight, x.numel() // x.shape[-1])
        end = "both" if return_logits else "ids"

        def join(tile_max: Tensor, tile_argmax: Tensor, ids: Tensor, overlap: bool) -> None:
            n_columns = len(weight.weight)
            self.exchange.join_argmax(tile_max, tile_argmax, ids, overlap, n_columns)

        if weight.format:
            partials, ids = quantized.launch(x, weight, end, join=join)
        else:
            tiles = find_tiles(x, weight.weight)
            how: dict[str, Any] = {"argmax": end, "join": join}
            partials, ids = products.launch(x, weight.weight, 0, tiles, **how)
        return ids, self.exchange.gather(partials[0]) if return_logits else partials[0]
