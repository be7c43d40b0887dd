"""The sampling kernels: against ``sampling`` in Triton's interpreter; their machine code.

What the filters leave is compared as it is, token by token: a drawn token would tell little of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from orthrus_fast.kernels import plain_sampling
from orthrus_fast.kernels.plain_sampling import keep, sample
from orthrus_fast.sampling import NO_TOKEN, SamplingParams, Settings
from tests.core.test_sampling import min_p_thresholds
from tests.kernel_compile import CHIPS, EVERY_CHIP, compile_for, interpreted, read_before_waiting
from tests.marks import slow_but

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

import triton.language.random

from orthrus_fast.kernels import sample as kernel

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FEW_DTYPES = slow_but([torch.bfloat16, torch.float32], DTYPES)
CPU = torch.device("cpu")
# temperature, top_k, top_p, min_p
GRID = list(itertools.product((1.5,), (None, 1, 5, 40), (None, 0.5, 0.95), (None, 0.1)))


@pytest.fixture
def interpreting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that a small vocabulary has several of each, the last of them partial."""
    monkeypatch.setattr(kernel, "BLOCKS", kernel.Blocks(group=8, chunk=64, gathered=16, draw=64))
    with interpreted(kernel), interpreted(triton.language.random):
        yield


def settings_of(*params: SamplingParams) -> Settings:
    settings = Settings.create(len(params), CPU)
    for slot, one in enumerate(params):
        settings.put(slot, one)
    return settings


def kept(logits: Tensor, settings: Settings) -> Tensor:
    """What ``plain_sampling.keep`` says, by the kernels: logits [B, T, V] -> bool [B, T, V]."""
    rows = kernel._Launcher(logits.flatten(0, 1).contiguous(), False)
    maxima, floors = kernel._find_thresholds(rows, tuple(settings)[:-1], logits.shape[1])
    assert maxima.shape == (len(floors), -(-logits.shape[-1] // kernel.BLOCKS.group))
    return logits.float() >= floors.view(*logits.shape[:2], 1)


# --- what is drawn ---


@pytest.mark.parametrize(
    "dtype, vocab_size",
    slow_but([(torch.bfloat16, 150), (torch.float32, 7)], product(DTYPES, (7, 64, 150))),
)
def test_the_kernels_draw_what_sample_draws(
    interpreting: None, dtype: torch.dtype, vocab_size: int
) -> None:
    """Slots of every setting beside each other."""
    generator = torch.Generator().manual_seed(vocab_size)
    params = [SamplingParams(*one, seed=2**63 + 7 * case) for case, one in enumerate(GRID)]
    params += [SamplingParams(top_k=3, seed=5), SamplingParams(0.7, seed=1)]
    logits = (3 * torch.randn(len(params), 1, vocab_size, generator=generator)).to(dtype)
    logits[::2, :, ::3] = 2.0  # ties, at a threshold or for first place
    position = torch.randint(0, 2**20, (len(params), 1), generator=generator)
    settings = settings_of(*params)
    expected = sample(logits, position, settings)
    drawn = kernel.sample_op(logits, position, *settings)
    assert drawn.tolist() == expected.tolist()
    assert drawn[:-2].ne(logits[:-2].argmax(-1)).any()  # noise decides somewhere


def test_a_greedy_row_is_the_lowest_of_the_greatest(interpreting: None) -> None:
    logits = torch.full((1, 4, 150), -2.0)
    logits[0, 0, [13, 70, 149]] = 5.0  # in three chunks
    logits[0, 1, [3, 2]] = 5.0  # in one group of four
    logits[0, 2] = -math.inf
    logits[0, 3, :] = -0.0
    logits[0, 3, 7] = 0.0  # equal to -0.0
    ids = kernel.sample_op(logits, torch.zeros(1, 4), *settings_of(SamplingParams()))
    assert ids.tolist() == [[13, 2, 0, 0]]


@pytest.mark.parametrize("vocab_size", [150, 320])  # the last group partial, and whole
def test_a_row_of_nans_gives_a_token(interpreting: None, vocab_size: int) -> None:
    for params in (
        SamplingParams(),
        SamplingParams(1.0),
        SamplingParams(1.0, top_k=2),
        SamplingParams(1.0, top_p=0.5),
        SamplingParams(1.0, min_p=0.5),
    ):
        logits = torch.full((1, 2, vocab_size), math.nan)
        logits[0, 1] = torch.arange(vocab_size)
        ids = kernel.sample_op(logits, torch.zeros(1, 2), *settings_of(params))
        assert 0 <= int(ids[0, 0]) < vocab_size and int(ids[0, 1]) >= vocab_size - 30


def test_infinite_rows_are_drawn_as_sample_draws_them(interpreting: None) -> None:
    logits = torch.randn(1, 3, 150)
    logits[0, 0] = -math.inf
    logits[0, 1, [80, 140]] = math.inf
    logits[0, 2, 1:] = -math.inf
    position = torch.arange(3)[None]
    for fields in ({}, {"top_k": 3, "min_p": 0.5}, {"top_p": 0.9}):
        settings = settings_of(SamplingParams(1.0, seed=3, **fields))  # type: ignore[arg-type]
        ids = kernel.sample_op(logits, position, *settings)
        assert ids.tolist() == [[0, 80, 0]] == sample(logits, position, settings).tolist()


def test_the_lowest_of_equal_scores_is_drawn(interpreting: None) -> None:
    """Logits so far from 0 that the noise is rounded away: they tie with it as they do without."""
    places = [[13, 70, 149], [2, 3], [8, 30], [63, 64]]
    logits = torch.full((1, len(places), 150), -2e9)
    for row, equal in enumerate(places):
        logits[0, row, equal] = 1e9
    position = torch.arange(len(places))[None]
    for top_k in (None, 2):
        settings = settings_of(SamplingParams(1.0, top_k, seed=3))
        ids = kernel.sample_op(logits, position, *settings)
        assert ids.tolist() == [[equal[0] for equal in places]]
        assert ids.tolist() == sample(logits, position, settings).tolist()


def test_a_row_depends_on_itself_alone(interpreting: None) -> None:
    logits = torch.randn(2, 3, 150)
    position = torch.arange(6).view(2, 3)
    params = [SamplingParams(1.0, top_k=20, top_p=0.8, seed=5), SamplingParams(2.0, seed=6)]
    both = kernel.sample_op(logits, position, *settings_of(*params))
    for slot in range(2):
        alone = settings_of(params[slot])
        for t in (slot, 2):  # two of the three
            row = kernel.sample_op(
                logits[slot, None, t, None], position[slot, None, t, None], *alone
            )
            assert row.item() == both[slot, t]


# --- what the filters leave ---


@pytest.fixture
def one_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's: masses that differ in a last bit may move a threshold."""
    monkeypatch.setattr(torch, "exp", lambda x: torch.from_numpy(np.exp(x.numpy())))


@st.composite
def rows_of_logits(draw: st.DrawFn) -> Tensor:
    """[4, V], with few or many ties, few or many of them likely, padded or not."""
    vocab_size = draw(st.sampled_from([1, 2, 7, 8, 63, 64, 65, 150, 200]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(4, vocab_size, generator=generator) * draw(st.sampled_from([0.1, 2, 30]))
    steps = draw(st.sampled_from([None, 4, 1]))  # in a unit
    logits = logits if steps is None else (logits * steps).round() / steps
    logits[:, draw(st.integers(1, vocab_size)) :] -= draw(st.sampled_from([0.0, 8.0, math.inf]))
    return logits.to(draw(st.sampled_from(DTYPES)))


filters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-30, 0.25, 0.7, 1.0, 4.0, 1e30]),
    top_k=st.none() | st.integers(1, 40) | st.sampled_from([149, 150, 2**63 - 1]),
    top_p=st.none() | st.floats(1e-9, 1.0) | st.sampled_from([0.5, 0.95, 0.999999, 1e-300]),
    min_p=st.none() | st.floats(0.0, 1.0) | st.sampled_from([0.05, 1.0]),
)


@hypothesis_settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(logits=rows_of_logits(), params=st.tuples(filters, filters))
@example(torch.arange(150.0).expand(4, 150), (SamplingParams(1.0, 19), SamplingParams(1.0, 20)))
def test_the_kernels_keep_what_keep_keeps(
    interpreting: None, one_exp: None, logits: Tensor, params: tuple[SamplingParams, SamplingParams]
) -> None:
    settings = settings_of(*params)
    logits = logits.reshape(2, 2, -1)
    assert torch.equal(kept(logits, settings), keep(logits, settings))


def test_the_threshold_of_min_p_is_rounded_once(interpreting: None) -> None:
    params, logits = min_p_thresholds(8)
    expected = torch.tensor([True, True, False]).expand(8, 1, 3)
    assert torch.equal(kept(logits, settings_of(*params)), expected)


@pytest.mark.parametrize("dtype", FEW_DTYPES)
@pytest.mark.parametrize("top_k", slow_but([19, 100], [1, 2, 4, 19, 100]))
def test_a_bound_leaves_the_kth_where_each_of_the_first_k_is_alone_in_its_group(
    interpreting: None, dtype: torch.dtype, top_k: int
) -> None:
    """The bound is then the k-th greatest logit itself: one rank more would lose it.

    Of 100 there are fewer groups, and no bound.
    """
    logits = torch.linspace(-3, 1, 150)
    heads = torch.arange(0, 150, 8)  # of 19 groups
    logits[heads] = 2 + heads / 64
    logits = logits.to(dtype)[None, None]
    for top_p in (None, 0.95):  # which would miss their mass, too
        settings = settings_of(SamplingParams(1.0, top_k, top_p))
        mask = kept(logits, settings)
        assert torch.equal(mask, keep(logits, settings))
        if top_p is None and top_k <= 19:
            assert mask[0, 0].nonzero().flatten().tolist() == heads[-top_k:].tolist()


@pytest.mark.parametrize("dtype, sign", slow_but([(torch.float32, -1)], product(DTYPES, (1, -1))))
def test_a_threshold_tells_neighbouring_floats_apart(
    interpreting: None, one_exp: None, dtype: torch.dtype, sign: int
) -> None:
    """120 logits that follow each other without a gap, in the dtype's steps."""
    logits = sign * (1 + torch.arange(120.0) * torch.finfo(dtype).eps)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    logits = logits[order].to(dtype)[None, None]
    for n in (1, 2, 10, 17, 36, 101, 119):
        assert int(kept(logits, settings_of(SamplingParams(1.0, n))).sum()) == n
        settings = settings_of(SamplingParams(1.0, top_p=n / 120))
        mask = keep(logits, settings)
        assert torch.equal(kept(logits, settings), mask) and 0 < int(mask.sum()) <= n + 1


@pytest.mark.parametrize(
    "dtype, temperature", slow_but([(torch.bfloat16, 0.5)], product(DTYPES, (0.5, 1.0)))
)
def test_logits_on_the_edges_fall_on_their_side_of_them(
    interpreting: None, one_exp: None, dtype: torch.dtype, temperature: float
) -> None:
    """Each on an edge of the last weighing, or half-way; top-p ends at every seventh."""
    logits = -torch.arange(150.0)[None, None] * temperature / 8
    logits = logits[..., torch.randperm(150, generator=torch.Generator().manual_seed(1))].to(dtype)
    mass = plain_sampling._mass(
        logits.float(), torch.zeros(1, 1, 1), torch.full((1, 1, 1), temperature)
    )
    running = mass.flatten().double().sort(descending=True).values.cumsum(0)
    for n, share in list(enumerate((running / running[-1]).tolist()))[:99:7]:
        settings = settings_of(SamplingParams(temperature, top_p=share))
        mask = keep(logits, settings)
        assert torch.equal(kept(logits, settings), mask)
        assert abs(int(mask.sum()) - n - 1) <= 1  # share is a float32 by now


@pytest.mark.parametrize("dtype", FEW_DTYPES)
def test_top_p_may_end_below_the_last_edge(
    interpreting: None, one_exp: None, dtype: torch.dtype
) -> None:
    logits = torch.full((1, 1, 150), -17.0)
    logits[..., [3, 70]] = torch.tensor([0.0, -30.0])
    settings = settings_of(SamplingParams(1.0, top_p=0.999999))
    mask = kept(logits.to(dtype), settings)
    assert torch.equal(mask, logits > -20) and torch.equal(mask, keep(logits, settings))


def test_what_is_gathered_is_what_may_decide(
    interpreting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens are left to the search; with more it would be slow, not wrong."""
    given: dict[str, Tensor] = {}
    search = kernel._search_kernel
    start = kernel._Launcher.start

    def recorded(self: Any, launched: Any, *arguments: Any) -> None:
        if launched is search:
            names = dict(zip(search.arg_names, arguments[2:], strict=False))
            given.update(n=names["n_gathered"].clone(), values=names["gathered"].clone())
        start(self, launched, *arguments)

    monkeypatch.setattr(kernel._Launcher, "start", recorded)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2))
    logits = torch.arange(150.0)[order].expand(3, 1, 150) / 8
    params = (SamplingParams(1.0, k, p) for k, p in ((10, None), (None, 0.9), (150, 0.9)))
    kept(logits, settings_of(*params))
    assert 10 <= given["n"][0] <= 19 * 8
    values = given["values"][0, : given["n"][0]] * 8
    assert values.sort().values[-10:].tolist() == list(range(140, 150))
    assert 1 <= given["n"][1] <= 3  # a quarter of a temperature
    assert given["n"][2] == given["n"][1]  # top-k is off


# --- log-probabilities ---


@pytest.mark.parametrize("dtype", [*FEW_DTYPES, torch.float64])
@pytest.mark.parametrize("vocab_size", [7, 9000])  # a part of a block, and several
def test_logprobs_are_the_models(interpreting: None, dtype: torch.dtype, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    size = torch.tensor([[0.1], [1.0], [30.0], [1e4], [3.0], [3.0]])
    logits = (size * torch.randn(6, vocab_size, generator=generator)).to(dtype)
    logits[4, ::2] = -math.inf
    logits[5, 1:] = -math.inf
    tokens = torch.tensor([[0, vocab_size - 1, 5], [3, 1, 0]])
    logits = logits.view(2, 3, -1)
    got = kernel.logprobs(logits, tokens)
    exact = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert got.dtype == torch.float32 and got.shape == tokens.shape
    assert torch.allclose(got.double(), exact, rtol=2e-7, atol=2e-6)
    assert got[1, 2] == 0
    assert torch.allclose(got, plain_sampling.logprobs(logits, tokens), rtol=2e-7, atol=2e-6)


def test_a_logprob_depends_on_its_row_alone(interpreting: None) -> None:
    logits = torch.randn(3, 4, 5000, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens = logits.argmax(-1)
    together = kernel.logprobs(logits, tokens)
    assert torch.equal(kernel.logprobs(logits.flip(0, 1), tokens.flip(0, 1)), together.flip(0, 1))
    for at in ((0, 0), (2, 3)):
        assert kernel.logprobs(logits[at], tokens[at]) == together[at]
    masked = tokens.clone()
    masked[1] = NO_TOKEN  # whose own is of no use
    beside = kernel.logprobs(logits, masked)
    assert torch.equal(beside[::2], together[::2])


# --- the machine code ---


def test_the_operators_say_what_they_return(interpreting: None) -> None:
    check = partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    logits, tokens = torch.randn(1, 3, 70), torch.arange(3)[None]
    check(kernel.sample_op, (logits, tokens, *settings_of(SamplingParams(1.0, seed=3))))
    check(kernel.logprobs_op, (logits.bfloat16(), tokens))


SIGNATURE = {"temperatures": "*fp32", "top_ks": "*i64", "top_ps": "*fp32", "min_ps": "*fp32"}
SIGNATURE |= {"logits": "*bf16", "positions": "*i64", "seeds": "*i64", "width": "i32"}
SIGNATURE |= {"group_max": "*fp32", "bests": "*fp32", "bounds": "*fp32", "thresholds": "*fp32"}
SIGNATURE |= {"masses": "*i64", "n_gathered": "*i32", "gathered": "*bf16"}
SIGNATURE |= {"scores": "*fp32", "tokens": "*i32", "out": "*i64"}
CONSTANTS = {"VOCAB": 151_936, "N_GROUPS": 2374, "GROUP": kernel.BLOCKS.group}
CONSTANTS |= {"CHUNK": kernel.BLOCKS.chunk, "SCALE": 2.0**44, "SHIFT": 16}
CONSTANTS |= {"N_DONE": 1, "N_CHUNKS": 149}
WARPS = {
    "group_max": 4,
    "bound": 8,
    "mass_above": 8,
    "gather": 8,
    "search": 8,
    "draw": 4,
    "pick": 4,
    "logprobs": 8,
}
BLOCK = {
    "logprobs": 4096,
    "bound": 4096,
    "search": kernel.BLOCKS.gathered,
    "draw": kernel.BLOCKS.draw,
    "pick": 256,
}


@pytest.mark.parametrize("chip", EVERY_CHIP)
@pytest.mark.parametrize("name", WARPS)
def test_the_kernels_compile_for_every_chip(name: str, chip: int) -> None:
    made = getattr(kernel, f"_{name}_kernel")
    constants = CONSTANTS | {"BLOCK": BLOCK.get(name)}
    constants = {name: value for name, value in constants.items() if name in made.arg_names}
    signature = SIGNATURE
    if name == "logprobs":
        signature = SIGNATURE | {"tokens": "*i64", "out": "*fp32"}
    compiled = compile_for(made, signature, constants, chip, WARPS[name], 3)
    assert compiled.metadata.shared <= CHIPS[chip]
    ptx = compiled.asm["ptx"]
    # The noise is as good as its logarithms near 1, where the fast approximation is poor.
    assert "lg2.approx" not in ptx
    if name in ("group_max", "mass_above", "gather"):  # eight logits at a time
        assert "ld.global.v4.b32" in ptx
    if chip >= 90:  # A kernel that runs ahead of its predecessors may read only what is not theirs.
        assert read_before_waiting(made, constants, ptx) == set()
        assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait")
