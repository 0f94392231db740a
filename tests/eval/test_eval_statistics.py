"""Standard errors against their textbook forms and against what resampling says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from llmquant_eval.report.statistics import (
    Estimate,
    Floats,
    block_bootstrap,
    exponential,
    ratio_of_sums,
    root,
    scaled,
)
from llmquant_eval.scoring.protocols import TokenWindow
from llmquant_eval.scoring.window_layout import WindowLayout, context_lengths


def perplexity(window_means: Floats) -> Estimate:
    return exponential(ratio_of_sums(window_means, np.ones_like(window_means)))


def perplexity_ratio(candidate: Floats, reference: Floats) -> Estimate:
    return perplexity(candidate - reference)


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
    assert estimate.standard_error == pytest.approx(
        4.0 * math.log(2.0), rel=1e-14
    )  # sd of (ln 2, ln 8) is √2 ln 2


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
        (
            perplexity_ratio(candidate, reference),
            np.exp((candidate - reference)[picks].mean(axis=1)),
        ),
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


def autocorrelated(draw: np.random.Generator, tokens: int, memory: float) -> Floats:
    """An AR(1) series of variance 1: ``x[t] = memory * x[t-1] + noise``."""
    noise = draw.normal(0.0, math.sqrt(1 - memory**2), tokens)
    values = np.empty(tokens)
    values[0] = draw.normal()
    for t in range(1, tokens):
        values[t] = memory * values[t - 1] + noise[t]
    return values


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8], ids=lambda m: f"memory {m}")
def test_the_block_bootstrap_finds_the_error_that_dependence_makes(memory: float) -> None:
    tokens = 4096
    true = math.sqrt((1 + memory) / (1 - memory) / tokens)  # of the mean of a long AR(1) series
    draw = np.random.default_rng(3)
    errors = []
    for _ in range(12):
        estimate = block_bootstrap(autocorrelated(draw, tokens, memory), np.ones(tokens))
        assert estimate.method == "block bootstrap"
        assert estimate.standard_error is not None
        errors.append(estimate.standard_error)
    assert np.mean(errors) == pytest.approx(true, rel=0.1)


def test_the_bootstrap_is_of_a_ratio_and_repeats_itself() -> None:
    draw = np.random.default_rng(4)
    weights = draw.uniform(0.5, 1.5, 900)
    noisy, constant = draw.normal(2.0, 0.5, 900), 3.0 * weights
    assert block_bootstrap(noisy, weights) == block_bootstrap(noisy, weights)
    assert block_bootstrap(noisy, weights).value == noisy.sum() / weights.sum()
    error = block_bootstrap(constant, weights).standard_error
    assert error is not None
    assert error < 1e-12  # numerator and denominator move together


@pytest.mark.parametrize(("tokens", "known"), [(15, False), (16, True)], ids=["too few", "enough"])
def test_few_tokens_have_no_error(tokens: int, known: bool) -> None:
    estimate = block_bootstrap(np.arange(tokens, dtype=np.float64), np.ones(tokens))
    assert estimate.value == (tokens - 1) / 2
    assert (estimate.standard_error is not None) == known
    assert estimate.method == ("block bootstrap" if known else None)


@pytest.mark.parametrize(
    ("windows", "overlapping", "method"),
    [(20, False, "by window"), (19, False, "block bootstrap"), (20, True, "block bootstrap")],
    ids=["enough windows", "few windows", "overlapping windows"],
)
def test_the_method_follows_from_the_windows(windows: int, overlapping: bool, method: str) -> None:
    layout = WindowLayout(np.full(windows, 7), overlapping)
    values = np.random.default_rng(5).normal(size=layout.tokens)
    assert layout.mean(values).method == method
    assert layout.mean(values).value == pytest.approx(float(values.mean()), rel=1e-12)


def test_windows_of_one_chat_are_one_draw() -> None:
    """Of 20 chats with three answers each that are equally hard, the error is that of 20 windows,
    not of 60."""
    chats = np.random.default_rng(3).normal(size=20)
    values = np.repeat(chats, 3 * 5)
    answers = WindowLayout(np.full(60, 5), units=np.arange(0, 60, 3))
    found, whole = answers.mean(values), WindowLayout(np.full(20, 15)).mean(values)
    assert (found.value, found.standard_error) == (whole.value, whole.standard_error)
    assert found.method == "by chat"
    few = WindowLayout(np.full(60, 5), units=np.arange(0, 60, 4))
    assert few.mean(values).method == "block bootstrap"


def test_a_layout_of_ragged_windows() -> None:
    windows = [TokenWindow(0, 5, 1), TokenWindow(3, 8, 5), TokenWindow(6, 9, 8)]
    layout = WindowLayout.of(windows, overlapping=True)
    assert (layout.counts.tolist(), layout.tokens, layout.windows) == ([4, 3, 1], 8, 3)
    assert layout.slices() == [slice(0, 4), slice(4, 7), slice(7, 8)]
    assert context_lengths(windows).tolist() == [1, 2, 3, 4, 2, 3, 4, 2]


def test_a_unit_changes_value_and_error_alike() -> None:
    assert scaled(Estimate(2.0, 0.5, "by window"), 3.0) == Estimate(6.0, 1.5, "by window")
    assert scaled(Estimate(2.0, None), 3.0) == Estimate(6.0, None)
