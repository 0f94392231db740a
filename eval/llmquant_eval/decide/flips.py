"""Two models right or wrong on the same items: is the candidate's loss smaller than a margin?

What both have right or both have wrong says nothing of a difference. ``lost`` counts the items that
only the baseline has right, ``gained`` those that only the candidate has right. The difference of
the two accuracies is ``(gained - lost) / items``, and Tango's score statistic (Statistics in
Medicine 17, 1998) tests it against any value: its variance is that of the null hypothesis, so it
also works where hardly anything flips.

Its normal approximation is too generous there: of 280 items with one flip in a hundred it errs 6
times in 100 at a level of 5 %. So the p-value is exact: the largest probability, over all rates of
flips that the null hypothesis allows, of a statistic at least as far out (Sidik, Statistics in
Medicine 22, 2003). The probability of a wrong verdict is never above the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_RATES = 48  # rates of flips at which the largest probability is looked for, and again around it
_NEGLIGIBLE = 1e-18  # probability of a count that is left out
_EXACT = 100_000  # items above which the normal approximation errs by less than it matters


@dataclass(frozen=True, slots=True)
class Flips:
    """Counts of items: ``lost`` and ``gained`` of ``items``."""

    lost: int
    gained: int
    items: int

    @property
    def difference(self) -> float:
        """Candidate minus baseline, -1 … 1."""
        return (self.gained - self.lost) / self.items

    @property
    def rate(self) -> float:
        """Share of items that flipped, either way."""
        return (self.lost + self.gained) / self.items

    def p_not_worse(self, margin: float) -> float:
        """Exact one-sided p-value of "the true loss is ``margin`` or more" (0 < margin < 1)."""
        return _exact(self.gained, self.lost, self.items, -margin)

    def p_worse(self, margin: float) -> float:
        """Exact one-sided p-value of "the true loss is at most ``margin``"."""
        return _exact(self.lost, self.gained, self.items, margin)

    def interval(self, level: float) -> tuple[float, float]:
        """Tango's two-sided score interval of the difference, with confidence ``level``."""
        from scipy.optimize import brentq
        from scipy.special import ndtri

        z = float(ndtri((1 + level) / 2))

        def distance(delta: float, target: float) -> float:
            at = np.asarray(float(self.gained)), np.asarray(float(self.lost))
            return float(score(*at, self.items, delta)) - target

        here, edge = self.difference, 1 - 1e-12
        low = -1.0 if here <= -edge else float(brentq(distance, -edge, here, args=(z,)))
        high = 1.0 if here >= edge else float(brentq(distance, here, edge, args=(-z,)))
        return low, high

    def detectable(self, margin: float, alpha: float, power: float) -> float:
        """How far from the margin the truth must be for a sample of this size, with flips as seen
        here, to say so with probability ``power``; without a single flip, the loss that it just
        rules out."""
        if self.rate == 0:
            return float(1 - alpha ** (1 / self.items))
        return self._spread(margin, alpha, power) / math.sqrt(self.items)

    def needed(self, margin: float, alpha: float, power: float) -> int | None:
        """Items that would settle the question with probability ``power`` if the true difference
        and rate of flips are those seen here; None if the difference equals the margin."""
        distance = abs(self.difference + margin)
        if self.rate == 0:
            return _without_flips(margin, alpha)
        if distance < 1e-12:
            return None
        return math.ceil((self._spread(margin, alpha, power) / distance) ** 2)

    def _spread(self, margin: float, alpha: float, power: float) -> float:
        """Of one item, weighed as a test at level ``alpha`` with that power does: at the margin and
        at what was seen (Nam, Biometrics 53, 1997)."""
        from scipy.special import ndtri

        gained, lost = (np.asarray(n / self.items) for n in (self.gained, self.lost))
        null = float(_variance(gained, lost, -margin))
        seen = self.rate - self.difference**2
        return float(ndtri(1 - alpha)) * math.sqrt(null) + float(ndtri(power)) * math.sqrt(seen)


@cache
def _without_flips(margin: float, alpha: float) -> int:
    """Items without a single flip that rule out a loss of ``margin``. The chance of seeing none is
    the least that it takes; at strict levels other tables are as far out, and it takes more."""
    items = math.ceil(math.log(alpha) / math.log1p(-margin))
    while Flips(0, 0, items).p_not_worse(margin) > alpha:
        items = math.ceil(items * 1.01)
    return items


def quantiles(alpha: float, power: float) -> float:
    """Standard errors between a margin and a difference that is told from it with ``power``."""
    from scipy.special import ndtri

    return float(ndtri(1 - alpha) + ndtri(power))


def score(gained: Array, lost: Array, items: int, delta: float) -> Array:
    """Tango's statistic of "gained minus lost, as a share, is ``delta``"; elementwise."""
    distance = (gained - lost) / items - delta
    variance = _variance(gained / items, lost / items, delta)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = distance * math.sqrt(items) / np.sqrt(variance)
    return np.where(np.abs(distance) < 1e-15, 0.0, z)


def _variance(gained: Array, lost: Array, delta: float) -> Array:
    """Of one item's difference if the true one is ``delta``, at the most likely rate of flips;
    arguments are shares."""
    b = -gained - lost + (2 - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    rate = (np.sqrt(np.maximum(b * b - 8 * c, 0)) - b) / 4
    rate = np.maximum(rate, max(0.0, -delta))
    return np.maximum(2 * rate + delta * (1 - delta), 0)


def _exact(gained: int, lost: int, items: int, delta: float) -> float:
    """The largest probability, where the true difference is ``delta``, of a statistic as high as
    that of these counts or higher."""
    observed = float(score(np.asarray(float(gained)), np.asarray(float(lost)), items, delta))
    if items > _EXACT:
        from scipy.special import ndtr

        return float(ndtr(-observed))
    least = _least_gained(np.arange(items + 1.0), items, delta, observed - 1e-9)
    low, high = max(0.0, -delta), (1 - delta) / 2
    rates = low + (high - low) * np.linspace(0, 1, _RATES) ** 2
    largest = 0.0
    for _ in range(2):
        chances = _chances(rates, least, items, delta)
        largest = max(largest, float(chances.max()))
        best = int(chances.argmax())
        rates = np.linspace(
            rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], _RATES // 2
        )
    return min(1.0, largest)


def _least_gained(losses: Array, items: int, delta: float, observed: float) -> Array:
    """For each count of losses the smallest count of gains whose statistic reaches ``observed``;
    more than there can be where none does. The statistic grows with the gains."""
    low, high = np.zeros_like(losses), items - losses + 1
    while (low < high).any():
        middle = np.floor((low + high) / 2)
        reached = score(middle, losses, items, delta) >= observed
        open_ = low < high
        high = np.where(open_ & reached, middle, high)
        low = np.where(open_ & ~reached, middle + 1, low)
    return low


def _chances(rates: Array, least: Array, items: int, delta: float) -> Array:
    """Probability of the region where a share ``rates`` of items is lost and ``rates + delta``
    gained."""
    from scipy.special import betainc, gammaln, xlog1py, xlogy

    losses = np.arange(items + 1.0)
    ways = gammaln(items + 1) - gammaln(losses + 1) - gammaln(items - losses + 1)
    found = np.zeros_like(rates)
    for i, rate in enumerate(rates):
        chance = np.exp(ways + xlogy(losses, rate) + xlog1py(items - losses, -rate))
        matter = chance > _NEGLIGIBLE
        matter &= least <= items - losses
        rest, needed = (items - losses)[matter], least[matter]
        gain = 0.0 if rate >= 1 else min(1.0, max(0.0, (rate + delta) / (1 - rate)))
        at_least = betainc(np.maximum(needed, 1), rest - needed + 1, gain)
        reached = np.where(needed <= 0, 1.0, at_least)
        found[i] = (chance[matter] * reached).sum()
    return found
