"""Linears whose codes are trained too: by latent weights, or by adapters that are merged before
rounding. What they multiply by is what would be stored, as in
:mod:`llmquant.training.layers.linear`.

A latent ``u`` is in units of codes::

    code = clamp(round(u), 0, max_code)
    dL/du = dL/dw * scale   where 0 < u < max_code, or a step leads further in; else 0

which is the straight-through estimator. The latent starts at the original weight's place, drawn a
little towards its code: step 0 is exactly the start, and weights near a boundary cross it first, a
few at a time. A weight beyond the grid starts at the end code. Where the start's code is not the
nearest (GPTQ chose it to make up for others) the latent starts at the code; at the boundary the
first noise would undo what GPTQ did. So it does where the original as a whole is not near the start
(a rotated model, scaled channels, another tool's folder).

An adapter changes the latent by a product of low rank, ``u = u0 + (b @ a) / scale``: the matrix
that is rounded is the original's with the adapter merged. ``u0`` is kept as float16 offsets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmquant import bitpack
from llmquant.activations import Activations
from llmquant.training.layers.linear import TrainedLinear
from llmquant.weight import QuantizedWeight

_DRAWN = 0.98  # offsets are times this: at half a code a latent would round to the neighbour
_NEAR = 0.5  # the largest |W - Q|² / |W|² at which W is what was rounded to Q


def offsets(start: QuantizedWeight, original: Tensor | None) -> Tensor:
    """float32 ``[out, in]``: where the original lies from the start's codes, in codes; zeros where
    it is unknown or not near, and in groups whose scale is 0."""
    if original is None:
        return torch.zeros_like(start.codes, dtype=torch.float32)
    w = original.to(torch.float32)
    error = (w - start.dequantize()).square().sum() / w.square().sum().clamp(min=1e-30)
    if not bool(error < _NEAR):
        return torch.zeros_like(w)
    group = start.column_groups()
    place = w / start.scales[:, group] + start.zeros[:, group]
    offset = place.sub_(start.codes)
    nearest = offset.abs() <= 0.5
    nearest &= (offset >= 0) | (start.codes > 0)
    nearest &= (offset <= 0) | (start.codes < start.spec.max_code)
    return torch.where(nearest, offset * _DRAWN, 0.0)


class _Rounded(TrainedLinear):
    """What the two have in common: codes that are rounded latents."""

    def latent(self) -> Tensor:
        """float32 ``[out, in]``, in codes."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        return self.latent().round_().clamp_(0, self.spec.max_code)

    def codes(self) -> Tensor:
        return self.levels().to(torch.uint8)

    def _inward(self, of_weight: Tensor, scales: Tensor) -> Tensor:
        """``dL/dw`` without what would move a latent at an end of the codes, or beyond it, further
        out. In place."""
        latent = self.latent()
        slope = self.times(of_weight.sign(), scales.sign())  # of the loss over the latent
        outward = (latent <= 0) & (slope > 0) | (latent >= self.spec.max_code) & (slope < 0)
        return of_weight.masked_fill_(outward, 0.0)


class LatentLinear(_Rounded):
    """Every code has a latent weight.

    Args:
        original: the unquantized weight ``[out, in]``, where it is known.
    """

    def __init__(
        self,
        start: QuantizedWeight,
        bias: Tensor | None = None,
        activations: Activations = "none",
        original: Tensor | None = None,
    ) -> None:
        super().__init__(start, bias, activations)
        self.u = nn.Parameter(start.codes + offsets(start, original))
        del self._buffers["packed"]

    def trained(self) -> list[nn.Parameter]:
        return [self.factor, self.u]

    def latent(self) -> Tensor:
        return self.u.detach().clone()

    def gradients(self, of_weight: Tensor, steps: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        of_factor = self._of_factor(of_weight, steps)
        return of_factor, self.times(self._inward(of_weight, scales), scales)


class AdapterLinear(_Rounded):
    """Latents that only a product of rank ``rank`` moves.

    Args:
        rank: of the adapter.
        seed: draws ``a``; ``b`` starts at 0, so that step 0 is the start.
    """

    def __init__(
        self,
        start: QuantizedWeight,
        bias: Tensor | None = None,
        activations: Activations = "none",
        original: Tensor | None = None,
        *,
        rank: int,
        seed: int,
    ) -> None:
        super().__init__(start, bias, activations)
        self.register_buffer("offset", offsets(start, original).to(torch.float16))
        rank = min(rank, *start.shape)
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, start.shape[1], generator=generator) / start.shape[1] ** 0.5
        self.a = nn.Parameter(a.to(start.scales.device))
        self.b = nn.Parameter(start.scales.new_zeros(start.shape[0], rank))

    def trained(self) -> list[nn.Parameter]:
        return [self.factor, self.a, self.b]

    def latent(self) -> Tensor:
        start = bitpack.unpack(self.get_buffer("packed"), self.spec.bits, self.shape[1])
        moved = self.b.detach() @ self.a.detach()
        start_scales = self.get_buffer("start_scales")
        per_code = torch.where(start_scales == 0, 0.0, start_scales.reciprocal())
        moved = self.times(moved, per_code)
        return moved.add_(start).add_(self.get_buffer("offset"))

    def gradients(self, of_weight: Tensor, steps: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
        of_factor = self._of_factor(of_weight, steps)
        # The trained scale over the start's is the factor, up to its rounding.
        share = torch.where(self.get_buffer("start_scales") == 0, 0.0, self.factor.detach())
        merged = self.times(self._inward(of_weight, scales), share)
        return of_factor, self.b.detach().T @ merged, merged @ self.a.detach().T
