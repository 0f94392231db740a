"""Negative log-likelihood per token, and the perplexity made of it.

Whatever dtype the model computes in, the log-softmax is float32: bf16 has 8 bits and a
log-probability of -9.3 would be rounded to a sixteenth. A float32 copy of all logits at once would
be the largest tensor of the run (2048 positions of a 128k vocabulary: 1 GiB), so positions are
taken in chunks of a fixed number of elements. Sums over tokens are float64.

A NaN or an infinite loss is an error, not a skipped token: leaving out the tokens at which a model
breaks would reward it for breaking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmquant.errors import QuantizationError
from llmquant_eval.report.statistics import Estimate, Floats, exponential
from llmquant_eval.scoring.layout import Layout

# Elements of one float32 chunk of [positions, vocabulary]: 16 MiB, small enough to stay near the
# cache.
CHUNK_ELEMENTS = 1 << 22


def position_chunks(positions: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover ``positions`` rows with at most :data:`CHUNK_ELEMENTS` elements each (at
    least one row)."""
    rows = max(1, CHUNK_ELEMENTS // vocabulary)
    for start in range(0, positions, rows):
        yield slice(start, min(start + rows, positions))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target in nats.

    Args:
        logits: ``[positions, vocabulary]``, any float dtype.
        targets: int64 ``[positions]``, the token that came next.

    Returns:
        float32 ``[positions]``; NaN or infinite where the logits are.
    """
    nll = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for part in position_chunks(*logits.shape):
        log_probabilities = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        nll[part] = -log_probabilities.gather(1, targets[part].unsqueeze(1)).squeeze(1)
    return nll


def check_finite(losses: Floats, label: str, windows: Sequence[int]) -> None:
    """Refuse losses (one array a window, end to end) that are NaN or infinite; ``windows`` are the
    windows' numbers.

    Raises:
        QuantizationError: says how many tokens of how many, and the first window they are in.
    """
    bad = ~np.isfinite(losses)
    if bad.any():
        where = (
            f"window {windows[0]}"
            if len(windows) == 1
            else f"windows {windows[0]} to {windows[-1]}"
        )
        raise QuantizationError(
            f"{label} gave a NaN or infinite loss at {int(bad.sum())} of {bad.size} tokens of {where}; "
            "try --dtype float32, or look at the checkpoint with llmquant inspect --verify"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Perplexity:
    """Losses ``[tokens]`` in nats, float64, in the order of their layout, and what follows from
    them.

    Raises:
        QuantizationError: on construction, when a loss is NaN or infinite.
    """

    losses: Floats
    layout: Layout
    label: str

    def __post_init__(self) -> None:
        check_finite(self.losses, self.label, range(self.layout.windows))

    @property
    def estimate(self) -> Estimate:
        """``exp`` of the mean loss per token; with windows of one length that is the mean of the
        window means."""
        return exponential(self.layout.mean(self.losses))

    def per(self, weights: Floats) -> Estimate:
        """Mean loss in nats per unit of ``weights`` ``[tokens]``, the share of a word or a byte
        that each token is."""
        return self.layout.mean(self.losses, weights)

    def ratio_to(self, reference: Perplexity, weights: Floats | None = None) -> Estimate:
        """This perplexity over the reference's on the same tokens, with the paired standard
        error."""
        return exponential(self.layout.mean(self.losses - reference.losses, weights))
