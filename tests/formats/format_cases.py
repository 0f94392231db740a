"""What the tests of layouts share: weights drawn by hypothesis, and the plainest way to read
bits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from llmquant.spec import SUPPORTED_BITS, QuantSpec
from llmquant.weight import QuantizedWeight, portable


def bits_at(words: list[int], start: int, bits: int) -> int:
    """Bits ``start … start + bits - 1`` of a stream of 32-bit words, lowest first, one bit at a
    time."""
    value = 0
    for i in range(bits):
        word, position = divmod(start + i, 32)
        value |= ((words[word] >> position) & 1) << i
    return value


def weight(
    out_features: int,
    in_features: int,
    spec: QuantSpec,
    *,
    seed: int = 0,
    lowest_zero: int = 0,
    g_idx: bool = False,
) -> QuantizedWeight:
    """Uniform codes and zeros, portable scales of either sign; ``g_idx`` deals the columns out to
    groups at random."""
    generator = torch.Generator().manual_seed(seed)
    groups = spec.groups(in_features)
    codes = torch.randint(
        0, spec.levels, (out_features, in_features), generator=generator, dtype=torch.uint8
    )
    zeros = torch.randint(
        lowest_zero, spec.levels, (out_features, groups), generator=generator, dtype=torch.uint8
    )
    if spec.symmetric:
        zeros.fill_(spec.middle)
    scales = portable((torch.rand(out_features, groups, generator=generator) - 0.3) * 0.02)
    order = torch.randperm(in_features, generator=generator) % groups if g_idx else None
    return QuantizedWeight(
        codes, scales, zeros, spec, None if order is None else order.to(torch.int32)
    )


@st.composite
def weights(
    draw: st.DrawFn,
    *,
    out_step: int = 1,
    in_step: int = 1,
    bits: tuple[int, ...] = SUPPORTED_BITS,
    groups: tuple[int | None, ...] = (None, 1, 8, 24, 32),
    symmetric: tuple[bool, ...] = (False, True),
    lowest_zero: int = 0,
) -> QuantizedWeight:
    """Every spec on shapes that are multiples of the steps and otherwise odd; half of the grouped
    ones with a g_idx."""
    width = draw(st.sampled_from(bits))
    group = draw(st.sampled_from(groups))
    columns = draw(st.integers(1, 4)) * in_step
    if group is not None:
        columns *= group
    spec = QuantSpec(width, group, draw(st.sampled_from(symmetric)))
    g_idx = group is not None and spec.groups(columns) > 1 and draw(st.booleans())
    rows = draw(st.integers(1, 5)) * out_step
    return weight(
        rows, columns, spec, seed=draw(st.integers(0, 2**31)), lowest_zero=lowest_zero, g_idx=g_idx
    )


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Equal numbers, spec and effective grouping."""
    return a.digest() == b.digest() and bool(torch.equal(a.dequantize(), b.dequantize()))
