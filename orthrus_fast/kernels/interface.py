"""What of a pass has more than one implementation: the signatures, and ``Kernels``, one of each.

Shapes: B slots, R sequences of a pass, T rows of each, S cache rows, D head_dim, P partials, V
vocabulary. ``prefetch``, wherever it stands, is the weight that will be read next: a kernel may ask
the memory for its beginning while it leaves the memory idle. It never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from orthrus_fast.sampling import Settings


class Weight(Protocol):
    """A weight [N, K] of products with it.

    As it stands where ``format`` is empty. Else ``weight`` has fewer bits, which ``formats`` lays
    out, ``scale`` [N] a float32 for each row and ``group_scale`` a small number for each group of
    columns, where the format has groups. ``split`` columns of K are summed at once (``k_split``).
    Where ``n_ranks`` share K, each has a weight of its own.
    ``whole`` is the weight before it had fewer bits, where somebody else keeps that anyway.
    """

    @property
    def weight(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def group_scale(self) -> Tensor | None: ...
    @property
    def n_inputs(self) -> int: ...
    @property
    def split(self) -> int: ...
    @property
    def n_ranks(self) -> int: ...
    @property
    def format(self) -> str: ...
    @property
    def whole(self) -> Weight | None: ...


MOST_ROWS = 128  # of x for which fewer bits are faster: each tile of rows unpacks them anew


def fitting(weight: Weight, n_rows: int) -> Weight:
    """The weight to multiply so many rows with: itself, or what it was before it had fewer bits."""
    return weight if weight.whole is None or n_rows <= MOST_ROWS else weight.whole


class Attend(Protocol):
    """Attention of a short block of rows over the cache, which already holds the block's K and V.

    ``q`` [R, T, n_heads, D]: row t of r sits at position ``start[r] + t`` of ``slot[r]``.
    ``k_cache``, ``v_cache`` [B, n_kv_heads, S, D]; ``start``, ``slot`` [R]. Causal rows see the
    positions up to their own (the autoregressive view); otherwise every row sees all ``start[r] +
    T`` (the draft view). Returns [R, T, n_heads, D], contiguous. The bits of a causal row depend on
    that row's query and on the K and V it sees alone.
    """

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        prefetch: Tensor | None = None,
        *,
        causal: bool,
    ) -> Tensor: ...


class QkNormRopeWrite(Protocol):
    """What follows the qkv product: q is returned, k and v go to the cache.

    ``partials`` [P, R, T, (n_heads + 2 n_kv_heads) · D] hold the q heads, then the k, then the v
    heads. q and k are normed by ``q_norm`` and ``k_norm`` [D] and rotated by ``cos`` and ``sin``
    [R, T, D]; k and v are written to ``k_cache`` and ``v_cache`` [B, n_kv_heads, S, D] at
    ``positions`` [R, T] of ``slot`` [R], with 0 for what has overflowed. Returns q [R, T, n_heads,
    D].
    """

    def __call__(
        self,
        partials: Tensor,
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


class AddNorm(Protocol):
    """Adds the ``partials`` [P, …, hidden_size] to the residual stream x [..., hidden_size].

    Returns the sum and its RMS norm (arXiv 1910.07467), both [..., hidden_size].
    """

    def __call__(
        self,
        x: Tensor,
        partials: Tensor,
        weight: Tensor,
        eps: float,
        prefetch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...


LARGEST_STEP = 256  # columns of K that a tile of a product takes at once, at most


def k_split(n_columns: int, n_inner: int) -> int:
    """The columns of K in each partial sum of a product with the whole weight [N, K].

    A row's bits follow from where K is split, and from nothing else of a launch; so this is a
    property of the weight, never of a slice of it, of the number of rows or of the chip. Weights
    that are longer than they are high (o and down) are split in two, of which two GPUs may own one
    each; the longest of few columns in four, since a block of few rows needs the programs. The
    boundaries are multiples of every tile's step.
    """
    step = LARGEST_STEP if n_inner >= 4 * LARGEST_STEP else LARGEST_STEP // 4
    n_partials = 2 if n_columns <= n_inner and n_inner > step else 1
    if n_columns <= 2048 and n_inner >= 4096 and math.ceil(n_inner / step) % 4 == 0:
        n_partials = 4
    return math.ceil(n_inner / (n_partials * step)) * step


class Products(Protocol):
    """The products of x [..., K] and a weight [N, K], each with what follows it.

    A row of a result depends on that row of x alone: not on its neighbours, not on their number.
    """

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        """The product as P partial sums [P, ..., N], for ``AddNorm`` or ``QkNormRopeWrite``.

        P is 1, 2 or 4. Whoever reads them adds them pairwise, neighbours first. They are float32;
        where P is 1 they may be rounded to the model's dtype. An implementation may add them
        itself. Where ranks share K, they are those of all ranks, in their order.
        """
        ...

    def swiglu(self, x: Tensor, weight: Weight, prefetch: Tensor | None = None) -> Tensor:
        """SwiGLU (arXiv 2002.05202) of the product's halves, gate and up: [..., N / 2]."""
        ...

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """Token ids [...] of each row's greatest logit, the lowest at a tie, and logits [..., N].

        A NaN or +inf is greater than all else, so that the chosen logit tells of either.
        Without ``return_logits`` the second value is of no use.
        """
        ...


class Sample(Protocol):
    """Draws a token for each row of ``logits`` [B, T, V] -> token ids [B, T] int64.

    ``position`` [B, T] is the absolute position of the sampled token itself, one past that of the
    row that predicts it. A slot with temperature 0 gets the greatest logit. A row's token depends
    on that row, its position and its slot's settings alone.
    """

    def __call__(self, logits: Tensor, position: Tensor, settings: Settings) -> Tensor: ...


class Logprobs(Protocol):
    """logits [..., V], tokens [...] -> float32 [...]: the tokens' log-probabilities.

    Under the model itself: before temperature and filters. NO_TOKEN's is of no use.
    """

    def __call__(self, logits: Tensor, tokens: Tensor) -> Tensor: ...


class Embed(Protocol):
    """tokens [R, T] from positions ``start`` [R] on -> x [R, T, hidden_size], positions [R, T].

    And the rows [R, T, head_dim] there of the rotary tables ``cos`` and ``sin`` [S, head_dim].
    ``weight`` [V, hidden_size] has the embeddings.
    """

    def __call__(
        self, tokens: Tensor, start: Tensor, weight: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


CommitAccepted = Callable[..., Tensor]  # see ``steps.commit_accepted``


@dataclass(frozen=True)
class Kernels:
    """One implementation of each operation that has several."""

    attend: Attend
    qk_norm_rope_write: QkNormRopeWrite
    add_norm: AddNorm
    products: Products
    sample: Sample
    logprobs: Logprobs
    embed: Embed
    commit_accepted: CommitAccepted | None = None  # None: that of ``steps``
