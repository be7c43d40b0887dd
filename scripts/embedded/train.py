"""Trains in two phases: the AR view on the data, then the draft view on the distribution of the
frozen AR view.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from scripts.embedded.data import ANSWER, PROMPT, Windows
from scripts.embedded.net import OrthrusLM, draft_layer

log = logging.getLogger(__name__)
LossFunction = Callable[[int], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One phase: `steps` in all, in parts of at most `part_seconds`; `n_rows` windows per step."""

    steps: int
    n_rows: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.1
    part_seconds: float = 480.0
    total_seconds: float | None = (
        None  # if set, a phase in one part whose schedule follows the clock, not `steps`
    )
    log_every: int = 200


class Feed:
    """Gives each step rows of several sets of windows in fixed shares, each set in a new seeded
    order every epoch.
    """

    def __init__(
        self, sets: Sequence[tuple[Windows, float]], n_rows: int, seed: int, device: torch.device
    ) -> None:
        shares = [share / sum(share for _, share in sets) for _, share in sets]
        self.counts = [round(share * n_rows) for share in shares]
        self.counts[0] += n_rows - sum(self.counts)
        self.tokens = [torch.from_numpy(w.tokens.astype("int16")).to(device) for w, _ in sets]
        self.roles = [torch.from_numpy(w.roles).to(device) for w, _ in sets]
        self.seed, self.device = seed, device
        self.orders: dict[tuple[int, int], Tensor] = {}

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's tokens [n_rows, length] int64 and roles [n_rows, length] uint8."""
        picks = [self._pick(which, count, step) for which, count in enumerate(self.counts)]
        tokens = [rows[pick] for rows, pick in zip(self.tokens, picks, strict=True)]
        roles = [rows[pick] for rows, pick in zip(self.roles, picks, strict=True)]
        return torch.cat(tokens).long(), torch.cat(roles)

    def _pick(self, which: int, count: int, step: int) -> Tensor:
        """Return `count` row numbers of a set, from where the step before stopped."""
        epoch, start = divmod(step * count, len(self.tokens[which]))
        picked = self._order(which, epoch)[start : start + count]
        while len(picked) < count:
            epoch += 1
            picked = torch.cat([picked, self._order(which, epoch)[: count - len(picked)]])
        return picked

    def _order(self, which: int, epoch: int) -> Tensor:
        if (which, epoch) not in self.orders:
            self.orders = {k: v for k, v in self.orders.items() if k[0] != which}
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + which * 1009 + epoch)
            order = torch.randperm(len(self.tokens[which]), generator=generator)
            self.orders[which, epoch] = order.to(self.device)
        return self.orders[which, epoch]


def learning_rate(plan: Plan, step: int, progress: float) -> float:
    """Return the rate: linear warm-up, then a cosine to 1/50 as `progress` goes from 0 to 1."""
    warm = min(1.0, (step + 1) / plan.warmup)
    return plan.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclasses.dataclass
class Clock:
    """Times one part of a phase; the first steps, which include compilation, do not count for
    `progress`.
    """

    plan: Plan
    first_step: int
    started: float = dataclasses.field(default_factory=time.monotonic)
    steady: float | None = None

    def tick(self, step: int, loss: Tensor) -> None:
        """Note a finished step."""
        if step == self.first_step + 5:
            if loss.is_cuda:
                torch.cuda.synchronize()
            self.steady = time.monotonic()

    def steady_seconds(self) -> float:
        return time.monotonic() - self.steady if self.steady else 0.0

    def progress(self, step: int) -> float:
        if self.plan.total_seconds:
            return min(1.0, self.steady_seconds() / self.plan.total_seconds)
        return step / self.plan.steps

    def part_over(self) -> bool:
        return time.monotonic() - self.started > self.plan.part_seconds


def run_phase(
    net: OrthrusLM, draft: bool, plan: Plan, loss_of_step: LossFunction, folder: Path
) -> bool:
    """Train one phase, from its saved state if there is one. Return True when all steps are done.

    `loss_of_step` returns (loss, numbers to log). `folder` holds the state and a log of JSON Lines.
    """
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(("_diff." in name) == draft)
    parameters = [p for _, p in net.named_view_parameters(draft)]
    optimizer = _optimizer(net, draft, plan)
    step = _resume(net, optimizer, folder)
    clock = Clock(plan, step)
    while clock.progress(step) < 1 and not clock.part_over():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step, clock.progress(step))
        loss, numbers = loss_of_step(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        clock.tick(step, loss)
        if step % plan.log_every == 0:
            rate = (step - clock.first_step - 5) / max(clock.steady_seconds(), 1e-9)
            _log(
                folder,
                step=step,
                loss=loss.item(),
                numbers=[round(n, 4) for n in numbers.tolist()],
                steps_per_s=rate,
            )
    torch.save(
        {"step": step, "net": net.state_dict(), "optimizer": optimizer.state_dict()},
        folder / "state.pt",
    )
    return clock.progress(step) >= 1


def _optimizer(net: OrthrusLM, draft: bool, plan: Plan) -> torch.optim.AdamW:
    """Return AdamW without weight decay for norms."""
    named = net.named_view_parameters(draft)
    groups = [
        {"params": [p for _, p in named if p.dim() == 2], "weight_decay": plan.weight_decay},
        {"params": [p for _, p in named if p.dim() != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95), fused=True)


def _resume(net: OrthrusLM, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location=next(net.parameters()).device, weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _log(folder: Path, **entry: object) -> None:
    line = json.dumps(entry)
    log.info("%s %s", folder.name, line)
    with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


# Phase 1 ------------------------------------------------------------------------------------------


def ar_loss(
    net: OrthrusLM, tokens: Tensor, roles: Tensor, prompt_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the next token's cross-entropy in nats: (weighted mean, [mean over answers])."""
    hidden, _ = net.ar(tokens[:, :-1])
    logits = net.logits(hidden).float()
    nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    role = roles[:, 1:].flatten()
    answer = (role == ANSWER).float()
    weight = answer + prompt_weight * (role == PROMPT).float()
    return (nats * weight).sum() / weight.sum(), ((nats * answer).sum() / answer.sum()).detach()[
        None
    ]


def train_ar(
    net: OrthrusLM, feed: Feed, plan: Plan, folder: Path, prompt_weight: float = 0.1
) -> bool:
    """Train phase 1; call it until it returns True."""
    device = next(net.parameters()).device
    compiled = torch.compile(ar_loss, disable=device.type == "cpu")

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        tokens, roles = feed.rows(step)
        with torch.autocast(device.type, torch.bfloat16):
            result: tuple[Tensor, Tensor] = compiled(net, tokens, roles, prompt_weight)
        return result

    return run_phase(net, False, plan, loss_of_step, folder)


# Phase 2 ------------------------------------------------------------------------------------------


def choose_anchors(
    roles: Tensor, n_anchors: int, block_size: int, generator: torch.Generator
) -> Tensor:
    """Choose anchors: roles [R, length] -> positions [R, n_anchors] in rising order, within answers
    as long as there are enough.
    """
    usable = roles[:, : roles.shape[1] - block_size]
    inside = ((usable == ANSWER) & (roles[:, 1 : usable.shape[1] + 1] == ANSWER)).float()
    keys = inside + torch.rand(inside.shape, device=roles.device, generator=generator)
    return keys.topk(n_anchors, 1).indices.sort(1).values


def block_tokens(
    tokens: Tensor, anchors: Tensor, block_size: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Return the draft inputs `[anchor, MASK, MASK, …]` and their positions, [R, n_anchors ·
    block_size] each.
    """
    offsets = torch.arange(block_size, device=tokens.device)
    positions = (anchors[:, :, None] + offsets).flatten(1)
    first = (offsets == 0).repeat(anchors.shape[1])
    return torch.where(first, tokens.gather(1, positions), mask_id), positions


def dense_mask(anchors: Tensor, length: int, block_size: int) -> Tensor:
    """Return the mask [R, 1, T, length + T]: a block attends to the context strictly before its
    anchor, and to all of itself.
    """
    owner = torch.arange(anchors.shape[1] * block_size, device=anchors.device) // block_size
    context = torch.arange(length, device=anchors.device) < anchors[:, owner, None]
    itself = (owner[:, None] == owner).expand(len(anchors), -1, -1)
    return torch.cat([context, itself], -1)[:, None]


def sparse_mask(anchors: Tensor, length: int, block_size: int) -> BlockMask:
    """Return the same mask for FlexAttention."""

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        owner = query // block_size
        in_context = (key < length) & (key < anchors[row, owner])
        return in_context | ((key >= length) & ((key - length) // block_size == owner))

    n_queries = anchors.shape[1] * block_size
    return create_block_mask(
        seen, len(anchors), None, n_queries, length + n_queries, device=str(anchors.device)
    )


def draft_weights(roles: Tensor, positions: Tensor, block_size: int, decay: float) -> Tensor:
    """Return weights [R, n_anchors, block_size - 1]: `exp(-i / decay)` while the answer lasts, then
    0 (a block ends with its answer).
    """
    blocks = roles.gather(1, positions).view(len(roles), -1, block_size)
    lasting = (blocks == ANSWER).float().cumprod(-1)
    steps = torch.arange(block_size - 1, device=roles.device)
    return lasting[:, :, 1:] * torch.exp(-steps / decay)


def divergence(
    net: OrthrusLM, target_hidden: Tensor, draft_hidden: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(AR || draft) in nats of the next 1 … block_size - 1 tokens: (weighted mean,
    agreement by position).

    Both hidden states are [R, n_anchors · block_size, hidden], rows of the same positions.
    """
    target = net.logits(_inner(target_hidden, net.shape.block_size)).float().log_softmax(-1)
    draft = net.logits(_inner(draft_hidden, net.shape.block_size)).float().log_softmax(-1)
    nats = (target.exp() * (target - draft)).sum(-1)
    counted = (weights > 0).float()
    agrees = (target.argmax(-1) == draft.argmax(-1)).float() * counted
    agreement = agrees.sum((0, 1)) / counted.sum((0, 1)).clamp(min=1)
    return (nats * weights).sum() / weights.sum(), agreement.detach()


def _inner(hidden: Tensor, block_size: int) -> Tensor:
    """Drop each block's last row, which proposes nothing: [R, n_anchors · block_size, hidden] ->
    [R, n_anchors, block_size - 1, hidden].
    """
    return hidden.view(len(hidden), -1, block_size, hidden.shape[-1])[:, :, :-1]


def train_draft(
    net: OrthrusLM,
    feed: Feed,
    plan: Plan,
    n_anchors: int,
    folder: Path,
    dense: bool = False,
    decay: float = 10.0,
) -> bool:
    """Train phase 2; call it until it returns True. Layers are compiled one by one, and share
    their code.
    """
    device, shape = next(net.parameters()).device, net.shape
    on_cpu = device.type == "cpu"
    run_ar = torch.compile(net.ar, disable=on_cpu)
    run_layer = torch.compile(draft_layer, disable=on_cpu)
    loss_of = torch.compile(divergence, disable=on_cpu)
    make_mask = dense_mask if on_cpu or dense else torch.compile(sparse_mask)

    def loss_of_step(step: int) -> tuple[Tensor, Tensor]:
        tokens, roles = feed.rows(step)
        tokens, roles = tokens[:, :-1], roles[:, :-1]
        generator = torch.Generator(device).manual_seed(step)
        anchors = choose_anchors(roles, n_anchors, shape.block_size, generator)
        blocks, positions = block_tokens(tokens, anchors, shape.block_size, shape.mask_token_id)
        weights = draft_weights(roles, positions, shape.block_size, decay)
        mask = make_mask(anchors, tokens.shape[1], shape.block_size)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                hidden, cache = run_ar(tokens)
                hidden = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
            drafted = net.draft(blocks, positions, cache, mask, run_layer)
            result: tuple[Tensor, Tensor] = loss_of(net, hidden, drafted, weights)
        return result

    return run_phase(net, True, plan, loss_of_step, folder)
