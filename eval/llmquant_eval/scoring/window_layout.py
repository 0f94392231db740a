"""Where the scored tokens of a pass lie: which window each belongs to, and how much context it had.

Windows may score different numbers of tokens (the tail of a stride, the last window of a document),
so per-token values are flat arrays ``[tokens]`` in stream order and a layout says where each
window's begin. It also takes means over them with the standard error that fits:

* **by window** where there are at least :data:`FEW_WINDOWS` windows that do not overlap: tokens of
  one window share their context, windows nearly are independent. Windows of one chat are not, so
  of chats the error is by chat.
* **block bootstrap** over tokens where windows are fewer, or overlap and so are correlated: see
  :func:`llmquant_eval.report.statistics.block_bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llmquant_eval.report.statistics import Estimate, Floats, block_bootstrap, ratio_of_sums
from llmquant_eval.scoring.protocols import TokenWindow

# Below this many windows their spread is itself too uncertain: the standard error of a standard
# error of n is 1/sqrt(2n).
FEW_WINDOWS = 20


@dataclass(frozen=True, slots=True, eq=False)
class WindowLayout:
    """Scored tokens per window ``counts`` int64 ``[windows]``, none of them 0, and whether windows
    overlap. ``units``: the windows, by number, that begin what is independent of the rest; None:
    every window does."""

    counts: NDArray[np.int64]
    overlapping: bool = False
    units: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls, windows: Sequence[TokenWindow], overlapping: bool, units: Sequence[int] | None = None
    ) -> WindowLayout:
        counts = np.array([w.predictions for w in windows], dtype=np.int64)
        return cls(counts, overlapping, None if units is None else np.array(units, dtype=np.int64))

    @property
    def windows(self) -> int:
        return len(self.counts)

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    @property
    def starts(self) -> NDArray[np.int64]:
        """Offset of each window's first token in the flat arrays."""
        return np.concatenate([[0], np.cumsum(self.counts[:-1])])

    def slices(self) -> list[slice]:
        """Where each window's tokens lie in the flat arrays."""
        return [slice(int(s), int(s + n)) for s, n in zip(self.starts, self.counts, strict=True)]

    def mean(self, values: Floats, weights: Floats | None = None) -> Estimate:
        """``Σ values / Σ weights`` over flat arrays ``[tokens]``; weights are 1 where none are
        given."""
        weights = np.ones_like(values) if weights is None else weights
        starts = self.starts if self.units is None else self.starts[self.units]
        if self.overlapping or len(starts) < FEW_WINDOWS:
            return block_bootstrap(values, weights)
        sums = (np.add.reduceat(values, starts), np.add.reduceat(weights, starts))
        found = ratio_of_sums(*sums)
        return found if self.units is None else replace(found, method="by chat")


def context_lengths(windows: Sequence[TokenWindow]) -> NDArray[np.int64]:
    """Tokens that stand before each scored token in its window, ``[tokens]``."""
    return np.concatenate([np.arange(w.scored - w.begin, w.end - w.begin) for w in windows])
