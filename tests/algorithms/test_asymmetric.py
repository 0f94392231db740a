"""Asymmetric calibration against least squares over the activations themselves, in float64; slips
do not pass."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from slips import slipped
from tolerances import TWIN_ATOL

from llmquant.algorithms import Factor, GPTQOptions, asymmetric_target, factorize

OUT, IN, ROWS, DEAD = 6, 24, 200, 7
MODULE = sys.modules["llmquant.algorithms.gptaq"]


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, the original model's inputs and the quantized model's (one channel of which is always
    zero), float64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(IN, dtype=torch.float64) + 0.3 * torch.randn(
        IN, IN, generator=generator, dtype=torch.float64
    )
    original = (
        torch.randn(ROWS, IN, generator=generator, dtype=torch.float64)
        @ mix
        * torch.logspace(-1, 1, IN)
    )
    read = original + 0.2 * torch.randn(ROWS, IN, generator=generator, dtype=torch.float64) @ mix
    read[:, DEAD] = 0
    return torch.randn(OUT, IN, generator=generator, dtype=torch.float64), original, read


W, F, X = tensors()
HESSIAN, CROSS = X.T @ X, F.T @ X


def factor(order: str = "static") -> Factor:
    return factorize(HESSIAN, GPTQOptions(act_order=order))  # type: ignore[arg-type]


def ridge_twin(strength: float) -> torch.Tensor:
    """``min_T sum |W f - T x|^2 + damping |W - T|^2`` as one stacked least-squares problem over the
    tokens."""
    damping = (0.01 * HESSIAN.diagonal().mean()).sqrt() * torch.eye(IN, dtype=torch.float64)
    rows, wanted = torch.cat([X, damping]), torch.cat([F @ W.T, damping @ W.T])
    solved = torch.linalg.lstsq(rows, wanted).solution.T
    return W + strength * (solved - W)


def agrees(module: types.ModuleType, order: str = "static", strength: float = 1.0) -> bool:
    found = module.asymmetric_target(W, HESSIAN, CROSS, factor(order), strength)
    return bool(torch.allclose(found, ridge_twin(strength), rtol=0, atol=TWIN_ATOL))


@pytest.mark.parametrize("order", ["static", "off"])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_target_is_the_ridge_regression_over_the_tokens(order: str, strength: float) -> None:
    assert agrees(MODULE, order, strength)


SLIPS = {
    "cross transposed": ("cross - hessian", "cross.T - hessian"),
    "visiting order forgotten on the way in": (
        "(cross - hessian))[:, order]",
        "(cross - hessian))",
    ),
    "visiting order forgotten on the way out": ("step[:, order] = ", "step[:] = "),
    "factor on the wrong side": (
        "factor.upper.T) @ factor.upper",
        "factor.upper) @ factor.upper.T",
    ),
    "the other way": ("w + strength", "w - strength"),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not agrees(slipped(monkeypatch, MODULE, right, wrong))


def test_equal_inputs_leave_the_weight_alone() -> None:
    torch.testing.assert_close(asymmetric_target(W, HESSIAN, HESSIAN, factor()), W, rtol=0, atol=0)


def test_a_dead_column_stays_as_it_was() -> None:
    found = asymmetric_target(W, HESSIAN, CROSS, factor())
    assert torch.equal(found[:, DEAD], W[:, DEAD])
    assert not torch.equal(found, W)
