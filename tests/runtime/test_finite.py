"""Finiteness in pieces equals finiteness at once, wherever the one bad value stands."""

from __future__ import annotations

import pytest
import torch

from llmquant.runtime import finite
from llmquant.runtime.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 4, 11, 14])
def test_one_bad_value_is_found(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float, place: int
) -> None:
    monkeypatch.setattr(finite, "_PIECE", 4)
    tensor = torch.zeros(3, 5, dtype=dtype)
    assert all_finite(tensor)
    tensor.view(-1)[place] = bad
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))
