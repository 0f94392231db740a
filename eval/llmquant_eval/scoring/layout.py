"""Where the scored tokens of a pass lie: which window each belongs to, and how much context it had.

Windows may score different numbers of tokens (the tail of a stride, the last window of a document),
so per-token values are flat arrays ``[tokens]`` in stream order and a layout says where each
window's begin. It also takes means over them with the standard error that fits:

* **by window** where there are at least :data:`FEW_WINDOWS` windows that do not overlap: tokens of
  one window share their context, windows nearly are independent.
* **block bootstrap** over tokens where windows are fewer, or overlap and so are correlated: see
  :func:`llmquant_eval.report.statistics.block_bootstrap`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmquant_eval.report.statistics import Estimate, Floats, block_bootstrap, ratio_of_sums
from llmquant_eval.scoring.protocols import Window

# Below this many windows their spread is itself too uncertain: the standard error of a standard
# error of n is 1/sqrt(2n).
FEW_WINDOWS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Scored tokens per window ``counts`` int64 ``[windows]``, none of them 0, and whether windows
    overlap."""

    counts: NDArray[np.int64]
    overlapping: bool = False

    @classmethod
    def of(cls, windows: Sequence[Window], overlapping: bool) -> Layout:
        return cls(np.array([w.predictions for w in windows], dtype=np.int64), overlapping)

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
        if self.overlapping or self.windows < FEW_WINDOWS:
            return block_bootstrap(values, weights)
        return ratio_of_sums(
            np.add.reduceat(values, self.starts), np.add.reduceat(weights, self.starts)
        )


def context_lengths(windows: Sequence[Window]) -> NDArray[np.int64]:
    """Tokens that stand before each scored token in its window, ``[tokens]``."""
    return np.concatenate([np.arange(w.scored - w.begin, w.end - w.begin) for w in windows])
