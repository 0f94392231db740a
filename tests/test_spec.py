"""QuantSpec: what can exist, what is refused, and the arithmetic of groups."""

from __future__ import annotations

import pytest

from llmquant.errors import SpecError, UsageError
from llmquant.spec import SUPPORTED_BITS, QuantSpec


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({"bits": 1}, "bits=1 .* 2, 3, 4, 8", id="1 bit"),
        pytest.param({"bits": 5}, "bits=5", id="5 bits"),
        pytest.param({"bits": 16}, "bits=16", id="16 bits"),
        pytest.param({"bits": -4}, "bits=-4", id="negative bits"),
        pytest.param({"group_size": 0}, "group_size=0 .* positive divisor", id="no columns"),
        pytest.param(
            {"group_size": -1}, "group_size=-1 .*-1 on the command line", id="-1 is not None"
        ),
    ],
)
def test_impossible_specs_are_refused(fields, told):
    with pytest.raises(SpecError, match=told):
        QuantSpec(**fields)


def test_a_bad_spec_is_misuse_and_a_value_error():
    assert issubclass(SpecError, UsageError)
    assert issubclass(SpecError, ValueError)
    assert SpecError.exit_code == 2


@pytest.mark.parametrize(
    ("bits", "levels", "max_code", "middle"),
    [(2, 4, 3, 2), (3, 8, 7, 4), (4, 16, 15, 8), (8, 256, 255, 128)],
    ids=[f"{b} bits" for b in SUPPORTED_BITS],
)
def test_codes_of_a_width(bits, levels, max_code, middle):
    spec = QuantSpec(bits)
    assert (spec.levels, spec.max_code, spec.middle) == (levels, max_code, middle)


@pytest.mark.parametrize(
    ("group_size", "in_features", "groups", "width"),
    [(128, 256, 2, 128), (32, 32, 1, 32), (1, 7, 7, 1), (None, 48, 1, 48)],
    ids=["two groups", "one group", "a group per column", "per row"],
)
def test_groups_of_a_row(group_size, in_features, groups, width):
    spec = QuantSpec(4, group_size)
    spec.check(in_features, "m")
    assert spec.groups(in_features) == groups
    assert spec.width(in_features) == width
    assert groups * width == in_features


def test_a_group_size_that_does_not_divide_names_module_and_sizes_that_do():
    with pytest.raises(SpecError) as caught:
        QuantSpec(4, 128).check(192, "model.layers.0.mlp.down_proj")
    told = str(caught.value)
    assert told.startswith(
        "model.layers.0.mlp.down_proj: group_size=128 does not divide its 192 input columns"
    )
    assert "8, 12, 16, 24, 32, 48, 64, 96, 192" in told
    assert "--ignore model.layers.0.mlp.down_proj" in told


def test_a_prime_width_has_only_per_row():
    with pytest.raises(SpecError, match="none of 8 or more, or -1"):
        QuantSpec(4, 4).check(7, "m")


@pytest.mark.parametrize(
    ("spec", "in_features", "bits"),
    [
        pytest.param(QuantSpec(4, 128, True), 256, 4 + 16 / 128, id="g128 sym is 4.125"),
        pytest.param(QuantSpec(4, 128, False), 256, 4 + 20 / 128, id="asym adds a packed zero"),
        pytest.param(QuantSpec(3, 32, True), 256, 3.5, id="W3 g32"),
        pytest.param(QuantSpec(8, None, True), 256, 8 + 16 / 256, id="W8 per row"),
    ],
)
def test_bits_per_weight(spec, in_features, bits):
    assert spec.bits_per_weight(in_features) == bits


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        pytest.param(QuantSpec(), "W4 g128 sym", id="default"),
        pytest.param(QuantSpec(3, None, False), "W3 row asym", id="per row"),
    ],
)
def test_a_spec_tells_itself(spec, text):
    assert str(spec) == text
