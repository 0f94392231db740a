"""Overlap with the evaluation text is the share of the windows' 13-token shingles (13 consecutive
tokens, as long as the word shingles of the GPT-3 paper's appendix C) that also occur within a row
of the evaluation text, by the same tokenizer. Shingles are compared by a 64-bit hash: between two
million-shingle texts some false match has odds of 1e-7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmquant.data.sources import Documents, counted
from llmquant.data.tokenize import Ids, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHINGLE = 13
OVERLAP_THRESHOLD = 0.1
"""A window with more than this share of its shingles in the evaluation text is counted."""
_HASH_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of the calibration windows stands in the evaluation text (definition above)."""

    evaluation: str
    fraction: float
    windows: int
    shingle: int = SHINGLE
    threshold: float = OVERLAP_THRESHOLD
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows of the evaluation text that were not looked at, by reason; empty ones do not count."""

    def lines(self) -> list[str]:
        """For people: how much, and what was not looked at."""
        lines = [
            f"overlap  {self.fraction:.2%} of {self.shingle}-token shingles stand in {self.evaluation}; "
            f"{self.windows:,} windows have more than {self.threshold:.0%}"
        ]
        if self.dropped:
            lines.append(
                f"         rows of {self.evaluation} that were left out: {counted(self.dropped)}"
            )
        return lines


def shingles(ids: Ids) -> NDArray[np.uint64]:
    """A hash of every ``SHINGLE`` consecutive ids: their polynomial modulo 2**64. Empty for fewer
    ids."""
    count = max(0, len(ids) - SHINGLE + 1)
    values = np.zeros(count, np.uint64)
    for i in range(SHINGLE):
        values = values * _HASH_BASE + ids[i : i + count].astype(np.uint64) + np.uint64(1)
    return values


def measure_overlap(
    windows: Sequence[Ids], evaluation: Documents, tokenizer: PreTrainedTokenizerBase
) -> Overlap:
    """The share of the windows' shingles that occur in the evaluation text, over all and by
    window."""
    dropped = Counter(evaluation.dropped)
    known = [shingles(row) for row in tokenize(evaluation, tokenizer, dropped, specials=False)]
    lost = {reason: n for reason, n in sorted(dropped.items()) if n and reason != "empty"}
    table = np.unique(np.concatenate(known)) if known else np.zeros(0, np.uint64)
    hits = [_in_table(shingles(window), table) for window in windows]
    count = sum(map(len, hits))
    over = sum(bool(len(hit)) and float(hit.mean()) > OVERLAP_THRESHOLD for hit in hits)
    fraction = sum(int(hit.sum()) for hit in hits) / count if count else 0.0
    return Overlap(evaluation.source, fraction, over, dropped=lost)


def _in_table(values: NDArray[np.uint64], table: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values are in a sorted table (``np.isin`` would sort the table again for every
    window)."""
    places = np.searchsorted(table, values)
    inside = places < len(table)
    inside[inside] = table[places[inside]] == values[inside]
    return inside
