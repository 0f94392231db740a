"""Standard errors, by window.

Tokens inside a window share their context, so they are not independent draws; windows nearly are. Every standard
error here is therefore over windows: with ``n`` windows of sums ``S_w`` over ``T_w`` tokens the mean is
``m = ΣS/ΣT`` and its standard error ``sqrt(n/(n-1) · Σ(S_w - m·T_w)²) / ΣT``, which is the plain ``sd/sqrt(n)`` of
the window means when all windows are equally long. Functions of a mean take the delta method. One window has no
spread, and the answer is None rather than zero.

Two models on the same text are *paired*: what is uncertain about their ratio is the spread of the window-by-window
difference, far less than either perplexity's own (Cochran, Sampling Techniques, ch. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error in the same unit; None where one window tells no spread."""

    value: float
    standard_error: float | None


def ratio_of_sums(sums: Floats, counts: Floats) -> Estimate:
    """Mean per token from per-window sums ``[n]`` and token counts ``[n]``; ``counts`` must not all be 0."""
    total = float(counts.sum())
    mean = float(sums.sum()) / total
    n = len(sums)
    if n < 2:
        return Estimate(mean, None)
    residual = sums - mean * counts
    return Estimate(mean, math.sqrt(n / (n - 1) * float(residual @ residual)) / total)


def exponential(mean_log: Estimate) -> Estimate:
    """``exp`` of an estimate; delta method: the relative error of the result is the absolute one of its log."""
    value = math.exp(mean_log.value)
    return Estimate(value, None if mean_log.standard_error is None else value * mean_log.standard_error)


def root(mean_square: Estimate) -> Estimate:
    """Square root of an estimate ≥ 0, by the delta method; at 0 the slope is infinite and the error unknown."""
    value = math.sqrt(max(mean_square.value, 0.0))
    error = mean_square.standard_error
    return Estimate(value, None if error is None or value == 0.0 else error / (2.0 * value))


def perplexity(window_means: Floats) -> Estimate:
    """``exp(mean of the window means)`` of negative log-likelihoods in nats, ``[n]``."""
    return exponential(ratio_of_sums(window_means, np.ones_like(window_means)))


def perplexity_ratio(candidate: Floats, reference: Floats) -> Estimate:
    """``ppl(candidate) / ppl(reference)`` from paired window means ``[n]`` in nats, with the paired error."""
    return perplexity(candidate - reference)
