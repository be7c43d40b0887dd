"""The program that counts rows which differ, however they are computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rows
from orthrus_fast.attention import sdpa
from orthrus_fast.kernels import plain


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    words = ["rows", "--shape", "tiny", "--device", "cpu", "--slots", "1", "3", "--tokens", "60"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(path), *flags])
    return rows.main()


@pytest.mark.parametrize("begin", [0, 500])
def test_no_row_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: int) -> None:
    path = tmp_path / "rows.json"
    assert run(path, monkeypatch, "--begin", str(begin)) == 0
    content = json.loads(path.read_text())
    assert content["differing"] == 0
    ways = [result["what"] for result in content["compared"]]
    assert ways[0] == "1 slots, blocks of 8" and len(ways) == len(set(ways)) == 2 * (4 + 4)
    assert all(result["rows"] == 60 for result in content["compared"])


def test_a_mask_that_follows_the_width_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = sdpa.attend

    def attend(*arguments: object, causal: bool) -> object:
        q = arguments[0]
        return honest(*arguments, causal=causal and q.shape[1] != 4)  # type: ignore[arg-type,attr-defined]

    monkeypatch.setattr(sdpa, "attend", attend)
    path = tmp_path / "rows.json"
    assert run(path, monkeypatch) == 1
    wrong = {r["what"] for r in json.loads(path.read_text())["compared"] if r["logit_rows"]}
    assert wrong == {"1 slots, blocks of 4", "3 slots, blocks of 4"}


def test_a_product_that_follows_the_number_of_rows_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = plain.PlainProducts.lm_head_argmax

    def lm_head_argmax(self: plain.PlainProducts, x: object, *rest: object) -> object:
        ids, logits = honest(self, x, *rest)  # type: ignore[arg-type]
        return ids, logits * (1 + 1e-6 * (x.shape[:-1].numel() == 2))  # type: ignore[attr-defined]

    monkeypatch.setattr(plain.PlainProducts, "lm_head_argmax", lm_head_argmax)
    path = tmp_path / "rows.json"
    assert run(path, monkeypatch) == 1
    wrong = {r["what"] for r in json.loads(path.read_text())["compared"] if r["logit_rows"]}
    assert wrong == {"1 slots, blocks of 2"}
