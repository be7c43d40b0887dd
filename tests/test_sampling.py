"""The rule for ties, and the settings that are refused."""

from __future__ import annotations

import pytest
import torch

from orthrus_fast.errors import UnsupportedError
from orthrus_fast.sampling import SamplingParams, choose


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 4, (50, 6, 400), dtype=torch.int64).to(dtype)
    expected = [[row.index(max(row)) for row in block] for block in logits.tolist()]
    assert choose(logits).tolist() == expected


def test_what_is_not_implemented_is_refused_by_name() -> None:
    SamplingParams(seed=3).check_implemented()
    with pytest.raises(UnsupportedError, match="top_p=0.9 is not implemented yet"):
        SamplingParams(top_p=0.9).check_implemented()
    with pytest.raises(UnsupportedError, match="from_checkpoint is not implemented yet"):
        SamplingParams.from_checkpoint()
