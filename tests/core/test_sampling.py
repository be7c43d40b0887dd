"""The noise, the filters, the choice and its distribution, and the settings that are refused.

Statistical tests have fixed seeds: they pass or fail the same way every time. Each states the level
at which it would have refused a true hypothesis.
"""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from orthrus_fast.errors import RequestError
from orthrus_fast.kernels import plain_sampling
from orthrus_fast.kernels.plain_sampling import choose, gumbel, keep, philox, sample
from orthrus_fast.sampling import SamplingParams, Settings
from tests.judge import judged, judged_filters, judged_noise, judged_philox, sampled
from tests.marks import slow_but

CPU = torch.device("cpu")
LEVEL = 1e-4  # of every chi-squared test below

# Random123's kat_vectors: counter, key, output.
KNOWN_ANSWERS = [
    "00000000 00000000 00000000 00000000 00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1",
]

# Each filter alone, two, and all, at temperatures below and above 1.
FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 0.6, "top_p": 0.8},
    {"temperature": 1.7, "top_p": 0.8},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 1.7, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 7, "top_p": 0.7},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
]


def settings_of(*params: SamplingParams) -> Settings:
    settings = Settings.create(len(params), CPU)
    for slot, one in enumerate(params):
        settings.put(slot, one)
    return settings


def random_logits(seed: int, *shape: int, scale: float = 2.5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def chi_squared(counts: Tensor, expected: Tensor) -> float:
    """The p-value of ``counts`` under ``expected``, cells that expect less than 5 as one."""
    small = expected < 5
    counts = torch.cat((counts[~small].double(), counts[small].sum()[None].double()))
    expected = torch.cat((expected[~small].double(), expected[small].sum()[None].double()))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    half_of_freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_of_freedom, statistic / 2))


def test_chi_squared_is_the_textbooks() -> None:
    # 5 cells, 4 degrees of freedom: 9.488 is the 5% point.
    expected = torch.full((5,), 100.0)
    offset = math.sqrt(9.488 * 100 / 2)
    counts = expected + torch.tensor([offset, -offset, 0, 0, 0])
    assert chi_squared(counts, expected) == pytest.approx(0.05, abs=1e-4)


# --- the noise ---


@pytest.mark.parametrize("line", KNOWN_ANSWERS)
def test_philox_gives_the_published_words(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    a, b, c, d, k, l = (torch.tensor([word]) for word in words[:6])  # noqa: E741
    assert [int(word) for word in philox((a, b, c, d), (k, l))] == words[6:]
    assert list(judged_philox(tuple(words[:4]), tuple(words[4:6]))) == words[6:]


@pytest.mark.parametrize("vocab_size", [1, 4, 515])
def test_the_noise_is_the_judges(vocab_size: int) -> None:
    seeds = [0, 1, 2**31, 2**32 + 7, 2**63, 2**64 - 1]
    settings = settings_of(*(SamplingParams(1.0, seed=seed) for seed in seeds))
    positions = torch.tensor([[0, 1, 131_071, 2**32 - 1]] * len(seeds))
    noise = gumbel(settings.seed, positions, vocab_size)
    expected = [[judged_noise(s, p, vocab_size) for p in positions[0].tolist()] for s in seeds]
    torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_the_noise_is_finite_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [torch.tensor([[[word]]]) for word in (0, 2**9 - 1, 2**32 - 1, 2**32 - 2**9)]
    monkeypatch.setattr(plain_sampling, "philox", lambda counter, key: ends)
    noise = gumbel(torch.zeros(1).long(), torch.zeros(1, 1).long(), 4).flatten()
    low = -math.log(24 * math.log(2))
    high = 24 * math.log(2)  # -log(1 - 2**-24) is 2**-24
    assert noise.tolist() == pytest.approx([low, low, high, high], rel=1e-6)


def test_the_noise_is_finite_where_a_log_is_poor(monkeypatch: pytest.MonkeyPatch) -> None:
    log = torch.log
    monkeypatch.setattr(torch, "log", lambda x: torch.where(x > 1 - 1e-6, 0.0, log(x)))
    assert gumbel(torch.zeros(1).long(), torch.arange(40)[None], 100_000).max() < 16.7


@functools.cache
def uniforms() -> Tensor:
    """Uniform variates [seed, position, token] behind the noise: 8 × 64 × 2048."""
    seeds = torch.arange(8) * 3 + 2**40
    positions = torch.arange(1000, 1064).expand(8, 64)
    return torch.exp(-torch.exp(-gumbel(seeds, positions, 2048).double()))


def test_the_noise_is_uniform() -> None:
    u = uniforms()
    for n_cells in (10, 1000):
        counts = (u * n_cells).long().clamp(max=n_cells - 1).flatten().bincount(minlength=n_cells)
        assert chi_squared(counts, torch.full((n_cells,), u.numel() / n_cells)) > LEVEL
    # The tail decides tokens: the top 2**-14 of it, 64 expected.
    n_high = int((u > 1 - 2.0**-14).sum())
    assert abs(n_high - 64) < 4 * 8


@pytest.mark.parametrize("axis", ["seed", "position", "token"])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_the_noise_is_independent(axis: str, step: int) -> None:
    """Pairs of neighbours along an axis, in a table of 32 × 32 cells; and their correlation."""
    u = uniforms()
    dim = ("seed", "position", "token").index(axis)
    size = u.shape[dim] - step
    here, there = u.narrow(dim, 0, size).flatten(), u.narrow(dim, step, size).flatten()
    cells = (here * 32).long() * 32 + (there * 32).long()
    counts = cells.bincount(minlength=1024)
    assert chi_squared(counts, torch.full((1024,), len(cells) / 1024)) > LEVEL
    correlation = float(torch.corrcoef(torch.stack((here, there)))[0, 1])
    assert abs(correlation) < 4 / math.sqrt(len(cells))


def test_every_bit_of_the_seed_and_of_the_position_counts() -> None:
    seeds = [0] + [2**bit for bit in range(64)]
    settings = settings_of(*(SamplingParams(1.0, seed=seed) for seed in seeds))
    by_seed = gumbel(settings.seed, torch.full((len(seeds), 1), 9), 8)
    by_position = gumbel(settings.seed[:1], torch.tensor([[0] + [2**bit for bit in range(32)]]), 8)
    assert by_seed.unique().numel() == by_seed.numel()
    assert by_position.unique().numel() == by_position.numel()


# --- the filters ---


def by_transformers(logits: Tensor, params: SamplingParams) -> Tensor:
    """What transformers' processors keep of logits [N, V]: bool [N, V]."""
    from transformers.generation import logits_process

    ids = torch.zeros(len(logits), 1, dtype=torch.int64)
    scores = logits_process.TemperatureLogitsWarper(params.temperature)(ids, logits)
    if params.top_k is not None:
        scores = logits_process.TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p is not None:
        scores = logits_process.TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p is not None:
        scores = logits_process.MinPLogitsWarper(params.min_p)(ids, scores)
    kept: Tensor = scores > -math.inf
    return kept


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("vocab_size", [3, 50, 2003])
def test_filters_keep_what_transformers_keeps(fields: dict[str, Any], vocab_size: int) -> None:
    params = SamplingParams(**fields)
    logits = random_logits(vocab_size, 100, vocab_size)
    kept = keep(logits[None], settings_of(params))[0]
    assert torch.equal(kept, by_transformers(logits, params))
    if vocab_size > 3 and len(fields) > 1:
        assert 1 < kept.sum() / 100 < vocab_size  # the case decides something


def test_filters_keep_what_transformers_keeps_of_a_large_vocabulary() -> None:
    logits = random_logits(1, 2, 151_936)
    for fields in (FILTERS[2], FILTERS[7], FILTERS[9], {"temperature": 2.0, "top_p": 0.99}):
        params = SamplingParams(**fields)
        kept = keep(logits[None], settings_of(params))[0]
        # In float64: a float32 running sum over so many tokens is off by more than some of them.
        assert torch.equal(kept, by_transformers(logits.double(), params))


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_filters_keep_what_the_judge_keeps_with_many_ties(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    logits = (random_logits(2, 50, 90) * 2).round() / 2
    kept = keep(logits[None], settings_of(params))[0]
    n_ties = 0
    for row, mask in zip(logits, kept, strict=True):
        expected, margin = judged_filters(row.tolist(), params)
        if margin > 1e-6:
            assert sorted(expected) == mask.nonzero().flatten().tolist()
        n_ties += int(mask.sum()) > (params.top_k or 90)
    assert n_ties > 0 or "top_k" not in fields or "top_p" in fields


def test_a_tie_at_a_threshold_is_kept_whole() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0, 2.0, 2.0, -math.inf, 0.0, -0.0]]])
    for fields, kept in (
        ({"top_k": 2}, [1, 2, 3, 4]),
        ({"top_k": 7}, [0, 1, 2, 3, 4, 6, 7]),  # 0.0 and -0.0 are one value
        ({"top_k": 6}, [0, 1, 2, 3, 4, 6, 7]),
        ({"top_p": 0.5}, [1, 2, 3, 4]),
        ({"min_p": 0.36}, [1, 2, 3, 4]),  # exp(-1) is 0.368
        ({"min_p": 0.37}, [1]),
    ):
        settings = settings_of(SamplingParams(1.0, **fields))  # type: ignore[arg-type]
        assert keep(logits, settings)[0, 0].nonzero().flatten().tolist() == kept, fields


def min_p_thresholds(n: int) -> tuple[list[SamplingParams], Tensor]:
    """Settings, and logits [n, 1, 3]: a best one, the least that min_p keeps, the next below.

    The threshold is worked out in float64 and rounded to float32 once; it is another number where
    each step is rounded.
    """
    draw = random.Random(5)
    params, rows = [], []
    while len(rows) < n:
        values = torch.tensor(
            [draw.uniform(0.3, 3.0), draw.uniform(0.01, 0.9), draw.uniform(-20, 20)],
            dtype=torch.float32,
        )
        temperature, min_p, best = values.tolist()
        least = torch.tensor(best + temperature * math.log(min_p), dtype=torch.float32)
        if least != values[2] + values[0] * values[1].log():
            params.append(SamplingParams(temperature, min_p=min_p))
            below = torch.nextafter(least, torch.tensor(-math.inf))
            rows.append([best, float(least), float(below)])
    return params, torch.tensor(rows)[:, None]


def test_the_threshold_of_min_p_is_rounded_once() -> None:
    params, logits = min_p_thresholds(50)
    expected = torch.tensor([True, True, False]).expand(50, 1, 3)
    assert torch.equal(keep(logits, settings_of(*params)), expected)


def test_the_token_that_reaches_top_p_is_kept() -> None:
    logits = torch.tensor([[[0.5, 0.25, 0.125, 0.125]]]).log()
    for top_p, n_kept in ((0.49, 1), (0.51, 2), (0.74, 2), (0.76, 4), (1.0, 4), (1e-300, 1)):
        settings = settings_of(SamplingParams(1.0, top_p=top_p))
        assert int(keep(logits, settings).sum()) == n_kept
    # After top-k 2, which leaves 2/3 and 1/3.
    for top_p, n_kept in ((0.66, 1), (0.67, 2)):
        settings = settings_of(SamplingParams(1.0, top_k=2, top_p=top_p))
        assert int(keep(logits, settings).sum()) == n_kept


def test_filters_that_are_off_change_nothing() -> None:
    logits = random_logits(3, 4, 5, 77, scale=60)  # most probabilities vanish
    logits[..., 11] = -math.inf
    off = [
        SamplingParams(0.5),
        SamplingParams(0.5, top_k=77),
        SamplingParams(0.5, top_k=2**63 - 1),
        SamplingParams(0.5, top_p=1.0, min_p=0.0),
    ]
    settings = settings_of(*off)
    assert keep(logits, settings).all()
    positions = torch.arange(20).view(4, 5)
    scores = logits + 0.5 * gumbel(settings.seed, positions, 77)
    assert torch.equal(sample(logits, positions, settings), scores.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", FILTERS[1:], ids=str)
def test_half_precision_logits_are_their_float32_values(
    dtype: torch.dtype, fields: dict[str, Any]
) -> None:
    logits = random_logits(4, 1, 60, 301).to(dtype)
    logits[..., 5] = 1e-7  # subnormal in float16
    settings = settings_of(SamplingParams(**fields, seed=5))
    assert torch.equal(keep(logits, settings), keep(logits.float(), settings))
    positions = torch.arange(60)[None]
    expected = sample(logits.float(), positions, settings)
    assert torch.equal(sample(logits, positions, settings), expected)


# --- the choice ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (50, 6, 400), dtype=torch.int64).to(dtype)
    expected = [[row.index(max(row)) for row in block] for block in logits.tolist()]
    assert choose(logits).tolist() == expected


def many_settings(n_slots: int, seed: int) -> list[SamplingParams]:
    """Settings of every kind, greedy among them."""
    draw = random.Random(seed)
    return [
        SamplingParams(
            temperature=draw.choice([0.0, 0.01, 0.3, 0.7, 1.0, 2.5]),
            top_k=draw.choice([None, 1, 2, 13, 50]),
            top_p=draw.choice([None, 0.05, 0.5, 0.9, 0.999]),
            min_p=draw.choice([None, 0.02, 0.3, 1.0]),
            seed=draw.randrange(2**64),
        )
        for _ in range(n_slots)
    ]


def test_tokens_are_the_judges() -> None:
    params = many_settings(250, seed=6)
    logits = random_logits(6, 250, 3, 61)
    positions = torch.randint(0, 131_072, (250, 3), generator=torch.Generator().manual_seed(6))
    tokens = sample(logits, positions, settings_of(*params))
    n_near = n_not_greedy = 0
    for slot, one in enumerate(params):
        for row in range(3):
            assert one.seed is not None
            place = (logits[slot, row].double(), one.seed, int(positions[slot, row]), one)
            expected, margin = judged(*place)
            assert expected == sampled(*place)
            n_near += margin < 1e-5
            n_not_greedy += expected != int(logits[slot, row].argmax())
            assert int(tokens[slot, row]) == expected or margin < 1e-5
    assert n_near < 40  # most of them min_p 1, whose threshold is the best logit itself
    assert n_not_greedy > 75


def test_a_slot_does_not_see_its_neighbours_nor_a_row_the_others() -> None:
    params = many_settings(24, seed=7)
    settings = settings_of(*params)
    logits = random_logits(7, 24, 6, 509)
    positions = torch.randint(0, 9999, (24, 6), generator=torch.Generator().manual_seed(7))
    kept, tokens = keep(logits, settings), sample(logits, positions, settings)
    noise = gumbel(settings.seed, positions, 509)
    for slot in range(24):
        own = settings.of(torch.tensor([slot]))
        assert all(torch.equal(a, b) for a, b in zip(own, settings_of(params[slot]), strict=True))
        for rows in (slice(0, 6), slice(2, 3), slice(3, 6)):
            part, place = logits[slot, None, rows], positions[slot, None, rows]
            assert torch.equal(keep(part, own), kept[slot, None, rows])
            assert torch.equal(gumbel(own.seed, place, 509), noise[slot, None, rows])
            assert torch.equal(sample(part, place, own), tokens[slot, None, rows])
    order = torch.randperm(24, generator=torch.Generator().manual_seed(8))
    assert torch.equal(sample(logits[order], positions[order], settings.of(order)), tokens[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_0_is_greedy_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    logits = torch.randint(-3, 4, (6, 40, 200), generator=generator).to(dtype)  # ties galore
    if dtype == torch.float64:
        logits += torch.rand(6, 40, 200, generator=generator, dtype=dtype) * 1e-12
    logits[3] = -math.inf
    logits[4, :, 7:] = -math.inf
    params = [SamplingParams(0.0, top_k=3, top_p=0.2, min_p=0.5, seed=slot) for slot in range(6)]
    params[1] = SamplingParams(1.0, seed=8)
    positions = torch.arange(40).expand(6, 40)
    tokens = sample(logits, positions, settings_of(*params))
    greedy = [0, 2, 3, 4, 5]
    assert torch.equal(tokens[greedy], choose(logits)[greedy])
    assert not torch.equal(tokens[1], choose(logits)[1])


def test_infinite_logits_and_extreme_temperatures() -> None:
    logits = random_logits(10, 1, 200, 50)
    logits[..., ::2] = -math.inf
    positions = torch.arange(200)[None]
    for temperature in (1e-45, 1e-30, 0.5, 1e4, 1e30):
        for fields in ({}, {"top_k": 30, "top_p": 0.9, "min_p": 0.001}):
            settings = settings_of(SamplingParams(temperature, seed=1, **fields))  # type: ignore[arg-type]
            tokens = sample(logits, positions, settings)
            assert (tokens % 2 == 1).all()
            if temperature < 1e-20:
                assert torch.equal(tokens, choose(logits))
            if temperature > 1:
                assert tokens.unique().numel() == 25  # near uniform over what there is
    filtered = settings_of(SamplingParams(0.7, top_k=3, top_p=0.5, min_p=0.3, seed=1))
    logits[..., 9] = math.inf
    for settings in (filtered, settings_of(SamplingParams(0.7, seed=1))):
        assert (sample(logits, positions, settings) == 9).all()
        assert (sample(torch.full_like(logits, -math.inf), positions, settings) == 0).all()
    for row in (logits, torch.full_like(logits, -math.inf)):
        best = row.amax(-1, keepdim=True)
        mass = plain_sampling._mass(row, best, torch.ones(1, 1, 1))
        assert (mass[row == best] == 2**56).all() and (mass[row != best] == 0).all()


@pytest.mark.slow
def test_compiled_code_chooses_the_same_tokens() -> None:
    """In float32 a last bit of a logarithm may turn a near-tie; here none does."""
    compiled = torch.compile(sample, fullgraph=True, dynamic=False)
    params = many_settings(16, seed=11)
    settings = settings_of(*params)
    for call in range(4):
        logits = random_logits(12 + call, 16, 64, 97)
        positions = torch.arange(call * 64, call * 64 + 64).expand(16, 64)
        tokens = compiled(logits, positions, settings)
        assert torch.equal(tokens, sample(logits, positions, settings))


@pytest.mark.parametrize("fields", slow_but(FILTERS[::3], FILTERS), ids=str)
def test_tokens_follow_the_softmax_of_the_filtered_logits(fields: dict[str, Any]) -> None:
    """Counts over 40 seeds × 1000 positions, at the level of 1e-4."""
    params = SamplingParams(**fields)
    logits = random_logits(13, 30, scale=1.5)
    logits[17] = logits[4]  # a tie among the likely ones
    kept, _ = judged_filters(logits.tolist(), params)
    weights = torch.zeros(30, dtype=torch.float64)
    weights[kept] = (logits[kept].double() / params.temperature).softmax(0)
    settings = settings_of(*(SamplingParams(**fields, seed=77 * n) for n in range(40)))
    positions = torch.arange(1000).expand(40, 1000)
    tokens = sample(logits.expand(40, 1000, 30), positions, settings)
    counts = tokens.flatten().bincount(minlength=30)
    assert counts[weights == 0].sum() == 0
    assert chi_squared(counts, weights * 40_000) > LEVEL


def test_logprobs_are_of_the_model_itself() -> None:
    logits = random_logits(14, 3, 4, 1000, scale=8)
    tokens = torch.randint(0, 1000, (3, 4), generator=torch.Generator().manual_seed(14))
    expected = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    got = plain_sampling.logprobs(logits, tokens)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)
    half = plain_sampling.logprobs(logits.bfloat16(), tokens)
    assert torch.equal(half, plain_sampling.logprobs(logits.bfloat16().float(), tokens))


# --- the settings ---


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature", [-0.1, math.nan, math.inf, 1e31, True, "1", None, 10**400]),
        ("top_k", [-2, 1.5, 0.0, False, 20.0, True, "2", 2**63]),
        ("top_p", [0, -0.5, 1.01, math.nan, True, "0.9"]),
        ("min_p", [-0.01, 1.01, math.nan, False, "0"]),
        ("seed", [-1, 2**64, 1.0, True, "7"]),
        ("stop", ["", ["x", ""], ("",), (1,), [1], {"x"}, 1, None]),
        ("logprobs", [1, None, "yes"]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(RequestError, match=f"^sampling: {name}=") as refusal:
            SamplingParams(**{name: value})
        assert "\n" not in str(refusal.value)


def test_settings_at_the_ends_of_their_ranges() -> None:
    SamplingParams(0, 1, 1, 0, 0, (), False)
    SamplingParams(1e30, 2**63 - 1, 1e-300, 1, 2**64 - 1, ("x", "\n"), True)


def test_settings_spelled_in_other_ways() -> None:
    assert SamplingParams(top_k=0) == SamplingParams(top_k=-1) == SamplingParams()
    one, two = SamplingParams(stop="ab"), SamplingParams(stop=["ab", "c"])
    assert (one, two) == (SamplingParams(stop=("ab",)), SamplingParams(stop=("ab", "c")))
    assert len({one, two, SamplingParams(stop="ab"), SamplingParams(stop=[])}) == 3


def test_settings_of_the_checkpoint() -> None:
    qwen = {"do_sample": True, "temperature": 0.6, "top_k": 20.0, "top_p": 0.95, "eos": 3}
    params = SamplingParams.from_checkpoint(seed=4, logprobs=True)
    assert params.resolved(qwen) == SamplingParams(0.6, 20, 0.95, seed=4, logprobs=True)
    params = SamplingParams.from_checkpoint(top_k=None, temperature=0.0)
    assert params.resolved(qwen) == SamplingParams(0.0, None, 0.95)
    everything = SamplingParams.from_checkpoint()
    assert everything.resolved({}) == SamplingParams()
    assert everything.resolved({"do_sample": True}) == SamplingParams(1.0)
    assert everything.resolved({"temperature": 0.5, "top_k": 0}) == SamplingParams(0.5)
    assert everything.resolved({"do_sample": False, "temperature": 0.5}) == SamplingParams()
    assert SamplingParams(0.3).resolved(qwen) == SamplingParams(0.3)
    assert everything.resolved({"top_k": -1.0, "top_p": 1.0}) == SamplingParams(top_p=1.0)
    for name, value in (("top_p", 2), ("top_k", 20.5), ("temperature", "hot")):
        with pytest.raises(RequestError, match=f"{name}={value!r}"):
            everything.resolved({name: value})
    with pytest.raises(RequestError, match="'topk' is not one of temperature, top_k"):
        SamplingParams.from_checkpoint(topk=3)


def test_settings_reach_their_slot_alone() -> None:
    settings = Settings.create(3, CPU)
    before = [values.clone() for values in settings]
    settings.put(1, SamplingParams(0.5, 7, 0.25, 0.125, 2**64 - 2))
    assert [values[1].item() for values in settings] == [0.5, 7, 0.25, 0.125, -2]
    for values, old in zip(settings, before, strict=True):
        assert torch.equal(values[[0, 2]], old[[0, 2]])
    settings.put(1, SamplingParams())
    assert all(torch.equal(a, b) for a, b in zip(settings, before, strict=True))
