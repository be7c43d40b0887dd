"""Sampling in plain PyTorch: the reference of ``kernels.sample``, and what runs without a GPU.

A token is ``argmax(logits + temperature · gumbel(seed, position, token))`` over the candidates that
top-k, top-p and min-p keep (the Gumbel-max trick: Gumbel 1954; Maddison et al., "A* Sampling",
2014), which draws from the softmax of ``logits / temperature`` over those candidates. The noise
belongs to the position: no generator, no state, so any mode, width or slot draws the same.

Shapes: B slots, T rows, V vocabulary. A row's token depends on that row and its slot's settings
alone: the sums are of integers. exp and log differ in their last bits between devices, and between
eager and compiled code, so equality holds within one configuration.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthrus_fast.sampling import Settings

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

MINUS_INFINITY_RANK = 0x007FFFFF  # below it and above +inf lie the NaNs


def sample(logits: Tensor, position: Tensor, settings: Settings) -> Tensor:
    """See ``interface.Sample``.

    Arithmetic is in float32 whatever the logits' dtype; handing over bfloat16 logits as they are
    halves the cost of the filters. A logit of -inf is never chosen beside a finite one.
    """
    noise = gumbel(settings.seed, position, logits.shape[-1])
    scores = logits.float() + settings.temperature[:, None, None] * noise
    sampled = choose(torch.where(keep(logits, settings), scores, -math.inf))
    return torch.where(settings.temperature[:, None] > 0, sampled, choose(logits))


def choose(logits: Tensor) -> Tensor:
    """logits [..., V] -> token ids [...]: the greatest logit, the lowest id where several tie.

    A NaN counts as the greatest.
    """
    return logits.argmax(dim=-1)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed [B] int64, position [B, T] -> noise [B, T, V] float32: standard Gumbel, -2.9 … 16.7.

    Philox with the seed as its key (low word, high word) and the counter (token id // 4, position,
    0, 0); token i takes lane i mod 4, so four tokens share one evaluation. The lane's top 23 bits
    plus one half, over 2**23, are a float32 exactly, strictly between 0 and 1; the variate is
    -log(-log(u)), rounded to float32 at each logarithm.
    """
    group = torch.arange(-(-vocab_size // 4), device=position.device)
    at = position.long()[:, :, None]
    zero = torch.zeros_like(at)
    key = (seed[:, None, None] & _WORD, (seed[:, None, None] >> 32) & _WORD)
    words = philox((group, at, zero, zero), key)
    lanes = torch.stack([(word >> 9).float() for word in words], dim=-1)
    uniform = (lanes + 0.5) * 2.0**-23
    # The least value of -log(u) is 2**-24. Where a device's log falls short of that near 1, as far
    # as 0, the noise would be infinite and its token certain.
    noise = -torch.log((-torch.log(uniform)).clamp(min=2.0**-24))
    return noise.flatten(-2)[..., :vocab_size]


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Words are int64 tensors of 0 … 2**32 - 1 that broadcast against each other; so are the four
    that come back. A product of two words may wrap int64; its bits are right all the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        product_0 = c0 * _PHILOX_MULTIPLIERS[0]
        product_1 = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD
        k1 = (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def keep(logits: Tensor, settings: Settings) -> Tensor:
    """logits [B, T, V] -> bool [B, T, V]: the candidates that top-k, top-p and min-p leave.

    Each filter is a threshold on the logits, so equal logits stay or go together, and the best
    always stays:

    - top-k: the k-th highest logit. k above V is off.
    - top-p: the highest logit at and above which the tokens hold top_p of the probability that
      top-k left, at the slot's temperature; on logits without ties, transformers' TopPLogitsWarper.
    - min-p: the logit min_p times as probable as the best; transformers' MinPLogitsWarper.

    Nothing is sorted: two searches over the ordered bits of the logits, ``_threshold``, which are
    exact. Probabilities are float32 relative to the best, made integers in steps of 2**-44 of it
    (V = 151,936), so that their sums are exact in any order; what is rarer weighs nothing and is
    kept only with top-p off.
    """
    n_bits, vocab_size = bits_that_differ(logits.dtype), logits.shape[-1]
    temperature, top_k, top_p, min_p, _ = (setting[:, None, None] for setting in settings)
    temperature = torch.where(temperature > 0, temperature, 1.0)  # greedy slots: anything finite
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)

    count = torch.where(top_k > 0, top_k, vocab_size)  # above V it is never reached: -inf
    kth = _threshold(logits, None, count.expand_as(best), n_bits)

    mass = _mass(logits, best, temperature)
    total = _mass_above(logits >= kth, mass)
    need = (top_p.double() * total.double()).clamp(min=1)  # top_p may be 0 once it is a float32
    nucleus = _threshold(logits, mass, need, n_bits)
    nucleus = torch.where(top_p < 1, nucleus, -math.inf)

    least = (best.double() + temperature.double() * min_p.double().log()).float()
    least = torch.where(min_p > 0, least, -math.inf)
    return logits >= torch.maximum(torch.maximum(kth, nucleus), least)  # none is above the best


def _mass(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """logits [B, T, V] -> int64 [B, T, V]: probability over the best's, in fixed point.

    Equality is asked first, so that an infinite best (of a row of -inf, say) has weight 1, not NaN.
    """
    weight = torch.exp((logits - best) / temperature)
    weight = torch.where(logits == best, 1.0, weight)
    return (weight * mass_scale(logits.shape[-1])).long()


def mass_scale(vocab_size: int) -> float:
    """The fixed-point weight of the best logit: the greatest at which a vocabulary's sum fits."""
    return 2.0 ** (62 - vocab_size.bit_length())


def bits_that_differ(dtype: torch.dtype) -> int:
    """How many leading bits of a float32 tell values apart that came from ``dtype``."""
    return 9 - round(math.log2(torch.finfo(dtype).eps)) if dtype.itemsize < 4 else 32


def _threshold(logits: Tensor, mass: Tensor | None, need: Tensor, n_bits: int) -> Tensor:
    """The highest threshold [B, T, 1] float32 at and above which lies a mass of ``need`` [B, T, 1].

    ``logits`` is [B, T, V] float32, ``mass`` [B, T, V] int64 or None for one each. The search walks
    down the bits of the threshold's rank among all floats, highest first; values that come from a
    16-bit float differ in their first ``n_bits`` already.
    """
    rank = torch.zeros_like(need, dtype=torch.int64)
    for shift in range(31, 31 - n_bits, -1):
        reached = _mass_above(logits >= _float_of_rank(rank + (1 << shift)), mass)
        rank = rank + ((reached >= need).long() << shift)
    return _float_of_rank(rank)


def _mass_above(above: Tensor, mass: Tensor | None) -> Tensor:
    """The mass [B, T, 1] int64 of the tokens of ``above`` [B, T, V] bool; without a mass, int32."""
    if mass is None:
        return above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return (mass & -above.long()).sum(dim=-1, keepdim=True)  # on a CPU a tenth of where's time


def _float_of_rank(rank: Tensor) -> Tensor:
    """rank int64, 0 … 2**32 - 1 -> the float32 of that rank; NaN above +inf, -inf below -inf.

    Floats of one sign are ordered as their bits are; the negative ones run backwards.
    """
    key = rank.clamp(min=MINUS_INFINITY_RANK) - 2**31
    return torch.where(key < 0, key ^ 0x7FFFFFFF, key).to(torch.int32).view(torch.float32)


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """See ``interface.Logprobs``.

    A row's sum has one order. PyTorch's on the CPU may share a sum among its threads, but only
    where it is the only one: so a single row has a copy beside it.
    """
    rows = logits.reshape(-1, logits.shape[-1]).float()
    chosen = rows.gather(-1, tokens.reshape(-1, 1).clamp(min=0))[:, 0]
    if len(rows) == 1:
        rows = rows.expand(2, -1).contiguous()
    return (chosen - rows.logsumexp(dim=-1)[: len(chosen)]).view(tokens.shape)
