"""Losslessness: both modes against each other and against the judge; streams, budgets, slots."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import orthrus_fast
from orthrus_fast import Decoder, Generation, SamplingParams, loading, steps
from orthrus_fast.checkpoint import load_model, open_checkpoint
from orthrus_fast.errors import PromptError, RequestError, TemplateError, UnsupportedError
from orthrus_fast.loading import memory_needed, with_block_size
from orthrus_fast.model import View
from orthrus_fast.options import ONE_ROW
from tests.checkpoints import write_checkpoint
from tests.decoders import always_drafting, committed, start, unchecked
from tests.judge import Judge, follows
from tests.marks import slow_but

some_examples = settings(
    max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)


def load(directory: Path, dtype: str = "float64", **options: Any) -> Decoder:
    with unchecked():
        options = always_drafting(directory, options)
        return orthrus_fast.load(directory, device="cpu", dtype=dtype, **options)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A small architecture, a prompt, a budget, end tokens and a block's rows to decode with."""
    n_kv_heads = draw(st.integers(1, 3))
    vocab_size = draw(st.integers(5, 60))
    tokens = st.integers(0, vocab_size - 1)
    block_size = draw(st.integers(2, 9))
    return {
        "config": {
            "vocab_size": vocab_size,
            "hidden_size": draw(st.sampled_from([8, 20, 32])),
            "intermediate_size": draw(st.sampled_from([8, 30])),
            "num_hidden_layers": draw(st.integers(1, 3)),
            "num_attention_heads": n_kv_heads * draw(st.integers(1, 3)),
            "num_key_value_heads": n_kv_heads,
            "head_dim": draw(st.sampled_from([2, 8, 16])),
            "block_size": block_size,
            "mask_token_id": vocab_size - 1,
            "eos_token_id": draw(st.lists(tokens, max_size=2, unique=True)),
        },
        "seed": draw(st.integers(0, 2**16)),
        "agreement": draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        "tied": draw(st.booleans()),
        "prompt": draw(st.lists(tokens, min_size=1, max_size=12)),
        "budget": draw(st.integers(1, 40)),
        "width": draw(st.sampled_from([block_size, 2]) | st.integers(2, block_size)),
    }


def build(case: dict[str, Any], directory: Path) -> Path:
    return write_checkpoint(
        directory,
        seed=case["seed"],
        agreement=case["agreement"],
        tied=case["tied"],
        **case["config"],
    )


@some_examples
@given(cases())
def test_both_modes_decode_what_the_judge_decodes(case: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = build(case, Path(temporary) / "model")
        judge = Judge(directory)
        eos = tuple(case["config"]["eos_token_id"])
        prompt, budget = case["prompt"], case["budget"]
        expected, gaps = judge.generate(prompt, budget, eos)
        width = case["width"]
        exact = load(directory, max_seq_len=len(prompt) + budget, block_size=width)
        for mode in ("ar", "diffusion"):
            result = exact.generate(prompt, budget, mode=mode)
            assert result.tokens == expected, mode
            assert result.finish_reason == ("eos" if expected[-1] in eos else "length")
            assert result.stats.cycles <= len(expected) - 1
            assert mode == "diffusion" or result.stats.accepted == (0,) * (len(expected) - 1)
            assert all(n < width for n in result.stats.accepted)
            for layer in range(judge.n_layers):
                k, v = committed(exact, layer)
                assert len(k) == len(prompt) + len(expected) - 1
                assert torch.allclose(k, torch.stack(judge.keys[layer]), rtol=0, atol=1e-9)
                assert torch.allclose(v, torch.stack(judge.values[layer]), rtol=0, atol=1e-9)
        single = load(directory, "float32", block_size=width)
        ar, diffusion = (single.generate(prompt, budget, mode=m) for m in ("ar", "diffusion"))
        assert ar.tokens == diffusion.tokens
        assert follows(ar.tokens, expected, gaps, near_tie=1e-5)


@some_examples
@given(cases(), st.data())
def test_no_proposal_at_all_can_change_the_text(case: dict[str, Any], data: st.DataObject) -> None:
    """A drafter that knows the text, lies anywhere, or says nothing but nonsense."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = build(case, Path(temporary) / "model")
        decoder = load(directory)
        prompt, budget = case["prompt"], case["budget"]
        expected = decoder.generate(prompt, budget, mode="ar").tokens
        text = torch.tensor(prompt + expected)
        vocab_size = case["config"]["vocab_size"]

        def adversary(
            model: Any, cache: Any, state: steps.State, _: int, width: int, *__: Any
        ) -> None:
            at = int(state.length[0])
            block = torch.full((1, width), vocab_size - 1)
            known = text[at : at + width]
            block[0, : len(known)] = known
            block[0, 0] = state.anchor[0]
            for i in range(1, width):
                if data.draw(st.booleans()):
                    block[0, i] = data.draw(st.integers(0, vocab_size - 1))
            cache.k[0][0, :, at : at + width] = data.draw(st.sampled_from([0.0, 1e6]))
            state.proposals.copy_(block[:, 1:])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(steps, "draft", adversary)
            result = decoder.generate(prompt, budget)
        assert result.tokens == expected
        # Every cycle adds a token of its own, but for a last one that the budget or an end cut.
        n_cut = sum(result.stats.accepted) + result.stats.cycles - (len(expected) - 1)
        assert n_cut in (0, 1)


@some_examples
@given(cases())
def test_the_draft_views_logits_are_the_plain_computations(case: dict[str, Any]) -> None:
    """A broken drafter shows nowhere else: the text stays right, only slower."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = build(case, Path(temporary) / "model")
        width, mask = case["width"], case["config"]["mask_token_id"]
        judge, decoder = Judge(directory), load(directory, block_size=width)
        judge.feed(case["prompt"])
        first = start(decoder.runner, case["prompt"], 0, 50).tokens[0]
        runner = decoder.runner
        for rows in (*runner.cache.k, *runner.cache.v):
            rows[:, :, len(case["prompt"]) :] = 1e3  # whatever an earlier cycle left there
        expected = judge.draft_logits(first, width)
        inputs = torch.tensor([[first] + [mask] * (width - 1)])
        state = runner.state
        with torch.inference_mode():
            hidden = runner.model(inputs, state.length, state.slots, runner.cache, View.DRAFT)
            got = runner.model.greedy(hidden, return_logits=True)[1][0]
            steps.draft(runner.model, runner.cache, state, mask, width)
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)
        assert state.proposals[0].tolist() == expected[:-1].argmax(-1).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """block_size 8, four heads; a draft that is right about half of the time."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", seed=3, eos_token_id=[])


@pytest.fixture(scope="module")
def decoder(tiny: Path) -> Decoder:
    return load(tiny, "float32", max_seq_len=200)


@pytest.mark.parametrize(
    "n_tokens", slow_but([1, 33, 128, 260], [1, 2, 31, 32, 33, 127, 128, 129, 260])
)
def test_prefill_of_any_length_follows_the_judge(
    tmp_path: Path, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "PREFILL_CHUNK", 128)  # so that a short prompt has several
    directory = write_checkpoint(tmp_path / "model", max_position_embeddings=400, eos_token_id=[])
    prompt = [(i * i + 3) % 50 for i in range(n_tokens)]
    judge, exact = Judge(directory), load(directory, max_seq_len=400)
    logits = judge.feed(prompt)
    found = exact.next_logits(prompt)
    assert torch.allclose(found, logits, rtol=0, atol=1e-9)
    assert not found.is_inference()
    tokens = []
    for _ in range(20):
        tokens.append(int(logits.argmax()))
        logits = judge.step(tokens[-1])
    for mode in ("ar", "diffusion"):
        assert exact.generate(prompt, 20, mode=mode).tokens == tokens


def test_a_request_that_fits_exactly(tiny: Path) -> None:
    limit = 512  # of the checkpoint's positions
    exact = load(tiny, "float32", max_seq_len=limit)
    prompt = list(range(40)) * 12
    roomy = load(tiny, "float32")
    for budget in (limit - len(prompt), 1):
        for mode in ("ar", "diffusion"):
            tokens = exact.generate(prompt, budget, mode=mode).tokens
            assert len(tokens) == budget
            assert tokens == roomy.generate(prompt, budget, mode=mode).tokens
    with pytest.raises(
        PromptError, match=rf"480 tokens \+ max_new_tokens 33 = 513, over .* {limit}"
    ):
        exact.generate(prompt, limit - len(prompt) + 1)


def test_slots_do_not_see_each_other(tiny: Path) -> None:
    """More prompts than slots, lengths and budgets apart: each text is that of a run alone."""
    prompts = [[i + 1] * (1 + 17 * i % 70) for i in range(7)]
    alone = load(tiny)
    many = load(tiny, slots=4)
    for mode in ("ar", "diffusion"):
        expected = [alone.generate(prompt, 30, mode=mode).tokens for prompt in prompts]
        assert [r.tokens for r in many.generate(prompts, 30, mode=mode)] == expected


def test_a_done_slot_does_not_move(tiny: Path) -> None:
    many = load(tiny, slots=3)
    runner = many.runner
    start(runner, [1, 2, 3], 0, 5)
    start(runner, [4], 2, 100)
    for _ in range(8):
        runner.launch(drafting=True, width=8)
        cycle = runner.read()
    assert [output.done for output in cycle] == [True, True, False]
    before = [t.clone() for t in (runner.state.length, runner.state.anchor, runner.state.tokens)]
    runner.launch(drafting=True, width=8)
    assert [output.tokens for output in runner.read()[:2]] == [[], []]
    after = (runner.state.length, runner.state.anchor, runner.state.tokens)
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(after, before, strict=True))
    assert int(runner.state.length[0]) + 1 == 5


def test_committed_rows_have_equal_bits_in_both_modes(tmp_path: Path) -> None:
    """Those of passes of one row and of blocks."""
    directory = write_checkpoint(tmp_path / "model", seed=5, block_size=16, eos_token_id=[])
    both = orthrus_fast.load(directory, "cpu", "float32", max_seq_len=200, drafting=16)
    if both.configuration["promise"] != ONE_ROW:
        pytest.skip(f"this CPU's rows depend on more than their tokens: {both.invariance}")
    rows = []
    for mode in ("ar", "diffusion"):
        result = both.generate([1, 2, 3], 150, mode=mode)
        assert mode == "ar" or max(result.stats.accepted) > 1
        rows.append([tensor.clone() for layer in range(2) for tensor in committed(both, layer)])
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("holds", [True, False])
def test_ar_runs_one_row_where_a_row_is_a_function_of_its_tokens(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, holds: bool
) -> None:
    """Else as many as a block has, so that both modes run the same pass."""
    tokens, _ = Judge(tiny).generate([1, 2, 3], 40, ())
    widths: list[int] = []
    verify = steps.verify

    def spy(model: Any, cache: Any, state: steps.State, block: Tensor) -> Any:
        widths.append(block.shape[1])
        return verify(model, cache, state, block)

    monkeypatch.setattr(steps, "verify", spy)
    with unchecked(holds):
        decoder = orthrus_fast.load(tiny, "cpu", "float64", drafting=8)
    assert decoder.generate([1, 2, 3], 40, mode="ar").tokens == tokens
    assert widths == [1 if holds else 8] * 39
    assert decoder.generate([1, 2, 3], 40, mode="diffusion").tokens == tokens
    assert set(widths[39:]) == {8} and len(widths) < 2 * 39


@pytest.mark.parametrize("width", [2, 5, 8])
def test_a_slot_drafts_or_does_not_whatever_its_neighbours_do(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """One of two drafts; the proposals are right in both, at blocks of any width."""
    tokens, _ = Judge(tiny).generate([1, 2, 3], 40, ())
    text = torch.tensor([1, 2, 3, *tokens])

    def perfect(model: Any, cache: Any, state: steps.State, mask: int, n: int, _: Any) -> None:
        for slot, length in enumerate(state.length.tolist()):
            state.proposals[slot, : n - 1] = text[length + 1 : length + n]

    monkeypatch.setattr(steps, "draft", perfect)
    runner = load(tiny, slots=2).runner
    first = [start(runner, [1, 2, 3], slot, 40, drafting=slot == 1) for slot in (0, 1)]
    emitted = [output.tokens for output in first]
    for _ in range(3):
        runner.launch(drafting=True, width=width)
        outputs = runner.read()
        assert [output.n_accepted for output in outputs] == [0, width - 1]
        emitted = [e + output.tokens for e, output in zip(emitted, outputs, strict=True)]
    assert emitted == [tokens[: 1 + 3], tokens[: 1 + 3 * width]]


def test_stream_gives_what_generate_gives(decoder: Decoder) -> None:
    whole = decoder.generate([5, 6, 7], 50)
    chunks = list(decoder.stream([5, 6, 7], 50))
    assert [t for chunk in chunks for t in chunk.tokens] == whole.tokens
    assert len(chunks) == whole.stats.cycles + 1
    assert chunks[0].n_accepted == 0
    assert [chunk.n_accepted for chunk in chunks[1:]] == list(whole.stats.accepted)
    assert all(len(chunk.pieces) == len(chunk.tokens) for chunk in chunks)
    assert whole.stats.tokens_per_cycle == pytest.approx(
        (len(whole.tokens) - 1) / whole.stats.cycles
    )


def test_pieces_joined_are_the_text_wherever_the_budget_cuts(tmp_path: Path) -> None:
    """Random bytes are hardly ever whole characters: they span tokens, cycles and the end."""
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True, eos_token_id=[])
    decoder = load(directory, "float32")
    assert decoder.tokenizer is not None
    held_back = 0
    for budget in range(1, 40, 3):
        chunks = list(decoder.stream("日本", budget))
        tokens = [token for chunk in chunks for token in chunk.tokens]
        text = "".join(chunk.text for chunk in chunks)
        assert text == decoder.tokenizer.decode(tokens) == decoder.generate("日本", budget).text
        detokenizer = decoder.tokenizer.detokenizer()
        held_back += text != "".join(detokenizer.push(token) for token in tokens)
    assert held_back > 0


def test_a_dropped_stream_leaves_the_decoder_usable(decoder: Decoder) -> None:
    """Which has one slot; a stream that is half read shares it, too."""
    expected, whole = decoder.generate([9, 9], 30).tokens, decoder.generate([1, 2], 60).tokens
    logits = decoder.next_logits([9, 9])
    stream = decoder.stream([1, 2], 60)
    next(stream)
    next(stream)
    partial = stream.result
    assert partial.finish_reason is None
    assert 2 <= len(partial.tokens) < 60
    assert decoder.generate([9, 9], 30).tokens == expected
    assert torch.equal(decoder.next_logits([9, 9]), logits)
    rest = [token for chunk in stream for token in chunk.tokens]
    assert partial.tokens + rest == whole and stream.result.finish_reason == "length"
    dropped = decoder.stream([1, 2], 60)
    next(dropped)
    del dropped
    assert decoder.generate([9, 9], 30).tokens == expected
    closed = decoder.stream([1, 2], 60)
    next(closed)
    closed.close()
    assert list(closed) == [] and closed.result.finish_reason is None
    assert decoder.generate([9, 9], 30).tokens == expected
    assert not decoder.engine.scheduler.sequences and not decoder._inboxes
    unread = decoder.stream([1, 2], 60)
    assert decoder.generate([9, 9], 30).tokens == expected
    assert [token for chunk in unread for token in chunk.tokens] == whole


def test_a_stream_may_be_closed_while_another_thread_waits_for_it(tiny: Path) -> None:
    decoder = load(tiny, "float32")
    stream = decoder.stream([1, 2], 100)
    inside, leave = threading.Event(), threading.Event()
    launch = decoder.runner.start

    def wait(*arguments: Any) -> Any:
        inside.set()
        leave.wait(30)
        return launch(*arguments)

    decoder.runner.start = wait  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(list, stream)
        inside.wait(30)
        stream.close()
        leave.set()
        assert first.result() == []
    assert decoder.generate([1, 2], 3).finish_reason == "length"


def test_several_end_tokens_each_end_the_text(tiny: Path, tmp_path: Path) -> None:
    free = load(tiny, "float32").generate([5, 6, 7], 40).tokens
    for index in (0, 1, 7, 23):
        end = free[index]
        first = free.index(end)
        unused = next(t for t in range(60) if t not in free)
        directory = write_checkpoint(tmp_path / f"{index}", seed=3, eos_token_id=[unused, end])
        ended = load(directory, "float32")
        for mode in ("ar", "diffusion"):
            for budget in (40, first + 1):  # the end may be the last token that there is room for
                result = ended.generate([5, 6, 7], budget, mode=mode)
                assert result.tokens == free[: first + 1]
                assert result.finish_reason == "eos"


@pytest.mark.parametrize("n_before", [0, 1, 3])
def test_an_end_token_within_a_block_ends_the_text_there(
    tmp_path: Path, n_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is right to its end, and the ``n_before`` of its tokens before the end are."""
    free = load(write_checkpoint(tmp_path / "free", seed=3, eos_token_id=[])).generate([5, 6], 40)
    first = next(i for i in range(n_before + 1, 40) if free.tokens[i] not in free.tokens[:i])
    directory = write_checkpoint(tmp_path / "model", seed=3, eos_token_id=[free.tokens[first]])
    decoder = load(directory)
    text = torch.tensor([5, 6, *free.tokens])

    def known_near_the_end(model: Any, cache: Any, state: steps.State, *_: Any) -> None:
        at = int(state.length[0])
        known = text[at + 1 :][:7] if at >= 2 + first - n_before - 1 else torch.full((7,), 271)
        state.proposals[0, : len(known)] = known

    monkeypatch.setattr(steps, "draft", known_near_the_end)
    result = decoder.generate([5, 6], 40)
    assert (result.tokens, result.finish_reason) == (free.tokens[: first + 1], "eos")
    assert result.stats.accepted[-1] == n_before + 1
    assert [len(rows) for rows in committed(decoder, 0)] == [2 + first] * 2


def test_a_plain_qwen3_decodes_in_ar_mode_only(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False, eos_token_id=[])
    plain = load(directory)
    tokens, _ = Judge(directory).generate([1, 2], 10, ())
    assert plain.generate([1, 2], 10, mode="ar").tokens == tokens
    assert plain.generate([1, 2], 10).tokens == tokens
    with pytest.raises(UnsupportedError, match="diffusion.*plain Qwen3.*mode 'ar'"):
        plain.generate([1, 2], 10, mode="diffusion")


def test_a_mode_that_is_not_named_drafts_where_it_can(tiny: Path, decoder: Decoder) -> None:
    ar, diffusion = (decoder.generate([5, 6], 40, mode=mode) for mode in ("ar", "diffusion"))
    without = load(tiny, "float32", draft_view=False)
    for one, expected in ((decoder, diffusion), (without, ar)):
        [several] = one.generate([[5, 6]], 40)
        for result in (one.generate([5, 6], 40), several):
            assert result.stats is not None and expected.stats is not None
            assert result.stats.accepted == expected.stats.accepted
    assert (decoder.default_mode, without.default_mode) == ("diffusion", "ar")
    with pytest.raises(UnsupportedError, match="loaded with draft_view=False"):
        without.generate([5, 6], 40, mode="diffusion")


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "empty list"),
        ([1.0, 2.0], "list of float is not"),
        ([1, "a"], "list of int, str is not"),
        ([-1], "-1 is no id below"),
        ([272], "272 is no id below"),
        ([10**9], "1000000000 is no id below"),
        ([True], "True is no id below"),
        ("text", "no tokenizer.json"),
        ([{"role": "user", "content": "x"}], "no tokenizer.json"),
        ((1, 2), "tuple is not a string"),
        (None, "NoneType is not a string"),
        (torch.tensor([1]), "Tensor is not a string"),
    ],
)
def test_bad_prompts_are_typed_errors(decoder: Decoder, prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        decoder.generate(prompt)
    with pytest.raises(PromptError, match=message.replace("empty list", "empty")):
        decoder.stream(prompt)


def test_one_bad_prompt_in_a_list_fails_alone(decoder: Decoder) -> None:
    results = decoder.generate([[1, 2], [], [10**6], [3]], 5)
    assert [r.finish_reason for r in results] == ["length", "error", "error", "length"]
    assert results[1].error == "prompt: empty; it needs at least one token"
    assert "1000000 is no id" in results[2].error
    assert results[3].tokens == decoder.generate([3], 5).tokens
    assert all(
        r.error == "prompt: empty; it needs at least one token" for r in decoder.generate([[], []])
    )


@pytest.mark.parametrize("budget", [0, -1, 1.5, "8", True, [5]])
def test_bad_budgets_are_typed_errors(decoder: Decoder, budget: Any) -> None:
    with pytest.raises(RequestError, match="max_new_tokens"):
        decoder.generate([1], budget)


def test_a_budget_that_is_not_named_is_what_fits(tiny: Path, decoder: Decoder) -> None:
    """256 at most; one token must fit."""
    for n, budget in ((1, 199), (150, 50), (199, 1)):
        prompt = [n % 50] * n
        assert len(decoder.generate(prompt).tokens) == budget
        assert sum(len(chunk.tokens) for chunk in decoder.stream(prompt)) == budget
    assert len(load(tiny, "float32").generate([1]).tokens) == 256
    with pytest.raises(PromptError, match=r"200 tokens \+ max_new_tokens 1 = 201, over .* 200 "):
        decoder.generate([1] * 200)
    several = dict(decoder.as_completed([[1], [2] * 190, [3] * 190], [3, None, 11]))
    assert [len(several[i].tokens) for i in range(3)] == [3, 10, 0]
    assert "max_new_tokens 11 = 201" in str(several[2].error)


MESSAGES = [{"role": "user", "content": "hi"}]


def test_arguments_reach_the_chat_template(chat: Path) -> None:
    decoder = load(chat, "float32")
    assert decoder.tokenizer is not None
    encode = decoder.tokenizer.encode_chat
    for arguments in ({"enable_thinking": False}, {"add_generation_prompt": False}):
        ids = encode(MESSAGES, **arguments)
        assert ids != encode(MESSAGES)
        assert decoder.encode(MESSAGES, **arguments) == ids
        expected = decoder.generate(ids, 9).tokens
        assert expected != decoder.generate(MESSAGES, 9).tokens
        stream = decoder.stream(MESSAGES, 9, **arguments)
        assert [token for chunk in stream for token in chunk.tokens] == expected
        assert decoder.generate(MESSAGES, 9, **arguments).tokens == expected
        assert torch.equal(decoder.next_logits(MESSAGES, **arguments), decoder.next_logits(ids))
        mixed = ["hi", MESSAGES, ids]
        results = decoder.generate(mixed, 9, **arguments)
        assert results[0].tokens == decoder.generate("hi", 9).tokens
        assert results[1].tokens == results[2].tokens == expected
        assert dict(decoder.as_completed(mixed, 9, **arguments))[1].tokens == expected


def test_arguments_that_no_template_would_heed_are_refused(chat: Path, raw: Path) -> None:
    decoder = load(chat, "float32")
    for prompt in ("hi", [1, 2], ["hi", [1, 2]]):
        with pytest.raises(RequestError, match="^enable_thinking, tools: for a chat template"):
            decoder.generate(prompt, 5, enable_thinking=False, tools=[])  # type: ignore[call-overload]
    for call in (decoder.encode, decoder.stream, decoder.next_logits):
        with pytest.raises(RequestError, match="^max_tokens: for a chat template"):
            call("hi", max_tokens=5)
    for messages in (MESSAGES, [MESSAGES, "hi"]):
        with pytest.raises(RequestError, match="^max_tokens: .* has no such variable"):
            decoder.generate(messages, max_tokens=5)  # type: ignore[call-overload]
    assert decoder.encode(MESSAGES, tools=None) == decoder.encode(MESSAGES)
    with pytest.raises(TemplateError, match="no chat template"):
        load(raw, "float32").generate(MESSAGES, enable_thinking=False)


@pytest.mark.parametrize("slots", [1, 2])
def test_prompts_are_encoded_as_slots_become_free(
    raw: Path, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load(raw, "float32", slots=slots)
    encoded: list[str] = []
    encode = decoder.encode

    def noted(prompt: Any, **arguments: Any) -> list[int]:
        encoded.append(prompt)
        return encode(prompt, **arguments)

    monkeypatch.setattr(decoder, "encode", noted)
    prompts = ["a", "", "b", "c", "", "d", "e"]
    expected = [decoder.generate(prompt, 5).tokens if prompt else [] for prompt in prompts]
    encoded.clear()
    ended = []
    for index, result in decoder.as_completed(prompts, 5):
        ended.append(index)
        assert result.tokens == expected[index]
        assert (result.error or "").startswith("prompt: empty") == (not prompts[index])
        assert len(encoded) <= len(ended) + slots + 1  # which waits for the next free slot
    assert encoded == prompts
    assert sorted(ended) == list(range(7))


def test_prompts_that_all_fail_come_one_by_one(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load(raw, "float32")
    results = decoder.as_completed(["", [], [10**6]], 5, SamplingParams(seed=4))
    monkeypatch.setattr(decoder.runner, "launch", None)
    first = next(results)
    assert first == (0, Generation("", [], "error", 4, None, str(first[1].error)))
    assert [(i, one.finish_reason) for i, one in results] == [(1, "error"), (2, "error")]


def test_a_cycle_is_prepared_for_what_its_texts_need(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late prompt that samples, or asks for log-probabilities, beside others that do not."""
    decoder = load(raw, "float32")
    calls: list[Any] = []
    monkeypatch.setattr(decoder.runner, "prepare", lambda *of: calls.append(of))
    logprobs = SamplingParams(logprobs=True)
    for last in (SamplingParams(1.0), logprobs):
        decoder.generate(["a", "b", "c"], 2, [None, None, last])
        assert calls == [(8, False), (8, False), (8, True)]
        calls.clear()


def test_a_batch_that_is_dropped_leaves_the_decoder_usable(raw: Path) -> None:
    decoder = load(raw, "float32")
    expected = decoder.generate("a", 5).tokens
    results = decoder.as_completed(["a", "b", "c"], 5)
    next(results)
    assert decoder.generate("a", 5).tokens == expected
    del results
    assert decoder.generate("a", 5).tokens == expected
    assert not decoder._inboxes


def test_a_prompt_that_its_template_refuses_fails_alone_too(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=3, tokenizer=True)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    chatting = load(directory, "float32")
    results = chatting.generate(
        ["x", [{"role": "system", "content": "y"}]], 3, SamplingParams(seed=4)
    )
    assert [r.finish_reason for r in results] == ["length", "error"]
    assert "no such role" in results[1].error
    assert results[1].seed == 4


def test_ids_may_be_any_integers(decoder: Decoder) -> None:
    expected = decoder.generate([1, 2, 3], 5).tokens
    assert decoder.generate(list(torch.tensor([1, 2, 3])), 5).tokens == expected


def test_accepted_counts_only_what_was_emitted(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A perfect drafter, and a budget that cuts inside its block."""
    decoder = load(tiny, "float32")
    text = torch.tensor([5, 6, 7, *decoder.generate([5, 6, 7], 40).tokens])

    def perfect(model: Any, cache: Any, state: steps.State, *_: Any) -> None:
        known = text[int(state.length[0]) + 1 :][:7]
        state.proposals[0, : len(known)] = known

    monkeypatch.setattr(steps, "draft", perfect)
    chunks = list(decoder.stream([5, 6, 7], 12))
    assert [(len(chunk.tokens), chunk.n_accepted) for chunk in chunks] == [(1, 0), (8, 7), (3, 3)]


@pytest.mark.parametrize("runner", ["eager", "compiled"])
def test_ar_ignores_proposals_that_drafting_has_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    """Even where they are right: those of AR's first block were left there by the call before."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile(f, backend="eager"))
    decoder = load(tiny, "float32", runner=runner)
    expected = decoder.generate([5, 6, 7], 20, mode="ar").tokens

    def the_first_blocks(model: Any, cache: Any, state: steps.State, *_: Any) -> None:
        state.proposals[0] = torch.tensor(expected[1:8])

    monkeypatch.setattr(steps, "draft", the_first_blocks)
    assert max(decoder.generate([5, 6, 7], 20).stats.accepted) == 7
    chunks = list(decoder.stream([5, 6, 7], 20, mode="ar"))
    assert [chunk.tokens for chunk in chunks] == [[token] for token in expected]
    assert not any(chunk.n_accepted for chunk in chunks)
    stats = decoder.generate([5, 6, 7], 20, mode="ar").stats
    assert (stats.cycles, stats.accepted) == (19, (0,) * 19)


def test_rates_are_those_of_the_clock(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    stats = decoder.generate([5, 6, 7], 40).stats
    assert stats.prompt_tokens == 3
    n_ticks = 3  # of a launch: its beginning, when it was read, when its tokens were
    assert stats.time_to_first_token == n_ticks
    assert stats.seconds == n_ticks * (1 + stats.cycles)
    assert stats.tokens_per_second == 39 / (n_ticks * stats.cycles)


def test_two_decoders_in_two_threads_leave_the_flags_alone(tiny: Path) -> None:
    matmul = torch.backends.cuda.matmul
    decoders = [load(tiny, "float32") for _ in range(2)]
    expected = decoders[0].generate([1, 2], 60).tokens
    matmul.fp32_precision = "tf32"
    try:
        with ThreadPoolExecutor(2) as threads:
            jobs = [threads.submit(one.generate, [1, 2], 60) for one in decoders]
        assert [job.result().tokens for job in jobs] == [expected, expected]
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"


# Blocks narrower than the checkpoint's own, which are of 8 rows


PROMPTS = [[5, 6, 7], [1] * 70, [9]]


@pytest.fixture(scope="module")
def judged(tiny: Path) -> list[tuple[list[int], list[float]]]:
    """The judge's tokens after each of PROMPTS, and the gap at each."""
    judge = Judge(tiny)
    return [judge.generate(prompt, 40, ()) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype, near_tie", [("float64", 0.0), ("float32", 1e-5)])
@pytest.mark.parametrize("block_size", slow_but([2, 5, None], [2, 3, 5, 7, 8, None]))
def test_a_narrower_block_decodes_what_the_judge_decodes(
    tiny: Path,
    judged: list[tuple[list[int], list[float]]],
    block_size: int | None,
    dtype: str,
    near_tie: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both modes; passes of ar have one row."""
    width = block_size or 8
    decoder = load(tiny, dtype, slots=2, block_size=block_size, prefix_reuse=False)
    decoder.engine.scheduler.takes_turns = False  # or a prompt would be cut into chunks
    assert decoder.configuration["block_size"] == decoder.config.block_size == width
    assert decoder.runner.state.proposals.shape == (2, width - 1)
    widths: dict[View, set[int]] = {view: set() for view in View}
    model = type(decoder.runner.model)
    forward = model.forward

    def spy(self: Any, tokens: Tensor, start: Tensor, slot: Tensor, *rest: Any) -> Tensor:
        widths[rest[1]].add(tokens.shape[1])
        return forward(self, tokens, start, slot, *rest)

    monkeypatch.setattr(model, "forward", spy)
    texts = {}
    for mode in ("ar", "diffusion"):
        results = decoder.generate(PROMPTS, 40, mode=mode)
        texts[mode] = [result.tokens for result in results]
        for tokens, (wanted, gaps) in zip(texts[mode], judged, strict=True):
            assert follows(tokens, wanted, gaps, near_tie=near_tie)
        accepted = [n for result in results for n in result.stats.accepted]
        assert 0 < max(accepted) < width if mode == "diffusion" else not any(accepted)
    assert texts["ar"] == texts["diffusion"]
    prompts = set(map(len, PROMPTS))
    assert widths == {View.DRAFT: {width}, View.AUTOREGRESSIVE: {1, width} | prompts}


@pytest.mark.parametrize("width", [2, 3, 8])
def test_a_cycle_proposes_one_less_than_the_blocks_rows(
    tiny: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter that knows more of the text than it may propose."""
    decoder = load(tiny, "float32", block_size=width)
    text = torch.tensor([5, 6, 7, *decoder.generate([5, 6, 7], 80).tokens])

    def perfect(model: Any, cache: Any, state: steps.State, *_: Any) -> None:
        n = state.proposals.shape[1]
        state.proposals[0] = text[int(state.length[0]) + 1 :][:n]

    monkeypatch.setattr(steps, "draft", perfect)
    result = decoder.generate([5, 6, 7], 1 + 5 * width)
    assert result.tokens == text[3 : 4 + 5 * width].tolist()
    assert result.stats.accepted == (width - 1,) * 5
    assert result.stats.tokens_per_cycle == width


def test_sampled_texts_of_a_narrower_block(tiny: Path) -> None:
    """The noise is a position's: it does not know of blocks."""
    settings = SamplingParams(temperature=0.8, top_k=40, seed=11)
    texts = [
        load(tiny, block_size=width).generate([5, 6, 7], 40, settings, mode=mode).tokens
        for width in (2, 5, 8)
        for mode in ("ar", "diffusion")
    ]
    assert all(text == texts[0] for text in texts)


def test_capacity_and_memory_follow_the_blocks_rows(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "model", block_size=200, eos_token_id=[])
    memory = []
    expected, _ = Judge(directory).generate([1, 2, 3], 97, ())
    for width, n_rows in ((None, 320), (100, 256), (2, 192)):
        decoder = load(directory, max_seq_len=100, block_size=width)
        runner = decoder.runner
        assert runner.cache.capacity == runner.state.tokens.shape[1] == n_rows
        assert runner.model.rope_cos.shape[0] == n_rows
        memory.append(memory_needed(decoder.config, torch.float64, runner.device, 100, 1))
        assert memory[-1].cache == n_rows * 2 * 2 * 2 * 16 * 8  # layers, K/V, heads, head_dim
        assert memory[-1].cache == sum(t.nbytes for t in (*runner.cache.k, *runner.cache.v))
        assert decoder.generate([1, 2, 3], 97).tokens == expected  # all that fits
    assert len({one.weights for one in memory}) == 1


def test_weights_that_are_in_memory_need_no_room(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[loading.Memory] = []
    monkeypatch.setattr(loading, "check_memory", lambda memory, _: asked.append(memory))
    checkpoint, options = open_checkpoint(tiny), loading.Options(device="cpu")

    def make_model(_: Any, *how: Any) -> Any:
        return load_model(checkpoint, *how)

    for present in (False, True):
        loading.build_decoder("it", checkpoint.config, make_model, options, weights_present=present)
    assert asked[0].weights > 0
    assert asked[1] == asked[0]._replace(weights=0)


def test_a_narrower_block_beside_the_other_choices_of_load(tiny: Path) -> None:
    """No draft view; and the files' own config stays what it is."""
    tokens, _ = Judge(tiny).generate([1, 2, 3], 30, ())
    without = load(tiny, block_size=4, draft_view=False)
    assert without.configuration["block_size"] == 4
    assert without.generate([1, 2, 3], 30, mode="ar").tokens == tokens
    with pytest.raises(UnsupportedError):
        without.generate([1, 2, 3], 30, mode="diffusion")
    assert load(tiny).configuration["block_size"] == 8
    config = load(tiny).config
    assert with_block_size(config, None) is config
    assert with_block_size(config, 8) == config


@pytest.mark.parametrize("wrong", [1, 0, -1, -(10**9), True, False, 4.0, "4", [4], 9, 10**9])
def test_a_block_size_that_cannot_be_is_refused_with_the_range(tiny: Path, wrong: Any) -> None:
    with pytest.raises(RequestError) as caught:
        load(tiny, block_size=wrong)
    assert str(caught.value).startswith(f"block_size: {wrong!r} is not an integer from 2 to 8")


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_a_plain_qwen3_has_no_block_size(tmp_path: Path, block_size: int) -> None:
    directory = write_checkpoint(tmp_path / "model", draft=False, eos_token_id=[])
    with pytest.raises(RequestError, match=f"block_size: {block_size}, but a plain Qwen3"):
        load(directory, block_size=block_size)
    assert load(directory, block_size=None).configuration["block_size"] is None


def test_other_bad_arguments_of_a_call(decoder: Decoder) -> None:
    with pytest.raises(RequestError, match="mode: 'greedy'"):
        decoder.generate([1], mode="greedy")
    with pytest.raises(RequestError, match="stop needs a tokenizer"):
        decoder.generate([1], sampling=SamplingParams(stop=("x",)))
    assert decoder.generate([1], 3, SamplingParams(seed=7)).seed == 7
    for wrong in ("greedy", 5, {}):
        with pytest.raises(RequestError, match="sampling: "):
            decoder.generate([1], sampling=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "tpu"}, "device"),
        ({"device": "mps"}, "device 'mps' is not supported"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"dtype": torch.int8}, "dtype: torch.int8"),
        ({"dtype": [1]}, "dtype: \\[1\\] is not one of"),
        ({"device": "cpu:3"}, "device 'cpu:3'"),
        ({"max_seq_len": 1}, "max_seq_len: 1 is not within"),
        ({"max_seq_len": 10**9}, "max_seq_len: 1000000000 is not within 2 … 512"),
        ({"slots": 0}, "slots: 0"),
        ({"slots": 10**9}, "needs weights .* KV cache .*lower max_seq_len or slots"),
        ({"runner": "graph"}, "runner 'graph' needs a CUDA device"),
        ({"runner": "fast"}, "runner: 'fast'"),
        ({"attention": "triton"}, "attention 'triton': needs a CUDA device"),
        ({"attention": "fast"}, "attention: 'fast' is not one of 'auto'"),
        ({"compile_mode": "max-autotune"}, "compile_mode 'max-autotune': runner 'eager' has none"),
        ({"compile_mode": "fast"}, "compile_mode: 'fast'"),
    ],
)
def test_bad_arguments_of_load(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        orthrus_fast.load(tiny, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="no CUDA device is available"):
        orthrus_fast.load(tiny, device="cuda")


def test_load_and_decoding_leave_torch_as_they_found_it(tiny: Path) -> None:
    torch.manual_seed(11)
    torch.set_default_dtype(torch.float64)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        before = torch.get_rng_state()
        one = orthrus_fast.load(tiny, "cpu", "float32")
        tokens = one.generate([1, 2, 3], 20).tokens
        with torch.autocast("cpu", torch.bfloat16):
            assert one.generate([1, 2, 3], 20).tokens == tokens
            assert torch.is_autocast_enabled("cpu")
        for _ in one.stream([1], 5):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_default_dtype() == torch.float64
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert load(tiny, "float32").generate([1, 2, 3], 20).tokens == tokens


def test_a_cpu_decodes_in_float32_where_none_is_named(tiny: Path) -> None:
    config = dataclasses.replace(open_checkpoint(tiny).config, dtype="bfloat16")
    for asked, dtype in ((None, torch.float32), ("float64", torch.float64)):
        options = loading.Options(device="cpu", dtype=asked)
        assert loading.resolve(options, config).dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_decodes_the_same_in_both_modes(tmp_path: Path, dtype: str) -> None:
    directory = write_checkpoint(tmp_path / "model", seed=8, block_size=16, eos_token_id=[])
    half = orthrus_fast.load(directory, "cpu", dtype)  # whatever its check finds
    ar, diffusion = (half.generate([4, 5], 100, mode=mode) for mode in ("ar", "diffusion"))
    assert ar.tokens == diffusion.tokens
    assert len(ar.tokens) == 100
