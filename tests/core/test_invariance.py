"""The invariance check on the CPU: it holds, it leaves no trace, and planted faults are caught.

But for the first test, products and attention are computed in float64 and rounded once: their bits
follow no order of summation, so that a fault here is the planted one on any machine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orthrus_fast import SamplingParams, invariance, steps
from orthrus_fast.cache import KVCache
from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.invariance import CAPTURED, STEPWISE, Invariance, check
from orthrus_fast.kernels.interface import Attend, Weight
from orthrus_fast.kernels.plain import ROW_MULTIPLE, PlainProducts, add_norm, qk_norm_rope_write
from orthrus_fast.model import Transformer
from orthrus_fast.runners import EagerRunner
from tests.checkpoints import kernels_for, tile_boundaries, write_checkpoint
from tests.decoders import start
from tests.judge import Judge
from tests.marks import slow_but

WIDTH, SLOTS = 16, 2
WIDTHS = (1, 4, WIDTH)
N_REPLAYED = 7  # tokens of a slot
CPU = torch.device("cpu")
Patch = pytest.MonkeyPatch
Term = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied: with tied embeddings the replay's text is one token, and hides what follows it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(directory, seed=8, tied=False, block_size=WIDTH, eos_token_id=[])


def build(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    slots: int = SLOTS,
    max_seq_len: int = 200,
    exact: bool = True,
) -> EagerRunner:
    """A runner of the checkpoint; ``exact``: with products and attention of float64."""
    checkpoint = open_checkpoint(str(directory))
    config = checkpoint.config
    model = load_model(checkpoint, kernels_for("sdpa", CPU, dtype, config.head_dim), CPU, dtype)
    width = config.block_size or 1
    capacity = steps.cache_rows(max_seq_len, width)
    model.set_capacity(capacity)
    state = steps.State.create(slots, capacity, width, CPU)
    runner = EagerRunner(model, state, KVCache(config, slots, capacity, dtype, CPU))
    if exact:
        use(runner, products=PlainProducts(linear=exact_linear), attend=attention())
    return runner


def found_in(runner: EagerRunner, widths: tuple[int, ...] = WIDTHS) -> Invariance:
    boundaries = tile_boundaries("sdpa", runner.cache.capacity)
    return check(runner, widths, boundaries, prefill=widths != (WIDTH,))


def use(runner: EagerRunner, **kernels: Any) -> None:
    """Put these in place of the model's kernels of those names."""
    runner.model.kernels = dataclasses.replace(runner.model.kernels, **kernels)


def exact_linear(x: Tensor, weight: Tensor, _: int, gated: bool) -> Tensor:
    return gate(F.linear(x.double(), weight.double()).to(x.dtype), gated)


def gate(out: Tensor, gated: bool) -> Tensor:
    """SwiGLU of a product's halves, where it is ``gated``."""
    if not gated:
        return out
    halves = out.double().chunk(2, dim=-1)
    return (F.silu(halves[0]) * halves[1]).to(out.dtype)


Visible = Callable[[Tensor, Tensor, int], Tensor]


def causal_keys(key: Tensor, own: Tensor, width: int) -> Tensor:
    """Which keys [S] rows at positions ``own`` [R, T, 1] of a block of ``width`` may see."""
    return key <= own


def attention(
    visible: Visible = causal_keys,
    splits: Callable[[int, int], list[int]] | None = None,
    backwards: Callable[[int], bool] = lambda width: False,
) -> Attend:
    """Attention over the whole cache.

    ``splits`` of the block's width and end: where splits of the keys begin, after 0. What a split
    leaves is ``coarse``, and so are the sums of the splits, one after another, or ``backwards``.
    """

    def attend(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        *_: Any,
        causal: bool,
    ) -> Tensor:
        (_, width, n_heads, head_dim), capacity = q.shape, k_cache.shape[2]
        group = n_heads // k_cache.shape[1]
        k, v = (rows[slot].double().repeat_interleave(group, 1) for rows in (k_cache, v_cache))
        own = start[:, None, None] + torch.arange(width)[:, None]
        shown = visible(torch.arange(capacity), own, width)
        scores = torch.einsum("rthd,rhsd->rhts", q.double(), k) / math.sqrt(head_dim)
        weights = scores.masked_fill(~shown[:, None], -math.inf).softmax(dim=-1)
        if splits is None:
            return torch.einsum("rhts,rhsd->rthd", weights, v).to(q.dtype)
        begins = [0, *splits(width, int(start.max()) + width), capacity]
        pairs = list(zip(begins, begins[1:], strict=False))
        out = torch.zeros(q.shape, dtype=torch.float64)
        for a, b in reversed(pairs) if backwards(width) else pairs:
            part = torch.einsum("rhts,rhsd->rthd", weights[..., a:b], v[:, :, a:b])
            out = coarse(out + coarse(part))
        return out.to(q.dtype)

    return attend


def coarse(x: Tensor) -> Tensor:
    """x rounded to bfloat16: then another order of summation has other bits on every machine."""
    return x.to(torch.bfloat16).to(x.dtype)


def adding(term: Callable[[Tensor, int], Tensor | float]) -> Attend:
    """Honest attention, and on top ``term`` of the rows' start [R, 1, 1, 1] and the width."""
    honest = attention()

    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor, *rest: Any, causal: bool) -> Tensor:
        out = honest(q, k, v, start, *rest, causal=causal)
        return out + term(start[:, None, None, None], q.shape[1])

    return attend


# What an honest pass gives


@pytest.mark.parametrize(
    "dtype, slots",
    slow_but(
        [("float32", 2), ("float64", 1)],
        [("float32", 2), ("float64", 1), ("float32", 1), ("float64", 4)],
    ),
)
def test_an_honest_pass_holds(tiny: Path, dtype: str, slots: int) -> None:
    """With the CPU's own library: products over padded rows, attention over tiles of queries."""
    found = found_in(build(tiny, getattr(torch, dtype), slots, exact=False))
    assert (found.holds, found.n_differing, found.replay_equal) == (True, 0, True), str(found)
    assert (found.widths, found.prefill) == (WIDTHS, True)
    # A block of 16 with 12 rows of the text; of 4, ending and beginning there, and with 3; one row,
    # twice. Prefill's chunks have all 32 rows, and from one row earlier than the boundary 17.
    rows_of_a_slot = 12 + (4 + 4 + 3) + (1 + 1)
    n_boundaries = 2
    assert found.n_rows == n_boundaries * (slots * rows_of_a_slot + 32 + 17)
    assert found.n_replayed == slots * N_REPLAYED
    assert found.seconds > 0


def test_with_one_width_the_narrower_promise_is_checked(tiny: Path) -> None:
    """Rows follow the width, and prefill differs from both; but there is only one."""
    runner = build(tiny)
    use(runner, attend=adding(lambda start, width: 1e-6 * width))
    assert not found_in(runner).holds
    found = found_in(runner, (WIDTH,))
    assert (found.holds, found.widths, found.prefill) == (True, (WIDTH,), False)
    assert found.n_rows == 4 * SLOTS * (12 + 1 + 1)  # AR's one row on either side of the boundary


def test_a_row_at_a_time(tmp_path: Path) -> None:
    """A plain Qwen3 has nothing to draft with."""
    directory = write_checkpoint(tmp_path / "model", draft=False, eos_token_id=[])
    found = found_in(build(directory), (1,))
    assert (found.holds, found.n_replayed) == (True, SLOTS * N_REPLAYED)


@pytest.mark.parametrize("widths", [WIDTHS, (WIDTH,)])
def test_the_smallest_cache(tiny: Path, widths: tuple[int, ...]) -> None:
    runner = build(tiny, max_seq_len=2)
    assert runner.cache.capacity == 128
    found = found_in(runner, widths)
    assert found.holds, str(found)
    assert found.n_rows > 0 and found.n_replayed > 0


def test_boundaries_outside_the_cache_are_passed_over(tiny: Path) -> None:
    """And those so near its ends that no block lies across them; without any, some rows are."""
    runner = build(tiny)
    assert runner.cache.capacity == 320
    found = [check(runner, WIDTHS, at) for at in ([], [64], [0, 7, 64, 300, 320, 10**6])]
    assert [each.holds for each in found] == [True] * 3
    assert [each.n_rows for each in found] == [SLOTS * (12 + 11 + 2) + 32 + 17] * 3


@pytest.mark.parametrize("ends", [range(272), range(0, 272, 3)])
def test_the_replay_ends_where_a_text_ends(tmp_path: Path, ends: range) -> None:
    """Rows past a slot's end are not its own, and differ as garbage does."""
    directory = write_checkpoint(
        tmp_path / "model", seed=8, tied=False, block_size=WIDTH, eos_token_id=list(ends)
    )
    found = found_in(build(directory))
    assert SLOTS <= found.n_replayed < SLOTS * N_REPLAYED
    assert found.holds, str(found)


def test_the_check_leaves_no_trace(tiny: Path) -> None:
    runner = build(tiny)
    for slot in range(SLOTS):
        runner.state.settings.put(slot, SamplingParams(0.5, top_k=3, top_p=0.5, min_p=0.1, seed=7))
    before, random = dict(vars(runner)), torch.get_rng_state()
    found = found_in(runner)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(vars(runner)[name] is value for name, value in before.items())
    assert len(runner.model.verifier.layers) == len(runner.cache.k) == 2
    fresh = steps.State.create(SLOTS, runner.cache.capacity, WIDTH, CPU)
    for field in dataclasses.fields(steps.State):
        if field.name != "settings":
            assert torch.equal(getattr(runner.state, field.name), getattr(fresh, field.name)), field
    settings = zip(runner.state.settings, fresh.settings, strict=True)
    assert all(torch.equal(setting, greedy) for setting, greedy in settings)
    assert not any(rows.any() for rows in (*runner.cache.k, *runner.cache.v))
    assert runner.in_flight == 0
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        again = found_in(runner)
    assert dataclasses.replace(again, seconds=found.seconds) == found


def test_what_was_found_is_one_line() -> None:
    assert str(Invariance(True, (1, 8, 32), True, 480, 0, 32, True, 0.86)) == (
        "480 rows in blocks of 1, 8, 32 and prefill equal to the bit; "
        "32 tokens replayed equal to the bit (0.9 s)"
    )
    assert str(Invariance(False, (16,), False, 48, 3, 64, False, 0.26)) == (
        "48 rows in blocks of 16 3 differ; 64 tokens replayed differ (0.3 s)"
    )


# Which passes it runs


class Passes:
    """Counts a runner's passes, and keeps the widths of those over a prompt."""

    def __init__(self, patch: Patch) -> None:
        self.n_verified, self.chunks = 0, list[int]()
        verify, prefill_chunk = EagerRunner.verify, EagerRunner.prefill_chunk

        def verify_counted(runner: EagerRunner, width: int) -> Tensor:
            self.n_verified += 1
            assert self.n_verified < 1000
            return verify(runner, width)

        def prefill_counted(runner: EagerRunner, tokens: Tensor, start: int, slot: int) -> Tensor:
            self.chunks.append(tokens.shape[1])
            return prefill_chunk(runner, tokens, start, slot)

        patch.setattr(EagerRunner, "verify", verify_counted)
        patch.setattr(EagerRunner, "prefill_chunk", prefill_counted)


@pytest.mark.parametrize(
    "widths, captured",
    slow_but(
        [(WIDTHS, True), ((1, WIDTH), False)],
        product([WIDTHS, (1, WIDTH), (1, 2, 4, 8, WIDTH), (WIDTH,), (1,)], [False, True]),
    ),
)
def test_passes_within_the_budget(
    tmp_path: Path, monkeypatch: Patch, widths: tuple[int, ...], captured: bool
) -> None:
    directory = write_checkpoint(
        tmp_path / "model", block_size=WIDTH, max_position_embeddings=1000, eos_token_id=[]
    )
    runner = build(directory, max_seq_len=1000, slots=1)
    if captured:
        monkeypatch.setattr(invariance, "GraphRunner", EagerRunner)
    passes, budget = Passes(monkeypatch), CAPTURED if captured else STEPWISE
    boundaries = list(range(64, 1000, 64))
    assert check(runner, widths, boundaries, prefill=widths != (WIDTH,)).holds
    n_passes = passes.n_verified + len(passes.chunks)
    assert budget / 2 < n_passes <= budget


def test_a_graphs_passes_are_checked_in_every_layer(tmp_path: Path, monkeypatch: Patch) -> None:
    """Elsewhere the first two layers tell of all."""
    directory = write_checkpoint(
        tmp_path / "model", tied=False, block_size=WIDTH, num_hidden_layers=3, eos_token_id=[]
    )
    runner = build(directory)
    tamper(runner, "down", by_row, layer=2)
    assert found_in(runner).holds
    monkeypatch.setattr(invariance, "GraphRunner", EagerRunner)
    assert not found_in(runner).holds


@pytest.mark.parametrize(
    "widths, run", [((), {35, 21}), ((32, 64, 128, 512), {32, 64, 128}), ((512,), set())]
)
def test_prefill_runs_at_the_widths_that_there_are(
    tiny: Path, monkeypatch: Patch, widths: tuple[int, ...], run: set[int]
) -> None:
    """As far as they fit: the cache has 320 rows."""
    runner, passes = build(tiny), Passes(monkeypatch)
    monkeypatch.setattr(EagerRunner, "prefill_widths", widths)
    assert found_in(runner).holds
    assert set(passes.chunks) == run


def test_boundaries_are_chosen_where_tiles_and_splits_change(tiny: Path) -> None:
    """Triton's of a long cache: tiles of 64, a split a 256, a 512, then a 1024."""
    runner = build(tiny, max_seq_len=12_000, slots=1)
    boundaries = [*range(64, 1024, 64), *range(1024, 4352, 256), *range(4352, 8448, 512)]
    boundaries += range(8448, runner.cache.capacity, 1024)
    probe = invariance._Probe(runner, WIDTHS, prefill=True)
    chosen = probe.choose(boundaries, 96)
    assert {64, 1024, 4352, 8448, 11520} <= set(chosen) <= set(boundaries)
    assert len(chosen) == 9 and chosen == sorted(chosen)
    assert probe.choose(boundaries, 22) == [64, 11520]


# Planted faults that it must catch


def splits_follow_the_rows(runner: EagerRunner, patch: Patch) -> None:
    """Few rows want more programs, and so more splits of the keys."""
    use(runner, attend=attention(splits=lambda width, end: [64, 128] if width > 1 else [64]))


def splits_follow_the_length(runner: EagerRunner, patch: Patch) -> None:
    use(runner, attend=attention(splits=lambda width, end: [end // 2]))


def splits_are_joined_as_they_end(runner: EagerRunner, patch: Patch) -> None:
    """In another order where there are few rows."""
    splits, backwards = split_at_fixed_positions, lambda width: width < WIDTH
    use(runner, attend=attention(splits=splits, backwards=backwards))


def narrow_blocks_take_another_tile(runner: EagerRunner, patch: Patch) -> None:
    """One ulp, as where a tile of 16 rows sums over keys in another order."""
    honest = attention()

    def attend(q: Tensor, *rest: Any, causal: bool) -> Tensor:
        out = honest(q, *rest, causal=causal)
        return one_ulp_up(out) if q.shape[1] < WIDTH else out

    use(runner, attend=attend)


def long_chunks_take_another_tile(runner: EagerRunner, patch: Patch) -> None:
    """In prefill alone."""
    use(runner, attend=adding(lambda start, width: 1e-6 * (width > WIDTH)))


def a_chunk_sees_nothing_before_it(runner: EagerRunner, patch: Patch) -> None:
    def visible(key: Tensor, own: Tensor, width: int) -> Tensor:
        return (key <= own) & ((width <= WIDTH) | (key >= own[:, :1]))

    use(runner, attend=attention(visible))


def one_ulp_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def a_term_follows_the_start(runner: EagerRunner, patch: Patch) -> None:
    use(runner, attend=adding(lambda start, width: 1e-7 * start))


def two_launches_differ(runner: EagerRunner, patch: Patch) -> None:
    launches = iter(range(10**6))
    use(runner, attend=adding(lambda start, width: 1e-6 * (next(launches) % 7)))


def the_mask_is_one_wide(runner: EagerRunner, patch: Patch) -> None:
    use(runner, attend=attention(lambda key, own, width: key <= own + 1))


def scratch_rows_are_read(runner: EagerRunner, patch: Patch) -> None:
    """A row past the block, that an earlier and rejected block wrote."""
    use(runner, attend=attention(lambda key, own, width: (key <= own) | (key == own + WIDTH)))


def the_caches_last_row_is_read(runner: EagerRunner, patch: Patch) -> None:
    """Far from all boundaries: in the replay alone there is new garbage."""
    last = runner.cache.capacity - 1
    use(runner, attend=attention(lambda key, own, width: (key <= own) | (key == last)))


def verification_looks_both_ways(runner: EagerRunner, patch: Patch) -> None:
    use(runner, attend=attention(lambda key, own, width: key <= own[:, -1:]))


def every_slot_reads_the_first_ones_cache(runner: EagerRunner, patch: Patch) -> None:
    honest = attention()

    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        return honest(q, k, v, start, torch.zeros_like(slot), causal=causal)

    use(runner, attend=attend)


def a_term_follows_the_slot(runner: EagerRunner, patch: Patch) -> None:
    """As where a block's place among all rows of a pass decides how they are summed."""
    term = 1e-6 * torch.arange(SLOTS)[:, None, None, None]
    use(runner, attend=adding(lambda start, width: term if len(start) == SLOTS else 0.0))


def weight_of(model: Transformer, name: str, layer: int = 0) -> Tensor:
    """The weight of a product of a verify pass."""
    module: Any = model.verifier.layers[layer]
    owners = {"qkv": module.attention, "o": module.attention, "lm_head": model.verifier}
    owner = owners.get(name, module.mlp)
    weight: Tensor = getattr(owner, name).weight
    return weight


def by_row(out: Tensor) -> Tensor:
    return 1e-6 * torch.arange(out.shape[-2])[:, None].to(out.dtype) if out.dim() > 1 else out * 0


def by_neighbours(out: Tensor) -> Tensor:
    return 1e-6 * out.mean(-2, keepdim=True) if out.dim() > 1 else out * 0


def by_number_of_rows(out: Tensor) -> Tensor:
    """One ulp where there are fewer rows than a tile has."""
    n_rows = out.numel() // out.shape[-1]
    return (one_ulp_up(out) - out) * (n_rows < ROW_MULTIPLE)


def tamper(runner: EagerRunner, name: str, term: Term, layer: int = 0) -> None:
    """On top of one weight's product put ``term`` of its result [R, T, N], or of a row's [N]."""
    tampered = weight_of(runner.model, name, layer)

    def linear(x: Tensor, weight: Tensor, row_multiple: int, gated: bool) -> Tensor:
        out = exact_linear(x, weight, row_multiple, False)
        return gate(out + term(out) if weight is tampered else out, gated)

    use(runner, products=PlainProducts(linear=linear))


class SplitProducts(PlainProducts):
    """Of products with partial sums: each of ``split`` columns of K, and ``coarse``.

    ``n_splits`` of the number of rows: in how many parts the columns of K are summed.
    """

    def __init__(self, n_splits: Callable[[int], int]) -> None:
        super().__init__(linear=exact_linear)
        object.__setattr__(self, "n_splits", n_splits)

    def partials(self, x: Tensor, weight: Weight) -> Tensor:
        n: int = self.n_splits(x.numel() // x.shape[-1])  # type: ignore[attr-defined]
        parts = zip(x.chunk(n, dim=-1), weight.weight.chunk(n, dim=-1), strict=True)
        return torch.stack([coarse(exact_linear(*part, ROW_MULTIPLE, False)) for part in parts])


def the_split_of_a_product_follows_the_rows(runner: EagerRunner, patch: Patch) -> None:
    use(runner, products=SplitProducts(lambda n_rows: 2 if n_rows > 16 else 4))


def a_later_layers_product_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    tamper(runner, "down", by_row, layer=1)


class Choosing(PlainProducts):
    """Greedy ids that are not those of the logits, in all rows but the first."""

    def lm_head_argmax(
        self, x: Tensor, weight: Weight, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        ids, logits = super().lm_head_argmax(x, weight, return_logits)
        if ids.dim() > 1:
            ids = torch.cat((ids[:, :1], logits[:, 1:].topk(2, dim=-1).indices[..., 1]), dim=1)
        return ids, logits


def the_choice_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    use(runner, products=Choosing(linear=exact_linear))


def a_norm_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    def wrong(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        x, normed = add_norm(x, *rest)
        return x, normed + by_row(normed)

    use(runner, add_norm=wrong)


def the_residual_follows_the_neighbours(runner: EagerRunner, patch: Patch) -> None:
    use(runner, add_norm=lambda x, *rest: add_norm(x + by_neighbours(x), *rest))


def positions_restart_with_the_block(runner: EagerRunner, patch: Patch) -> None:
    model = runner.model
    honest = model.embed

    def embed(tokens: Tensor, start: Tensor, slot: Tensor) -> Any:
        x, at = honest(tokens, start, slot)
        cos, sin = (table[: tokens.shape[1]] for table in (model.rope_cos, model.rope_sin))
        return x, at._replace(cos=cos.expand_as(at.cos), sin=sin.expand_as(at.sin))

    patch.setattr(model, "embed", embed)


def the_anchors_row_is_not_written(runner: EagerRunner, patch: Patch) -> None:
    """What lies there stays: an earlier block's row, or a draft's."""

    def write(partials: Tensor, *rest: Any) -> Tensor:
        *_, positions, slot, k_cache, v_cache = rest
        first = positions[:, 0]
        kept = k_cache[slot, :, first].clone(), v_cache[slot, :, first].clone()
        q = qk_norm_rope_write(partials, *rest)
        k_cache[slot, :, first], v_cache[slot, :, first] = kept
        return q

    use(runner, qk_norm_rope_write=write)


def the_start_is_the_last_cycles(runner: EagerRunner, patch: Patch) -> None:
    """As from a graph that holds a copy of the length."""
    honest, kept = steps.verify, runner.state.length.clone()

    def verify(model: Transformer, cache: Any, state: steps.State, block: Tensor) -> Any:
        out = honest(model, cache, dataclasses.replace(state, length=kept.clone()), block)
        kept.copy_(state.length)
        return out

    patch.setattr(steps, "verify", verify)


PLANTS = [
    splits_follow_the_rows,
    splits_follow_the_length,
    splits_are_joined_as_they_end,
    narrow_blocks_take_another_tile,
    long_chunks_take_another_tile,
    a_chunk_sees_nothing_before_it,
    a_term_follows_the_start,
    two_launches_differ,
    the_mask_is_one_wide,
    scratch_rows_are_read,
    the_caches_last_row_is_read,
    verification_looks_both_ways,
    every_slot_reads_the_first_ones_cache,
    a_term_follows_the_slot,
    the_split_of_a_product_follows_the_rows,
    a_later_layers_product_follows_the_row,
    the_choice_follows_the_row,
    a_norm_follows_the_row,
    the_residual_follows_the_neighbours,
    positions_restart_with_the_block,
    the_anchors_row_is_not_written,
    the_start_is_the_last_cycles,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_fault_in_the_pass_is_caught(tiny: Path, monkeypatch: Patch, plant: Any) -> None:
    runner = build(tiny)
    plant(runner, monkeypatch)
    found = found_in(runner)
    assert not found.holds, str(found)


def split_at_fixed_positions(width: int, end: int) -> list[int]:
    return [64, 128, 192, 256]


def test_the_faults_are_not_the_splits_themselves(tiny: Path) -> None:
    """At fixed positions, joined in order, of a fixed number for a product: all is well."""
    runner = build(tiny)
    use(runner, attend=attention(splits=split_at_fixed_positions))
    use(runner, products=SplitProducts(lambda n_rows: 4))
    assert found_in(runner).holds


@pytest.mark.parametrize(
    "term", [by_row, by_neighbours, by_number_of_rows], ids=lambda t: t.__name__
)
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "lm_head"])
def test_a_fault_in_any_product_is_caught(tiny: Path, name: str, term: Term) -> None:
    runner = build(tiny)
    tamper(runner, name, term)
    found = found_in(runner)
    assert found.n_differing > 0, str(found)


def test_a_library_that_sums_by_the_number_of_rows_is_caught(tiny: Path) -> None:
    """Rows that are not padded; where the library takes the same steps for one row it is honest."""
    runner = build(tiny)
    honest = True
    for weight in {p for p in runner.model.parameters() if p.dim() == 2}:
        x = torch.randn(WIDTH, weight.shape[1], generator=torch.Generator().manual_seed(0))
        honest &= torch.equal(F.linear(x[:1], weight), F.linear(x, weight)[:1])
    if honest:
        pytest.skip("this CPU's library has the same bits for one row and for 16")
    use(runner, products=PlainProducts(row_multiple=1))
    assert not found_in(runner).holds


def one_too_many_is_accepted(patch: Patch) -> None:
    honest = steps.accept

    def accept(block: Tensor, target: Tensor) -> Tensor:
        return (honest(block, target) + 1).clamp(max=block.shape[1] - 1)

    patch.setattr(steps, "accept", accept)


def length_after(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the length by ``change`` of n_new [B] where that is above 1 and the slot goes on."""
    honest = steps.commit

    def commit(state: steps.State, *rest: Tensor) -> Tensor:
        n_new = honest(state, *rest)
        state.length.add_(((n_new > 1) & ~state.done) * change(n_new))
        return n_new

    patch.setattr(steps, "commit", commit)


def the_length_is_one_behind(patch: Patch) -> None:
    length_after(patch, lambda n_new: torch.full_like(n_new, -1))


def the_length_is_one_ahead(patch: Patch) -> None:
    """A committed row that verification never wrote."""
    length_after(patch, lambda n_new: (n_new < WIDTH).int())


def the_anchor_is_the_last_proposal(patch: Patch) -> None:
    honest = steps.commit

    def commit(state: steps.State, target: Tensor, *rest: Tensor) -> Tensor:
        n_new = honest(state, target, *rest)
        before = target.gather(1, (n_new - 2).clamp(min=0)[:, None])[:, 0]
        state.anchor.copy_(torch.where(n_new > 1, before, state.anchor))
        return n_new

    patch.setattr(steps, "commit", commit)


def nothing_is_committed(patch: Patch) -> None:
    """And the check does not wait for an end."""
    patch.setattr(steps, "commit", lambda state, *_: torch.zeros_like(state.length))


BETWEEN_PASSES = [
    one_too_many_is_accepted,
    the_length_is_one_behind,
    the_length_is_one_ahead,
    the_anchor_is_the_last_proposal,
    nothing_is_committed,
]


@pytest.mark.parametrize("plant", BETWEEN_PASSES, ids=lambda plant: plant.__name__)
def test_a_fault_between_passes_shows_in_the_replay(
    tiny: Path, monkeypatch: Patch, plant: Any
) -> None:
    """Rows are alike then, so it is the replay that differs."""
    runner, _ = build(tiny), Passes(monkeypatch)
    plant(monkeypatch)
    found = found_in(runner)
    assert (found.holds, found.n_differing, found.replay_equal) == (False, 0, False)


# Each part of the check alone: what one does not see, another would cover for.


def test_logits_are_compared_to_the_bit(tiny: Path) -> None:
    """One logit of one row of the widest block, by one ulp; and a zero of the other sign."""

    def one_ulp(out: Tensor) -> Tensor:
        change = torch.zeros_like(out)
        if out.shape[:-1] == (SLOTS, WIDTH):
            change[:, 5, 7] = (one_ulp_up(out) - out)[:, 5, 7]
        return change

    runner = build(tiny)
    tamper(runner, "lm_head", one_ulp)
    found = found_in(runner)
    assert 0 < found.n_differing < found.n_rows / 2, str(found)

    def linear(x: Tensor, weight: Tensor, row_multiple: int, gated: bool) -> Tensor:
        out = exact_linear(x, weight, row_multiple, gated)
        if weight is runner.model.verifier.lm_head.weight:
            out[..., 9] = 0.0 if x.dim() > 2 and x.shape[1] == WIDTH else -0.0
        return out

    use(runner, products=PlainProducts(linear=linear))
    found = found_in(runner)
    assert (found.n_differing > 0, found.replay_equal) == (True, False)


def test_the_replay_compares_logits_to_the_bit(tiny: Path) -> None:
    """Only where slots are at work, and so in the replay alone, is one logit an ulp greater."""
    runner = build(tiny)

    def term(out: Tensor) -> Tensor:
        change = torch.zeros_like(out)
        if not runner.state.done.all() and out.dim() > 1:
            change[:, 1:, 7] = (one_ulp_up(out) - out)[:, 1:, 7]
        return change

    tamper(runner, "lm_head", term)
    found = found_in(runner)
    assert (found.n_differing, found.replay_equal) == (0, False)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("in_replay", [False, True])
def test_cache_rows_are_compared_to_the_bit(
    tiny: Path, name: str, layer: int, in_replay: bool
) -> None:
    """One element of a row follows its place in the block by an ulp, and nothing reads it."""
    runner, honest = build(tiny), attention()
    rows = {"k": runner.cache.k, "v": runner.cache.v}[name][layer]

    def write(partials: Tensor, *rest: Any) -> Tensor:
        *_, positions, slot, k_cache, v_cache = rest
        q = qk_norm_rope_write(partials, *rest)
        is_run = in_replay != bool(runner.state.done.all())
        if is_run and (k_cache is rows or v_cache is rows):
            at = (slot[:, None], 0, positions[:, 1:], 3)
            rows[at] = one_ulp_up(rows[at])
        return q

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, causal: bool) -> Tensor:
        k, v = k.clone(), v.clone()
        k[..., 3] = v[..., 3] = 0.0
        return honest(q, k, v, *rest, causal=causal)

    use(runner, attend=attend)
    assert found_in(runner).holds
    use(runner, qk_norm_rope_write=write)
    found = found_in(runner)
    assert (found.n_differing == 0, found.replay_equal) == (in_replay, not in_replay)


def test_a_fault_of_prefill_alone_is_counted_in_its_rows(tiny: Path) -> None:
    """Neither blocks nor the replay see it."""
    runner = build(tiny)
    long_chunks_take_another_tile(runner, Patch())
    found = found_in(runner)
    assert found.replay_equal
    assert 0 < found.n_differing <= 2 * (32 + 17)


# Faults that the check does not see, because they are the same in all rows and both modes, or
# because it never drafts. They show where texts are held against the judge, and one mode's rows
# against the other's.


def text_of(runner: EagerRunner, drafting: bool, n_new: int = 30) -> list[int]:
    """Tokens after the prompt [1, 2, 3], of which slot 0 has the rows."""
    tokens = start(runner, [1, 2, 3], 0, 3 + n_new, drafting=drafting).tokens
    while not runner.state.done[0]:
        runner.launch(drafting, WIDTH if drafting else 1)
        tokens += runner.read()[0].tokens
    return tokens


def test_a_mask_one_narrow_everywhere_shows_against_the_judge(tiny: Path) -> None:
    def visible(key: Tensor, own: Tensor, width: int) -> Tensor:
        """No row sees itself, but for the first one of all."""
        return (key < own) | ((key == 0) & (own == 0))

    expected, _ = Judge(tiny).generate([1, 2, 3], 30, ())
    runner = build(tiny)
    assert text_of(runner, drafting=False) == expected
    use(runner, attend=attention(visible))
    assert found_in(runner).holds
    assert text_of(runner, drafting=False) != expected


def test_a_draft_over_a_committed_row_shows_between_the_modes(
    tiny: Path, monkeypatch: Patch
) -> None:
    runner = build(tiny, slots=1)
    honest = steps.draft

    def one_early(model: Transformer, cache: Any, state: steps.State, *rest: Any) -> None:
        honest(model, cache, dataclasses.replace(state, length=state.length - 1), *rest)

    def rows_of(drafting: bool) -> list[Tensor]:
        text_of(runner, drafting)
        length = int(runner.state.length[0])
        return [rows[:, :, :length].clone() for rows in (*runner.cache.k, *runner.cache.v)]

    expected = rows_of(drafting=False)
    assert all(map(torch.equal, rows_of(drafting=True), expected))
    monkeypatch.setattr(steps, "draft", one_early)
    assert found_in(runner).holds
    got = rows_of(drafting=True)
    assert not all(map(torch.equal, got, expected))
