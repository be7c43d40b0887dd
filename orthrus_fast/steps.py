"""One decoding cycle, step by step: draft, verify, accept, commit; and prefill before the first.

Each step is a function of tensors that reads nothing on the host, so that the same lines can be
captured in a CUDA graph. A step that may sample takes a kernel ``sample``; None means that every
slot is greedy. Shapes: B slots, K block size, T rows of a block, at most K, S cache rows, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus_fast.cache import KVCache
from orthrus_fast.kernels.interface import CommitAccepted, Logprobs, Sample
from orthrus_fast.kernels.plain_sampling import choose
from orthrus_fast.model import Transformer
from orthrus_fast.sampling import NO_TOKEN, SamplingParams, Settings

PREFILL_CHUNK = 2048  # rows of one prefill pass, at most
PREFILL_WIDTHS = (64, 256, 512, 1024, PREFILL_CHUNK)  # those that are captured
CHEAP_WIDTH = 256  # up to it a pass takes about as long as its weights do


@dataclass(frozen=True)
class State:
    """What a decoder knows of its slots, on the device; made once, then changed in place."""

    length: Tensor  # [B] int32: committed cache rows; the anchor sits at this position
    anchor: Tensor  # [B] int64: newest token, chosen but not cached yet
    tokens: Tensor  # [B, S] int64: prompt and output; past the anchor meaningless
    max_length: Tensor  # [B] int32: tokens at which the text ends, prompt included
    done: Tensor  # [B] bool: ended; the slot's state no longer moves
    proposals: Tensor  # [B, K-1] int64: what the draft view puts after the anchor
    drafting: Tensor  # [B] bool: False makes verification ignore them, which is AR decoding
    slots: Tensor  # [B] int64: 0 … B-1
    settings: Settings  # [B] each: how a slot's tokens are chosen

    @staticmethod
    def create(n_slots: int, capacity: int, block_size: int, device: torch.device) -> State:
        """All slots empty and done."""
        ints = torch.zeros(n_slots, dtype=torch.int32, device=device)
        return State(
            length=ints,
            anchor=torch.zeros(n_slots, dtype=torch.int64, device=device),
            tokens=torch.zeros(n_slots, capacity, dtype=torch.int64, device=device),
            max_length=torch.ones_like(ints),
            done=torch.ones(n_slots, dtype=torch.bool, device=device),
            proposals=torch.zeros(n_slots, block_size - 1, dtype=torch.int64, device=device),
            drafting=torch.zeros(n_slots, dtype=torch.bool, device=device),
            slots=torch.arange(n_slots, device=device),
            settings=Settings.create(n_slots, device),
        )

    def reset(self) -> None:
        """As ``create`` leaves it, in place."""
        for tensor in (self.length, self.anchor, self.tokens, self.proposals, self.drafting):
            tensor.zero_()
        self.max_length.fill_(1)
        self.done.fill_(True)
        for slot in range(len(self.slots)):
            self.settings.put(slot, SamplingParams())


def prefill_chunks(
    begin: int, end: int, widths: Sequence[int], capacity: int
) -> Iterator[tuple[int, int, int]]:
    """(first, last + 1, width) of each pass over the tokens ``begin`` … ``end`` - 1 of a prompt.

    Without ``widths`` a pass is as wide as its tokens. Else it has one of those, in rising order,
    padded where that takes less time than another pass, and never past ``capacity`` rows; tokens so
    near the end that none of them fits make a pass of their own width.
    """
    while begin < end:
        rest = end - begin
        full = [width for width in widths if width <= rest]
        padded = [width for width in widths if width >= rest and begin + width <= capacity]
        width = full[-1] if full else padded[0] if padded else rest
        if not widths:
            width = min(rest, PREFILL_CHUNK)
        elif padded and (padded[0] <= CHEAP_WIDTH or 4 * rest > 3 * padded[0]):
            width = padded[0]
        yield begin, min(begin + width, end), width
        begin += width


def cache_rows(max_seq_len: int, block_size: int) -> int:
    """S: room for ``max_seq_len`` tokens, and past them for a whole block or a padded chunk."""
    multiple = PREFILL_WIDTHS[0]
    return -(-(max_seq_len + max(block_size, multiple)) // multiple) * multiple


def open_slot(
    state: State, slot: int, tokens: Tensor, length: int, max_length: int, drafting: bool
) -> None:
    """Give ``slot`` a text [n] whose first ``length`` rows are cached, in place.

    It stays done until it is started: so no cycle moves it, though cycles write their scratch rows
    to it, from ``length`` on. ``drafting``: whether verification is to use its proposals.
    """
    state.done[slot] = True
    state.tokens[slot, : len(tokens)] = tokens
    state.length[slot] = length
    state.max_length[slot] = max_length
    state.drafting[slot] = drafting


def start_sequence(state: State, slot: int, n_tokens: int, first: Tensor, eos: Tensor) -> None:
    """Give ``slot``, of which ``n_tokens`` rows are cached, the token [] after them, in place.

    NO_TOKEN ends the slot at once; the model is never given it.
    """
    state.tokens[slot, n_tokens] = state.anchor[slot] = first.clamp(min=0)
    state.length[slot] = n_tokens
    state.done[slot] = _is_end(first, eos) | (state.max_length[slot] <= n_tokens + 1)


def first_token(
    state: State, slot: int, logits: Tensor, position: int, sample: Sample | None
) -> Tensor:
    """logits [V] after a prompt of ``position`` tokens -> the token [] that follows it.

    NO_TOKEN where the greatest logit is not finite, or any is NaN.
    """
    token = greedy = choose(logits)
    if sample is not None:
        at = torch.full((1, 1), position, device=logits.device)
        token = sample(logits[None, None], at, state.settings.of(state.slots[slot, None]))[0, 0]
    return _where_finite(token, logits, greedy)


def sample_block(state: State, logits: Tensor, sample: Sample) -> Tensor:
    """logits [B, T, V] of the tokens that follow each slot's anchor -> the tokens [B, T].

    By the slots' settings; a greedy slot's are those of ``choose``. The noise belongs to a token's
    position, so that drafts and verification share it.
    """
    offset = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    return sample(logits, state.length[:, None] + offset, state.settings)


def draft(
    model: Transformer,
    cache: KVCache,
    state: State,
    mask_token_id: int,
    width: int,
    sample_tokens: Callable[[State, Tensor], Tensor] | None = None,
) -> None:
    """One pass of the draft view over blocks of ``width``: a proposal less than that, in place.

    Its input is the anchor and then masks. Row i predicts the token after position i, as in AR, so
    the last row's logits are not needed. The pass leaves its K and V in scratch rows; verification
    overwrites every one of them. ``sample_tokens`` is ``sample_block`` with a kernel; None: greedy.
    """
    proposals = state.proposals[:, : width - 1]
    masks = torch.full_like(proposals, mask_token_id)
    inputs = torch.cat((state.anchor[:, None], masks), dim=1)
    assert model.drafter is not None  # the decoder refuses to draft without the draft view
    hidden = model(inputs, state.length, state.slots, cache, model.drafter)
    hidden = hidden[:, :-1].contiguous()  # or a library reads the output head once for each slot
    tokens, logits = model.greedy(hidden, sample_tokens is not None, model.drafter)
    proposals.copy_(tokens if sample_tokens is None else sample_tokens(state, logits))


def make_block(state: State, width: int) -> Tensor:
    """The block [B, width] to verify: the anchor and proposals, or in AR the anchor throughout."""
    anchor = state.anchor[:, None]
    proposals = torch.where(state.drafting[:, None], state.proposals[:, : width - 1], anchor)
    return torch.cat((anchor, proposals), dim=1)


def verify(
    model: Transformer, cache: KVCache, state: State, block: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass of the autoregressive view over block [B, T] -> greedy ids [B, T], logits [B, T, V].

    Greedy decoding does not need the logits. They are kept at 0.2% of a pass over the 1.7B, so that
    the invariance check sees every bit of the very graph that decodes.
    """
    hidden = model(block, state.length, state.slots, cache, model.verifier)
    return model.greedy(hidden, return_logits=True)


def constrain(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., V] -> greedy ids [...] and logits [..., V], -inf where masks have a bit of 0.

    ``masks`` [..., ceil(V / 32)] int32: a bit for each token, the lowest first.
    """
    bit = torch.arange(8, dtype=torch.uint8, device=masks.device)  # a byte for each, and not four
    allowed = (masks.view(torch.uint8)[..., None] >> bit) & 1
    allowed = allowed.flatten(-2)[..., : logits.shape[-1]].bool()
    logits = logits.masked_fill(~allowed, -math.inf)
    return choose(logits), logits


def accept_and_commit(
    state: State,
    block: Tensor,
    greedy: Tensor,
    logits: Tensor,
    eos: Tensor,
    sample: Sample | None,
    logprobs: Logprobs,
    kernel: CommitAccepted | None = None,
) -> Tensor:
    """Accept and commit, in place -> the cycle's report for the host.

    That is ``commit_accepted``'s, which ``kernel`` may stand for; with ``sample``, T more columns
    have the bits of the targets' float32 log-probabilities.
    """
    target = greedy if sample is None else sample_block(state, logits, sample)
    report = (kernel or commit_accepted)(state, block, target, greedy, logits, eos)
    if sample is not None:
        target = report[:, : block.shape[1]].contiguous()
        bits = logprobs(logits, target).view(torch.int32).long()
        report = torch.cat((report, bits), dim=1)
    return report


def commit_accepted(
    state: State, block: Tensor, target: Tensor, greedy: Tensor, logits: Tensor, eos: Tensor
) -> Tensor:
    """Accept and commit, in place -> a report [B, T+3] int64.

    A row holds the target tokens [T], how many of them were emitted, how many of these were
    proposed, and whether the slot is done. ``target[:, i]`` is what AR puts after ``block[:, : i +
    1]``, or NO_TOKEN, which ends the slot, where the greatest logit is not finite or any is NaN.
    """
    target = _where_finite(target, logits, greedy)
    n_accepted = accept(block, target) * state.drafting
    n_new = commit(state, target, n_accepted, eos)
    columns = (n_new, torch.minimum(n_accepted, n_new), state.done)
    return torch.cat((target, torch.stack(columns, dim=1)), dim=1)


def _where_finite(tokens: Tensor, logits: Tensor, greedy: Tensor) -> Tensor:
    """tokens [...] chosen by logits [..., V] -> NO_TOKEN in place of those whose row overflowed.

    ``greedy`` [...] are the rows' argmax, which is the id of a NaN where there is one.
    """
    best = logits.gather(-1, greedy[..., None])[..., 0]
    return torch.where(best.isfinite(), tokens, NO_TOKEN)


def _is_end(tokens: Tensor, eos: Tensor) -> Tensor:
    """Whether no token may follow these: an end-of-sequence id, ``eos`` [E], or NO_TOKEN."""
    # torch.isin takes one of two ways by the sizes, which a compiler may not know.
    return (tokens[..., None] == eos).any(dim=-1) | (tokens == NO_TOKEN)


def accept(block: Tensor, target: Tensor) -> Tensor:
    """block and target [B, T] -> n_accepted [B], 0 … T-1: the length of the agreeing prefix."""
    last = block.shape[1] - 1
    row = torch.arange(block.shape[1], device=block.device)
    proposed = block[:, (row + 1).clamp(max=last)]
    return _first((proposed != target) | (row == last))  # after the last row nothing is proposed


def _first(where: Tensor) -> Tensor:
    """where [B, T] bool -> the first index at which it is true [B]; T where there is none.

    A minimum, not a scan: a compiler that knows no sizes has no code for scans on every device.
    """
    n_rows = where.shape[1]
    return torch.where(where, torch.arange(n_rows, device=where.device), n_rows).amin(dim=-1)


def commit(state: State, target: Tensor, n_accepted: Tensor, eos: Tensor) -> Tensor:
    """Emit the accepted proposals and the token after them, in place -> n_new [B].

    What is emitted ends at the first end-of-sequence id, ``eos`` [E], or NO_TOKEN, and at
    ``max_length``. The emitted tokens are ``target[:, :n_new]``; as many cache rows become
    committed, all of them written by verification from tokens that were accepted.
    """
    offset = torch.arange(target.shape[1], device=target.device)
    is_end = _is_end(target, eos)
    last = torch.minimum(n_accepted, _first(is_end))[:, None]
    room = (state.max_length - state.length - 1)[:, None]
    keep = (offset <= last) & (offset < room) & ~state.done[:, None]
    n_new = keep.sum(dim=-1)

    positions = state.length[:, None].long() + 1 + offset
    tokens = target.clamp(min=0)  # the model is never given NO_TOKEN
    kept = torch.where(keep, tokens, state.tokens.gather(1, positions))
    state.tokens.scatter_(1, positions, kept)

    last = (n_new - 1).clamp(min=0)[:, None]
    moved = n_new > 0
    state.anchor.copy_(torch.where(moved, tokens.gather(1, last)[:, 0], state.anchor))
    ended = moved & is_end.gather(1, last)[:, 0]
    state.length.add_(n_new)
    state.done.logical_or_(ended | (state.length + 1 >= state.max_length))
    return n_new
