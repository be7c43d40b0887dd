"""Several callers of one decoder: threads, half-read streams, errors, Ctrl-C, full queues."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus_fast import SamplingParams
from orthrus_fast.engine.request import Request
from orthrus_fast.errors import PromptError, QueueFullError, RequestError
from orthrus_fast.tokenizer import Detokenizer
from tests.engine.solo import Solo, check_rows, interrupt, load

LONG = [(7 * i) % 250 for i in range(300)]


def alone(solo: Solo, prompt: list[int], budget: int = 20) -> list[int]:
    return solo.told(Request(0, prompt, budget, SamplingParams(), True)).tokens


def prompts(n: int) -> list[list[int]]:
    return [[i, 3 * i % 50, 7] * (1 + i % 5) for i in range(n)]


# Sharing


def test_threads_share_passes(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=4)
    n_cycles = [0]
    launch = decoder.runner.launch

    def counted(*arguments: Any) -> None:
        n_cycles[0] += 1
        launch(*arguments)

    decoder.runner.launch = counted  # type: ignore[method-assign]
    everybody = threading.Barrier(4)

    def ask(prompt: list[int]) -> Any:
        everybody.wait()
        return decoder.generate(prompt, 40, mode="ar")

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(ask, prompts(4)))
    for prompt, result in zip(prompts(4), results, strict=True):
        assert result.tokens == alone(solo, prompt, 40)
    assert n_cycles[0] < 0.7 * sum(result.stats.cycles for result in results)


def test_many_threads_come_and_go(tiny: Path, solo: Solo) -> None:
    """More than slots; some read slowly, some leave early, some in lists."""
    decoder = load(tiny, slots=3)

    def ask(number: int) -> None:
        prompt = prompts(24)[number]
        expected = alone(solo, prompt)
        if number % 4 == 0:
            both = decoder.generate([prompt, [9, number]], 20)
            assert both[0].tokens == expected
        elif number % 4 == 1:
            stream = decoder.stream(prompt, 20)
            next(stream)
            stream.close()
            assert stream.result.tokens == expected[: len(stream.result.tokens)]
        else:
            stream = decoder.stream(prompt, 20)
            for _ in stream:
                time.sleep(0.001 * (number % 3))
            assert stream.result.tokens == expected

    for number in range(24):
        alone(solo, prompts(24)[number])  # not in the threads
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(24)))
    decoder.generate([1], 1)
    assert not decoder.engine.scheduler.sequences and not decoder._inboxes


def test_a_slow_reader_delays_nobody(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=2)
    slow = decoder.stream([1, 2, 3], 40)
    next(slow)
    assert decoder.generate([4, 5], 20).tokens == alone(solo, [4, 5])
    assert decoder.generate([6], 20).tokens == alone(solo, [6])
    cycles = list(slow)  # all of them are there already
    assert [t for chunk in cycles for t in chunk.tokens] == alone(solo, [1, 2, 3], 40)[1:]


def test_half_read_streams_in_one_thread_share_passes(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=3)
    streams = [decoder.stream(prompt, 20) for prompt in prompts(3)]
    for chunks in zip(*streams, strict=False):
        assert len(chunks) == 3
    for stream, prompt in zip(streams, prompts(3), strict=True):
        for _ in stream:
            pass
        assert stream.result.tokens == alone(solo, prompt)


def test_dropped_streams_leave_nothing(tiny: Path, solo: Solo) -> None:
    """Waiting, in the middle of their prompts, in the middle of their texts; and what is kept of
    them is right."""
    decoder = load(tiny, slots=2)
    decoder.engine._longest_chunk = lambda: 40  # type: ignore[method-assign]
    streams = [decoder.stream(prompt, 30) for prompt in (LONG, [1, 2], LONG[:200], [5])]
    for _ in range(12):
        decoder._hand_out(decoder.engine.step())
    sequences = decoder.engine.scheduler.sequences
    assert len(sequences) == 2
    del streams
    gc.collect()
    decoder._hand_out(decoder.engine.step())
    assert not decoder.engine.scheduler.sequences and not decoder.engine.scheduler.waiting
    assert not decoder._inboxes
    check_rows(decoder.engine, solo)
    assert decoder.generate([*LONG[:250], 9], 10).tokens == alone(solo, [*LONG[:250], 9], 10)


def test_a_prompt_cancelled_in_its_middle_lends_what_was_prefilled(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=2)
    decoder.engine._longest_chunk = lambda: 40  # type: ignore[method-assign]
    busy = decoder.stream([1, 2], 60, mode="ar")
    next(busy)
    stream = decoder.stream(LONG, 10)
    for _ in range(8):
        decoder._hand_out(decoder.engine.step())
    stream.close()
    n_rows = max(len(slot.rows) for slot in decoder.engine.scheduler.slots)
    assert 80 <= n_rows < 300
    result = decoder.generate(LONG, 10)
    assert result.tokens == alone(solo, LONG, 10)
    assert result.stats is not None and result.stats.reused_tokens == n_rows
    for _ in busy:
        pass
    assert busy.result.tokens == alone(solo, [1, 2], 60)


# Reuse


def test_the_next_turn_pays_for_its_new_tokens_alone(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=2)
    history = list(LONG[:150])
    for turn in range(4):
        result = decoder.generate(history, 12)
        assert result.stats is not None and result.tokens == alone(solo, history, 12)
        expected = 0 if turn == 0 else len(history) - 4  # the answer's last token has no row
        assert result.stats.reused_tokens == expected
        history += [*result.tokens, 1, 2, turn]
    again = decoder.generate(history[:-1], 5).stats
    assert again is not None and again.reused_tokens >= len(history) - 5
    repeated = decoder.generate(history[:-1], 5).stats
    assert repeated is not None and repeated.reused_tokens == len(history) - 2
    without = load(tiny, slots=2, prefix_reuse=False)
    for _ in range(2):
        stats = without.generate(LONG, 5).stats
        assert stats is not None and stats.reused_tokens == 0


def test_a_beginning_is_copied_from_a_slot_that_is_busy(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=3)
    first = decoder.stream([*LONG, 1], 30)
    next(first)
    for last in (2, 3):
        result = decoder.generate([*LONG, last], 10)
        assert result.tokens == alone(solo, [*LONG, last], 10)
        assert result.stats is not None and result.stats.reused_tokens == 300
    for _ in first:
        pass
    assert first.result.tokens == alone(solo, [*LONG, 1], 30)
    assert check_rows(decoder.engine, solo) > 600


def test_a_stop_string_ends_one_text_and_its_rows_stay(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny, slots=2)
    text = decoder.generate(LONG[:50], 40).text
    stop = SamplingParams(stop=text[10:12])
    both = decoder.generate([LONG[:50], [8, 9]], 40, [stop, None])
    assert both[0].finish_reason == "stop" and both[0].text == text[: text.find(text[10:12])]
    assert both[1].tokens == alone(solo, [8, 9], 40)
    follow = LONG[:50] + both[0].tokens + [1]
    result = decoder.generate(follow, 10)
    assert result.tokens == alone(solo, follow, 10)
    assert result.stats is not None and result.stats.reused_tokens >= 50
    check_rows(decoder.engine, solo)


# Faults


@pytest.mark.parametrize("where", ["launch", "verify", "start", "prefill", "read", "open"])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_in_one_call_harms_no_other(
    tiny: Path, solo: Solo, where: str, ahead: int, after: bool
) -> None:
    """Whatever it interrupts, before or after its work: others go on from what they have read."""
    decoder = load(tiny, slots=3)
    decoder.runner.lookahead = ahead  # type: ignore[misc]
    decoder.engine._longest_chunk = lambda: 40  # type: ignore[method-assign]
    other, waiting = decoder.stream(LONG[:100], 40), decoder.stream([3, 4], 20)
    next(other), next(other)
    interrupt(decoder.runner, where, 3, after)
    with pytest.raises(KeyboardInterrupt):
        for extra in (LONG[:130], LONG[50:200], [5]):
            decoder.generate(extra, 20)
    for stream, prompt, budget in ((other, LONG[:100], 40), (waiting, [3, 4], 20)):
        for _ in stream:
            pass
        assert stream.result.tokens == alone(solo, prompt, budget)
    check_rows(decoder.engine, solo)
    assert decoder.generate(LONG[:130], 20).tokens == alone(solo, LONG[:130], 20)


@pytest.mark.parametrize("where", ["launch", "start", "prefill", "read", "open"])
def test_an_error_of_the_device_ends_the_requests_that_it_concerns(
    tiny: Path, solo: Solo, where: str
) -> None:
    decoder = load(tiny, slots=2)
    decoder.engine._longest_chunk = lambda: 40  # type: ignore[method-assign]
    function, n_calls = getattr(decoder.runner, where), [0]

    def failing(*arguments: Any) -> Any:
        n_calls[0] += 1
        if n_calls[0] == 2:
            raise RuntimeError("CUDA error: it\nis hot")
        return function(*arguments)

    setattr(decoder.runner, where, failing)
    results = decoder.generate([LONG, [1, 2], LONG[:200], [3]], 20)
    failed = [result for result in results if result.finish_reason == "error"]
    assert 1 <= len(failed) <= 2
    assert {result.error for result in failed} == {"RuntimeError: CUDA error: it is hot"}
    for prompt, result in zip(([LONG, [1, 2], LONG[:200], [3]]), results, strict=True):
        if result not in failed:
            assert result.tokens == alone(solo, prompt)
    assert decoder.generate(LONG, 20).tokens == alone(solo, LONG)
    check_rows(decoder.engine, solo)


def test_rows_that_an_error_may_have_spoiled_are_not_reused(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny)
    decoder.engine._longest_chunk = lambda: 40  # type: ignore[method-assign]
    prefill = decoder.runner.prefill

    def spoiling(*arguments: Any) -> None:
        if arguments[1] == 80:
            decoder.runner.cache.k[0].fill_(7.0)
            raise RuntimeError("illegal memory access")
        prefill(*arguments)

    decoder.runner.prefill = spoiling  # type: ignore[method-assign]
    assert decoder.generate(LONG, 20).finish_reason == "error"
    decoder.runner.prefill = prefill  # type: ignore[method-assign]
    assert decoder.generate(LONG, 20).tokens == alone(solo, LONG)


def test_a_device_that_stays_broken_fails_each_request_once(tiny: Path) -> None:
    decoder = load(tiny, slots=2)

    def broken(*_: Any) -> None:
        raise RuntimeError("gone")

    whole = decoder.stream([1, 2], 20)
    next(whole)
    decoder.runner.open = decoder.runner.launch = broken  # type: ignore[method-assign]
    results = decoder.generate([[1], [2], [3], [4]], 20)
    assert {result.error for result in results} == {"RuntimeError: gone"}
    assert list(whole)[-1].tokens == [] and whole.result.error == "RuntimeError: gone"
    assert decoder.generate([5], 3).error == "RuntimeError: gone"


def test_an_error_of_ones_own_text_harms_no_other(
    tiny: Path, solo: Solo, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(tiny, slots=2)
    other = decoder.stream([4, 5], 30)
    next(other)
    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "push", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoder.generate([1, 2], 20)
        with pytest.raises(ZeroDivisionError):
            decoder.generate([[1, 2], [3], [4], [5]], 20)
    for _ in other:
        pass
    assert other.result.tokens == alone(solo, [4, 5], 30)
    decoder.generate([1], 1)
    assert not decoder.engine.scheduler.sequences and not decoder._inboxes


# Limits


def test_a_full_queue_says_so_and_lists_wait(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny)
    object.__setattr__(decoder.engine.limits, "waiting", 2)
    streams = [decoder.stream([i], 20) for i in range(2)]
    with pytest.raises(QueueFullError, match="queue: 2 requests wait already"):
        decoder.stream([3], 20)
    with pytest.raises(QueueFullError):
        decoder.next_logits([3])
    results = decoder.generate(prompts(6), 20)
    assert [result.tokens for result in results] == [alone(solo, p) for p in prompts(6)]
    for i, stream in enumerate(streams):
        assert sum(len(chunk.tokens) for chunk in stream) == len(alone(solo, [i]))


def test_what_can_never_run_is_refused_at_once(tiny: Path) -> None:
    engine = load(tiny, max_seq_len=100).engine
    for prompt, budget, why in (
        ([], 1, "empty"),
        ([1] * 90, 11, r"90 tokens \+ max_new_tokens 11 = 101, over max_seq_len 100"),
        ([272], 1, "272 is no id below 272"),
    ):
        with pytest.raises(PromptError, match=why):
            engine.submit(Request(0, prompt, budget, SamplingParams(), False))
    assert not engine.has_work
    engine.cancel(17)  # which never was
    assert engine.step() == []


@pytest.mark.parametrize("drafting", [1, 9, 0, True, 2.0, "8", "none"])
def test_a_drafting_width_that_cannot_be_is_refused(tiny: Path, drafting: Any) -> None:
    with pytest.raises(RequestError, match="drafting: .* is not 'auto' or an integer from 2 to 8"):
        load(tiny, drafting=drafting)


# Gaps


def test_a_long_prompt_leaves_room_for_its_neighbours(tiny: Path) -> None:
    """By chunks of the smallest width, where no wider one is known to be quick enough."""
    decoder = load(tiny, slots=2)
    neighbour = decoder.stream([1, 2, 3], 100, mode="ar")
    next(neighbour)
    events: list[Any] = []
    prefill, launch = decoder.runner._prefill, decoder.runner.launch

    def noting_chunks(slot: int, begin: int, end: int, width: int) -> Any:
        events.append(end - begin)
        return prefill(slot, begin, end, width)

    def noting_cycles(*arguments: Any) -> None:
        events.append("cycle")
        launch(*arguments)

    decoder.runner._prefill = noting_chunks  # type: ignore[method-assign]
    decoder.runner.launch = noting_cycles  # type: ignore[method-assign]
    object.__setattr__(decoder.engine.limits, "max_gap", 0.0)
    decoder.generate(LONG, 1)
    sizes = [event for event in events if event != "cycle"]
    assert sizes == [64] * 4 + [44]
    between = "".join("c" if event == "cycle" else "p" for event in events)
    assert "pp" not in between
    object.__setattr__(decoder.engine.limits, "max_gap", 100.0)
    events.clear()
    decoder.generate(LONG[::-1], 1)
    assert events[0] == 300 or 300 in events
    for _ in neighbour:
        pass


def test_nothing_is_read_before_the_next_launch(tiny: Path) -> None:
    """Where a device runs ahead, a prompt's first token included."""
    decoder = load(tiny, slots=2)
    decoder.runner.lookahead = 1  # type: ignore[misc]
    in_flight: list[int] = []
    read = decoder.runner.read

    def noted() -> Any:
        in_flight.append(decoder.runner.in_flight)
        return read()

    decoder.runner.read = noted  # type: ignore[method-assign]
    decoder.generate([[1, 2], LONG[:90]], 20, mode="ar")
    assert set(in_flight[:-2]) == {2}


def test_next_logits_beside_others(tiny: Path, solo: Solo) -> None:
    decoder = load(tiny)
    expected = solo.decoder.next_logits([4, 5])
    stream = decoder.stream([1, 2], 30)
    next(stream)
    assert torch.equal(decoder.next_logits([4, 5]), expected)
    for _ in stream:
        pass
    assert stream.result.tokens == alone(solo, [1, 2], 30)


@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing(tiny: Path, solo: Solo) -> None:
    """No growth, and no wrong text, with prompts, modes and settings that change."""
    decoder = load(tiny, slots=4)
    settings = [None, SamplingParams(0.8, seed=3), SamplingParams(logprobs=True)]
    sizes = []
    for round_ in range(10):
        asked = [[i % 7, i % 31, round_] * (1 + i % 9) for i in range(1000)]
        params = [settings[i % 3] for i in range(1000)]
        mode = ("diffusion", "ar")[round_ % 2]
        results = decoder.generate(asked, [1 + i % 4 for i in range(1000)], params, mode)
        for i in range(0, 1000, 97):
            request = Request(0, asked[i], 1 + i % 4, params[i] or SamplingParams(), True)
            assert results[i].tokens == solo.told(request).tokens
        del results, asked, params
        gc.collect()
        sizes.append(len(gc.get_objects()))
    engine = decoder.engine
    assert not (decoder._inboxes or engine.has_work or engine._updates or engine._cancelled)
    assert sizes[-1] < sizes[2] + 500
