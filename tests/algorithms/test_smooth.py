"""SmoothQuant's scales and loss against plain loops in float64, and what it promises by its own
measure."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from slips import slipped

from llmquant.algorithms import Reader, ScaleSearch, rtn, search_smoothing
from llmquant.algorithms.smoothquant import smooth_scale, smoothed_loss
from llmquant.errors import SpecError
from llmquant.spec import QuantSpec

SPEC = QuantSpec(8, None, True)
SEARCH = ScaleSearch(steps=2)
OWN = torch.arange(8)
MODULE = sys.modules["llmquant.algorithms.smoothquant"]


def case(seed: int = 0, outlier: float = 60.0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two weights and inputs ``[tokens, 8]`` of which one channel is far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 8, generator=generator, dtype=torch.float64)
    x[:, 5] *= outlier
    return [torch.randn(6, 8, generator=generator, dtype=torch.float64) for _ in range(2)], x


def readers(weights: list[torch.Tensor], int8: bool = True) -> list[Reader]:
    return [Reader(w, SPEC, int8) for w in weights]


def scale_twin(
    weights: list[torch.Tensor], x: torch.Tensor, alpha: float, channel: list[int]
) -> list[float]:
    scales = []
    for shared in range(max(channel) + 1):
        inside = [j for j in range(x.shape[1]) if channel[j] == shared]
        a = max(abs(float(token[j])) for token in x for j in inside)
        b = max(abs(float(row[j])) for w in weights for row in w for j in inside)
        scales.append(a**alpha / b ** (1 - alpha))
    middle = (max(scales) * min(scales)) ** 0.5
    return [s / middle for s in scales]


def scales_agree(module: types.ModuleType, alpha: float, channel: list[int]) -> bool:
    weights, x = case()
    found = module.smooth_scale(weights, x.abs().amax(0), alpha, torch.tensor(channel))
    return found.tolist() == pytest.approx(scale_twin(weights, x, alpha, channel), rel=1e-12)


@pytest.mark.parametrize(
    "channel", [list(range(8)), [0, 1, 2, 3, 0, 1, 2, 3]], ids=["own scales", "shared by two"]
)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0], ids=str)
def test_scales_equal_plain_loops(alpha, channel):
    assert scales_agree(MODULE, alpha, channel)


def loss_twin(
    weights: list[torch.Tensor], x: torch.Tensor, scale: list[float], int8: bool
) -> float:
    """Token by token: the input divided and rounded on the token's own grid, the weight multiplied
    and rounded on its rows'."""
    total = 0.0
    for w in weights:
        q = rtn(w * torch.tensor(scale, dtype=w.dtype), SPEC, SEARCH).dequantize(torch.float64)
        for token in x:
            inputs = [float(token[j]) / scale[j] for j in range(8)]
            step = max(map(abs, inputs)) / 127
            rounded = [round(v / step) * step for v in inputs] if int8 else inputs
            for row in range(w.shape[0]):
                got = sum(float(q[row, j]) * rounded[j] for j in range(8))
                total += (got - sum(float(w[row, j]) * float(token[j]) for j in range(8))) ** 2
    return total


def loss_agrees(module: types.ModuleType, int8: bool) -> bool:
    weights, x = case()
    scale = smooth_scale(weights, x.abs().amax(0), 0.5, OWN)
    got = module.smoothed_loss(readers(weights, int8), x, scale, SEARCH)
    return got == pytest.approx(
        loss_twin(weights, x, scale.tolist(), int8), rel=1e-4
    )  # activations are scaled in float32


@pytest.mark.parametrize("int8", [True, False], ids=["int8 inputs", "inputs as they are"])
def test_the_loss_equals_plain_loops(int8):
    assert loss_agrees(MODULE, int8)


SLIPS = {
    "alpha on the weights": (
        "where(known, 1.0).pow(alpha) / ",
        "where(known, 1.0).pow(1 - alpha) / ",
    ),
    "the weights' largest of the first linear": (
        "torch.stack([w.abs().amax(0) for w in weights])",
        "weights[0].abs()",
    ),
    "the weights' largest by rows": (
        "for w in weights]).amax(0)",
        "for w in weights]).amax(0).flip(0)",
    ),
    "extremes not centred": (" / (scale.max() * scale.min()).sqrt()", ""),
    "weights divided": ("rtn(weight * scale", "rtn(weight / scale"),
    "inputs multiplied": ("scaled = rows / scale", "scaled = rows * scale"),
    "inputs never rounded": ("(rounded if reader.int8 else scaled)", "scaled"),
    "inputs always rounded": ("(rounded if reader.int8 else scaled)", "rounded"),
    "against what the scaled inputs give": (
        "rows @ weight.T).square()",
        "scaled @ weight.T).square()",
    ),
}


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right, wrong, monkeypatch):
    module = slipped(monkeypatch, MODULE, right, wrong)
    assert not (
        scales_agree(module, 0.3, list(range(8)))
        and all(loss_agrees(module, int8) for int8 in (True, False))
    )


def test_smoothing_repairs_an_outlier_and_the_wrong_side_makes_it_worse():
    weights, x = case()
    found = search_smoothing(readers(weights), x, x.abs().amax(0), (0.5,), SEARCH)
    assert found.ratio == 0.5
    assert found.after < found.before / 4
    inverse = smoothed_loss(readers(weights), x, 1 / found.scale, SEARCH)
    assert inverse > smoothed_loss(readers(weights), x, torch.ones(8, dtype=torch.float64), SEARCH)


@pytest.mark.parametrize("alphas", [(0.5,), (0.1, 0.5, 0.9)], ids=["one", "three"])
@pytest.mark.parametrize("seed", range(6))
def test_the_result_is_the_best_and_never_worse_than_no_scaling(seed, alphas):
    weights, x = case(seed, outlier=1.0)
    largest = x.abs().amax(0)
    found = search_smoothing(readers(weights), x, largest, alphas, SEARCH)
    tried = {
        a: smoothed_loss(readers(weights), x, smooth_scale(weights, largest, a, OWN), SEARCH)
        for a in alphas
    }
    signal = sum(float((x @ w.T).square().sum()) for w in weights)
    plain = smoothed_loss(readers(weights), x, torch.ones(8, dtype=torch.float64), SEARCH)
    assert found.before == pytest.approx(plain / signal, rel=1e-9)
    assert found.after == pytest.approx(min(plain, *tried.values()) / signal, rel=1e-9)
    assert (found.ratio is None) == bool((found.scale == 1).all()) == (min(tried.values()) >= plain)


def test_channels_that_say_nothing_get_a_middling_scale():
    weights, x = case()
    x[:, 3] = 0
    weights = [w.index_fill(1, torch.tensor([2]), 0.0) for w in weights]
    scale = smooth_scale(weights, x.abs().amax(0), 0.5, OWN)
    known = scale[[0, 1, 4, 5, 6, 7]]
    assert scale[2].item() == scale[3].item() == pytest.approx(known.log().mean().exp().item())
    assert bool((smooth_scale(weights, torch.zeros(8, dtype=torch.float64), 0.5, OWN) == 1).all())


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_an_impossible_alpha_is_refused(alpha):
    weights, x = case()
    with pytest.raises(SpecError, match="alpha must be between 0 and 1"):
        smooth_scale(weights, x.abs().amax(0), alpha, OWN)
