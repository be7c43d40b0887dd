"""The invariance check on the CPU: it holds, it leaves no trace, and planted faults are caught."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import orthrus_fast
from orthrus_fast import Decoder, SamplingParams, invariance, steps
from orthrus_fast.attention import sdpa
from orthrus_fast.invariance import Invariance, check, ensure_row_invariance
from orthrus_fast.kernels.interface import Attend, Products
from orthrus_fast.kernels.plain import PlainProducts, add_norm, qk_norm_rope_write
from orthrus_fast.model import Transformer
from orthrus_fast.runners import EagerRunner
from tests.checkpoints import tile_boundaries, write_checkpoint
from tests.decoders import committed
from tests.judge import Judge
from tests.kernel_compile import interpreted
from tests.marks import slow_but

WIDTH = 16
SLOTS = 2
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="orthrus_fast")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied: with tied embeddings the replay's text is one token, and hides what follows it."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    return write_checkpoint(directory, seed=8, tied=False, block_size=WIDTH, eos_token_id=[])


def load(directory: Path, dtype: str = "float32", slots: int = SLOTS, **options: Any) -> Decoder:
    """Skips the test where this machine's own products are not row-invariant."""
    options = {"max_seq_len": 200} | options
    decoder = orthrus_fast.load(directory, device="cpu", dtype=dtype, slots=slots, **options)
    n_rows = slots * decoder.block_width
    for weight in {p for p in decoder.runner.model.parameters() if p.dim() == 2}:
        x = torch.randn(n_rows, weight.shape[1], dtype=weight.dtype)
        out, turned, same = (y @ weight.T for y in (x, x.flip(0), x[:1].repeat(n_rows, 1)))
        if not torch.equal(turned.flip(0), out) or not torch.equal(same, out[:1].expand_as(out)):
            pytest.skip(f"this CPU's matrix products are not row-invariant at {n_rows} rows")
    return decoder


def found_in(decoder: Decoder) -> Invariance:
    runner = decoder.runner
    return check(runner, decoder.block_width, tile_boundaries("sdpa", runner.cache.capacity))


def ready(runner: EagerRunner) -> None:
    """As a runner that compiles is when it comes to the check: it has run a pass."""
    with torch.inference_mode():
        runner.verify(runner.state.proposals.shape[1] + 1)


# What an honest pass gives


@pytest.mark.parametrize(
    "dtype, slots",
    slow_but(
        [("float64", 1), ("float32", 4), ("bfloat16", 2), ("float16", 2)],
        product(["float64", "float32", "bfloat16", "float16"], [1, 2, 4]),
    ),
)
def test_an_honest_pass_holds(tiny: Path, dtype: str, slots: int) -> None:
    found = found_in(load(tiny, dtype, slots))
    assert found.holds, str(found)
    assert (found.n_differing, found.replay_equal, found.replaced) == (0, True, ())
    # A third of the block and a row later there are 10 of its 16 rows left; and AR's one, twice.
    assert found.n_rows == slots * 4 * (10 + 1 + 1)  # at 64, 128, 192, 256 of 320 rows
    assert found.n_replayed == slots * 64
    assert found.seconds > 0


def test_across_the_attentions_own_tile(tmp_path: Path) -> None:
    """sdpa reads 512 keys at a time: the block at 512 begins in one tile and ends in the next."""
    directory = write_checkpoint(
        tmp_path / "model", seed=3, block_size=WIDTH, max_position_embeddings=1100, eos_token_id=[]
    )
    decoder = load(directory, max_seq_len=1100)
    assert 512 in tile_boundaries("sdpa", decoder.runner.cache.capacity)
    assert found_in(decoder).holds


def test_edges_outside_the_cache_are_passed_over(tiny: Path) -> None:
    runner = load(tiny).runner
    assert runner.cache.capacity == 320
    n_rows = []
    ready(runner)
    for places in ([64], [0, 7, 64, 300, 320, 10**6], [8], []):
        found = check(runner, WIDTH, places)
        assert found.holds
        assert found.n_replayed == SLOTS * 64
        n_rows.append(found.n_rows)
    assert n_rows == [24, 24, 24, 0]


def test_a_row_at_a_time_has_no_other_places(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False, eos_token_id=[])
    decoder = load(directory)
    ready(decoder.runner)
    found = found_in(decoder)
    assert (found.holds, found.n_rows, found.n_replayed) == (True, 0, SLOTS * 64)


def test_the_smallest_cache(tiny: Path) -> None:
    decoder = load(tiny, max_seq_len=2)
    assert decoder.runner.cache.capacity == 128
    found = found_in(decoder)
    assert found.holds
    assert found.n_rows == SLOTS * 12  # around 64
    assert found.n_replayed == SLOTS * 64


@pytest.mark.parametrize("ends", [range(272), range(0, 272, 3)])
def test_the_replay_ends_where_a_text_ends(tmp_path: Path, ends: range) -> None:
    """Rows past a slot's end are not its own, and differ as garbage does."""
    directory = write_checkpoint(
        tmp_path / "model", seed=8, tied=False, block_size=WIDTH, eos_token_id=list(ends)
    )
    found = found_in(load(directory))
    assert SLOTS <= found.n_replayed < SLOTS * 64
    assert found.holds, str(found)


def test_the_check_leaves_no_trace(tiny: Path) -> None:
    prompts = [[i + 1] * (1 + 17 * i % 70) for i in range(5)]
    expected = [result.tokens for result in load(tiny).generate(prompts, 30)]
    decoder = load(tiny)
    runner = decoder.runner
    assert [result.tokens for result in decoder.generate(prompts, 30)] == expected
    for slot in range(SLOTS):
        runner.state.settings.put(slot, SamplingParams(0.5, top_k=3, top_p=0.5, min_p=0.1, seed=7))
    random = torch.get_rng_state()
    found = found_in(decoder)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    fresh = steps.State.create(SLOTS, runner.cache.capacity, WIDTH, runner.device)
    for field in dataclasses.fields(steps.State):
        if field.name != "settings":
            assert torch.equal(getattr(runner.state, field.name), getattr(fresh, field.name)), field
    settings = zip(runner.state.settings, fresh.settings, strict=True)
    assert all(torch.equal(setting, greedy) for setting, greedy in settings)
    assert runner.state.done.all()
    assert not any(rows.any() for rows in (*runner.cache.k, *runner.cache.v))
    assert runner.in_flight == 0
    assert [result.tokens for result in decoder.generate(prompts, 30)] == expected
    again = found_in(decoder)
    assert dataclasses.replace(again, seconds=found.seconds) == found


def test_what_the_caller_has_switched_on_changes_nothing(tiny: Path) -> None:
    decoder = load(tiny)
    found = found_in(decoder)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        again = found_in(decoder)
    assert dataclasses.replace(again, seconds=found.seconds) == found


def test_only_a_decoder_with_graphs_is_checked(tiny: Path) -> None:
    assert load(tiny).invariance is None


def test_what_was_found_is_one_line() -> None:
    found = Invariance(True, 48, 0, 64, True, (), 0.26)
    assert str(found) == (
        "48 rows in other places equal to the bit; 64 tokens replayed equal to the bit (0.3 s)"
    )
    found = Invariance(False, 48, 3, 64, False, ("32 × 48", "96 × 32"), 1.0)
    assert str(found) == (
        "48 rows in other places 3 differ; 64 tokens replayed differ; "
        "custom kernels in place of cuBLAS: 32 × 48, 96 × 32 (1.0 s)"
    )


# Planted faults that it must catch


def use(runner: EagerRunner, **kernels: Any) -> None:
    """Put these in place of the model's kernels of those names."""
    runner.model.kernels = dataclasses.replace(runner.model.kernels, **kernels)


def attend_by(runner: EagerRunner, attend: Attend) -> None:
    use(runner, attend=attend)


def adding(term: Callable[[Tensor], Tensor]) -> Attend:
    """The honest backend, and on top ``term`` of the rows' start [R] -> [R or 1, T or 1, 1, 1]."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        return sdpa.attend(q, k, v, start, slot, causal=causal) + term(start)

    return attend


def coarse(x: Tensor) -> Tensor:
    """x rounded to bfloat16: then on every machine another order of summation has other bits."""
    return x.to(torch.bfloat16).to(x.dtype)


def splitting(boundaries: Callable[[int, int], list[int]]) -> Attend:
    """Keys in splits, each with its own softmax, then combined: what a GPU kernel does.

    ``boundaries`` of the visible length and the capacity: where splits begin, after 0. What a
    split leaves is ``coarse``.
    """

    def attend(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        start: Tensor,
        slot: Tensor,
        prefetch: Tensor | None = None,
        *,
        causal: bool,
    ) -> Tensor:
        capacity, group = k_cache.shape[2], q.shape[2] // k_cache.shape[1]
        rows = []
        for r in range(len(q)):
            k, v = (c[int(slot[r])].repeat_interleave(group, 0) for c in (k_cache, v_cache))
            scores = torch.einsum("thd,hsd->hts", q[r], k) / math.sqrt(q.shape[-1])
            visible = sdpa._visible_keys(start[r, None], q.shape[1], capacity, causal=causal)
            scores = scores.masked_fill(~visible, -1e9)
            begins = [0, *boundaries(int(start[r]) + q.shape[1], capacity), capacity]
            parts = [scores[..., a:b] for a, b in zip(begins, begins[1:], strict=False)]
            best = [part.amax(-1, keepdim=True) for part in parts]
            weights = [(part - top).exp() for part, top in zip(parts, best, strict=True)]
            highest = torch.stack(best).amax(0)
            scales = [(top - highest).exp() for top in best]
            total = sum(w.sum(-1, keepdim=True) * s for w, s in zip(weights, scales, strict=True))
            places = zip(weights, scales, begins, begins[1:], strict=False)
            mixed = sum(coarse(w @ v[:, a:b]) * s for w, s, a, b in places)
            rows.append((mixed / total).transpose(0, 1))
        return torch.stack(rows).contiguous()

    return attend


def split_at_fixed_places(length: int, capacity: int) -> list[int]:
    return list(range(64, capacity, 64))


def split_by_length(length: int, capacity: int) -> list[int]:
    n_splits = 1 + length // 32
    return [length * i // n_splits for i in range(1, n_splits)]


def test_splits_at_fixed_places_hold(tiny: Path) -> None:
    """The fault below is where the splits lie, not that there are some."""
    decoder = load(tiny)
    attend_by(decoder.runner, splitting(split_at_fixed_places))
    assert found_in(decoder).holds


def splits_follow_the_length(runner: EagerRunner, patch: Patch) -> None:
    attend_by(runner, splitting(split_by_length))


def one_ulp_follows_the_length(runner: EagerRunner, patch: Patch) -> None:
    """As where keys are summed in another order once there are more of them."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        out = sdpa.attend(q, k, v, start, slot, causal=causal)
        odd = (start % 2 == 1)[:, None, None, None]
        return torch.where(odd, one_ulp_up(out), out)

    attend_by(runner, attend)


def one_ulp_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, math.inf))


def a_term_follows_the_start(runner: EagerRunner, patch: Patch) -> None:
    attend_by(runner, adding(lambda start: 1e-7 * start[:, None, None, None]))


def a_term_follows_the_row_in_the_block(runner: EagerRunner, patch: Patch) -> None:
    attend_by(runner, adding(lambda start: 1e-6 * torch.arange(WIDTH)[None, :, None, None]))


def two_launches_differ(runner: EagerRunner, patch: Patch) -> None:
    launches = iter(range(10**6))
    attend_by(runner, adding(lambda start: torch.tensor(1e-6 * (next(launches) % 7))))


def seen_by(runner: EagerRunner, patch: Patch, extra: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Show rows more keys: ``extra`` of key [visible] and the row's own position [R, T, 1]."""
    honest = sdpa._visible_keys

    def visible_keys(start: Tensor, width: int, visible: int, *, causal: bool) -> Tensor:
        own = start[:, None, None] + torch.arange(width)[:, None]
        shown = honest(start, width, visible, causal=causal)
        return shown | extra(torch.arange(visible), own)

    patch.setattr(sdpa, "_visible_keys", visible_keys)


def the_mask_is_one_wide(runner: EagerRunner, patch: Patch) -> None:
    seen_by(runner, patch, lambda key, own: key == own + 1)


def scratch_rows_are_read(runner: EagerRunner, patch: Patch) -> None:
    """A row past the block, that an earlier and rejected block wrote."""
    seen_by(runner, patch, lambda key, own: key == own + WIDTH)


def the_caches_last_row_is_read(runner: EagerRunner, patch: Patch) -> None:
    """Far from all edges: in the replay alone there is new garbage."""
    last = runner.cache.capacity - 1
    patch.setattr(sdpa, "VISIBLE_MULTIPLE", last + 1)
    seen_by(runner, patch, lambda key, own: (key == last) & (own >= 0))


def verification_looks_both_ways(runner: EagerRunner, patch: Patch) -> None:
    def attend(*arguments: Tensor, causal: bool) -> Tensor:
        return sdpa.attend(*arguments, causal=False)

    attend_by(runner, attend)


def every_slot_reads_the_first_ones_cache(runner: EagerRunner, patch: Patch) -> None:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        return sdpa.attend(q, k, v, start, torch.zeros_like(slot), causal=causal)

    attend_by(runner, attend)


Shapes = frozenset[tuple[int, int]]
Term = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tampered(PlainProducts):
    """The library's products; on top of one weight's, ``term`` of its result [R, T, N].

    As in CustomProducts there are kernels of ours, that do the shapes of ``table`` in any case,
    and the others if forced. The fault is gone once they do all that it ``needs``; None: never.
    """

    has_custom: ClassVar[bool] = True
    weight: Tensor
    term: Term
    needs: Shapes | None = None
    table: Shapes = frozenset()
    forced: Shapes = frozenset()

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(x, weight)
        gone = self.needs is not None and self.needs <= self.table | self.forced
        return out if weight is not self.weight or gone else out + self.term(out)

    def partials(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.product(x, weight)[None]

    def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
        gate, up = self.product(x, weight).chunk(2, dim=-1)
        return F.silu(gate) * up

    def lm_head_argmax(
        self, x: Tensor, weight: Tensor, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        product = self.product(x, weight)
        return product.argmax(dim=-1), product

    def is_custom(self, n_rows: int, weight: Tensor) -> bool:
        return tuple(weight.shape) in self.table | self.forced

    def without_cublas(self, shapes: Shapes) -> Tampered:
        return dataclasses.replace(self, forced=shapes)


def weight_of(model: Transformer, name: str, layer: int = 0) -> Tensor:
    """The weight of a product of a verify pass."""
    module: Any = model.layers[layer]
    owners = {"qkv": module.attention, "o": module.attention, "lm_head": model}
    owner = owners.get(name, module.mlp)
    weight: Tensor = getattr(owner, name).weight
    return weight


def by_row(out: Tensor) -> Tensor:
    return 1e-6 * torch.arange(out.shape[1])[:, None].to(out.dtype)


def by_neighbours(out: Tensor) -> Tensor:
    return 1e-6 * out.mean(1, keepdim=True)


def tamper(runner: EagerRunner, name: str, term: Term, layer: int = 0) -> None:
    use(runner, products=Tampered(weight_of(runner.model, name, layer), term))


class SplitProducts(PlainProducts):
    """Of a product whose inner dimension is split: the sum of two parts, as a GPU's kernel has it.

    ``split`` of the rows [T, 1] and the inner dimension: where the second part begins. The parts
    are ``coarse``.
    """

    def __init__(self, split: Callable[[Tensor, int], Tensor]) -> None:
        self.split = split

    def partials(self, x: Tensor, weight: Tensor) -> Tensor:
        inner = torch.arange(x.shape[-1])
        first = inner < self.split(torch.arange(x.shape[1])[:, None], x.shape[-1])
        terms = (
            x[..., None, :] * weight
        )  # and no product of the library's, of which little is known
        return torch.stack([coarse((terms * part[:, None]).sum(-1)) for part in (first, ~first)])


def test_products_in_parts_hold(tiny: Path) -> None:
    decoder = load(tiny)
    use(decoder.runner, products=SplitProducts(lambda row, n: row * 0 + n // 2))
    assert found_in(decoder).holds


def the_inner_dimension_is_split_by_the_row(runner: EagerRunner, patch: Patch) -> None:
    use(runner, products=SplitProducts(lambda row, n: (row % 3 + 1) * n // 4))


def a_later_layers_product_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    tamper(runner, "down", by_row, layer=1)


class Choosing(PlainProducts):
    """Greedy ids that are not those of the logits, in all rows but the first."""

    def lm_head_argmax(
        self, x: Tensor, weight: Tensor, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        _, product = super().lm_head_argmax(x, weight, return_logits)
        ids = product.topk(2, dim=-1).indices
        return torch.cat((ids[:, :1, 0], ids[:, 1:, 1]), dim=1), product


def the_choice_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    use(runner, products=Choosing())


def a_norm_follows_the_row(runner: EagerRunner, patch: Patch) -> None:
    def wrong(
        x: Tensor, parts: Tensor, weight: Tensor, eps: float, prefetch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x, normed = add_norm(x, parts, weight, eps)
        return x, normed + by_row(normed)

    use(runner, add_norm=wrong)


def the_residual_follows_the_neighbours(runner: EagerRunner, patch: Patch) -> None:
    def wrong(
        x: Tensor, parts: Tensor, weight: Tensor, eps: float, prefetch: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_norm(x + by_neighbours(x), parts, weight, eps)

    use(runner, add_norm=wrong)


def positions_restart_with_the_block(runner: EagerRunner, patch: Patch) -> None:
    honest = runner.model.embed

    def embed(tokens: Tensor, start: Tensor, slot: Tensor) -> Any:
        x, places = honest(tokens, start, slot)
        cos, sin = (t[: tokens.shape[1]] for t in (runner.model.rope_cos, runner.model.rope_sin))
        return x, places._replace(cos=cos.expand_as(places.cos), sin=sin.expand_as(places.sin))

    patch.setattr(runner.model, "embed", embed)


def the_anchors_row_is_not_written(runner: EagerRunner, patch: Patch) -> None:
    """What lies there stays: an earlier block's row, or a draft's."""

    def write(parts: Tensor, *rest: Any) -> Tensor:
        *_, positions, slot, k_cache, v_cache = rest
        first = positions[:, 0]
        kept = k_cache[slot, :, first].clone(), v_cache[slot, :, first].clone()
        q = qk_norm_rope_write(parts, *rest)
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


def one_too_many_is_accepted(runner: EagerRunner, patch: Patch) -> None:
    honest = steps.accept

    def accept(block: Tensor, target: Tensor) -> Tensor:
        return (honest(block, target) + 1).clamp(max=WIDTH - 1)

    patch.setattr(steps, "accept", accept)


def length_after(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the length by ``change`` of n_new [B] where that is above 1 and the slot goes on."""
    honest = steps.commit

    def commit(state: steps.State, *rest: Tensor) -> Tensor:
        n_new = honest(state, *rest)
        state.length.add_(((n_new > 1) & ~state.done) * change(n_new))
        return n_new

    patch.setattr(steps, "commit", commit)


def the_length_is_one_behind(runner: EagerRunner, patch: Patch) -> None:
    length_after(patch, lambda n_new: torch.full_like(n_new, -1))


def the_length_is_one_ahead(runner: EagerRunner, patch: Patch) -> None:
    """A committed row that verification never wrote."""
    length_after(patch, lambda n_new: (n_new < WIDTH).int())


def the_anchor_is_the_last_proposal(runner: EagerRunner, patch: Patch) -> None:
    honest = steps.commit

    def commit(state: steps.State, target: Tensor, *rest: Tensor) -> Tensor:
        n_new = honest(state, target, *rest)
        before = target.gather(1, (n_new - 2).clamp(min=0)[:, None])[:, 0]
        state.anchor.copy_(torch.where(n_new > 1, before, state.anchor))
        return n_new

    patch.setattr(steps, "commit", commit)


Plant = Callable[[EagerRunner, Patch], None]
BY_ROWS_OR_REPLAY: list[Plant] = [
    splits_follow_the_length,
    one_ulp_follows_the_length,
    a_term_follows_the_start,
    a_term_follows_the_row_in_the_block,
    two_launches_differ,
    the_mask_is_one_wide,
    scratch_rows_are_read,
    the_caches_last_row_is_read,
    verification_looks_both_ways,
    every_slot_reads_the_first_ones_cache,
    a_later_layers_product_follows_the_row,
    the_inner_dimension_is_split_by_the_row,
    a_norm_follows_the_row,
    the_residual_follows_the_neighbours,
    positions_restart_with_the_block,
    the_anchors_row_is_not_written,
    the_start_is_the_last_cycles,
]
IN_THE_REPLAY: list[Plant] = [
    one_too_many_is_accepted,
    the_length_is_one_behind,
    the_length_is_one_ahead,
    the_anchor_is_the_last_proposal,
    the_choice_follows_the_row,
]


@pytest.mark.parametrize("plant", BY_ROWS_OR_REPLAY, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "float64"]))
def test_a_fault_in_the_pass_is_caught(tiny: Path, dtype: str, plant: Plant) -> None:
    decoder = load(tiny, dtype)
    with pytest.MonkeyPatch.context() as patch:
        plant(decoder.runner, patch)
        found = found_in(decoder)
    assert not found.holds, str(found)


@pytest.mark.parametrize("term", [by_row, by_neighbours], ids=lambda term: term.__name__)
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "lm_head"])
@pytest.mark.parametrize("dtype", slow_but(["float32"], ["float32", "float64"]))
def test_a_fault_in_any_product_is_caught(tiny: Path, dtype: str, name: str, term: Term) -> None:
    decoder = load(tiny, dtype)
    tamper(decoder.runner, name, term)
    found = found_in(decoder)
    assert found.n_differing > 0, str(found)


@pytest.mark.parametrize("plant", IN_THE_REPLAY, ids=lambda plant: plant.__name__)
def test_a_fault_between_passes_shows_in_the_replay(tiny: Path, plant: Plant) -> None:
    """Rows are alike then, so it is the replay that differs."""
    decoder = load(tiny)
    with pytest.MonkeyPatch.context() as patch:
        plant(decoder.runner, patch)
        found = found_in(decoder)
    assert (found.holds, found.n_differing, found.replay_equal) == (False, 0, False)


# Each part of the check alone: what one does not see, another would cover for.


def test_rows_in_other_places_are_compared_to_the_bit(tiny: Path) -> None:
    """One logit of one row of the block, by one ulp."""

    def term(out: Tensor) -> Tensor:
        change = torch.zeros_like(out)
        change[:, WIDTH // 2, 7] = (one_ulp_up(out) - out)[:, WIDTH // 2, 7]
        return change

    for dtype in ("float32", "float64"):
        decoder = load(tiny, dtype)
        tamper(decoder.runner, "lm_head", term)
        found = found_in(decoder)
        assert 0 < found.n_differing < found.n_rows / 2, str(found)


def test_a_zero_of_the_other_sign_differs(tiny: Path) -> None:
    runner = load(tiny).runner
    zero_at = torch.zeros(272, dtype=torch.bool)
    zero_at[9] = True

    class Signed(PlainProducts):
        def lm_head_argmax(
            self, x: Tensor, weight: Tensor, return_logits: bool
        ) -> tuple[Tensor, Tensor]:
            _, product = super().lm_head_argmax(x, weight, return_logits)
            product = product.masked_fill(zero_at, 0.0)
            product[:, WIDTH // 2, 9] = -0.0
            return product.argmax(dim=-1), product

    use(runner, products=Signed())
    assert check(runner, WIDTH, [64]).n_differing > 0


def test_the_replay_compares_logits_to_the_bit(tiny: Path) -> None:
    """Only where slots are at work, and so in the replay alone, is one logit an ulp greater."""
    runner = load(tiny).runner

    def term(out: Tensor) -> Tensor:
        change = torch.zeros_like(out)
        if not runner.state.done.all():
            change[:, 1:, 7] = (one_ulp_up(out) - out)[:, 1:, 7]
        return change

    tamper(runner, "lm_head", term)
    found = check(runner, WIDTH, [64])
    assert (found.n_differing, found.replay_equal) == (0, False)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("name", ["k", "v"])
def test_the_replay_compares_cache_rows_to_the_bit(tiny: Path, name: str, layer: int) -> None:
    """One element of a row follows its place in the block by an ulp, and nothing reads it."""
    runner = load(tiny).runner
    caches = {"k": runner.cache.k[layer], "v": runner.cache.v[layer]}

    def write(parts: Tensor, *rest: Any) -> Tensor:
        *_, positions, slot, k_cache, v_cache = rest
        q = qk_norm_rope_write(parts, *rest)
        if k_cache is runner.cache.k[layer]:
            at = (slot[:, None], 0, positions[:, 1:], 3)
            caches[name][at] = one_ulp_up(caches[name][at])
        return q

    def attend(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, slot: Tensor, *_: Any, causal: bool
    ) -> Tensor:
        k, v = k.clone(), v.clone()
        k[..., 3] = v[..., 3] = 0.0
        return sdpa.attend(q, k, v, start, slot, causal=causal)

    use(runner, attend=attend)
    assert check(runner, WIDTH, [64]).holds
    use(runner, qk_norm_rope_write=write)
    found = check(runner, WIDTH, [64])
    assert (found.n_differing, found.replay_equal) == (0, False)


def test_a_commit_that_never_advances_is_caught(tiny: Path, monkeypatch: Patch) -> None:
    """And does not keep the check waiting for an end."""
    decoder = load(tiny)
    runner, n_passes = decoder.runner, 0
    verify = runner.verify

    def counted(width: int) -> Tensor:
        nonlocal n_passes
        n_passes += 1
        assert n_passes < 1000
        return verify(width)

    monkeypatch.setattr(runner, "verify", counted)
    monkeypatch.setattr(steps, "commit", lambda state, *_: torch.zeros_like(state.length))
    assert not found_in(decoder).holds


# Faults that the check does not see, because they are the same in all rows and both modes, or
# because it never drafts. They show where texts are held against the judge and one mode's rows
# against the other's, as test_decoder.py does for the honest decoder.


def test_a_mask_one_narrow_everywhere_shows_against_the_judge(tiny: Path) -> None:
    def visible_keys(start: Tensor, width: int, visible: int, *, causal: bool) -> Tensor:
        """No row sees itself, but for the first one of all."""
        key, own = torch.arange(visible), start[:, None, None] + torch.arange(width)[:, None]
        return (key < own) | ((key == 0) & (own == 0))

    expected, _ = Judge(tiny).generate([1, 2, 3], 30, ())
    decoder = load(tiny, "float64")
    assert decoder.generate([1, 2, 3], 30, mode="ar").tokens == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_visible_keys", visible_keys)
        assert found_in(decoder).holds
        assert decoder.generate([1, 2, 3], 30, mode="ar").tokens != expected


def test_a_start_one_early_everywhere_shows_against_the_judge(tiny: Path) -> None:
    """The check may see this one, by a scratch row that it takes for the last committed one."""
    honest = steps.verify

    def verify(model: Transformer, cache: Any, state: steps.State, block: Tensor) -> Any:
        return honest(model, cache, dataclasses.replace(state, length=state.length - 1), block)

    expected, _ = Judge(tiny).generate([1, 2, 3], 30, ())
    decoder = load(tiny, "float64", slots=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "verify", verify)
        assert decoder.generate([1, 2, 3], 30, mode="ar").tokens != expected
    assert decoder.generate([1, 2, 3], 30, mode="ar").tokens == expected


def test_a_draft_over_a_committed_row_shows_between_the_modes(tiny: Path) -> None:
    decoder = load(tiny, slots=1)
    honest = steps.draft

    def one_early(model: Transformer, cache: Any, state: steps.State, mask: int, _: Any) -> None:
        honest(model, cache, dataclasses.replace(state, length=state.length - 1), mask)

    def rows_of(mode: str) -> list[Tensor]:
        decoder.generate([1, 2, 3], 60, mode=mode)
        return [tensor.clone() for layer in range(2) for tensor in committed(decoder, layer)]

    expected = rows_of("ar")
    assert all(map(torch.equal, rows_of("diffusion"), expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "draft", one_early)
        assert found_in(decoder).holds
        got = rows_of("diffusion")
    assert not all(map(torch.equal, got, expected))


# ensure_row_invariance: what is done about a pass that is not invariant

SHAPES = {  # of the products of a verify pass, [N, K] by name
    "qkv": (128, 32),
    "o": (32, 64),
    "gate_up": (96, 32),
    "down": (32, 48),
    "lm_head": (272, 32),
}


EVERY: Shapes = frozenset(SHAPES.values())


class Workshop:
    """Builds runners for ``ensure_row_invariance``; notes what is done to the products, in order.

    ``failing`` are the products that fail on their own. The products are honest; ``plant`` plants a
    fault. ``table`` are shapes that a kernel of ours does in any case.
    """

    def __init__(
        self,
        decoder: Decoder,
        patch: Patch,
        failing: tuple[str, ...] = (),
        table: Shapes = frozenset(),
    ) -> None:
        self.runner = decoder.runner
        self.model = self.runner.model
        self.failing = {SHAPES[name] for name in failing}
        self.table = table
        self.done: list[str] = []
        self.rows_looked_at = 0
        self.plant("down", frozenset())
        patch.setattr(invariance, "variant_products", self.variant_products)
        replace_products = invariance.replace_products

        def replacing(model: Transformer, shapes: set[tuple[int, int]]) -> None:
            assert model is self.model
            replace_products(model, shapes)
            if shapes:
                self.done.append(f"replace {len(shapes)}")

        patch.setattr(invariance, "replace_products", replacing)

    def plant(self, name: str, needs: Shapes, term: Term = by_row) -> None:
        """Tamper with a product, until ``needs`` are done by kernels of ours."""
        weight = weight_of(self.model, name)
        use(self.runner, products=Tampered(weight, term, needs, self.table))

    def variant_products(self, model: Transformer, n_rows: int) -> set[tuple[int, int]]:
        assert model is self.model
        self.rows_looked_at = n_rows
        return set(self.failing)

    def build(self) -> EagerRunner:
        workshop = self

        class Noted(EagerRunner):
            def prepare(self, width: int, sampling: bool = False) -> None:
                workshop.done.append(f"prepare {width}")

        self.runner = Noted(self.model, self.runner.state, self.runner.cache)
        return self.runner

    def ensure_row_invariance(self) -> Invariance:
        runner, found = ensure_row_invariance(self.model, self.build, SLOTS, WIDTH, [64])
        assert runner is self.runner
        return found


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and text of what the library has said."""
    records = [record for record in caplog.records if record.name == "orthrus_fast"]
    return [(record.levelname, record.getMessage()) for record in records]


def without_tiles(*names: str) -> tuple[str, str]:
    """The line that is logged about products that are the library's."""
    shapes = ", ".join(f"{n} × {k}" for n, k in sorted(SHAPES[name] for name in names))
    return "INFO", f"no tiles for {shapes} at {SLOTS * WIDTH} rows: cuBLAS"


def test_ensure_with_nothing_to_do(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """All products are ours already."""
    workshop = Workshop(load(tiny), monkeypatch, table=EVERY)
    found = workshop.ensure_row_invariance()
    assert (found.holds, found.replaced) == (True, ())
    assert workshop.done == [f"prepare {WIDTH}"]
    assert workshop.rows_looked_at == SLOTS * WIDTH
    assert logged(caplog) == [("INFO", f"row invariance holds: {found}")]


@pytest.mark.parametrize("names", [("gate_up",), ("qkv", "lm_head"), tuple(SHAPES)])
def test_products_without_tiles_are_named(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, names: tuple[str, ...]
) -> None:
    """They stay the library's, as long as they do no harm."""
    table = EVERY - {SHAPES[name] for name in names}
    workshop = Workshop(load(tiny), monkeypatch, table=table)
    found = workshop.ensure_row_invariance()
    assert (found.holds, found.replaced) == (True, ())
    assert workshop.done == [f"prepare {WIDTH}"]
    assert logged(caplog) == [without_tiles(*names), ("INFO", f"row invariance holds: {found}")]


def test_where_all_products_are_the_librarys_none_is_claimed(
    tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No kernels of ours: nothing to replace, no second try, no word of tiles."""
    decoder = load(tiny)
    runner, n_built = decoder.runner, 0
    library = runner.model.kernels.products

    def build() -> EagerRunner:
        nonlocal n_built
        n_built += 1
        ready(runner)
        return runner

    found = ensure_row_invariance(runner.model, build, SLOTS, WIDTH, [64])[1]
    assert (found.holds, found.replaced, n_built) == (True, (), 1)
    with pytest.MonkeyPatch.context() as patch:
        a_term_follows_the_start(runner, patch)
        failed = ensure_row_invariance(runner.model, build, SLOTS, WIDTH, [64])[1]
    assert (failed.holds, failed.replaced, n_built) == (False, (), 2)
    assert runner.model.kernels.products is library
    assert logged(caplog) == [
        ("INFO", f"row invariance holds: {found}"),
        ("WARNING", f"row invariance DOES NOT HOLD: {failed}"),
    ]


def test_a_failing_product_is_replaced_before_anything_is_compiled(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(load(tiny), monkeypatch, failing=("down", "qkv"))
    workshop.plant("down", needs=frozenset({SHAPES["down"]}))
    found = workshop.ensure_row_invariance()
    assert (found.holds, found.replaced) == (True, ("32 × 48", "128 × 32"))
    assert workshop.done == ["replace 2", f"prepare {WIDTH}"]
    assert logged(caplog) == [
        without_tiles("o", "gate_up", "lm_head"),
        ("INFO", f"row invariance holds: {found}"),
    ]
    assert "custom kernels in place of cuBLAS: 32 × 48, 128 × 32" in caplog.messages[-1]


@pytest.mark.parametrize("name", SHAPES)
def test_a_failing_pass_has_all_its_products_replaced(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Each product passes alone, the pass does not."""
    workshop = Workshop(load(tiny), monkeypatch)
    workshop.plant(name, needs=EVERY)
    found = workshop.ensure_row_invariance()
    assert found.holds
    assert found.replaced == tuple(f"{n} × {k}" for n, k in sorted(EVERY))
    assert workshop.done == [f"prepare {WIDTH}", "replace 5", f"prepare {WIDTH}"]
    assert [level for level, _ in logged(caplog)] == ["INFO", "WARNING", "INFO"]
    assert "not row-invariant with products of cuBLAS" in caplog.messages[-2]


def test_what_is_ours_already_is_not_claimed_as_replaced(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    ours = frozenset({SHAPES["qkv"], SHAPES["gate_up"]})
    workshop = Workshop(load(tiny), monkeypatch, failing=("o",), table=ours)
    workshop.plant("lm_head", needs=EVERY)
    found = workshop.ensure_row_invariance()
    assert found.holds
    assert found.replaced == ("32 × 48", "32 × 64", "272 × 32")
    assert workshop.done == ["replace 1", f"prepare {WIDTH}", "replace 3", f"prepare {WIDTH}"]
    assert logged(caplog)[0] == without_tiles("down", "lm_head")


def test_a_pass_that_still_fails_is_said_to(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(load(tiny), monkeypatch, failing=("o",))
    a_term_follows_the_start(workshop.runner, monkeypatch)
    found = workshop.ensure_row_invariance()
    assert not found.holds
    assert found.n_differing > 0
    assert len(found.replaced) == len(SHAPES)
    assert workshop.done == ["replace 1", f"prepare {WIDTH}", "replace 5", f"prepare {WIDTH}"]
    assert [level for level, _ in logged(caplog)] == ["INFO", "WARNING", "WARNING"]
    assert "row invariance DOES NOT HOLD" in caplog.messages[-1]


@pytest.mark.parametrize("table", [frozenset(), EVERY], ids=["all fail alone", "all are ours"])
def test_there_is_no_second_try_without_another_way(
    tiny: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, table: Shapes
) -> None:
    failing = () if table else tuple(SHAPES)
    workshop = Workshop(load(tiny), monkeypatch, failing, table)
    a_term_follows_the_start(workshop.runner, monkeypatch)
    found = workshop.ensure_row_invariance()
    assert not found.holds
    assert len(found.replaced) == len(failing)
    assert workshop.done == [*["replace 5"][: len(failing)], f"prepare {WIDTH}"]
    assert [level for level, _ in logged(caplog)] == ["WARNING"]


def test_ensure_leaves_state_and_cache_as_new(tiny: Path, monkeypatch: Patch) -> None:
    decoder = load(tiny)
    expected = decoder.generate([1, 2, 3], 40).tokens
    workshop = Workshop(decoder, monkeypatch)
    workshop.plant("down", needs=EVERY)
    assert workshop.ensure_row_invariance().holds
    assert workshop.runner.state.done.all()
    assert not any(rows.any() for rows in (*workshop.runner.cache.k, *workshop.runner.cache.v))
    decoder.runner = workshop.runner
    assert decoder.generate([1, 2, 3], 40).tokens == expected


def test_the_time_on_products_counts(tiny: Path, monkeypatch: Patch) -> None:
    workshop = Workshop(load(tiny), monkeypatch)
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    assert workshop.ensure_row_invariance().seconds == 20.0


# The products themselves


@pytest.fixture
def interpreter() -> Iterator[Any]:
    """The module of our own products, whose kernels run on the CPU."""
    pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")
    from orthrus_fast.kernels import products

    with interpreted(products):
        yield products


@contextmanager
def failing_library(*names: str) -> Iterator[None]:
    """Within, where products are looked at alone, the library's of these names follow the row."""
    failing = {SHAPES[name] for name in names}

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(x, weight)
        wrong = 1e-6 * torch.arange(len(x))[:, None] * (tuple(weight.shape) in failing)
        return out + wrong.to(out.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(invariance, "F", SimpleNamespace(linear=linear))
        yield


def custom_products(product: Any, library: Products, n_rows: int, *names: str) -> Any:
    """CustomProducts, as for a chip whose table has these shapes at ``n_rows`` rows."""
    tiles = product.Tiles(32, 16, 1, 4, 2)
    block_m = product.block_rows(n_rows)
    table = {(block_m, *SHAPES[name]): tiles for name in names}
    return product.CustomProducts(library, table, 99 * 1024)


def test_which_products_fail_on_their_own(tiny: Path, interpreter: Any) -> None:
    runner = load(tiny).runner
    model, n_rows = runner.model, SLOTS * WIDTH
    honest = model.kernels.products
    with failing_library(*SHAPES):
        assert invariance.cublas_products(model, n_rows) == {}  # no kernels of ours
        assert invariance.variant_products(model, n_rows) == set()
    use(runner, products=custom_products(interpreter, honest, n_rows))
    assert set(invariance.cublas_products(model, n_rows)) == EVERY
    assert invariance.variant_products(model, n_rows) == set()
    for names in (("qkv",), ("o",), ("gate_up",), ("down", "lm_head")):
        with failing_library(*names):
            found = invariance.variant_products(model, n_rows)
        assert found == {SHAPES[name] for name in names}


def test_products_that_are_ours_are_not_looked_at(tiny: Path, interpreter: Any) -> None:
    """By the table, at these numbers of rows, or because they were forced."""
    runner = load(tiny).runner
    model, n_rows = runner.model, SLOTS * WIDTH
    honest = model.kernels.products
    use(runner, products=custom_products(interpreter, honest, n_rows, "qkv", "down"))
    rest = {SHAPES[name] for name in ("o", "gate_up", "lm_head")}
    with failing_library(*SHAPES):
        assert invariance.variant_products(model, n_rows) == rest
        assert invariance.variant_products(model, n_rows - 1) == rest  # the same tiles
        assert invariance.variant_products(model, n_rows // 2) == EVERY  # no such tiles
        invariance.replace_products(model, {SHAPES["o"]})
        assert invariance.variant_products(model, n_rows) == rest - {SHAPES["o"]}
        assert invariance.variant_products(model, n_rows // 2) == EVERY - {SHAPES["o"]}
    products: Any = model.kernels.products
    assert products.cublas is honest


def test_a_weight_of_every_shape_is_looked_at(tiny: Path, interpreter: Any) -> None:
    runner = load(tiny).runner
    model, n_rows = runner.model, SLOTS * WIDTH
    use(runner, products=custom_products(interpreter, model.kernels.products, n_rows, "o"))
    weights = invariance.cublas_products(model, n_rows)
    assert set(weights) == EVERY - {SHAPES["o"]}
    parameters = {id(weight) for weight in model.parameters()}
    for shape, weight in weights.items():
        assert tuple(weight.shape) == shape
        assert id(weight) in parameters


class Refusing(PlainProducts):
    """A library that must not be asked."""

    def partials(self, x: Tensor, weight: Tensor) -> Tensor:
        raise AssertionError("the library was asked")

    def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
        raise AssertionError("the library was asked")

    def lm_head_argmax(
        self, x: Tensor, weight: Tensor, return_logits: bool
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("the library was asked")


def test_replaced_products_decode_the_same_text(tiny: Path, interpreter: Any) -> None:
    """All of them, in both views and in prefill."""
    decoder = load(tiny, slots=1)
    expected = [decoder.generate([1, 2, 3], 4, mode=mode).tokens for mode in ("ar", "diffusion")]
    runner = decoder.runner
    use(runner, products=custom_products(interpreter, Refusing(), WIDTH))
    with pytest.raises(AssertionError, match="the library was asked"):
        decoder.generate([1, 2, 3], 8)
    before = runner.model.kernels
    invariance.replace_products(runner.model, set(EVERY))
    assert dataclasses.replace(runner.model.kernels, products=before.products) == before
    got = [decoder.generate([1, 2, 3], 4, mode=mode).tokens for mode in ("ar", "diffusion")]
    assert got == expected


def test_ensure_with_our_own_kernels(
    tmp_path: Path, interpreter: Any, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing stands in here but the interpreter: a library whose rows differ is replaced.

    "o" is ours from the start; "down" and the head fail alone; "gate_up" differs in the pass only.
    """
    monkeypatch.setattr(invariance, "N_REPLAYED", 12)  # the interpreter takes its time
    width = 4
    directory = write_checkpoint(tmp_path / "model", seed=8, tied=False, block_size=width)
    runner = load(directory, slots=1).runner
    model = runner.model

    class Library(PlainProducts):
        """As the CPU's, but that gate_up follows the row."""

        def swiglu(self, x: Tensor, weight: Tensor, prefetch: Tensor | None = None) -> Tensor:
            hidden = super().swiglu(x, weight, prefetch)
            return hidden + by_row(hidden)

    use(runner, products=custom_products(interpreter, Library(), width, "o"))
    built = []

    def build() -> EagerRunner:
        products: Any = model.kernels.products
        built.append(products.forced)
        made = EagerRunner(model, runner.state, runner.cache)
        ready(made)
        return made

    with failing_library("down", "lm_head", "o"):
        found = ensure_row_invariance(model, build, 1, width, [64])[1]
    assert built == [{SHAPES["down"], SHAPES["lm_head"]}, EVERY - {SHAPES["o"]}]
    assert found.holds, str(found)
    assert found.replaced == ("32 × 48", "96 × 32", "128 × 32", "272 × 32")
    assert [level for level, _ in logged(caplog)] == ["INFO", "WARNING", "INFO"]
    assert caplog.messages[0] == "no tiles for 96 × 32, 128 × 32 at 4 rows: cuBLAS"
