"""Where the divergence sits: KL by the reference's confidence, and by how much context a position
had.

Fixed edges rather than deciles of the data, so that two models, two texts and two runs have the
same buckets: tenths of the probability that the reference gives its first choice, and powers of two
of the tokens that stand before the position. A bucket without tokens is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmquant_eval.report.results import Breakdown, Bucket
from llmquant_eval.scoring.divergence import Divergence
from llmquant_eval.scoring.protocols import TokenWindow
from llmquant_eval.scoring.window_layout import context_lengths

CONFIDENCE_EDGES = tuple(i / 10 for i in range(11))
_FIRST_CONTEXT = 16


def context_edges(longest: int) -> tuple[int, ...]:
    """``1, 16, 32, 64, …`` up to the first power of two beyond ``longest`` tokens of context."""
    edges = [1, _FIRST_CONTEXT]
    while edges[-1] <= longest:
        edges.append(2 * edges[-1])
    return tuple(edges)


def breakdowns(
    divergence: Divergence, windows: Sequence[TokenWindow], protocol: str
) -> list[Breakdown]:
    """KL of one pass by the reference's confidence, and by the length of the context."""
    contexts = context_lengths(windows)
    return [
        Breakdown(
            protocol=protocol,
            by="confidence",
            buckets=_buckets(divergence, divergence.confidence, CONFIDENCE_EDGES),
        ),
        Breakdown(
            protocol=protocol,
            by="context",
            buckets=_buckets(
                divergence, contexts.astype(np.float64), context_edges(int(contexts.max()))
            ),
        ),
    ]


def _buckets(
    divergence: Divergence, values: NDArray[np.float64], edges: Sequence[float]
) -> list[Bucket]:
    """One bucket per pair of edges; the last one has its upper edge too (a confidence of exactly
    1)."""
    inner = np.digitize(values, edges[1:-1])
    buckets = []
    for i, (lower, upper) in enumerate(pairwise(edges)):
        inside = inner == i
        tokens = int((inside & divergence.finite).sum())
        if tokens == 0:
            continue
        kl = divergence.mean_over(divergence.kl, inside)
        buckets.append(
            Bucket(
                lower=lower,
                upper=upper,
                tokens=tokens,
                kl_mean=kl.value,
                standard_error=kl.standard_error,
                top1_agreement=divergence.mean_over(divergence.same_top, inside).value,
            )
        )
    return buckets
