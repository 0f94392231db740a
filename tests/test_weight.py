"""The waist: a QuantizedWeight refuses to be wrong, and dequantizing it is the definition, rounded
once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packing import random_weight, shuffled_groups

from llmquant.errors import QuantizationError
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, eight_bits, is_portable, portable

SYM = QuantSpec(4, 8, True)
ASYM = QuantSpec(4, 8, False)
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def fields(spec: QuantSpec = SYM) -> dict[str, object]:
    """The fields of a good weight [3, 16] with two groups a row."""
    good = random_weight(3, 16, spec)
    return {f.name: getattr(good, f.name) for f in dataclasses.fields(good)}


def set_to(tensor: torch.Tensor, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


WRONG = {
    "codes of int8": (SYM, "codes", lambda t: t.to(torch.int8), "codes must be uint8"),
    "codes of one dimension": (
        SYM,
        "codes",
        lambda t: t.reshape(-1),
        r"codes must be uint8 \[out, in\]",
    ),
    "group size does not divide": (
        SYM,
        "codes",
        lambda t: t[:, :15],
        "group_size 8 does not divide 15 columns",
    ),
    "no rows": (SYM, "codes", lambda t: t[:0], r"scales must be float32 \[0, 2\]"),
    "code too large": (SYM, "codes", lambda t: set_to(t, 16), "exceeds 15"),
    "scales of fp16": (SYM, "scales", lambda t: t.half(), "scales must be float32"),
    "scales of fp64": (SYM, "scales", lambda t: t.double(), "scales must be float32"),
    "scales transposed": (
        SYM,
        "scales",
        lambda t: t.T,
        r"scales must be float32 \[3, 2\], got torch.float32 \[2, 3\]",
    ),
    "scale NaN": (SYM, "scales", lambda t: set_to(t, float("nan")), "a scale is NaN or infinite"),
    "scale infinite": (
        SYM,
        "scales",
        lambda t: set_to(t, float("-inf")),
        "a scale is NaN or infinite",
    ),
    "zeros of int32": (SYM, "zeros", lambda t: t.int(), "zeros must be uint8"),
    "zeros of one group": (SYM, "zeros", lambda t: t[:, :1], r"zeros must be uint8 \[3, 2\]"),
    "zero too large": (ASYM, "zeros", lambda t: set_to(t, 16), "exceeds 15"),
    "symmetric off its middle": (SYM, "zeros", lambda t: set_to(t, 7), "every zero-point at 8"),
    "g_idx of int64": (
        SYM,
        "g_idx",
        lambda _: torch.zeros(16, dtype=torch.int64),
        "g_idx must be int32",
    ),
    "g_idx too short": (
        SYM,
        "g_idx",
        lambda _: torch.zeros(15, dtype=torch.int32),
        r"g_idx must be int32 \[16\]",
    ),
    "g_idx of no group": (
        SYM,
        "g_idx",
        lambda _: torch.full((16,), 2, dtype=torch.int32),
        "lie in 0 … 1",
    ),
    "g_idx negative": (
        SYM,
        "g_idx",
        lambda _: torch.full((16,), -1, dtype=torch.int32),
        "lie in 0 … 1",
    ),
}


@pytest.mark.parametrize(("spec", "field", "change", "told"), WRONG.values(), ids=WRONG)
def test_a_wrong_field_is_refused(spec, field, change, told):
    wrong = fields(spec)
    wrong[field] = change(wrong[field])
    with pytest.raises(QuantizationError, match=told) as caught:
        QuantizedWeight(**wrong)
    assert str(caught.value).startswith(f"invalid quantized weight ({spec}): ")


def test_no_elements_is_refused():
    empty = torch.empty(0, 2)
    with pytest.raises(QuantizationError, match="it has no elements"):
        QuantizedWeight(torch.empty(0, 16, dtype=torch.uint8), empty, empty.to(torch.uint8), SYM)


SPECS = [QuantSpec(b, g, s) for b in (2, 3, 4, 8) for g in (8, None) for s in (True, False)]


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "g_idx"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_dequantize_is_the_elementwise_definition(spec, ordered):
    g_idx = shuffled_groups(24, 3) if ordered and spec.group_size else None
    weight = random_weight(5, 24, spec, g_idx=g_idx)
    got = weight.dequantize()
    assert got.dtype == torch.float32
    for row in range(5):
        for column in range(24):
            group = column // spec.width(24) if g_idx is None else int(g_idx[column])
            code, zero = int(weight.codes[row, column]), int(weight.zeros[row, group])
            # Exact in Python's float64; equality says that the float32 product was exact too.
            assert float(got[row, column]) == (code - zero) * float(weight.scales[row, group])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bits", [4, 8], ids=["4 bits", "8 bits"])
def test_dequantize_rounds_once(bits, dtype):
    weight = random_weight(64, 256, QuantSpec(bits, 32, False), seed=bits)
    expanded = (
        weight.scales.double().repeat_interleave(32, dim=1),
        weight.zeros.double().repeat_interleave(32, dim=1),
    )
    exact = (weight.codes.double() - expanded[1]) * expanded[0]
    assert torch.equal(weight.dequantize(dtype), exact.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_engine_that_multiplies_in_half_precision_gets_the_same_number(dtype):
    weight = random_weight(64, 256, QuantSpec(4, 32, False))
    scale = weight.scales.to(dtype).repeat_interleave(32, dim=1)
    difference = (
        weight.codes.to(torch.int16) - weight.zeros.to(torch.int16).repeat_interleave(32, dim=1)
    ).to(dtype)
    assert torch.equal(difference * scale, weight.dequantize(dtype))


def test_explicit_groups_of_the_natural_order_change_nothing():
    plain = random_weight(3, 16, ASYM)
    told = dataclasses.replace(plain, g_idx=(torch.arange(16) // 8).to(torch.int32))
    assert torch.equal(plain.dequantize(), told.dequantize())
    assert plain.digest() == told.digest()


def changes_of_one_element(weight: QuantizedWeight) -> dict[str, QuantizedWeight]:
    """Every weight that differs from ``weight`` in one element of one field (and in its spec)."""
    found = {}
    for name in ("codes", "zeros", "scales", "g_idx"):
        tensor = getattr(weight, name)
        for i in range(tensor.numel()):
            changed = tensor.clone()
            flat = changed.view(-1)
            flat[i] = float(flat[i]) * 2 if name == "scales" else (int(flat[i]) ^ 1)
            found[f"{name}[{i}]"] = dataclasses.replace(weight, **{name: changed})
    return found


def test_the_digest_changes_with_any_one_element():
    weight = random_weight(2, 8, QuantSpec(4, 4, False), g_idx=shuffled_groups(8, 2))
    digests = {name: other.digest() for name, other in changes_of_one_element(weight).items()}
    assert len(digests) == 16 + 4 + 4 + 8
    assert len({weight.digest(), *digests.values()}) == len(digests) + 1


def test_the_digest_tells_spec_and_shape_apart():
    wide = random_weight(2, 8, QuantSpec(4, None, True))
    tall = QuantizedWeight(wide.codes.view(2, 8), wide.scales, wide.zeros, QuantSpec(4, 8, True))
    asymmetric = QuantizedWeight(wide.codes, wide.scales, wide.zeros, QuantSpec(4, None, False))
    assert len({wide.digest(), tall.digest(), asymmetric.digest()}) == 3


def test_to_a_device_keeps_every_field():
    weight = random_weight(2, 8, QuantSpec(4, 4, False), g_idx=shuffled_groups(8, 2))
    moved = weight.to("cpu")
    assert moved.digest() == weight.digest()
    assert moved.g_idx is not None


NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_a_portable_scale_is_exact_in_both_half_precisions(values):
    scale = portable(torch.tensor(values, dtype=torch.float32))
    assert is_portable(scale)
    assert bool((scale.abs() >= 2.0**-24).all())
    assert bool((scale.abs() <= 65280).all())
    assert torch.equal(portable(scale), scale)


@given(st.floats(2.0**-17, 65280, width=32), st.sampled_from([1.0, -1.0]))
def test_a_portable_scale_is_the_nearest_and_keeps_its_sign(value, sign):
    got = float(portable(torch.tensor(sign * value)))
    assert got * sign > 0
    assert abs(got - sign * value) <= 2.0**-8 * value


@pytest.mark.parametrize(
    ("value", "nearest"),
    [
        pytest.param(0.0, 2.0**-14, id="zero"),
        pytest.param(2.0**-15 * 1.25, 2.0**-15 * 1.25, id="below fp16's normals"),
        pytest.param(129.4 * 2.0**-24, 129 * 2.0**-24, id="the last with eight bits"),
        pytest.param(17.1 * 2.0**-24, 18 * 2.0**-24, id="up to a multiple of fp16's step"),
        pytest.param(-1e-9, -(2.0**-24), id="negative and tiny"),
        pytest.param(1e9, 65280.0, id="beyond fp16"),
        pytest.param(65400.0, 65280.0, id="would round up beyond fp16"),
        pytest.param(1 + 2.0**-8, 1.0, id="tie to even"),
        pytest.param(1 + 3 * 2.0**-8, 1 + 2.0**-6, id="tie to even, upwards"),
    ],
)
def test_portable_at_the_edges(value, nearest):
    assert float(portable(torch.tensor(value))) == nearest


@given(st.floats(2.0**-126, 2.0**126, width=32), st.integers(-60, 60))
def test_eight_bits_know_no_range(value, power):
    scale = torch.tensor(value)
    assert torch.equal(eight_bits(scale), scale.to(torch.bfloat16).to(torch.float32))
    moved = scale * 2.0**power
    if 2.0**-126 <= float(moved) <= 2.0**126:
        assert float(eight_bits(moved)) == float(eight_bits(scale)) * 2.0**power


def test_an_fp16_scale_need_not_be_portable():
    assert not is_portable(torch.tensor(1 + 2.0**-10))
