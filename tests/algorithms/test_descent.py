"""Coordinate descent against trying every code of every column, in float64; each pass is monotone;
slips do not pass."""

from __future__ import annotations

import itertools
import sys
from contextlib import suppress

import pytest
import torch
from slips import slipped

from llmquant.algorithms import GPTQOptions, ScaleSearch, descend, factorize, gptq, rtn
from llmquant.errors import QuantizationError
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

OUT, IN = 5, 32
MODULE = sys.modules["llmquant.algorithms.coordinate_descent"]
SPECS = {
    str(s): s
    for s in (
        QuantSpec(2, 8, True),
        QuantSpec(3, 16, False),
        QuantSpec(4, None, True),
        QuantSpec(4, 8, False),
    )
}


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a strongly correlated, damped Hessian, float64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64) * 0.5 + torch.eye(
        IN, dtype=torch.float64
    )
    x = torch.randn(120, IN, generator=generator, dtype=torch.float64) @ mix
    hessian = x.T @ x
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(OUT, IN, generator=generator, dtype=torch.float64), hessian


W, H = tensors()


def objective(quantized: QuantizedWeight) -> float:
    delta = quantized.dequantize(torch.float64) - W
    return float(((delta @ H) * delta).sum())


def start(spec: QuantSpec, order: str = "static") -> QuantizedWeight:
    options = GPTQOptions(act_order=order, search=ScaleSearch(steps=4))  # type: ignore[arg-type]
    return gptq(W, factorize(H, options), spec, options)


def sweep_twin(begin: QuantizedWeight) -> torch.Tensor:
    """Codes after one pass: each in turn becomes the one whose whole objective, written out, is the
    smallest."""
    codes, group = begin.codes.double().clone(), begin.column_groups()
    scales, zeros = begin.scales.double()[:, group], begin.zeros.double()[:, group]
    for j in range(IN):
        for row in range(OUT):
            errors = []
            for code in range(begin.spec.max_code + 1):
                codes[row, j] = code
                delta = (codes[row] - zeros[row]) * scales[row] - W[row]
                errors.append(float(delta @ H @ delta))
            codes[row, j] = errors.index(min(errors))
    return codes


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_pass_sets_each_code_to_the_best_given_all_others(spec: QuantSpec, block: int) -> None:
    begin = rtn(W, spec, ScaleSearch(steps=4))
    assert torch.equal(descend(W, begin, H, 1, block).codes.double(), sweep_twin(begin))


def test_groups_in_visiting_order_are_honoured() -> None:
    begin = start(QuantSpec(3, 8, False), "group")
    assert torch.equal(descend(W, begin, H, 1).codes.double(), sweep_twin(begin))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_pass_lowers_the_objective_until_no_code_can(spec: QuantSpec) -> None:
    errors = [objective(descend(W, start(spec), H, passes)) for passes in range(6)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]
    done = descend(W, start(spec), H, 100)
    assert descend(W, done, H, 1).digest() == done.digest()


def test_no_pass_is_the_start_and_grid_and_inputs_are_left_alone() -> None:
    begin, w, h = start(QuantSpec(3, 8, False)), W.clone(), H.clone()
    assert descend(W, begin, H, 0).digest() == begin.digest()
    moved = descend(W, begin, H, 3)
    assert torch.equal(moved.scales, begin.scales)
    assert torch.equal(moved.zeros, begin.zeros)
    assert torch.equal(W, w)
    assert torch.equal(H, h)


SLIPS = {
    "block-local column used as a global one": (
        "scales[first + i], codes[first + i]",
        "scales[i], codes[first + i]",
    ),
    "columns inside the block do not hear of it": ("local.addr_(", "local.clone().addr_("),
    "columns outside the block do not hear of it": ("gradient.addmm_(", "gradient.clone().addmm_("),
    "the step is not in units of codes": ("(square[i, i] * scale)", "square[i, i]"),
    "the code may leave its range": (".clamp_(0, max_code)", ""),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = slipped(monkeypatch, MODULE, right, wrong)
    begin = rtn(W, QuantSpec(2, 8, True), ScaleSearch(steps=4))
    with suppress(QuantizationError):  # codes out of range do not become a weight at all
        assert not torch.equal(module.descend(W, begin, H, 1, 7).codes.double(), sweep_twin(begin))
