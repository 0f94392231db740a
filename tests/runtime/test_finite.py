"""A value that is not finite is found wherever it stands."""

from __future__ import annotations

import pytest
import torch

from llmquant.runtime.finite import all_finite, finite_there


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 3, 4, 11, 14])
def test_one_bad_value_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.zeros(3, 5, dtype=dtype)
    tensor[1, 1] = torch.finfo(dtype).max
    assert all_finite(tensor)
    tensor.view(-1)[place] = bad
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())
    assert torch.equal(finite_there(tensor), torch.isfinite(tensor).all())


def test_eight_bits_are_looked_at_too() -> None:
    tensor = torch.ones(4).to(torch.float8_e5m2)
    assert all_finite(tensor)
    tensor.view(torch.uint8)[2] = 0b0_11111_00  # infinity
    assert not all_finite(tensor)
    powers = torch.tensor([0, 127, 254], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert all_finite(powers)
    powers.view(torch.uint8)[1] = 255  # NaN
    assert not all_finite(powers)


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.empty(0))
