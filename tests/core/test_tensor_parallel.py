"""A model on several ranks: equal to the bit to one rank, and one clear error where that ends.

Ranks are threads here, or processes where it is about these.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

import orthrus_fast
from orthrus_fast import Decoder, Grammar, SamplingParams, loading, model
from orthrus_fast.bench.shapes import shape_config
from orthrus_fast.checkpoint import load_model, open_checkpoint, own_slices
from orthrus_fast.engine.request import Inputs, Request
from orthrus_fast.errors import RankError, RequestError, UnsupportedError
from orthrus_fast.invariance import bits_of
from orthrus_fast.kernels.tiled import TiledProducts, multiply
from orthrus_fast.loading import memory_needed
from orthrus_fast.tensor_parallel import Ranks
from tests.checkpoints import kernels_for, write_checkpoint
from tests.processes import free_port, wait_for_end
from tests.ranks import ThreadRanks, decoder_of, on_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
RANKS = [2, pytest.param(4, marks=pytest.mark.slow)]


class Outcome(NamedTuple):
    """What one rank gives."""

    texts: list[Any]  # of the first rank alone
    logits: Tensor | None
    rows: list[list[Tensor]]  # committed cache rows, by tensor and slot


def committed_rows(decoder: Decoder) -> list[list[Tensor]]:
    """K and V of each layer: each slot's [n_kv_heads, length, head_dim]."""
    lengths, cache = decoder.runner.state.length.tolist(), decoder.runner.cache
    tensors = (*cache.k, *cache.v)
    return [[rows[slot, :, :n].clone() for slot, n in enumerate(lengths)] for rows in tensors]


def outcome(directory: Path, ranks: ThreadRanks, seed: int, **options: Any) -> Outcome:
    """Texts of all kinds, by slots that are reused; half of them drafted at a width by times."""
    decoder = decoder_of(directory, ranks, max_seq_len=160, **options)
    if ranks.rank > 0:
        ranks.serve(decoder)
        return Outcome([], None, committed_rows(decoder))
    draw = random.Random(seed)
    common = [draw.randrange(200) for _ in range(40)]
    prompts = [
        common[: draw.randrange(1, 40)] + [draw.randrange(200) for _ in range(draw.randrange(1, 9))]
        for _ in range(5)
    ]
    settings = [
        SamplingParams(),
        SamplingParams(temperature=0.9, seed=1),
        SamplingParams(temperature=1.2, top_k=9, top_p=0.8, seed=2),
        SamplingParams(logprobs=True),
        SamplingParams(),
    ]
    texts: list[Any] = []
    for mode in ("ar", "diffusion"):
        results = decoder.generate(prompts, [9, 14, 20, 3, 1], settings, mode)
        texts += [(r.tokens, r.logprobs, r.finish_reason, r.error) for r in results]
    with decoder.stream(prompts[0], 60) as stream:  # left half-way, as in a server
        texts += [chunk.tokens for chunk in itertools.islice(stream, 2)][:1]
    texts += [decoder.generate(prompt, 12).tokens for prompt in prompts[:2]]
    logits = decoder.next_logits(prompts[1])
    ranks.end()
    return Outcome(texts, logits, committed_rows(decoder))


def check_equal(many: list[Outcome], one: Outcome) -> None:
    assert many[0].texts == one.texts
    assert one.logits is not None and many[0].logits is not None
    assert torch.equal(bits_of(many[0].logits), bits_of(one.logits))
    assert any(len(rows[0][0]) for rows in one.rows)
    for index, expected in enumerate(one.rows):
        for slot, rows in enumerate(expected):
            shares = [rank.rows[index][slot] for rank in many]
            assert torch.equal(bits_of(torch.cat(shares)), bits_of(rows))


def random_shape(seed: int, n_ranks: int) -> dict[str, Any]:
    """Of config.json, such that each rank has whole heads, and whole sums of one rank's."""
    draw = random.Random(seed)
    head_dim = draw.choice([16, 32])
    n_kv_heads = n_ranks * draw.choice([1, 2])
    group = draw.choice([1, 2, 3]) * max(1, 128 // (n_kv_heads * head_dim))
    return {
        "hidden_size": draw.choice([32, 48, 80]),
        "intermediate_size": 128 * draw.choice([1, 2]),
        "num_attention_heads": n_kv_heads * group,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "vocab_size": draw.choice([272, 320, 300]),
        "tied": draw.random() < 0.5,
        "block_size": draw.choice([4, 8]),
    }


@pytest.mark.parametrize("n_ranks", RANKS)
@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_are_equal_to_one(
    n_ranks: int, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, log-probabilities, logits and cache rows, float32."""
    # As many partial sums as there are of large weights, which take long here.
    monkeypatch.setattr(model, "k_split", lambda _, n_inner: -(-n_inner // 4))
    shape = random_shape(seed, n_ranks)
    directory = write_checkpoint(tmp_path / "model", seed=seed, eos_token_id=[], **shape)

    def run(ranks: ThreadRanks) -> Outcome:
        return outcome(directory, ranks, seed, slots=2)

    [one] = on_ranks(1, run)
    check_equal(on_ranks(n_ranks, run), one)


def test_the_splits_of_a_weight_are_those_of_the_whole(tmp_path: Path) -> None:
    """With ``k_split`` as it is: two sums, one a rank; a rank alone would make others.

    So it would of qkv, of which it has half the rows: fewer than columns, as in all public models.
    """
    shape = {"num_attention_heads": 8, "hidden_size": 128, "intermediate_size": 256}
    directory = write_checkpoint(tmp_path / "model", eos_token_id=[], **shape)

    def run(ranks: ThreadRanks) -> tuple[Outcome, list[int]]:
        found = outcome(directory, ranks, 0, slots=3)
        return found, [len(parts) for parts in found.rows]

    [(one, _)] = on_ranks(1, run)
    check_equal([found for found, _ in on_ranks(2, run)], one)


@pytest.mark.parametrize("name", ["1.7B", "4B", "8B"])
def test_the_sums_of_a_public_model_are_those_of_one(name: str) -> None:
    """Each partial sum of as many columns, on two ranks and on one."""
    config = shape_config(name)
    with torch.device("meta"):
        one, two = (model.Layer(of, causal=True).linears() for of in (config, config.share(1, 2)))
    assert [linear.split for linear in two] == [linear.split for linear in one]
    assert all(linear.sums_as_one for linear in two)


def test_the_check_of_the_passes_holds_on_ranks(tmp_path: Path) -> None:
    shape = {"num_attention_heads": 8, "intermediate_size": 256}
    directory = write_checkpoint(tmp_path / "model", **shape)
    how = {"max_seq_len": 100}
    found = on_ranks(2, lambda ranks: decoder_of(directory, ranks, **how).invariance, checked=True)
    assert all(one.holds and one.prefill for one in found)


def test_a_grammar_is_compiled_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    shape = {"num_attention_heads": 8, "intermediate_size": 256}
    directory = write_checkpoint(tmp_path / "model", tokenizer=True, **shape)
    params = SamplingParams(grammar=Grammar("regex", "(ab|cd)*e"))

    def run(ranks: ThreadRanks) -> Any:
        decoder = decoder_of(directory, ranks, max_seq_len=100)
        if ranks.rank > 0:
            return ranks.serve(decoder)
        texts = [decoder.generate([7, 8], 20, params, mode).text for mode in ("ar", "diffusion")]
        ranks.end()
        return texts

    [one], many = on_ranks(1, run), on_ranks(2, run)
    assert many[0] == one and set(one[0]) <= set("abcde")


@pytest.mark.parametrize("formats", [{"draft_weights": "int4"}, {"weights": "fp8"}])
def test_quantized_views_are_those_of_one(formats: dict[str, str], tmp_path: Path) -> None:
    """Drafts, too: as many cycles, at a width that is not chosen by times."""
    shape = {"num_attention_heads": 32, "intermediate_size": 512}
    directory = write_checkpoint(tmp_path / "model", eos_token_id=[], **shape)

    def run(ranks: ThreadRanks) -> Any:
        decoder = decoder_of(directory, ranks, max_seq_len=100, drafting=8, **formats)
        if ranks.rank > 0:
            return ranks.serve(decoder)
        found = [decoder.generate([7, 8, 9], 30, mode=mode) for mode in ("ar", "diffusion")]
        logits = bits_of(decoder.next_logits([7, 8, 9])).tolist()
        ranks.end()
        return [one.tokens for one in found], found[1].stats.cycles, logits  # type: ignore[union-attr]

    [one], many = on_ranks(1, run), on_ranks(2, run)
    assert many[0] == one and one[0][0] == one[0][1]


# Loading


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_a_rank_reads_its_slices_alone(
    tied: bool, n_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 64}
    directory = write_checkpoint(tmp_path / "model", tied=tied, n_shards=2, **shape)
    checkpoint = open_checkpoint(directory)
    kernels = kernels_for("sdpa", CPU, torch.float32, 16)
    whole = load_model(checkpoint, kernels, CPU, torch.float32).tensors()
    sizes: dict[int, int] = {}
    for rank in range(n_ranks):
        config = checkpoint.config.share(rank, n_ranks)
        of_rank = open_checkpoint(directory)
        of_rank = type(of_rank)(**{**vars(of_rank), "config": config})
        done: list[tuple[int, int]] = []
        how = (kernels, CPU, torch.float32)
        mine = load_model(of_rank, *how, progress=lambda *of, done=done: done.append(of))
        assert done[-1][0] == done[-1][1]
        for name, tensor in mine.tensors().items():
            shape_, of = tuple(tensor.shape), tuple(whole[name].shape)
            assert torch.equal(tensor, whole[name][own_slices(shape_, of, rank)])
            divided = "norm" not in name and "embed" not in name
            assert tensor.numel() == whole[name].numel() // (n_ranks if divided else 1)
        head, rows = mine.verifier.lm_head.weight, checkpoint.config.vocab_size // n_ranks
        expected = whole["model.embed_tokens.weight" if tied else "lm_head.weight"]
        assert torch.equal(head, expected[rank * rows : (rank + 1) * rows])
        sizes[rank] = memory_needed(config, torch.float32, CPU, 100, 1).weights
        storages = [weight.untyped_storage() for weight in mine.parameters()]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        assert sum(held.values()) == sizes[rank]
    assert len(set(sizes.values())) == 1


@pytest.mark.parametrize(
    "n_ranks, fields, said",
    [
        (4, {}, "does not divide n_kv_heads 2: 2 = 4 x 0 + 2"),
        (2, {"intermediate_size": 49}, "does not divide intermediate_size 49: 49 = 2 x 24 + 1"),
        (2, {"vocab_size": 273}, "does not divide vocab_size 273: 273 = 2 x 136 + 1"),
        (3, {}, "3 is not one of 1, 2, 4"),
        (True, {}, "True is not one of 1, 2, 4"),
    ],
)
def test_what_does_not_divide_is_refused(
    n_ranks: int, fields: dict[str, int], said: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path / "model", **fields)
    with pytest.raises(RequestError, match=re.escape(said)):
        orthrus_fast.load(directory, device="cpu", tensor_parallel=n_ranks)


def test_no_compiler_is_given_a_model_of_ranks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="tensor_parallel: not with runner 'compiled'"):
        orthrus_fast.load(tmp_path, device="cpu", runner="compiled", tensor_parallel=2)


def test_one_device_is_not_several() -> None:
    with pytest.raises(RequestError, match="device: 'cpu:0' is one, but tensor_parallel 2 takes 2"):
        orthrus_fast.load(device="cpu:0", tensor_parallel=2)


def test_other_sums_than_on_one_gpu_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its o has two partial sums, of which four ranks own a half each."""
    shape = {"num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 256}
    directory = write_checkpoint(tmp_path / "model", **shape)
    on_ranks(2, lambda ranks: decoder_of(directory, ranks, max_seq_len=100))
    assert not caplog.messages
    on_ranks(4, lambda ranks: decoder_of(directory, ranks, max_seq_len=100))
    assert "texts may differ from those of one" in caplog.text


def test_tiles_divide_no_row_and_no_column() -> None:
    """A product's rows and columns do not depend on which others it has."""
    x, weight = torch.randn(21, 96), torch.randn(80, 96)
    expected = multiply(x, weight)
    torch.testing.assert_close(expected, x @ weight.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(multiply(x[5:9], weight), expected[5:9])
    assert torch.equal(multiply(x, weight[16:48]), expected[:, 16:48])
    gated = multiply(x, weight[:40], weight[40:])
    silu = torch.nn.functional.silu(expected[:, :40]) * expected[:, 40:]
    torch.testing.assert_close(gated, silu)
    assert TiledProducts().gather is None


# What ends


class Loaded(NamedTuple):
    decoder: Decoder
    ranks: Ranks

    @property
    def children(self) -> dict[int, Any]:
        return self.ranks._children


def load_two(directory: Path, **options: Any) -> Loaded:
    how = {"device": "cpu", "max_seq_len": 300, "tensor_parallel": 2, **options}
    decoder = orthrus_fast.load(directory, **how)
    ranks: Any = decoder.engine.peers
    return Loaded(decoder, ranks)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "model"
    shape = {"num_attention_heads": 8, "intermediate_size": 256, "num_hidden_layers": 1}
    return write_checkpoint(directory, eos_token_id=[], **shape)


def test_a_rank_that_dies_is_one_error_for_all_who_wait(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # they are started with ours, which is 1
    decoder, ranks = loaded = load_two(small)
    assert len(decoder.generate([1, 2, 3], 5).tokens) == 5
    streams = [decoder.stream([1, 2, n], 200) for n in range(3)]
    next(streams[0])
    loaded.children[1].kill()
    begin = time.monotonic()
    for stream in streams:
        list(stream)
        assert "rank 1 has ended with exit code -9" in (stream.result.error or "")
    assert "rank 1 has ended" in (decoder.generate([4], 3).error or "")
    assert time.monotonic() - begin < 30
    with pytest.raises(RankError, match="load the model again"):
        ranks.check()


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_an_error(small: Path) -> None:
    decoder, ranks = loaded = load_two(small)
    ranks._patience = 1.0
    loaded.children[1].send_signal(signal.SIGSTOP)
    error = decoder.generate([1, 2, 3], 50).error or ""
    assert "a rank did not answer for 1 s" in error
    assert loaded.children[1].wait(5) == -signal.SIGKILL


@pytest.mark.slow
def test_a_rank_that_is_late_is_waited_for(small: Path) -> None:
    decoder, _ = loaded = load_two(small)
    expected = decoder.generate([1, 2, 3], 30).tokens
    loaded.children[1].send_signal(signal.SIGSTOP)
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -CONT {loaded.children[1].pid}"])
    assert decoder.generate([1, 2, 3], 30).tokens == expected


@pytest.mark.slow
def test_ranks_end_with_the_first(small: Path) -> None:
    """When the decoder is dropped, closed, or its process killed."""
    decoder, ranks = load_two(small)
    ranks.close()
    assert ranks._children[1].wait(10) == 0
    assert "closed" in (decoder.generate([1], 2).error or "")
    decoder, ranks = load_two(small)
    child = ranks._children[1]
    decoder.generate([1, 2], 3)
    del decoder, ranks
    gc.collect()
    assert child.wait(10) == 0
    code = (
        "import orthrus_fast, os, sys, time\n"
        f"decoder = orthrus_fast.load({str(small)!r}, device='cpu', tensor_parallel=2)\n"
        "print(decoder.engine.peers._children[1].pid, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else None\n"
    )
    for how in ("kill", "leave"):
        out = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True)
        wait_for_end(int(out.stdout))


@pytest.mark.slow
def test_an_error_while_loading_ends_all(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RequestError("no room")

    monkeypatch.setattr(loading, "prepare_runner", fail)
    with pytest.raises(RequestError, match="no room"):
        load_two(small)


@pytest.mark.slow
def test_ranks_of_other_options_are_refused_on_both(small: Path) -> None:
    """As torchrun starts them: here with other slots."""
    code = "import orthrus_fast, sys; orthrus_fast.load(sys.argv[1], **eval(sys.argv[2]))"
    runs = []
    for rank in range(2):
        options = {"device": "cpu", "tensor_parallel": 2, "slots": 1 + rank}
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": free_port()}
        runs.append((options, where))
    port = runs[0][1]["MASTER_PORT"]
    started = []
    for options, where in runs:
        of = {name: str(value) for name, value in where.items()} | {"MASTER_PORT": str(port)}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **of, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(small), repr(options)]
        started.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        )
    first, second = (process.communicate(timeout=60)[1] for process in started)
    # Which of them sees it first is a matter of chance.
    said = ("slots is 1 on rank 0, but 2 on rank 1", "slots is 2 on rank 1, but 1 on rank 0")
    assert any(f"tensor_parallel: {one}" in first for one in said), first
    assert all(process.returncode for process in started), second


def test_a_rank_that_has_read_other_tokens_says_so() -> None:
    ranks = Ranks(1, 2, HashStore())
    ranks._hear = lambda _: Inputs([], [], [], 5)  # type: ignore[method-assign]
    assert ranks.agree(Inputs([], [], [], 5)).digest == 5
    with pytest.raises(RankError, match="other tokens than the first rank's"):
        ranks.agree(Inputs([], [], [], 6))


def test_a_rank_that_is_asked_by_itself_is_held_to_the_first() -> None:
    """Its requests are its own, with their grammars; those of one that only serves are made."""
    first = Request(0, [1, 2], 5, SamplingParams(), True)
    own = replace(first, matcher=object())  # type: ignore[arg-type]
    ranks = Ranks(1, 2, HashStore())
    ranks._hear = lambda _: Inputs([first], [3], [], 5)  # type: ignore[method-assign]
    agreed = ranks.agree(Inputs([own], [], [], 5))
    assert agreed.requests[0] is own and agreed.cancelled == [3]
    for others in ([], [own, own], [replace(own, prompt=[1, 3])]):
        with pytest.raises(RankError, match="other texts than the first rank"):
            ranks.agree(Inputs(others, [], [], 5))
    ranks.localize = lambda request: replace(request, id=9)
    assert ranks.agree(Inputs([], [], [], 5)).requests == [replace(first, id=9)]


@pytest.mark.parametrize("fails", [False, True])
def test_threads_of_a_group_end_before_python_does(fails: bool) -> None:
    """Else one that then frees the last tensor of a gather, after Ctrl-C say, aborts all."""
    ranks = Ranks(0, 1, HashStore())
    assert torch.equal(ranks.gather(torch.ones(2)), torch.ones(1, 2))
    assert ranks._group is not None
    with contextlib.suppress(KeyboardInterrupt):
        with ranks.ending_together():
            if fails:
                raise KeyboardInterrupt
        ranks.close()
    assert ranks._group is None


def test_ctrl_c_waits_for_the_end_of_a_step() -> None:
    """Or the other ranks would go on with what this one has left."""
    ranks, done = Ranks(0, 1, HashStore()), []
    with pytest.raises(KeyboardInterrupt), ranks.step():
        signal.raise_signal(signal.SIGINT)
        done.append(json.dumps("the step goes on"))
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
