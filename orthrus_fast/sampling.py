"""Logits to tokens: the settings of a request, its noise, its filters, and the rule for ties.

A token is ``argmax(logits + temperature · gumbel(seed, position, token))`` over the candidates that
top-k, top-p and min-p keep (the Gumbel-max trick: Gumbel 1954; Maddison et al., "A* Sampling",
2014), which draws from the softmax of ``logits / temperature`` over those candidates. The noise
belongs to the position: no generator, no state, so any mode, width or slot draws the same.

Shapes: B slots, T rows, V vocabulary. Everything is a function of tensors that reads nothing on the
host. A row's token depends on that row and its slot's settings alone: the sums are of integers, all
else goes element by element. Equality holds within one configuration: exp and log differ in
their last bits between devices, and between eager and compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from orthrus_fast.errors import RequestError

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10

MINUS_INFINITY_RANK = 0x007FFFFF  # below it and above +inf lie the NaNs

_MAX_TEMPERATURE = 1e30  # temperature times noise stays finite in float32
_CHECKPOINT_DECIDES = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen; greedy by default. Raises RequestError naming the field.

    ``temperature`` 0 is greedy, whatever the filters. The filters act in this order: ``top_k``
    keeps the k highest logits; ``top_p`` the fewest highest whose probability, among those, reaches
    p; ``min_p`` those at least that fraction as probable as the best. Ties at a threshold are all
    kept; None is off. ``seed`` (0 … 2**64 - 1) keys the noise; None draws one. Text ends before
    the first of the ``stop`` strings. ``logprobs`` asks for each token's log-probability under the
    model itself, before temperature and filters.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    _of_checkpoint: tuple[str, ...] = field(default=(), repr=False)  # fields yet to be resolved

    def __post_init__(self) -> None:
        temperature, top_p, min_p = self.temperature, self.top_p, self.min_p
        if not _is_number(temperature) or not 0 <= temperature <= _MAX_TEMPERATURE:
            self._refuse("temperature", f"a number from 0 to {_MAX_TEMPERATURE:g}")
        if self.top_k is not None and not (is_integer(self.top_k) and 1 <= self.top_k < 2**63):
            self._refuse("top_k", "None or an integer of at least 1")
        if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
            self._refuse("top_p", "None or a number above 0 and at most 1")
        if min_p is not None and not (_is_number(min_p) and 0 <= min_p <= 1):
            self._refuse("min_p", "None or a number from 0 to 1")
        if self.seed is not None and not (is_integer(self.seed) and 0 <= self.seed < 2**64):
            self._refuse("seed", "None or an integer from 0 to 2**64 - 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            self._refuse("stop", "a tuple of non-empty strings")
        if not isinstance(self.logprobs, bool):
            self._refuse("logprobs", "True or False")

    def _refuse(self, name: str, wanted: str) -> None:
        raise RequestError(f"sampling: {name}={getattr(self, name)!r} is not {wanted}")

    @classmethod
    def from_checkpoint(cls, **overrides: Any) -> SamplingParams:
        """The checkpoint's own temperature and filters, but for ``overrides``.

        They are known once a decoder has ``resolved`` them. Raises RequestError.
        """
        known = [f.name for f in fields(cls) if not f.name.startswith("_")]
        for name in overrides:
            if name not in known:
                raise RequestError(f"sampling: {name!r} is not one of {', '.join(known)}")
        undecided = tuple(name for name in _CHECKPOINT_DECIDES if name not in overrides)
        return cls(**overrides, _of_checkpoint=undecided)

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These settings with what ``from_checkpoint`` left open taken from ``defaults``.

        ``defaults`` holds generation_config.json's fields. ``do_sample`` false is greedy, true
        without a temperature is temperature 1; without ``do_sample``, a temperature decides. A
        filter that is absent, or spelled as off (top_k 0 or -1), is off. Raises RequestError for a
        value out of range.
        """
        values: dict[str, Any] = {name: defaults.get(name) for name in _CHECKPOINT_DECIDES}
        if not defaults.get("do_sample", values["temperature"] is not None):
            values["temperature"] = 0.0
        elif values["temperature"] is None:
            values["temperature"] = 1.0
        top_k = values["top_k"]
        if _is_number(top_k) and top_k <= 0:
            values["top_k"] = None
        elif isinstance(top_k, float) and top_k.is_integer():  # the config's parser made it one
            values["top_k"] = int(top_k)
        chosen: dict[str, Any] = {name: values[name] for name in self._of_checkpoint}
        return replace(self, **chosen, _of_checkpoint=())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


class Settings(NamedTuple):
    """Sampling settings on the device, one value a slot, so that a change recaptures nothing."""

    temperature: Tensor  # [B] float32: 0 is greedy
    top_k: Tensor  # [B] int64: 0 is off
    top_p: Tensor  # [B] float32: 1 is off
    min_p: Tensor  # [B] float32: 0 is off
    seed: Tensor  # [B] int64: the 64 bits of the key, in two's complement

    @staticmethod
    def create(n_slots: int, device: torch.device) -> Settings:
        """Every slot greedy, its filters off."""
        return Settings(
            temperature=torch.zeros(n_slots, device=device, dtype=torch.float32),
            top_k=torch.zeros(n_slots, device=device, dtype=torch.int64),
            top_p=torch.ones(n_slots, device=device, dtype=torch.float32),
            min_p=torch.zeros(n_slots, device=device, dtype=torch.float32),
            seed=torch.zeros(n_slots, device=device, dtype=torch.int64),
        )

    def put(self, slot: int, params: SamplingParams) -> None:
        """Give ``slot`` the settings of a request, in place; a seed of None counts as 0."""
        assert not params._of_checkpoint  # resolved
        seed = params.seed or 0
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k or 0
        self.top_p[slot] = 1.0 if params.top_p is None else params.top_p
        self.min_p[slot] = params.min_p or 0.0
        self.seed[slot] = seed - 2**64 if seed >= 2**63 else seed

    def of(self, slot: Tensor) -> Settings:
        """The settings of ``slot`` [R] int64, [R] each."""
        return Settings(*(values[slot] for values in self))


def choose(logits: Tensor) -> Tensor:
    """logits [..., V] -> token ids [...]: the greatest logit, the lowest id where several tie."""
    return logits.argmax(dim=-1)


def sample(logits: Tensor, position: Tensor, settings: Settings) -> Tensor:
    """logits [B, T, V], position [B, T] -> token ids [B, T] int64.

    ``position`` is the absolute position of the sampled token itself, one past that of the row that
    predicts it. Arithmetic is in float32 whatever the logits' dtype; handing over bfloat16 logits
    as they are halves the cost of the filters. A slot with temperature 0 gets exactly
    ``choose(logits)``. A logit of -inf is never chosen beside a finite one. On a GPU kernels do it:
    torch.compile's own code for it does not compile there.
    """
    if logits.is_cuda:
        from orthrus_fast.kernels.sample import sample_op

        if logits.dtype != torch.float64:
            chosen: Tensor = sample_op(logits, position, *settings)
            return chosen
        chosen = sample_op(logits.float(), position, *settings)
        return torch.where(settings.temperature[:, None] > 0, chosen, choose(logits))
    noise = gumbel(settings.seed, position, logits.shape[-1])
    scores = logits.float() + settings.temperature[:, None, None] * noise
    scores = torch.where(keep(logits, settings), scores, -math.inf)
    sampled = choose(scores)
    return torch.where(settings.temperature[:, None] > 0, sampled, choose(logits))


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """logits [..., V], tokens [...] -> float32 [...]: the tokens' log-probabilities.

    Under the model itself: before temperature and filters.
    """
    logits = logits.float()
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen - logits.logsumexp(dim=-1)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """seed [B] int64, position [B, T] -> noise [B, T, V] float32: standard Gumbel, -2.9 … 16.7.

    Philox with the seed as its key (low word, high word) and the counter (token id // 4, position,
    0, 0); token i takes lane i mod 4, so four tokens share one evaluation. The lane's top 23 bits
    plus one half, over 2**23, are a float32 exactly, strictly between 0 and 1; the variate is
    -log(-log(u)), rounded to float32 at each logarithm.
    """
    group = torch.arange(-(-vocab_size // 4), device=position.device)
    place = position.long()[:, :, None]
    zero = torch.zeros_like(place)
    key = (seed[:, None, None] & _WORD, (seed[:, None, None] >> 32) & _WORD)
    words = philox((group, place, zero, zero), key)
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
    top_k, top_p, min_p = (
        value[:, None, None] for value in (settings.top_k, settings.top_p, settings.min_p)
    )
    temperature = settings.temperature[:, None, None]
    temperature = torch.where(temperature > 0, temperature, 1.0)  # greedy slots: anything finite
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)

    count = torch.where(top_k > 0, top_k, vocab_size)  # above V it is never reached: -inf
    kth = _threshold(logits, None, count.expand_as(best), n_bits)

    mass = _mass(logits, best, temperature)
    total = _held(logits >= kth, mass)
    need = (top_p.double() * total.double()).clamp(min=1)  # top_p may be 0 once it is a float32
    nucleus = _threshold(logits, mass, need, n_bits)
    nucleus = torch.where(top_p < 1, nucleus, -math.inf)

    floor = (best.double() + temperature.double() * min_p.double().log()).float()
    floor = torch.where(min_p > 0, floor, -math.inf)
    return logits >= torch.maximum(torch.maximum(kth, nucleus), floor)  # none is above the best


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
        held = _held(logits >= _float_of_rank(rank + (1 << shift)), mass)
        rank = rank + ((held >= need).long() << shift)
    return _float_of_rank(rank)


def _held(above: Tensor, mass: Tensor | None) -> Tensor:
    """The mass [B, T, 1] of the tokens of ``above`` [B, T, V] bool, int64; without one, int32."""
    if mass is None:
        return above.sum(dim=-1, keepdim=True, dtype=torch.int32)
    return (mass & -above.long()).sum(dim=-1, keepdim=True)  # on a CPU a tenth of where's time


def _float_of_rank(rank: Tensor) -> Tensor:
    """rank int64, 0 … 2**32 - 1 -> the float32 of that rank; NaN above +inf, -inf below -inf.

    Floats of one sign are ordered as their bits are; the negative ones run backwards.
    """
    key = rank.clamp(min=MINUS_INFINITY_RANK) - 2**31
    return torch.where(key < 0, key ^ 0x7FFFFFFF, key).to(torch.int32).view(torch.float32)
