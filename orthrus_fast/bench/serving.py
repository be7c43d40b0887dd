"""The part of several requests at once: gaps, first tokens and the next turn of a chat, in ms."""

import time
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from orthrus_fast.bench.clocks import summary
from orthrus_fast.bench.common import HISTORY, PREFILL_LENGTHS, ROUNDS, Result, log
from orthrus_fast.bench.decoding import ignore_eos
from orthrus_fast.bench.session import NO_SIBLING, Session, random_prompts, release_memory, sibling
from orthrus_fast.engine.engine import Engine
from orthrus_fast.engine.request import Request
from orthrus_fast.sampling import SamplingParams

GREEDY = SamplingParams()
NEIGHBOUR, PROMPT = 0, 1  # ids of requests
BEFORE = 20  # tokens of the neighbour that are timed before the prompt comes
NEW = 32  # tokens of a turn


def engine(session: Session) -> Result:
    """Measure on a decoder of two slots over the same weights, which reuses what it has cached."""
    if session.ranks is not None:
        return NO_SIBLING
    decoder = sibling(session, replace(session.options, slots=2, prefix_reuse=True))
    longest = decoder.max_seq_len - 1
    lengths = [n for n in PREFILL_LENGTHS if n <= longest]
    history = min(HISTORY, longest // 2)
    with ignore_eos(decoder.runner):
        result = {
            "at": [gaps_at(session, decoder.engine, length) for length in lengths],
            "left_out": [n for n in PREFILL_LENGTHS if n > longest],
            "next_turn": next_turn(session, decoder.engine, history),
        }
    del decoder
    release_memory()
    return result


def gaps_at(session: Session, engine: Engine, length: int) -> Result:
    """Return a neighbour's gaps between tokens, and how long the prompt's first token takes."""
    log(f"a prompt of {length} tokens beside a neighbour")
    n_rounds = min(ROUNDS, session.args.repeats)
    before, longest, beside, alone = [], [], [], []
    for n in range(n_rounds):
        one, other, short = random_prompts(session, [length, length, 8], salt=1000 * length + n)
        alone.append(first_token(engine, one).ms)
        budget = engine.limits.max_seq_len - len(short)
        engine.submit(Request(NEIGHBOUR, short, budget, GREEDY, False))
        marks: list[float] = []
        while len(marks) < BEFORE:
            marks += [time.perf_counter() for u in engine.step() if u.id == NEIGHBOUR]
        before += [(b - a) * 1e3 for a, b in pairwise(marks[1:])]
        marks = marks[-1:]
        beside.append(first_token(engine, other, marks).ms)
        longest.append(max((b - a) * 1e3 for a, b in pairwise(marks)))
        engine.cancel(NEIGHBOUR)
        settle(engine)
    return {
        "prompt_tokens": length,
        "first_token_ms": summary(alone),
        "first_token_beside_ms": summary(beside),
        "gap_before_ms": summary(before),
        "longest_gap_ms": summary(longest),
    }


class First(NamedTuple):
    """A prompt's first token."""

    ms: float
    n_reused: int


def first_token(engine: Engine, prompt: list[int], neighbour: list[float] | None = None) -> First:
    """Serve one token after a prompt; note when a neighbour's come, until one after that."""
    begin, first = time.perf_counter(), None
    engine.submit(Request(PROMPT, prompt, 1, GREEDY, False))
    n_before = len(neighbour or ())
    while first is None or (neighbour is not None and len(neighbour) == n_before):
        for update in engine.step():
            now = time.perf_counter()
            if update.error is not None:
                raise RuntimeError(update.error)
            if update.id == PROMPT:
                first, n_before = First((now - begin) * 1e3, update.n_reused), len(neighbour or ())
            elif neighbour is not None:
                neighbour.append(now)
    return first


def next_turn(session: Session, engine: Engine, history: int) -> Result:
    """Return how long the first token takes after ``history`` cached tokens and some new ones."""
    log(f"the next turn after {history} tokens")
    turns = []
    for n in range(min(ROUNDS, session.args.repeats)):
        before, new = random_prompts(session, [history, NEW], salt=77_000 + n)
        first_token(engine, before)
        turns.append(first_token(engine, before + new))
    ms, reused = summary([turn.ms for turn in turns]), min(turn.n_reused for turn in turns)
    return {"history": history, "new": NEW, "reused": reused, "first_token_ms": ms}


def settle(engine: Engine) -> None:
    """Let all that is under way end."""
    while engine.has_work:
        engine.step()
