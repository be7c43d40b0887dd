"""What a request gives when it runs alone: the reference of the engine's tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import orthrus_fast
from orthrus_fast import Decoder, SamplingParams
from orthrus_fast.engine.engine import Engine
from orthrus_fast.engine.request import Request, Update
from orthrus_fast.invariance import bits_of
from orthrus_fast.options import ONE_ROW
from tests.checkpoints import write_checkpoint
from tests.decoders import unchecked

SETTINGS = (
    SamplingParams(),
    SamplingParams(logprobs=True),
    SamplingParams(0.9, seed=5),
    SamplingParams(0.7, top_k=30, seed=6, logprobs=True),
)
WIDTHS = (1, 2, 5, 8)


class Told(NamedTuple):
    """What a request gave: its tokens, their log-probabilities, why it ended."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str | None


def write_tiny(directory: Path) -> Path:
    """A checkpoint whose texts end now and then."""
    return write_checkpoint(
        directory, seed=3, eos_token_id=[40, 44, *range(100, 112)], tokenizer=True
    )


def load(directory: Path, **options: Any) -> Decoder:
    """Skips the test where this CPU's rows depend on more than their tokens."""
    with unchecked():
        return orthrus_fast.load(directory, device="cpu", dtype="float32", **options)


def skip_without_one_row(directory: Path) -> None:
    """Nothing of this holds where a row's bits depend on more than its tokens."""
    decoder = orthrus_fast.load(directory, device="cpu", dtype="float32")
    if decoder.configuration["promise"] != ONE_ROW:
        pytest.skip(f"this CPU's rows depend on more than their tokens: {decoder.invariance}")


def interrupt(owner: Any, name: str, nth: int, after: bool) -> None:
    """Have the ``nth`` call of a method raise KeyboardInterrupt, before or after its work."""
    function, n_calls = getattr(owner, name), 0

    def interrupted(*arguments: Any, **named: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == nth and not after:
            raise KeyboardInterrupt
        result = function(*arguments, **named)
        if n_calls == nth:
            raise KeyboardInterrupt
        return result

    setattr(owner, name, interrupted)


class Solo:
    """Runs each request alone, in mode ar, in a decoder's one slot, without reuse; once each."""

    def __init__(self, decoder: Decoder) -> None:
        assert decoder.slots == 1 and not decoder.engine.scheduler.reuse
        self.decoder = decoder
        self._known: dict[Any, Told] = {}

    def told(self, request: Request) -> Told:
        key = (tuple(request.prompt), request.max_new_tokens, request.sampling)
        if key not in self._known:
            how = (request.max_new_tokens, request.sampling)
            result = self.decoder.generate(request.prompt, *how, mode="ar")
            logprobs = result.logprobs or []
            self._known[key] = Told(result.tokens, logprobs, result.finish_reason)
        return self._known[key]

    def rows(self, ids: list[int]) -> list[Tensor]:
        """Bits of the cache rows [n_kv_heads, n, head_dim] of a text, in every layer."""
        self.decoder.next_logits(ids)
        caches = (*self.decoder.runner.cache.k, *self.decoder.runner.cache.v)
        return [bits_of(rows[0, :, : len(ids)]).clone() for rows in caches]


def unpredictable(engine: Engine, seed: int, ahead: int) -> None:
    """Let chance choose the widths and the lengths of chunks, as load may."""
    chance = random.Random(seed)
    engine.runner.lookahead = ahead  # type: ignore[misc]
    engine.policy.choose = (  # type: ignore[method-assign]
        lambda drafting, _: chance.choice(WIDTHS) if drafting else 1
    )
    engine._longest_chunk = lambda: chance.choice((1, 3, 16, 40))  # type: ignore[method-assign]


def check_rows(engine: Engine, solo: Solo) -> int:
    """Compare all rows that slots remember with a fresh prefill's, bit by bit; how many there are.

    Nothing is in flight on a CPU: it has run whatever was launched.
    """
    caches = (*engine.runner.cache.k, *engine.runner.cache.v)
    n_rows = 0
    for slot in engine.scheduler.slots:
        if slot.rows:
            n = len(slot.rows)
            assert n <= int(engine.runner.state.length[slot.index])
            for rows, expected in zip(caches, solo.rows(slot.rows), strict=True):
                assert torch.equal(bits_of(rows[slot.index, :, :n]), expected)
            n_rows += n
    return n_rows


def random_prompt(chance: random.Random) -> list[int]:
    """One of a few beginnings, and a tail of its own."""
    beginning = [[7] * 50, list(range(60)), [], [1, 2, 3], list(range(30)) + [9] * 40]
    shared = chance.choice(beginning)
    shared = shared[: chance.randint(0, len(shared))]
    tail = [chance.randrange(250) for _ in range(chance.choice((0, 1, 2, 30)))]
    return (shared + tail) or [chance.randrange(250)]


def collect(updates: list[Update]) -> Told:
    """One request's updates as a whole."""
    tokens = [token for update in updates for token in update.tokens]
    logprobs = [value for update in updates for value in update.logprobs]
    return Told(tokens, logprobs, updates[-1].finish_reason)


def drive(engine: Engine, chance: random.Random, todo: list[Request]) -> dict[int, list[Update]]:
    """Submit requests while others run, cancel some; the updates of those that ended."""
    ids, told = {request.id for request in todo}, dict[int, list[Update]]()
    cancelled: set[int] = set()
    while todo or engine.has_work:
        if todo and chance.random() < 0.3:
            for _ in range(min(len(todo), chance.randint(1, 6))):
                engine.submit(todo.pop())
        if chance.random() < 0.05 and told:
            number = chance.choice(list(told))
            engine.cancel(number)
            cancelled.add(number)
        for update in engine.step():
            assert update.id not in cancelled, "a cancelled request's text leaks"
            told.setdefault(update.id, []).append(update)
    ended = {number: updates for number, updates in told.items() if number not in cancelled}
    assert ended.keys() | cancelled == ids
    return ended


def random_request(number: int, chance: random.Random) -> Request:
    return Request(
        number,
        random_prompt(chance),
        chance.choice((1, 2, 9, 30)),
        chance.choice(SETTINGS),
        drafting=chance.random() < 0.6,
        reuse_key=chance.choice(("", "", "other")),
    )


def check_requests(engine: Engine, solo: Solo, n_requests: int, seed: int) -> list[list[Update]]:
    """Random requests, each of which is told what it is told alone, if it is not cancelled.

    The updates of those that ended.
    """
    chance = random.Random(seed)
    requests = [random_request(number, chance) for number in range(n_requests)]
    ended = drive(engine, chance, requests[::-1])
    for number, updates in ended.items():
        assert collect(updates) == solo.told(requests[number]), requests[number]
        assert 0 <= updates[0].n_reused < len(requests[number].prompt)
        by_prefill = [update.n_accepted is None for update in updates]
        assert by_prefill == [True] + [False] * (len(updates) - 1)
    return list(ended.values())
