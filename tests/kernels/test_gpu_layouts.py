"""humming's and gemlite's layouts: the bytes of the packages' own sources, and back without a bit
lost."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_kit import (
    GROUP_ORDER,
    ROW_ORDER,
    GemLiteLinear,
    in_order,
    packed_words,
    repacked,
    zero_points,
)
from packing import random_weight

from llmquant.kernels.gpu import gemlite_layout, humming_layout
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BF16, FP16 = torch.bfloat16, torch.float16


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return a.spec == b.spec and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in ((a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros))
    )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_are_those_of_hummings_repacking(
    bits: int, group: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(128, 96, QuantSpec(bits, group, symmetric))
    found = humming_layout.pack(weight, dtype)
    zeros = None if symmetric else weight.zeros
    expected = repacked(weight.codes, bits, zeros, preprocess=dtype is BF16 and bits == 8)
    assert torch.equal(found["packed"], expected)
    order = ROW_ORDER if group is None else GROUP_ORDER
    assert torch.equal(found["scales"], in_order(weight.scales.to(dtype), order))
    assert found.keys() == {"packed", "scales"} | (set() if symmetric else {"zeros"})
    if zeros is not None:
        assert torch.equal(found["zeros"], zero_points(zeros, bits))


def test_a_word_of_hummings_written_out() -> None:
    """Eight 4-bit codes: the even ones from the lowest bits up, then the odd ones."""
    values = [1, 2, 3, 4, 5, 6, 7, 8] + [0] * 120
    assert packed_words(values, 4)[0][0] == 0x86427531


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_those_of_gemlites_packing(bits: int, group: int | None, symmetric: bool) -> None:
    weight = random_weight(48, 96, QuantSpec(bits, group, symmetric))
    layer = GemLiteLinear(bits, group or 96, 96, 48, 2, 2)
    layer.pack(
        weight.codes, weight.scales.to(BF16), 2 ** (bits - 1) if symmetric else weight.zeros.to(BF16),
        fma_mode=False,
    )  # fmt: skip
    found = gemlite_layout.pack(weight, BF16)
    for name, expected in zip(("packed", "scales", "zeros"), layer.get_tensor_args(), strict=False):
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)
        assert found[name].is_contiguous()
    arguments = gemlite_layout.arguments(weight.spec, group or 96, group is None, BF16)
    assert arguments == layer.get_meta_args()


@pytest.mark.parametrize(
    ("layout", "widths", "rows"),
    [(humming_layout, (2, 3, 4, 8), 64), (gemlite_layout, (2, 4, 8), 32)],
    ids=["humming", "gemlite"],
)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_unpacking_undoes_packing(
    layout: ModuleType, widths: tuple[int, ...], rows: int, data: st.DataObject
) -> None:
    group = data.draw(st.sampled_from([16, 32, 64, None]), label="group")
    columns = data.draw(st.integers(1, 4)) * max(group or 32, 32)
    spec = QuantSpec(data.draw(st.sampled_from(widths)), group, data.draw(st.booleans()))
    weight = random_weight(
        rows * data.draw(st.integers(1, 3)), columns, spec, seed=data.draw(st.integers(0, 1000))
    )
    dtype = data.draw(st.sampled_from([BF16, FP16]))
    assert same(layout.unpack(layout.pack(weight, dtype), spec, weight.shape), weight)


def test_every_8_bit_code_and_zero_point_comes_back() -> None:
    """bfloat16 activations: codes are stored as distances."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    zeros = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    spec = QuantSpec(8, None, False)
    weight = QuantizedWeight(codes, torch.ones(256, 1), zeros, spec)
    assert same(humming_layout.unpack(humming_layout.pack(weight, BF16), spec, (256, 256)), weight)
