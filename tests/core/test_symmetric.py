"""What GPUs write into each other's memory, by Triton's interpreter: ranks take turns here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from orthrus_fast.kernels import norm, overlap, products, quantized, symmetric
from orthrus_fast.kernels.custom import CustomProducts
from orthrus_fast.kernels.formats import Stored, quantize, quantized_split
from orthrus_fast.kernels.interface import k_split
from orthrus_fast.kernels.symmetric import ABSENT, NAN, Areas, Exchange, SharedProducts
from orthrus_fast.kernels.tiles import default_tiles
from tests.checkpoints import write_checkpoint
from tests.kernel_compile import CHIPS, EVERY_CHIP, compile_for, rounding_as_a_gpu
from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, VOCAB, MOST_ROWS = 64, 96, 40


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    with rounding_as_a_gpu(overlap, norm, products, quantized, symmetric):
        yield


class Group:
    """Ranks whose buffers lie in one memory."""

    def __init__(self, n_ranks: int, itemsize: int) -> None:
        areas = Areas.of(MOST_ROWS, MOST_ROWS, HIDDEN, VOCAB * itemsize, n_ranks)
        new = torch.full
        self.buffers = [new((areas.n_words,), ABSENT, dtype=torch.int32) for _ in range(n_ranks)]
        self.broken = torch.zeros(1, dtype=torch.int32)
        self.ranks = [Exchange(r, self.buffers, areas, self.broken) for r in range(n_ranks)]

    @property
    def is_empty(self) -> bool:
        return all(bool((buffer == ABSENT).all()) for buffer in self.buffers)


def row_parallel(weight: Tensor, split: int, n_ranks: int, format: str = "") -> list[Stored]:
    """Each rank's share of a weight [N, K]."""
    shares = [share.contiguous() for share in weight.chunk(n_ranks, dim=1)]
    return [Stored(s, None, None, s.shape[1], split, format, n_ranks) for s in shares]


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_ranks, n_inner", [(2, 512), (2, 4096), (4, 4096)])
def test_partial_sums_of_ranks_are_those_of_one(
    n_ranks: int, n_inner: int, dtype: torch.dtype
) -> None:
    """Two products and norms after each other, of several numbers of rows; then nothing is left."""
    group, split = Group(n_ranks, dtype.itemsize), k_split(HIDDEN, n_inner)
    generator = torch.Generator().manual_seed(n_inner)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, scale = random(HIDDEN, n_inner), random(HIDDEN)
    shares = row_parallel(weight, split, n_ranks)
    one = Stored(weight, None, None, n_inner, split)
    for n_rows in (1, 3, 20, 2):
        x, residual = random(1, n_rows, n_inner), random(1, n_rows, HIDDEN)
        expected = norm.add_norm(residual, CustomProducts().partials(x, one), scale, 1e-6)
        slices = [part.contiguous() for part in x.chunk(n_ranks, dim=-1)]
        sent = [
            SharedProducts(rank).partials(part, share)
            for rank, part, share in zip(group.ranks, slices, shares, strict=True)
        ]
        for rank, partials in zip(group.ranks, sent, strict=True):
            for got, wanted in zip(
                rank.add_norm(residual, partials, scale, 1e-6), expected, strict=True
            ):
                assert torch.equal(got, wanted)
        assert group.is_empty


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_winners_and_logits_of_ranks_are_those_of_one(n_ranks: int, itemsize: int) -> None:
    """With ties across ranks, of which the lowest id wins, and a NaN, which wins all."""
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    weight = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1))
    weight[VOCAB - 1] = weight[5] = weight.abs().amax(0)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[:2] = x[:2].abs()
    x[3] = torch.nan
    weight = weight.to(dtype)
    expected = CustomProducts().lm_head_argmax(x, Stored(weight, None, None, 32, 32), True)
    assert expected[0][:2].tolist() == [5, 5]
    shares = [Stored(share, None, None, 32, 32) for share in weight.chunk(n_ranks)]
    for last in range(n_ranks):
        group = Group(n_ranks, itemsize)
        others = [rank for rank in range(n_ranks) if rank != last]
        for rank in (*others, last):  # the others send, and do not wait
            group.broken.fill_(rank != last)
            ids, logits = SharedProducts(group.ranks[rank]).lm_head_argmax(x, shares[rank], True)
        assert torch.equal(ids, expected[0])
        assert torch.equal(logits.nan_to_num(9.0), expected[1].nan_to_num(9.0))
        assert bool((group.buffers[last] == ABSENT).all())


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("n_ranks, late", [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_a_sum_waits_for_the_last_word_of_each_part(n_ranks: int, late: int) -> None:
    """Of a row's part the first word may come long before the others."""
    group, split = Group(n_ranks, 4), k_split(HIDDEN, 4096)
    weight, x = torch.randn(HIDDEN, 4096), torch.randn(1, 2, 4096)
    for rank, share in enumerate(row_parallel(weight, split, n_ranks)):
        part = x.chunk(n_ranks, dim=-1)[rank].contiguous()
        partials = SharedProducts(group.ranks[rank]).partials(part, share)
    n_each = len(partials) // n_ranks
    words = partials.view(torch.int32)[late * n_each : (late + 1) * n_each, :, :, 1:]
    residual, scale = torch.zeros(1, 2, HIDDEN), torch.ones(HIDDEN)
    expected = norm.add_norm(residual, partials.clone(), scale, 1e-6)
    sent, got = words.clone(), list[Tensor]()
    words.fill_(ABSENT)
    last = group.ranks[-1]
    waiting = threading.Thread(
        target=lambda: got.extend(last.add_norm(residual, partials, scale, 1e-6))
    )
    waiting.start()
    waiting.join(0.1)
    words.copy_(sent)
    waiting.join(20)
    assert all(map(torch.equal, got, expected)) and len(got) == 2


@pytest.mark.usefixtures("on_the_cpu")
def test_nobody_waits_any_more_once_a_rank_has_ended() -> None:
    group = Group(2, 4)
    group.broken.fill_(1)
    weight = torch.randn(HIDDEN, 512)
    share = row_parallel(weight, k_split(HIDDEN, 512), 2)[0]
    partials = SharedProducts(group.ranks[0]).partials(torch.randn(1, 2, 256), share)
    total, _ = group.ranks[0].add_norm(
        torch.randn(1, 2, HIDDEN), partials, torch.ones(HIDDEN), 1e-6
    )
    assert bool(total.isnan().all())


@pytest.mark.usefixtures("on_the_cpu")
def test_a_rehearsal_sends_nothing_and_waits_for_nobody() -> None:
    group = Group(2, 4)
    shared, exchange = SharedProducts(group.ranks[0]), group.ranks[0]
    share = row_parallel(torch.randn(HIDDEN, 512), k_split(HIDDEN, 512), 2)[0]
    x = torch.randn(1, 2, HIDDEN)
    with exchange.rehearsal():
        partials = shared.partials(torch.randn(1, 2, 256), share)
        exchange.add_norm(x, partials, torch.ones(HIDDEN), 1e-6)
        head = Stored(torch.randn(VOCAB // 2, 32), None, None, 32, 32)
        ids, logits = shared.lm_head_argmax(torch.randn(3, 32), head, True)
    assert ids.shape == (3,) and logits.shape == (3, VOCAB) and group.is_empty
    assert exchange.broken is group.broken and exchange.buffers is group.buffers
    assert exchange._turn == 0  # as on all ranks, in whatever order they have rehearsed


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_quantized_sums_of_ranks(n_ranks: int) -> None:
    """As many parts as are added, those of each rank one after another."""
    group = Group(n_ranks, 4)
    weight, x = torch.randn(HIDDEN, 4096), torch.randn(1, 3, 4096)
    sent, expected = [], torch.zeros(1, 3, HIDDEN)
    for rank, share, part in zip(
        group.ranks, weight.chunk(n_ranks, 1), x.chunk(n_ranks, -1), strict=True
    ):
        n_inner = share.shape[1]
        stored = Stored(
            *quantize(share, "int8"),
            n_inputs=n_inner,
            split=quantized_split(n_inner, 4 // n_ranks),
            format="int8",
            n_ranks=n_ranks,
        )
        part = part.contiguous()
        alone = stored._replace(n_ranks=1)
        expected += CustomProducts().partials(part, alone).sum(0)
        sent.append(SharedProducts(rank).partials(part, stored))
    assert all(len(partials) == 4 for partials in sent)
    for partials in sent:
        torch.testing.assert_close(partials.sum(0), expected, rtol=1e-4, atol=1e-3)


# Machine code


def compile_of(kernel: Any, chip: int, types: dict[str, Any], constants: dict[str, Any]) -> str:
    how = constants.pop("HOW")
    compiled = compile_for(kernel, types, constants, chip, *how, multiples={"n_columns"})
    assert compiled.metadata.shared <= CHIPS[chip]
    ptx: str = compiled.asm["ptx"]
    return ptx


@pytest.mark.parametrize("chip", EVERY_CHIP)
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_kernels_compile_for_every_chip(chip: int, n_ranks: int) -> None:
    """What is awaited is read past the first-level cache, which others' writes do not reach."""
    others = ("*i32",) * (n_ranks - 1)
    common = {"others": others, "broken": "*i32"}
    types = {"tile_max": "*fp32", "tile_argmax": "*i32", "winners": "*i32", "out": "*i64"}
    types |= dict.fromkeys(["n_rows", "first_id", "rank"], "i32") | common
    constants = {"N_TILES": 1187, "N_RANKS": n_ranks, "BLOCK": 2048, "HOW": (1, 3)}
    joins = compile_of(symmetric._join_argmax_kernel, chip, types, constants)
    types = dict.fromkeys(["words", "everything", "own", "out"], "*i32") | common
    types |= {"n_words": "i32", "n_columns": "i32"}
    constants = {"NAN": NAN, "N_RANKS": n_ranks, "BLOCK": 2048, "HOW": (8, 3)}
    gathers = compile_of(symmetric._gather_kernel, chip, types, constants)
    types = dict.fromkeys(["x", "weight", "total", "normed", "prefetch"], "*bf16")
    types |= {"partials": "*fp32", "n_elements": "i32", "broken": "*i32"}
    constants = {"SIZE": 4096, "BLOCK": 4096, "N_PARTIALS": n_ranks, "EPS": 1e-6, "HOW": (16, 3)}
    constants |= {"REGION": (4096, 8192, 512)}
    norms = compile_of(norm._add_norm_kernel, chip, types, constants)
    for ptx in (joins, gathers, norms):
        assert "ld.volatile.global" in ptx
    if chip >= 90:  # it reads sums before the product is done, and writes after that
        waits = norms.index("griddepcontrol.wait")
        assert norms.rindex("ld.volatile.global") < waits < norms.index("st.global")


@pytest.mark.parametrize("chip", EVERY_CHIP)
def test_products_for_all_ranks_compile(chip: int) -> None:
    tiles = default_tiles(32, 2, CHIPS[chip])
    types = {"x": "*bf16", "weight": "*bf16", "out": "*fp32", "others": ("*fp32",) * 3}
    types |= {"tile_max": "*fp32", "tile_argmax": "*i32", "prefetch": "*bf16"}
    types |= {"n_rows": "i32", "n_columns": "i32"}
    constants = {"dtype": tl.bfloat16, "K": 3072, "SPLIT": 1536, "N_PARTIALS": 2, "JOINED": False}
    constants |= {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
    constants |= {"DESCRIPTORS": False, "SWIGLU": False, "ARGMAX": False, "STORE": True}
    constants |= {"REGION": (0, 0, 0), "HOW": (tiles.num_warps, tiles.num_stages)}
    ptx = compile_of(products._product_kernel, chip, types, constants)
    if chip >= 90:  # the norm after it must find all before the product done
        assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert stores and all(".v4" in line for line in stores)  # whole sectors go over the link


@pytest.mark.parametrize("size", [2048, 2560, 4096])
@pytest.mark.parametrize("n_partials", [2, 4])
def test_the_norm_sums_a_row_as_on_one_gpu(size: int, n_partials: int) -> None:
    """How a sum's numbers lie over threads is its order: the same with and without a wait."""
    found = set()
    for more in ({}, {"broken": "*i32"}):
        types = dict.fromkeys(["x", "weight", "total", "normed", "prefetch"], "*bf16")
        types |= {"partials": "*fp32", "n_elements": "i32", **more}
        block = 1 << (size - 1).bit_length()
        constants = {"SIZE": size, "BLOCK": block, "N_PARTIALS": n_partials, "EPS": 1e-6}
        constants |= {"REGION": (4096, 8192, 512)}
        how = (min(block // 128, 16), 3)
        text = compile_for(norm._add_norm_kernel, types, constants, 90, *how).asm["ttgir"]
        layouts = dict(re.findall(r"(#\w+) = (#ttg\.blocked<.*>)$", text, re.MULTILINE))
        sums = re.findall(r"\(tensor<\d+xf32, (#\w+)>\) -> f32", text)
        assert len(sums) == 1
        found.add(layouts[sums[0]])
    assert len(found) == 1


# Processes


@pytest.mark.slow
def test_a_model_of_two_processes_is_one(tmp_path: Path) -> None:
    """Whole texts through these kernels, each of which waits for the other process."""
    directory = tmp_path / "model"
    shape = {"num_attention_heads": 8, "intermediate_size": 128}
    write_checkpoint(directory, seed=2, eos_token_id=[], **shape)
    command = [sys.executable, "-m", "tests.interpreted_ranks", str(directory)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": ROOT, "text": True}
    file = tmp_path / "two"
    started = [subprocess.Popen([*command, str(tmp_path / "one"), "1"], **how)]
    for rank in range(2):
        of = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **where}
        environment = {**os.environ, **of}
        started.append(subprocess.Popen([*command, str(file), "2"], env=environment, **how))
    one, two, _ = (process.communicate(timeout=240)[0] for process in started)
    expected, got = json.loads(one), json.loads(two)
    assert got["texts"] == expected["texts"]
    others = json.loads(file.with_name("two.rows1").read_text())["rows"]
    assert got["rows"] + others == expected["rows"]
