"""The kernels around a pass's layers: against PyTorch's, in Triton's interpreter; machine code."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from orthrus_fast import load, steps
from orthrus_fast.sampling import NO_TOKEN
from tests.checkpoints import write_checkpoint
from tests.decoders import contents
from tests.kernel_compile import EVERY_CHIP, compile_for, interpreted, read_before_waiting

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast.kernels import blocks

CPU = torch.device("cpu")
CAPACITY, VOCAB = 96, 5


def random_state(random: torch.Generator, n_slots: int, width: int) -> steps.State:
    """Slots at any point of their text: done or not, drafting or not, near their end or not."""

    def below(n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=random)

    state = steps.State.create(n_slots, CAPACITY, width, CPU)
    state.length.copy_(below(CAPACITY - 2 * width, n_slots))
    state.max_length.copy_(state.length + below(2 * width + 3, n_slots))
    state.tokens.copy_(below(VOCAB, n_slots, CAPACITY))
    for tensor, odds in ((state.done, 5), (state.drafting, 3)):
        tensor.copy_(below(odds, n_slots) == 0)
    state.drafting.logical_not_()
    state.anchor.copy_(below(VOCAB, n_slots))
    return state


def copied(state: steps.State) -> steps.State:
    names = ("length", "anchor", "tokens", "done", "max_length", "drafting")
    return replace(state, **{name: getattr(state, name).clone() for name in names})


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_slots=st.integers(1, 4),
    width=st.sampled_from([1, 2, 3, 8, 31, 32]),
    eos=st.lists(st.integers(0, VOCAB), max_size=3),
    right=st.sampled_from([0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_what_is_accepted_and_committed(
    seed: int, n_slots: int, width: int, eos: list[int], right: float, dtype: torch.dtype
) -> None:
    """Reports and states are equal, with rows that overflowed among them."""
    random = torch.Generator().manual_seed(seed)
    state = random_state(random, n_slots, width)
    shape = (n_slots, width)
    logits = torch.randn(*shape, VOCAB, generator=random).to(dtype)
    bad = torch.rand(shape, generator=random) < 0.05
    logits[bad, 1] = [math.nan, math.inf, -math.inf][seed % 3]
    greedy = logits.argmax(-1)
    target = torch.randint(VOCAB, shape, generator=random) if seed % 2 else greedy
    block = torch.randint(VOCAB, shape, generator=random)
    agrees = torch.rand(n_slots, width - 1, generator=random) < right
    block[:, 1:] = torch.where(agrees, target[:, :-1], block[:, 1:])
    ends = torch.tensor(eos, dtype=torch.int64)
    mine = copied(state)
    expected = steps.commit_accepted(state, block, target, greedy, logits, ends)
    with interpreted(blocks):
        report = blocks.commit_accepted(mine, block, target, greedy, logits, ends)
    assert report.tolist() == expected.tolist()
    assert all(map(torch.equal, contents(mine), contents(state)))


def test_a_row_that_overflowed_ends_a_text_with_no_token() -> None:
    """The anchor, which the model is given, is a token even so."""
    random = torch.Generator().manual_seed(0)
    state = random_state(random, 1, 4)
    state.done.fill_(False)
    state.max_length.fill_(CAPACITY)
    logits = torch.zeros(1, 4, VOCAB)
    logits[0, 1] = math.nan
    greedy = torch.zeros(1, 4, dtype=torch.int64)
    eos = torch.tensor([3])
    with interpreted(blocks):
        report = blocks.commit_accepted(state, greedy.clone(), greedy, greedy, logits, eos)
    assert report.tolist() == [[0, NO_TOKEN, 0, 0, 2, 1, 1]]
    assert bool(state.done[0]) and int(state.anchor[0]) == 0


def test_the_kernels_version_is_the_one_that_is_called() -> None:
    """With log-probabilities of its targets beside its report."""
    random = torch.Generator().manual_seed(3)
    state = random_state(random, 3, 4)
    logits = torch.randn(3, 4, VOCAB, generator=random)
    logits[1, 2] = math.nan
    greedy, eos = logits.argmax(-1), torch.tensor([2])
    sample: Any = lambda logits, position, settings: logits.argmin(-1)  # noqa: E731
    logprobs: Any = lambda logits, tokens: tokens.float() + 0.5  # noqa: E731
    mine = copied(state)
    given = (greedy.clone(), greedy, logits, eos, sample, logprobs)
    expected = steps.accept_and_commit(state, *given)
    with interpreted(blocks):
        report = steps.accept_and_commit(mine, *given, blocks.commit_accepted)
    assert report.shape == (3, 4 + 3 + 4) and report.tolist() == expected.tolist()


@pytest.mark.parametrize("n_rows, width", [(1, 1), (3, 5)])
def test_rows_are_embedded_where_they_sit(n_rows: int, width: int, tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path / "model", hidden_size=96)).runner.model
    random = torch.Generator().manual_seed(n_rows)
    tokens = torch.randint(model.config.vocab_size, (n_rows, width), generator=random)
    start = torch.randint(CAPACITY - width, (n_rows,), generator=random).int()
    slot = torch.arange(n_rows)
    x, at = model.embed(tokens, start, slot)
    with interpreted(blocks):
        model.kernels = replace(model.kernels, embed=blocks.embed)
        got, places = model.embed(tokens, start, slot)
    assert torch.equal(got, x)
    assert all(map(torch.equal, places, at))


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_the_kernels_compile(chip: int) -> None:
    of_embed = dict.fromkeys(("tokens", "positions"), "*i64") | {"start": "*i32", "width": "i32"}
    of_embed |= dict.fromkeys(("weight", "cos", "sin", "x", "cos_rows", "sin_rows"), "*bf16")
    of_commit = dict.fromkeys(("block", "target", "greedy", "eos", "report"), "*i64")
    of_commit |= dict.fromkeys(("anchor", "tokens"), "*i64")
    of_commit |= dict.fromkeys(("length", "max_length"), "*i32") | {"logits": "*bf16"}
    of_commit |= dict.fromkeys(("done", "drafting"), "*u8")
    of_commit |= dict.fromkeys(("width", "n_ends", "n_logits", "capacity"), "i32")
    for kernel, signature, constants in (
        (blocks._embed_kernel, of_embed, {"SIZE": 2560, "BLOCK": 4096, "HEAD_DIM": 128}),
        (blocks._commit_kernel, of_commit, {"NO_TOKEN": NO_TOKEN, "BLOCK": 32}),
    ):
        compiled = compile_for(kernel, signature, constants, chip, 4, 3)
        if chip >= 90:
            assert not read_before_waiting(kernel, constants, compiled.asm["ptx"])
