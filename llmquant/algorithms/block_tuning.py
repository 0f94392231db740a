"""Tune: choose the codes and scales of a whole decoder block together, by gradient descent on the
block's output.

GPTQ asks of each linear that its own output stay close. What matters is what leaves the block: here
all its linears are moved at once so that the *quantized* block, fed what the quantized blocks
before it really deliver, gives what the original model gave at this place. The family is AutoRound
(arXiv:2309.05516) and EfficientQAT's Block-AP (arXiv:2407.11062).

Per weight there is a latent ``u`` in units of codes, per group a factor of its scale::

    w = (clamp(round(u), 0, max_code) - zero) * portable(scale * factor)

The gradient passes the rounding and the portable scale as if they were not there
(straight-through). Codes do not depend on the factor, so its gradient is the exact one of a scale
whose codes stand; narrowing a range means a smaller factor and codes at its ends. ``u`` starts at
the original weight's place, moved into the interval that rounds to the start's code: step 0 is
exactly the start, and weights near a boundary cross it first.

Every ``checks``-th part of the steps the loss over *all* batches is measured with exactly the
numbers that would be stored, and the best state is kept. The start is one of them: the result is
never worse than it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import QuantizationError, SpecError
from llmquant.weight import QuantizedWeight, eight_bits, is_portable, portable

Forward = Callable[[Mapping[str, Tensor], int], Tensor]
_INSIDE = 0.49  # how far from its code a latent may start; at 0.5 it would round to the neighbour
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How long and how fast.

    Attributes:
        steps: gradient steps, each on one batch; their size falls linearly to zero.
        lr: Adam's step for latents, in codes.
        scale_lr: Adam's step for the factors of the scales; 0 leaves the scales alone.
        checks: how often the loss over all batches is measured.
        patience: checks in a row without a new best after which a block is done.
        seed: draws the order of the batches.
    """

    steps: int = 200
    lr: float = 0.002
    scale_lr: float = 0.001
    checks: int = 4
    patience: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.checks, self.patience) < 1 or self.lr <= 0 or self.scale_lr < 0:
            raise SpecError(
                f"tune needs steps, checks, patience >= 1, lr > 0 and scale_lr >= 0, got {self}"
            )


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came out.

    Attributes:
        weights: by the names of the start.
        before: mean squared error of the start's outputs over all batches.
        after: that of ``weights``; never larger.
        step: the step whose state was kept; 0 is the start.
        steps: steps taken.
    """

    weights: dict[str, QuantizedWeight]
    before: float
    after: float
    step: int
    steps: int


class _Latent:
    """One linear's parameters under optimization."""

    def __init__(self, original: Tensor, start: QuantizedWeight) -> None:
        group, codes = start.column_groups(), start.codes.to(torch.float32)
        self.start, self.zeros = start, start.zeros.to(torch.float32)
        self._round = portable if is_portable(start.scales) else eight_bits
        place = original.to(torch.float32) / start.scales[:, group] + self.zeros[:, group]
        self.u = torch.clamp(place, codes - _INSIDE, codes + _INSIDE).requires_grad_()
        self.factor = torch.ones_like(start.scales).requires_grad_()

    def _codes(self) -> Tensor:
        return self.u.detach().round().clamp_(0, self.start.spec.max_code)

    def _scales(self) -> Tensor:
        return self._round(self.start.scales * self.factor.detach())

    def weight(self) -> Tensor:
        """``[out, in]`` exactly as it would be dequantized; gradients flow to ``u`` and
        ``factor``."""
        clamped = self.u.clamp(0, self.start.spec.max_code)
        codes = clamped + (self._codes() - clamped.detach())
        scaled = self.start.scales * self.factor
        scales = scaled + (self._scales() - scaled.detach())
        if self.start.g_idx is not None:
            group = self.start.column_groups()
            return (codes - self.zeros[:, group]) * scales[:, group]
        grouped = codes.reshape(*scales.shape, -1)
        return ((grouped - self.zeros.unsqueeze(-1)) * scales.unsqueeze(-1)).reshape(codes.shape)

    def quantized(self) -> QuantizedWeight:
        start = self.start
        return QuantizedWeight(
            self._codes().to(torch.uint8), self._scales(), start.zeros, start.spec, start.g_idx
        )


def tune(
    originals: Mapping[str, Tensor],
    starts: Mapping[str, QuantizedWeight],
    forward: Forward,
    targets: Sequence[Tensor],
    options: TuneOptions,
    module: str = "block",
) -> Tuned:
    """Lower the mean squared error of a block's outputs, beginning at ``starts``.

    Args:
        originals: float weights ``[out, in]`` by name.
        starts: their quantized forms, same names.
        forward: the block's output for weights by name and the number of a batch; differentiable in
            the weights.
        targets: the output wanted for each batch.
        options: see :class:`TuneOptions`.
        module: name used in errors.

    Raises:
        QuantizationError: the start's outputs are not finite.
    """
    latents = {name: _Latent(originals[name], start) for name, start in starts.items()}
    kept, step = dict(starts), 0
    before = best = _loss(kept, forward, targets)
    if not math.isfinite(before):
        raise QuantizationError(
            f"{module} gave NaN or Inf on the calibration text before tuning; use --dtype float32"
        )
    optimizer = _optimizer(latents.values(), options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / options.steps, options.steps)
    batches = _shuffled(len(targets), options)
    every, waited, taken = max(1, options.steps // options.checks), 0, 0
    finite = torch.ones((), dtype=torch.bool, device=targets[0].device)
    for taken in range(1, options.steps + 1):
        batch = next(batches)
        optimizer.zero_grad()
        loss = _squared_error(
            forward({name: latent.weight() for name, latent in latents.items()}, batch),
            targets[batch],
        )
        loss.backward()
        finite &= loss.detach().isfinite()  # asked at the next check: to ask now is to wait
        optimizer.step()
        schedule.step()
        if taken % every and taken != options.steps:
            continue
        if not bool(finite):
            break
        found = {name: latent.quantized() for name, latent in latents.items()}
        now = _loss(found, forward, targets)
        waited = 0 if now < best else waited + 1
        if now < best:
            best, kept, step = now, found, taken
        if waited == options.patience:
            break
    return Tuned(kept, before, best, step, taken)


def _optimizer(latents: Collection[_Latent], options: TuneOptions) -> torch.optim.Optimizer:
    groups = [
        {"params": [latent.u for latent in latents], "lr": options.lr},
        {"params": [latent.factor for latent in latents], "lr": options.scale_lr},
    ]
    return torch.optim.Adam(groups, betas=_BETAS)


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.to(torch.float32) - target.to(torch.float32)).square().mean()


def _loss(
    weights: Mapping[str, QuantizedWeight], forward: Forward, targets: Sequence[Tensor]
) -> float:
    """Mean over the elements of all batches."""
    dense = {name: weight.dequantize() for name, weight in weights.items()}
    with torch.no_grad():
        total = sum(
            _squared_error(forward(dense, i), t).double() * t.numel() for i, t in enumerate(targets)
        )
    return float(total) / sum(t.numel() for t in targets)


def _shuffled(count: int, options: TuneOptions) -> Iterator[int]:
    """Batch numbers, each epoch in a new order."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
