"""How far a candidate's next-token distribution is from the reference's, token by token.

``KL(reference ‖ candidate) = Σ p (log p - log q)`` over the *full* vocabulary, in float32 from both
models' logits, in nats. It sees what perplexity cannot: changes that leave the true token's
probability alone, and losses and gains that cancel in the mean. With it come the share of positions
where both name the same most likely token, and the root mean square change of the true token's
probability (llama.cpp's RMS Δp).

Each position also keeps the reference's *confidence*, the probability of its first choice: most of
a mean KL may come from where the reference itself was unsure, or may not
(:mod:`llmquant_eval.scoring.breakdowns`).

A term with p = 0 is 0. A candidate that gives probability zero to a token that the reference thinks
possible has an infinite KL there; such positions are counted, reported and left out of the mean and
the quantiles. Values are not clamped at 0: rounding can leave -1e-8, and hiding that would hide a
wrong sign as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import QuantizationError
from llmquant_eval.report.statistics import Estimate, Floats, root
from llmquant_eval.scoring.perplexity import position_chunks
from llmquant_eval.scoring.window_layout import WindowLayout

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True, eq=False)
class TokenDivergence:
    """Per position ``[positions]``: KL in nats, agreement of the top token, change of the true
    token's probability, and the probability that the reference gives its top token."""

    kl: Tensor
    same_top: Tensor
    delta_p: Tensor
    confidence: Tensor

    @classmethod
    def empty(cls, positions: int, device: torch.device) -> TokenDivergence:
        """Uninitialized results of ``positions`` positions: float32, but ``same_top`` bool."""
        kl = torch.empty(positions, dtype=torch.float32, device=device)
        return cls(
            kl, torch.empty_like(kl, dtype=torch.bool), torch.empty_like(kl), torch.empty_like(kl)
        )


def kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``Σ p (log p - log q)`` over the last dimension of float32 log-probabilities; overwrites
    ``log_p``."""
    p = log_p.exp()
    return log_p.sub_(log_q).masked_fill_(p == 0, 0.0).mul_(p).sum(dim=-1)


def token_divergence(reference: Tensor, candidate: Tensor, targets: Tensor) -> TokenDivergence:
    """Compare two models' logits at the same positions.

    Args:
        reference, candidate: ``[positions, vocabulary]`` logits of the same shape, any float dtype.
        targets: int64 ``[positions]``, the token that came next.

    Returns:
        float32, bool, float32 and float32 tensors ``[positions]``.
    """
    result = TokenDivergence.empty(len(targets), reference.device)
    for part in position_chunks(*reference.shape):
        log_p = torch.log_softmax(reference[part], dim=-1, dtype=torch.float32)
        log_q = torch.log_softmax(candidate[part], dim=-1, dtype=torch.float32)
        target = targets[part].unsqueeze(1)
        result.delta_p[part] = (
            log_q.gather(1, target).exp() - log_p.gather(1, target).exp()
        ).squeeze(1)
        # From the logits: the rounding of log-softmax can make two different logits tie.
        result.same_top[part] = reference[part].argmax(dim=-1) == candidate[part].argmax(dim=-1)
        result.confidence[part] = log_p.amax(dim=-1).exp()
        result.kl[part] = kl_of_logs(log_p, log_q)
    return result


class ReferenceWindow(Protocol):
    """The reference at the scored positions of one window, in whatever form it is at hand."""

    @property
    def vocabulary(self) -> int: ...

    def divergence(self, candidate: Tensor, targets: Tensor) -> TokenDivergence:
        """Compare with a candidate's logits ``[positions, vocabulary]``."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveWindow:
    """The reference's own logits ``[positions, vocabulary]``."""

    logits: Tensor

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def divergence(self, candidate: Tensor, targets: Tensor) -> TokenDivergence:
        return token_divergence(self.logits.to(candidate.device), candidate, targets)


@dataclass(frozen=True, slots=True, eq=False)
class Divergence:
    """Float64 arrays ``[tokens]`` of what :class:`TokenDivergence` holds, in their layout, and what
    follows from them.

    Raises:
        QuantizationError: on construction, when no position has a finite divergence.
    """

    kl: Floats
    same_top: Floats
    delta_p: Floats
    confidence: Floats
    layout: WindowLayout
    label: str

    def __post_init__(self) -> None:
        if not np.isfinite(self.kl).any():
            raise QuantizationError(
                f"{self.label}: its divergence from the reference is infinite or NaN at every token; "
                "try --dtype float32, or look at the checkpoint with llmquant inspect --verify"
            )

    @property
    def finite(self) -> NDArray[np.bool_]:
        return np.isfinite(self.kl)

    @property
    def excluded(self) -> int:
        """Positions whose KL is not finite."""
        return int((~self.finite).sum())

    @property
    def tokens(self) -> int:
        """Positions whose KL is finite; the others are in no mean."""
        return int(self.finite.sum())

    def mean_over(self, values: Floats, positions: NDArray[np.bool_]) -> Estimate:
        """Mean of ``values`` ``[tokens]`` over those of ``positions`` whose KL is finite; at least
        one of them."""
        counted = self.finite & positions
        return self.layout.mean(np.where(counted, values, 0.0), counted.astype(np.float64))

    def _mean(self, values: Floats) -> Estimate:
        return self.mean_over(values, np.ones_like(self.finite))

    @property
    def mean_kl(self) -> Estimate:
        return self._mean(self.kl)

    @property
    def top1_agreement(self) -> Estimate:
        """Share of positions (0 … 1) where both models name the same token first."""
        return self._mean(self.same_top)

    @property
    def rms_delta_p(self) -> Estimate:
        return root(self._mean(self.delta_p**2))

    @property
    def max_kl(self) -> float:
        return float(self.kl[self.finite].max())

    def quantiles(self) -> dict[float, float]:
        """KL at each of :data:`QUANTILES`, linearly interpolated between order statistics."""
        values = np.quantile(self.kl[self.finite], QUANTILES)
        return dict(zip(QUANTILES, map(float, values), strict=True))
