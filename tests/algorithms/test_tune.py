"""Tune on one small block: step 0 is the start, what is measured is what is stored, and no result
is worse than its start."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping

import pytest
import torch
from slips import slipped
from torch import Tensor

from llmquant.algorithms import ScaleSearch, TuneOptions, rtn, tune
from llmquant.algorithms.block_tuning import _Latent
from llmquant.errors import QuantizationError, SpecError
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, is_portable

WIDTH, HIDDEN, BATCHES = 16, 24, 6
SPECS = {
    str(s): s for s in (QuantSpec(2, 8, True), QuantSpec(3, 8, False), QuantSpec(4, None, True))
}
MODULE = sys.modules["llmquant.algorithms.block_tuning"]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {"up": draw(HIDDEN, WIDTH, seed=1) / 4, "down": draw(WIDTH, HIDDEN, seed=2) / 5}
MIX = torch.eye(WIDTH) + 0.6 * draw(WIDTH, WIDTH, seed=3)
INPUTS = [draw(3, 20, WIDTH, seed=10 + i) @ MIX for i in range(BATCHES)]


def forward(weights: Mapping[str, Tensor], batch: int) -> Tensor:
    """A residual block of two linears."""
    x = INPUTS[batch]
    return x + torch.nn.functional.silu(x @ weights["up"].T) @ weights["down"].T


TARGETS = [forward(WEIGHTS, i) for i in range(BATCHES)]


def starts(spec: QuantSpec) -> dict[str, QuantizedWeight]:
    return {name: rtn(w, spec, ScaleSearch(steps=4)) for name, w in WEIGHTS.items()}


def error(weights: Mapping[str, QuantizedWeight]) -> float:
    dense = {name: w.dequantize() for name, w in weights.items()}
    return float(
        torch.cat([(forward(dense, i) - TARGETS[i]).flatten() for i in range(BATCHES)])
        .double()
        .square()
        .mean()
    )


def grouped(start: QuantizedWeight) -> QuantizedWeight:
    """The same numbers with columns and groups shuffled, so that ``g_idx`` is needed."""
    order = torch.randperm(start.shape[1], generator=torch.Generator().manual_seed(0))
    group = start.column_groups()[order].to(torch.int32)
    return QuantizedWeight(
        start.codes[:, order].contiguous(), start.scales, start.zeros, start.spec, group
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_tuning_lowers_the_error_it_reports(spec: QuantSpec) -> None:
    begin = starts(spec)
    tuned = tune(
        WEIGHTS,
        begin,
        forward,
        TARGETS,
        TuneOptions(steps=60, lr=0.01, scale_lr=0.003, checks=6, patience=6),
    )
    assert tuned.before == pytest.approx(error(begin), rel=1e-5)
    assert tuned.after == pytest.approx(error(tuned.weights), rel=1e-5)
    assert tuned.after < tuned.before
    assert tuned.step > 0
    for name, weight in tuned.weights.items():
        assert is_portable(weight.scales)
        assert torch.equal(weight.zeros, begin[name].zeros)


@pytest.mark.parametrize("lr", [1e-4, 1.0])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_result_is_worse_than_its_start(spec: QuantSpec, lr: float) -> None:
    begin = starts(spec)
    tuned = tune(
        WEIGHTS,
        begin,
        forward,
        TARGETS,
        TuneOptions(steps=7, lr=lr, scale_lr=lr, checks=7, patience=7),
    )
    assert tuned.after <= tuned.before
    assert error(tuned.weights) <= error(begin) * (1 + 1e-5)
    if tuned.step == 0:
        assert {n: w.digest() for n, w in tuned.weights.items()} == {
            n: w.digest() for n, w in begin.items()
        }


def test_steps_far_too_long_end_early_and_return_the_start() -> None:
    begin = starts(QuantSpec(4, 8, False))
    options = TuneOptions(steps=100, lr=1.0, scale_lr=1.0, checks=50, patience=3)
    tuned = tune(WEIGHTS, begin, forward, TARGETS, options)
    assert (tuned.step, tuned.steps, tuned.after) == (0, 6, tuned.before)
    assert all(tuned.weights[name].digest() == begin[name].digest() for name in begin)


@pytest.mark.parametrize("shuffled", [False, True], ids=["groups in order", "g_idx"])
@pytest.mark.parametrize("spec", list(SPECS.values())[:2], ids=list(SPECS)[:2])
def test_the_latent_begins_exactly_at_the_start(spec: QuantSpec, shuffled: bool) -> None:
    start = rtn(WEIGHTS["up"], spec, ScaleSearch(steps=4))
    start = grouped(start) if shuffled else start
    latent = _Latent(WEIGHTS["up"], start)
    assert torch.equal(latent.weight().detach(), start.dequantize())
    assert latent.quantized().digest() == start.digest()


def test_a_start_that_is_not_the_nearest_code_is_kept_though_the_weight_lies_elsewhere() -> None:
    start = rtn(WEIGHTS["up"], QuantSpec(4, 8, True), ScaleSearch(steps=4))
    other = QuantizedWeight((start.codes + 1).clamp(max=15), start.scales, start.zeros, start.spec)
    latent = _Latent(WEIGHTS["up"], other)
    assert latent.quantized().digest() == other.digest()
    assert float((latent.u.detach() - other.codes).min()) == pytest.approx(-0.49, abs=1e-6)


@pytest.mark.parametrize("shuffled", [False, True], ids=["groups in order", "g_idx"])
def test_gradients_are_those_of_the_formula(shuffled: bool) -> None:
    """Straight through the rounding: ``dw/du = scale`` inside the range, ``dw/dfactor = (code -
    zero) * start scale``."""
    start = rtn(WEIGHTS["up"], QuantSpec(3, 8, False), ScaleSearch(steps=4))
    start = grouped(start) if shuffled else start
    latent, upstream = _Latent(WEIGHTS["up"], start), draw(HIDDEN, WIDTH, seed=5)
    (latent.weight() * upstream).sum().backward()
    group = start.column_groups()
    inside = (latent.u.detach() >= 0) & (latent.u.detach() <= start.spec.max_code)
    assert latent.u.grad is not None
    assert torch.equal(latent.u.grad, torch.where(inside, upstream * start.scales[:, group], 0.0))
    expected = torch.zeros_like(start.scales)
    for column in range(WIDTH):
        g = int(group[column])
        value = (start.codes[:, column].float() - start.zeros[:, g].float()) * start.scales[:, g]
        expected[:, g] += upstream[:, column] * value
    assert latent.factor.grad is not None
    torch.testing.assert_close(latent.factor.grad, expected, rtol=1e-5, atol=1e-6)


def test_without_a_step_for_scales_they_stay() -> None:
    begin = starts(QuantSpec(3, 8, True))
    tuned = tune(
        WEIGHTS, begin, forward, TARGETS, TuneOptions(steps=40, lr=0.01, scale_lr=0, checks=2)
    )
    assert tuned.step > 0
    for name, weight in tuned.weights.items():
        assert torch.equal(weight.scales, begin[name].scales)


def test_the_same_seed_gives_the_same_numbers_and_another_does_not() -> None:
    def digests(seed: int) -> list[str]:
        options = TuneOptions(steps=20, lr=0.02, seed=seed)
        return [
            w.digest()
            for w in tune(
                WEIGHTS, starts(QuantSpec(2, 8, True)), forward, TARGETS, options
            ).weights.values()
        ]

    assert digests(0) == digests(0)
    assert digests(0) != digests(1)


def test_a_start_that_is_not_finite_names_the_block() -> None:
    with pytest.raises(QuantizationError, match=r"^model\.layers\.3 gave NaN or Inf"):
        tune(
            WEIGHTS,
            starts(QuantSpec(4, 8)),
            lambda w, i: forward(w, i) * torch.nan,
            TARGETS,
            TuneOptions(),
            "model.layers.3",
        )


@pytest.mark.parametrize("field", ["steps", "checks", "patience", "lr"])
def test_options_that_make_no_sense_are_refused(field: str) -> None:
    with pytest.raises(SpecError, match="tune needs steps"):
        TuneOptions(**{field: 0})


SLIPS = {
    "the last state instead of the best": (
        "if now < best:\n            best, kept",
        "if True:\n            best, kept",
    ),
    "scales measured before they are portable": (
        "scales = scaled + (self._scales() - scaled.detach())",
        "scales = scaled",
    ),
    "latents start at the weight and not within the start's codes": (
        "codes - _INSIDE, codes + _INSIDE",
        "codes - 9, codes + 9",
    ),
}


def well_behaved(module: types.ModuleType) -> bool:
    start = rtn(WEIGHTS["up"], QuantSpec(4, 8, True), ScaleSearch(steps=4))
    other = QuantizedWeight((start.codes + 1).clamp(max=15), start.scales, start.zeros, start.spec)
    latent = module._Latent(WEIGHTS["up"], other)
    same = bool(torch.equal(latent.weight().detach(), other.dequantize()))
    latent.factor.data.mul_(1.003)
    stored = bool(torch.equal(latent.weight().detach(), latent.quantized().dequantize()))
    options = module.TuneOptions(steps=9, lr=1.0, scale_lr=1.0, checks=9, patience=9)
    tuned = module.tune(WEIGHTS, starts(QuantSpec(4, 8, False)), forward, TARGETS, options)
    return (
        same
        and stored
        and error(tuned.weights) <= error(starts(QuantSpec(4, 8, False))) * (1 + 1e-5)
    )


def test_the_real_one_is_well_behaved() -> None:
    assert well_behaved(MODULE)


@pytest.mark.parametrize(("right", "wrong"), SLIPS.values(), ids=SLIPS)
def test_a_planted_slip_is_caught(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not well_behaved(slipped(monkeypatch, MODULE, right, wrong))
