"""RTN: every weight to the nearest code of its group's grid, one scalar at a time; bad weights are
refused by name."""

from __future__ import annotations

import sys

import pytest
import torch
from slips import slipped
from twin import quantized_value

from llmquant.algorithms import MINMAX, ScaleSearch, fit, rtn
from llmquant.errors import QuantizationError, SpecError
from llmquant.spec import SUPPORTED_BITS, QuantSpec

MODULE = sys.modules["llmquant.algorithms.rtn"]
SPECS = [QuantSpec(b, g, s) for b in SUPPORTED_BITS for g in (8, None) for s in (True, False)]


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) * 0.1).to(dtype)


def check(module, spec, search):
    """A module's rtn is the scalar twin's."""
    w = weights(dtype=torch.float64)
    result = module.rtn(w, spec, search)
    scales, zeros = fit(w, spec, search)
    assert torch.equal(result.scales, scales.float())
    assert torch.equal(result.zeros, zeros)
    dequantized = result.dequantize()
    for row in range(5):
        for column in range(24):
            group = column // spec.width(24)
            scale, zero = float(scales[row, group]), int(zeros[row, group])
            assert float(dequantized[row, column]) == quantized_value(
                float(w[row, column]), scale, zero, spec.max_code
            )


@pytest.mark.parametrize("search", [MINMAX, ScaleSearch(steps=5)], ids=["min-max", "search"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rtn_equals_the_scalar_twin(spec, search):
    check(MODULE, spec, search)


SLIPS = {
    "scales of the group before": (
        "(groups, scales.unsqueeze(-1)",
        "(groups, scales.roll(1, 1).unsqueeze(-1)",
    ),
    "zero-points of the group before": (
        "zeros.unsqueeze(-1), spec.max_code",
        "zeros.roll(1, 1).unsqueeze(-1), spec.max_code",
    ),
    "codes of a group reversed": ("codes.reshape(w.shape)", "codes.flip(-1).reshape(w.shape)"),
    "one code too few": (
        "zeros.unsqueeze(-1), spec.max_code)",
        "zeros.unsqueeze(-1), spec.max_code - 1)",
    ),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right, wrong, monkeypatch):
    module = slipped(monkeypatch, MODULE, right, wrong)
    with pytest.raises(AssertionError):
        check(module, QuantSpec(3, 8, False), ScaleSearch(steps=5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_rounded_in_float32(dtype):
    w = weights(dtype=dtype)
    assert rtn(w, QuantSpec(4, 8)).digest() == rtn(w.float(), QuantSpec(4, 8)).digest()


def test_the_default_is_the_search():
    w = weights(1)
    assert rtn(w, QuantSpec(3, None)).digest() == rtn(w, QuantSpec(3, None), ScaleSearch()).digest()
    assert rtn(w, QuantSpec(3, None)).digest() != rtn(w, QuantSpec(3, None), MINMAX).digest()


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "unweighted"])
def test_importance_counts_only_where_the_search_is_weighted(weighted):
    w, importance = weights(2), torch.logspace(-3, 3, 24)
    search = ScaleSearch(weighted=weighted)
    with_statistics = rtn(w, QuantSpec(3, None), search, importance)
    assert (with_statistics.digest() != rtn(w, QuantSpec(3, None), search).digest()) == weighted


def test_the_weight_itself_is_left_alone():
    w = weights()
    before = w.clone()
    rtn(w, QuantSpec(4, 8))
    assert torch.equal(w, before)


def test_a_weight_on_the_grid_is_kept_exactly():
    first = rtn(weights(), QuantSpec(4, 8, False), MINMAX)
    assert torch.equal(
        rtn(first.dequantize(), QuantSpec(4, 8, False)).dequantize(), first.dequantize()
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_names_its_module(bad):
    w = weights()
    w[1, 2] = w[4, 23] = bad
    with pytest.raises(
        QuantizationError, match=r"^model\.layers\.3\.mlp\.up_proj: .* 2 NaN or Inf values"
    ):
        rtn(w, QuantSpec(4, 8), module="model.layers.3.mlp.up_proj")


def test_a_group_size_that_does_not_divide_names_its_module():
    with pytest.raises(
        SpecError, match=r"^some\.linear: group_size=7 does not divide its 24 input columns"
    ):
        rtn(weights(), QuantSpec(4, 7), module="some.linear")
