"""Evidence that numbers no longer come from where a sample came from; it may be looked at after
every number.

A conformal test martingale (Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2nd
edition, chapter 8). Each new number is ranked among the sample and all numbers before it, ties
broken at random: its rank, divided by how many there are, is p. As long as the sample and the
stream are exchangeable, the p are independent and uniform, whatever the distribution is and however
small the sample. So a gambler who bets on p at fair odds, by a density f on [0, 1], has a capital
that is a martingale. By Ville's inequality it ever reaches c with a probability of at most 1/c.
That is the guarantee: it has no number of looks in it, and no error of the sample is left out.

The gambler spreads one unit over several densities (numbers are larger, smaller, wider, narrower;
strongly or a little; all or some of them) and over the moments at which they begin. The share that
still waits after t numbers is 1 / (1 + ln(1 + t)), so a change after a long quiet time costs
``ln t`` and a little more. Because a density has no memory, all beginnings add up to one number for
each: the memory is bounded. This is a CUSUM with an error guarantee over all time.

Numbers are kept as counts in bins. Ranks within a bin are drawn, which keeps the guarantee exact.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TILTS = np.array([s * t for t in (1.0, 2.0, 4.0, 8.0, 32.0) for s in (-1.0, 1.0)])
_SHARES = np.array([0.2, 1.0])  # of the numbers that a density believes to have changed
_NORMS = _TILTS / np.expm1(_TILTS)
_MOST = 1e280  # of a capital: cutting it off keeps the guarantee, and the arithmetic finite
EXPERTS = 2 * len(_TILTS) * len(_SHARES)


class Evidence:
    """The gambler's capital on one statistic.

    Args:
        edges: ascending; a number belongs to the bin after the last edge that it reaches.
        counts: of the sample, one more than edges.
        seed: of the ranks within a bin; the same seed and numbers give the same capital.

    Attributes:
        counts: of the sample and the stream.
        seen: numbers of the stream.
        capital: by density.
        value: all of it, with what waits; 1 at first.
    """

    def __init__(self, edges: Sequence[float], counts: Sequence[int], seed: str) -> None:
        self._edges, self.counts, self._seed = edges, list(counts), seed
        self.seen = 0
        self.capital: NDArray[np.float64] = np.zeros(EXPERTS)
        self.value = 1.0

    def restore(self, counts: Sequence[int], seen: int, capital: Sequence[float]) -> None:
        """Go on where another one was."""
        self.counts, self.seen = list(counts), seen
        self.capital = np.array(capital, dtype=np.float64)
        self.value = float(self.capital.sum()) + waiting(seen)

    def add(self, number: float) -> float:
        """The capital after one more number."""
        p = self._rank(number)
        woken = waiting(self.seen) - waiting(self.seen + 1)
        self.seen += 1
        self.capital = np.minimum((self.capital + woken / EXPERTS) * densities(p), _MOST)
        self.value = float(self.capital.sum()) + waiting(self.seen)
        return self.value

    def _rank(self, number: float) -> float:
        place = bisect.bisect_right(self._edges, number)
        self.counts[place] += 1
        drawn = _drawn(f"{self._seed}:{self.seen}")
        below = sum(self.counts[:place])
        return (below + drawn * self.counts[place]) / (below + sum(self.counts[place:]))


def _drawn(seed: str) -> float:
    """Uniform on [0, 1), by a hash: a generator would take ten times as long to seed."""
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=6).digest()) / 2**48


def waiting(seen: int) -> float:
    """The share of the capital that was not bet on any of the first ``seen`` numbers."""
    return 1 / (1 + math.log1p(seen))


def densities(p: float) -> NDArray[np.float64]:
    """Of every expert at p; each has the integral 1 over [0, 1]. By location, then by spread."""
    tilted = np.concatenate([_NORMS * np.exp(_TILTS * x) for x in (p, abs(2 * p - 1))])
    return np.concatenate([1 - share + share * tilted for share in _SHARES])
