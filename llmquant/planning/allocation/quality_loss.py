"""What a scheme does to an item: how it is measured on a model's outputs, and what follows for
schemes that were not measured.

See :mod:`llmquant.planning.allocation.sensitivity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.spec import QuantSpec

_EXTRAPOLATED_ABOVE_BITS = 4


@dataclass(frozen=True, slots=True)
class Damage:
    """What one scheme does to one item.

    Attributes:
        layer: ``tr(D H D^T)`` per calibration token, summed over the item's linears.
        predicted: in nats per token (``kl``) or relative squared error (``block``).
        measured: the measurement itself, where this scheme was one that was run.
    """

    layer: float
    predicted: float
    measured: float | None = None


def anchors_of(layer: Mapping[QuantSpec, float]) -> list[QuantSpec]:
    """The schemes to measure: per width of at most four bits (or, without any, the narrowest) the
    one of median layer error."""
    widths = sorted({s.bits for s in layer})
    low = [b for b in widths if b <= _EXTRAPOLATED_ABOVE_BITS] or widths[:1]
    anchors = []
    for bits in low:
        ranked = sorted((s for s in layer if s.bits == bits), key=lambda s: layer[s])
        anchors.append(ranked[len(ranked) // 2])
    return anchors


def interpolate(
    layer: Mapping[QuantSpec, float], measured: Mapping[QuantSpec, float]
) -> dict[QuantSpec, Damage]:
    """Damage of every scheme: that of the measured one of its width (else of the next narrower), by
    the ratio of layer errors."""
    damages = {}
    for spec, error in layer.items():
        anchor = max(
            (a for a in measured if a.bits <= spec.bits), key=lambda a: a.bits, default=None
        )
        assert anchor is not None
        ratio = error / layer[anchor] if layer[anchor] > 0 else 0.0
        damages[spec] = Damage(error, measured[anchor] * ratio, measured.get(spec))
    return damages


def divergence(reference: Tensor, changed: Tensor) -> Tensor:
    """KL of each position, in nats: ``[positions]`` of logits ``[1, positions, vocabulary]``."""
    p, q = reference[0].float().log_softmax(-1), changed[0].float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def relative_error(reference: Tensor, changed: Tensor) -> Tensor:
    """``|dy|^2 / |y|^2`` of each position: ``[positions]`` of ``[1, positions, hidden]``."""
    y = reference[0].float()
    return (changed[0].float() - y).square().sum(-1) / y.square().sum(-1).clamp_min(
        torch.finfo(torch.float32).tiny
    )
