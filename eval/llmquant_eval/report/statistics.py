"""Standard errors: by window, and by block bootstrap.

Tokens inside a window share their context, so they are not independent draws; windows nearly are.
Every standard error here is therefore over windows: with ``n`` windows of sums ``S_w`` over ``T_w``
tokens the mean is ``m = ΣS/ΣT`` and its standard error ``sqrt(n/(n-1) · Σ(S_w - m·T_w)²) / ΣT``,
which is the plain ``sd/sqrt(n)`` of the window means when all windows are equally long. Functions
of a mean take the delta method. One window has no spread, and the answer is None rather than zero.

Few windows, or windows that overlap, give no sound spread. There the error comes from a circular
block bootstrap over the tokens in their order (Politis and Romano 1992): blocks of
``ceil(sqrt(T))`` tokens are drawn with replacement, so that dependence within a block is kept;
longer than the ``T^(1/3)`` that is best for short memory, because a text's is long. The seed is
fixed: the same losses have the same error.

Two models on the same text are *paired*: what is uncertain about their ratio is the spread of the
window-by-window difference, far less than either perplexity's own (Cochran, Sampling Techniques,
ch. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmquant_eval.report.results import ErrorMethod

Floats = NDArray[np.float64]
RESAMPLES = 2000
FEWEST_TOKENS = 16  # below it no block is shorter than a quarter of the data
_SEED = 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error in the same unit (None where nothing tells a spread), and the
    method that gave it."""

    value: float
    standard_error: float | None
    method: ErrorMethod | None = None


def ratio_of_sums(sums: Floats, counts: Floats) -> Estimate:
    """Mean per token from per-window sums ``[n]`` and token counts ``[n]``; ``counts`` must not all
    be 0."""
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    n = len(sums)
    if n < 2:
        return Estimate(mean, None)
    residual = sums - mean * counts
    return Estimate(mean, math.sqrt(n / (n - 1) * float(residual @ residual)) / total, "by window")


def block_bootstrap(values: Floats, weights: Floats) -> Estimate:
    """``Σ values / Σ weights`` over tokens in order ``[T]``, with the standard error of a circular
    block bootstrap.

    Fewer than :data:`FEWEST_TOKENS` tokens have no error. The spread of k blocks is widened by
    ``sqrt(k/(k-1))``, as a sample's always is.
    """
    total = len(values)
    mean = float(values.sum()) / float(weights.sum())
    if total < FEWEST_TOKENS:
        return Estimate(mean, None)
    length = math.ceil(math.sqrt(total))
    blocks = round(total / length)
    starts = np.random.default_rng(_SEED).integers(0, total, (RESAMPLES, blocks))

    def sums(of: Floats) -> Floats:
        running = np.concatenate([[0.0], np.cumsum(np.concatenate([of, of[:length]]))])
        drawn: Floats = (running[starts + length] - running[starts]).sum(axis=1)
        return drawn

    drawn_weights = sums(weights)
    ratios = sums(values)[drawn_weights > 0] / drawn_weights[drawn_weights > 0]
    if len(ratios) < 2:
        return Estimate(mean, None)
    return Estimate(
        mean, float(ratios.std(ddof=1)) * math.sqrt(blocks / (blocks - 1)), "block bootstrap"
    )


def exponential(mean_log: Estimate) -> Estimate:
    """``exp`` of an estimate; delta method: the relative error of the result is the absolute one of
    its log."""
    value = math.exp(mean_log.value)
    error = mean_log.standard_error
    return Estimate(value, None if error is None else value * error, mean_log.method)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """An estimate in another unit; ``factor`` above 0."""
    error = estimate.standard_error
    return Estimate(
        factor * estimate.value, None if error is None else factor * error, estimate.method
    )


def root(mean_square: Estimate) -> Estimate:
    """Square root of an estimate ≥ 0, by the delta method; at 0 the slope is infinite and the error
    unknown."""
    value = math.sqrt(max(mean_square.value, 0.0))
    error = mean_square.standard_error
    if error is None or value == 0.0:
        return Estimate(value, None)
    return Estimate(value, error / (2.0 * value), mean_square.method)
