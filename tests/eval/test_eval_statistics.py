"""Standard errors against their textbook forms and against what resampling says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llmquant_eval.statistics import Estimate, exponential, perplexity, perplexity_ratio, ratio_of_sums, root


def test_equal_windows_give_the_plain_standard_error_of_the_mean() -> None:
    means = np.array([1.0, 2.0, 4.0, 8.0])
    estimate = ratio_of_sums(means * 7, np.full(4, 7.0))
    assert estimate.value == pytest.approx(3.75, rel=1e-15)
    assert estimate.standard_error == pytest.approx(float(scipy_stats.sem(means)), rel=1e-14)


def test_unequal_windows_give_the_mean_per_token() -> None:
    assert ratio_of_sums(np.array([3.0, 5.0]), np.array([1.0, 3.0])).value == 2.0


def test_one_window_has_no_standard_error() -> None:
    assert ratio_of_sums(np.array([3.0]), np.array([2.0])) == Estimate(1.5, None)
    assert perplexity(np.array([0.0])) == Estimate(1.0, None)


def test_perplexity_by_hand() -> None:
    estimate = perplexity(np.log([2.0, 8.0]))
    assert estimate.value == pytest.approx(4.0, rel=1e-15)
    assert estimate.standard_error == pytest.approx(4.0 * math.log(2.0), rel=1e-14)  # sd of (ln 2, ln 8) is √2 ln 2


def test_a_constant_shift_has_a_ratio_without_error() -> None:
    reference = np.array([3.0, 3.5, 4.5])
    ratio = perplexity_ratio(reference + 0.25, reference)
    assert ratio.value == pytest.approx(math.exp(0.25), rel=1e-15)
    assert ratio.standard_error == pytest.approx(0.0, abs=1e-15)


def test_by_window_errors_agree_with_a_bootstrap_over_windows() -> None:
    draw = np.random.default_rng(0)
    reference = draw.normal(3.5, 0.3, 200)
    candidate = reference + draw.normal(0.02, 0.01, 200)
    picks = draw.integers(0, 200, (4000, 200))
    for estimate, resampled in (
        (perplexity(candidate), np.exp(candidate[picks].mean(axis=1))),
        (perplexity_ratio(candidate, reference), np.exp((candidate - reference)[picks].mean(axis=1))),
    ):
        assert estimate.standard_error == pytest.approx(float(resampled.std()), rel=0.05)


def test_pairing_is_what_makes_a_small_loss_visible() -> None:
    draw = np.random.default_rng(1)
    reference = draw.normal(3.5, 0.3, 100)
    candidate = reference + draw.normal(0.01, 0.005, 100)
    paired, own = perplexity_ratio(candidate, reference), perplexity(candidate)
    assert paired.standard_error is not None
    assert own.standard_error is not None
    assert paired.standard_error / paired.value < own.standard_error / own.value / 20


@pytest.mark.parametrize(
    ("square", "expected"),
    [(Estimate(4.0, 0.4), Estimate(2.0, 0.1)), (Estimate(0.0, 0.0), Estimate(0.0, None)),
     (Estimate(9.0, None), Estimate(3.0, None))],
    ids=["delta method", "zero", "one window"],
)  # fmt: skip
def test_root(square: Estimate, expected: Estimate) -> None:
    assert root(square) == expected


def test_exponential_without_error() -> None:
    assert exponential(Estimate(0.0, None)) == Estimate(1.0, None)
