"""The table of tiles as it is committed, and what the script that writes it tries."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="needs triton (the test extra has it on Linux)")

from orthrus_fast.kernels.products import Tiles
from scripts.tune_products import TABLE, Shape, candidates, shapes, to_json

PRODUCTS = {  # (N, K) of qkv, o, gate and up, down, the output head
    "1.7B": [(4096, 2048), (2048, 2048), (12288, 2048), (2048, 6144), (151936, 2048)],
    "4B": [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728), (151936, 2560)],
    "8B": [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096)],
}


def test_every_product_of_the_public_models_is_tuned() -> None:
    found = shapes()
    assert len(found) == len(set(found)) == len({shape.key for shape in found}) == 60
    for products in PRODUCTS.values():
        ends = ("", "", "swiglu", "", "argmax")
        for n_rows in (16, 32, 64, 128):
            for (n, k), end in zip(products, ends, strict=True):
                assert Shape(n_rows, n, k, end) in found


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.key)
def test_candidates_divide_the_shape_and_fit(shape: Shape) -> None:
    found = list(candidates(shape))
    assert found and len(found) == len(set(found))
    for tiles in found:
        assert shape.n % tiles.block_n == 0
        assert shape.k % (tiles.block_k * tiles.n_splits) == 0
        assert 2 <= tiles.num_stages <= shape.k // (tiles.block_k * tiles.n_splits)
        stage = (tiles.block_n + shape.n_rows) * tiles.block_k * 2
        assert stage * tiles.num_stages <= 227 * 1024
        assert tiles.n_splits == 1 or not shape.end


def test_json_keeps_a_list_on_one_line() -> None:
    tiles = {"32x64x128": Tiles(64, 128, 1, 4, 3), "1x2x3": [1], "none": []}
    table = {"chips": {"sm_90": {"measured_on": "a chip", "tiles": tiles}}}
    text = to_json(table)
    assert json.loads(text) == json.loads(json.dumps(table))
    assert '"32x64x128": [ 64, 128, 1, 4, 3 ],\n' in text and text.endswith("}\n")
    assert len(text.splitlines()) == 12


def test_the_committed_table_is_as_the_script_writes_it() -> None:
    text = TABLE.read_text("utf-8")
    assert to_json(json.loads(text)) == text
