"""Two models scored on the same items with numbers: is the candidate's mean lower by less than a
margin?

Items that share a document go up and down together, so what is drawn and counted is the document (a
cluster of one where items share none). Three things must hold before a loss is ruled out, and each
covers what the others miss: Student's t over clusters; a bias-corrected and accelerated bootstrap
(BCa; Efron, JASA 82, 1987), which knows skewed differences; and the sample must be large enough
that a loss of the margin, concentrated in rare items, would have been seen at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llmquant_eval.decide.flips import Array, quantiles

_RESAMPLES = 9_999
_AT_A_TIME = 4_000_000  # numbers drawn at a time: 32 MB


@dataclass(frozen=True)
class Differences:
    """Candidate minus baseline, summed by cluster.

    Attributes:
        sums: of the differences of each cluster's items.
        counts: how many items each has.
        largest: the largest loss that one item can have.
        seed: of the bootstrap.
    """

    sums: Array
    counts: Array
    largest: float
    seed: int = 0

    @property
    def mean(self) -> float:
        """Over items."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Standard error of the mean over clusters; infinite for a single one."""
        clusters = len(self.sums)
        if clusters < 2:
            return math.inf
        residuals = self.sums - self.mean * self.counts
        share = clusters / (clusters - 1) * float((residuals**2).sum())
        return math.sqrt(share) / float(self.counts.sum())

    def p_not_worse(self, margin: float) -> float:
        """One-sided p-value of "the true mean loss is ``margin`` or more"."""
        return max(self._t(-margin), self._bootstrap(-margin), self._unseen(margin))

    def p_worse(self, margin: float) -> float:
        """One-sided p-value of "the true mean loss is at most ``margin``"."""
        mirrored = replace(self, sums=-self.sums)
        return max(mirrored._t(margin), mirrored._bootstrap(margin))

    def interval(self, level: float) -> tuple[float, float]:
        """BCa's two-sided interval of the mean with confidence ``level``."""
        from scipy.special import ndtr, ndtri

        if self.error in (0.0, math.inf):
            return (self.mean, self.mean) if self.error == 0.0 else (-math.inf, math.inf)
        means, bias, acceleration = self._resampled
        ends = []
        for share in ((1 - level) / 2, (1 + level) / 2):
            z = bias + float(ndtri(share))
            ends.append(float(np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))))
        return ends[0], ends[1]

    def detectable(self, margin: float, alpha: float, power: float) -> float:
        """How far from the margin the truth must be for a sample of this size and spread to say so
        with probability ``power``; without any spread, the loss that it just rules out."""
        if self.error == 0:
            return self.largest * float(1 - alpha ** (1 / len(self.sums)))
        return quantiles(alpha, power) * self.error

    def needed(self, margin: float, alpha: float, power: float) -> int | None:
        """Items that would settle the question with probability ``power`` if the true difference
        and spread are those seen here; None if the difference equals the margin."""
        distance = abs(self.mean + margin)
        unseen = math.ceil(math.log(alpha) / math.log1p(-min(1 - 1e-12, margin / self.largest)))
        if distance < 1e-12 or math.isinf(self.error):
            return None
        clusters = len(self.sums) * (self.error * quantiles(alpha, power) / distance) ** 2
        wanted = max(math.ceil(clusters), unseen if self.mean > -margin else 2)
        return math.ceil(wanted * float(self.counts.mean()))

    def _t(self, value: float) -> float:
        """Of "the mean is ``value`` or less"."""
        from scipy.stats import t

        if math.isinf(self.error):
            return 1.0
        if self.error == 0:
            return 0.0 if self.mean > value else 1.0
        return float(t.sf((self.mean - value) / self.error, len(self.sums) - 1))

    def _bootstrap(self, value: float) -> float:
        """The same: the level at which BCa's lower end is ``value``."""
        from scipy.special import ndtr, ndtri

        if self.error in (0.0, math.inf):
            return self._t(value)
        means, bias, acceleration = self._resampled
        below = (float((means < value).sum()) + 0.5) / (len(means) + 1)
        z = float(ndtri(below)) - bias
        return float(ndtr(z / (1 + acceleration * z) - bias))

    def _unseen(self, margin: float) -> float:
        """The probability of seeing no loss at all where a loss of ``margin`` is the work of items
        that lose all they can."""
        return float((1 - min(1.0, margin / self.largest)) ** len(self.sums))

    @cached_property
    def _resampled(self) -> tuple[Array, float, float]:
        """Means of resamples, the bias and the acceleration of BCa."""
        from scipy.special import ndtri

        draw, clusters = np.random.default_rng(self.seed), len(self.sums)
        means = np.empty(_RESAMPLES)
        step = max(1, _AT_A_TIME // clusters)
        for start in range(0, _RESAMPLES, step):
            size = (min(step, _RESAMPLES - start), clusters)
            chosen = draw.integers(0, clusters, size)
            means[start : start + size[0]] = self.sums[chosen].sum(1) / self.counts[chosen].sum(1)
        below = (means < self.mean).mean() + (means == self.mean).mean() / 2
        bias = float(ndtri(np.clip(below, 1 / len(means), 1 - 1 / len(means))))
        without = (self.sums.sum() - self.sums) / (self.counts.sum() - self.counts)
        apart = without.mean() - without
        spread = float((apart**2).sum()) ** 1.5
        acceleration = float((apart**3).sum()) / (6 * spread) if spread > 0 else 0.0
        return means, bias, acceleration
