"""QuantizedWeight: the narrow waist. Algorithms produce it, formats store it, kernels multiply by
it.

For a weight ``[out, in]`` with ``G`` groups per row::

    codes   uint8   [out, in]   0 … 2**bits - 1, natural column order
    zeros   uint8   [out, G]    the code that means 0.0 (symmetric: all 2**(bits-1))
    scales  float32 [out, G]    finite; negative ones mirror a group's asymmetric range
    g_idx   int32   [in]        group of each column; None means column // group_size

``dequantize()`` is the definition of truth: ``(code - zero) * scale`` in float32. The difference
has at most 9 bits with sign and a portable scale 8 significant bits, so the float32 product is
exact; an engine that computes it in fp16 or bf16 therefore rounds once, from the same number,
whatever its dtype (see :func:`portable`). Scales that fp16 cannot hold are not clamped into it:
they keep their 8 bits, and only a layout that stores scales in a wider dtype takes them
(:func:`eight_bits`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import QuantizationError
from llmquant.spec import QuantSpec

_FP16_STEP = 2.0**-24  # fp16's subnormals are its multiples
_FP16_MAX_8_BITS = 65280.0
_ALL_ZERO = 2.0**-14  # the scale of a group without a number in it
# From here down, a multiple of fp16's step that has 8 significant bits no longer exists.
FP16_EXACT = 2.0**-17
# From here down, fp16 has fewer than 5 significant bits left for a scale.
FP16_COARSE = 2.0**-20
_SMALLEST, _LARGEST = 2.0**-126, 255 * 2.0**120  # bf16's normal range


def eight_bits(scale: Tensor) -> Tensor:
    """Round scales to bf16's 8 significant bits, of any size that bf16 holds.

    Args:
        scale: float tensor of any shape, finite. 0 counts as positive and becomes 2**-14.

    Returns:
        float32, same shape and sign.
    """
    magnitude = scale.abs().to(torch.float32)
    rounded = magnitude.clamp(_SMALLEST, _LARGEST).to(torch.bfloat16).to(torch.float32)
    rounded = torch.where(magnitude == 0, _ALL_ZERO, rounded)
    return torch.where(scale < 0, -rounded, rounded)


def portable(scale: Tensor) -> Tensor:
    """Round scales to values exact in both fp16 and bf16.

    Below 2**-17 these are the multiples of 2**-24 and have fewer bits the smaller they are; there
    rounding goes up, so that no weight of a group falls off the end of its codes.

    Args:
        scale: float tensor of any shape, finite. 0 counts as positive and becomes 2**-14.

    Returns:
        float32, same shape and sign: 8 significant bits (bf16's), the magnitude in 2**-24 … 65280.
    """
    rounded = eight_bits(scale)
    magnitude = rounded.abs().clamp(max=_FP16_MAX_8_BITS)
    up = (magnitude / _FP16_STEP).ceil() * _FP16_STEP
    magnitude = torch.where(magnitude < FP16_EXACT, up, magnitude)
    return torch.where(rounded < 0, -magnitude, magnitude)


def times_power_of_two(values: Tensor, exponent: Tensor) -> Tensor:
    """``values * 2**exponent`` (integers; shapes broadcast), in two steps: one factor alone may be
    more than the dtype holds."""
    half = exponent // 2
    return torch.ldexp(torch.ldexp(values, half), exponent - half)


def unportable_scales(scale: Tensor) -> int:
    """How many scales are not the same number in float32, fp16 and bf16."""
    same = torch.ones_like(scale, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        same &= scale.to(dtype).to(torch.float32) == scale
    return int((~same).sum())


def is_portable(scale: Tensor) -> bool:
    """Whether every scale is the same number in float32, fp16 and bf16."""
    return unportable_scales(scale) == 0


def coarse_scales(scale: Tensor) -> int:
    """How many portable scales are so small that fp16 has fewer than five bits for them."""
    return int((scale.abs() < FP16_COARSE).sum()) if is_portable(scale) else 0


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """One quantized matrix; refuses to exist with shapes, dtypes or values that contradict its
    spec.

    Raises:
        QuantizationError: on construction, saying which field is wrong.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    spec: QuantSpec
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise QuantizationError(f"invalid quantized weight ({self.spec}): {problem}")

    def _problem(self) -> str | None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            return f"codes must be uint8 [out, in], got {self.codes.dtype} {list(self.codes.shape)}"
        out_features, in_features = self.codes.shape
        if self.spec.group_size is not None and in_features % self.spec.group_size:
            return f"group_size {self.spec.group_size} does not divide {in_features} columns"
        params = (out_features, self.spec.groups(in_features))
        if self.scales.dtype != torch.float32 or tuple(self.scales.shape) != params:
            return f"scales must be float32 {list(params)}, got {self.scales.dtype} {list(self.scales.shape)}"
        if self.zeros.dtype != torch.uint8 or tuple(self.zeros.shape) != params:
            return f"zeros must be uint8 {list(params)}, got {self.zeros.dtype} {list(self.zeros.shape)}"
        if self.codes.numel() == 0:
            return "it has no elements"
        if int(self.codes.max()) > self.spec.max_code or int(self.zeros.max()) > self.spec.max_code:
            return f"a code or zero-point exceeds {self.spec.max_code}"
        if self.spec.symmetric and not bool((self.zeros == self.spec.middle).all()):
            return f"a symmetric weight needs every zero-point at {self.spec.middle}"
        if not bool(torch.isfinite(self.scales).all()):
            return "a scale is NaN or infinite"
        return self._g_idx_problem(in_features)

    def _g_idx_problem(self, in_features: int) -> str | None:
        if self.g_idx is None:
            return None
        if self.g_idx.dtype != torch.int32 or tuple(self.g_idx.shape) != (in_features,):
            return f"g_idx must be int32 [{in_features}], got {self.g_idx.dtype} {list(self.g_idx.shape)}"
        groups = self.spec.groups(in_features)
        if int(self.g_idx.min()) < 0 or int(self.g_idx.max()) >= groups:
            return f"g_idx must lie in 0 … {groups - 1}"
        return None

    @property
    def shape(self) -> tuple[int, int]:
        out_features, in_features = self.codes.shape
        return out_features, in_features

    def column_groups(self) -> Tensor:
        """int64 ``[in]``: the group of each column, ``g_idx`` or its default."""
        if self.g_idx is not None:
            return self.g_idx.to(torch.int64)
        in_features = self.codes.shape[1]
        return torch.arange(in_features, device=self.codes.device) // self.spec.width(in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(code - zero) * scale`` computed in float32, then rounded once to ``dtype``; ``[out,
        in]``."""
        out_features, in_features = self.codes.shape
        if self.g_idx is None:
            blocks = self.codes.reshape(out_features, -1, self.spec.width(in_features)).to(
                torch.float32
            )
            weight = blocks.sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))
            return weight.reshape(out_features, in_features).to(dtype)
        group = self.column_groups()
        weight = self.codes.to(torch.float32).sub_(self.zeros[:, group]).mul_(self.scales[:, group])
        return weight.to(dtype)

    def digest(self) -> str:
        """sha256 over spec, shape, codes, scales, zeros and the effective group of each column."""
        h = hashlib.sha256(f"{self.spec}|{self.shape}".encode())
        for t in (self.codes, self.scales, self.zeros, self.column_groups().to(torch.int32)):
            # A copy, because a dimension of size 1 may carry a stride that view() refuses.
            h.update(t.detach().cpu().reshape(-1).clone().view(torch.uint8).numpy().data)
        return h.hexdigest()

    def to(self, device: torch.device | str) -> QuantizedWeight:
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return QuantizedWeight(
            self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.spec, g_idx
        )


def without_trivial_order(weight: QuantizedWeight) -> QuantizedWeight:
    """The same weight without a ``g_idx`` that says what its absence says."""
    if weight.g_idx is None:
        return weight
    plain = QuantizedWeight(weight.codes, weight.scales, weight.zeros, weight.spec)
    return plain if torch.equal(plain.column_groups(), weight.column_groups()) else weight
