"""W8A8 and its place beside pack-quantized: exact round trips, configs of one and of two
layouts."""

from __future__ import annotations

import json

import pytest
import torch
from format_cases import same, weight, weights
from hypothesis import given, settings

from llmquant.errors import FormatError
from llmquant.formats import FORMATS, Scheme, for_config
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

INT8 = FORMATS["int-quantized"]
FAMILY = FORMATS["compressed-tensors"]
W8A8 = Scheme(QuantSpec(8, None, True), activations="int8-dynamic")
W4 = Scheme(QuantSpec(4, 32, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@settings(deadline=None, max_examples=40)
@given(w=weights(bits=(8,), groups=(None,), symmetric=(True,)))
def test_round_trip(dtype: torch.dtype, w: QuantizedWeight) -> None:
    packed = INT8.pack(w, dtype)
    assert set(packed) == INT8.tensor_suffixes()
    assert packed["weight_scale"].dtype == dtype
    assert INT8.shape_of({n: tuple(t.shape) for n, t in packed.items()}, W8A8) == w.shape
    assert same(INT8.unpack(packed, W8A8), w)
    slow = [
        [q * s[0] for q in row]
        for row, s in zip(packed["weight"].tolist(), packed["weight_scale"].tolist(), strict=True)
    ]
    assert torch.equal(torch.tensor(slow), w.dequantize())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(QuantSpec(8, 32), activations="int8-dynamic"), "W8 g32 sym"),
        (Scheme(QuantSpec(8, None, False), activations="int8-dynamic"), "W8 row asym"),
        (Scheme(QuantSpec(4, None), activations="int8-dynamic"), "W4 row sym"),
        (Scheme(QuantSpec(8, None)), "engines quantize the activations"),
    ],
    ids=["groups", "asymmetric", "bits", "weights alone"],
)
def test_why_not(scheme: Scheme, message: str) -> None:
    assert message in str(INT8.why_not(scheme, (32, 64)))


def test_config_round_trip() -> None:
    schemes = {"m.q_proj": W8A8, "lm_head": W8A8}
    config = json.loads(json.dumps(INT8.config(schemes, ["m.down_proj"])))
    names = [
        "m.q_proj.weight",
        "m.q_proj.weight_scale",
        "lm_head.weight",
        "lm_head.weight_scale",
        "m.down_proj.weight",
    ]
    assert for_config(config).schemes(config, names) == schemes
    assert INT8.schemes(config, names) == schemes


def test_two_layouts_in_one_config() -> None:
    schemes = {"m.q_proj": W8A8, "m.up_proj": W4, "m.down_proj": W4}
    config = json.loads(json.dumps(FAMILY.config(schemes, ["lm_head"])))
    assert config["format"] == "mixed-precision"
    assert sorted(g["format"] for g in config["config_groups"].values()) == [
        "int-quantized",
        "pack-quantized",
    ]
    names = ["lm_head.weight"]
    for module, scheme in schemes.items():
        w = weight(32, 64, scheme.spec)
        packed = FAMILY.pack(w, torch.float16, scheme.activations)
        names += [f"{module}.{suffix}" for suffix in packed]
        assert same(FAMILY.unpack(packed, scheme), w)
        assert FAMILY.shape_of({n: tuple(t.shape) for n, t in packed.items()}, scheme) == (32, 64)
    assert FAMILY.schemes(config, names) == schemes


def _changed(part: str, **keys: object) -> dict[str, object]:
    config = INT8.config({"a": W8A8}, [])
    config["config_groups"]["group_0"][part] = {**config["config_groups"]["group_0"][part], **keys}
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_changed("input_activations", dynamic=False), "input_activations are"),
        (_changed("weights", strategy="group"), "weights are"),
        (_changed("weights", symmetric=False), "weights are"),
        ({**INT8.config({"a": W8A8}, []), "ignore": ["re:a"]}, "ignore list names it"),
        (
            {
                **INT8.config({"a": W8A8}, []),
                "config_groups": {"g": {"targets": ["b"], "format": "int-quantized"}},
            },
            "targets it",
        ),
        (
            {
                **INT8.config({"a": W8A8}, []),
                "config_groups": {"g": {"targets": ["Linear"], "format": "float-quantized"}},
            },
            "'float-quantized'",
        ),
    ],
    ids=["static", "groups", "asymmetric", "ignored", "untargeted", "floats"],
)
def test_configs_that_cannot_be_read(config: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        for_config(config).schemes(config, ["a.weight", "a.weight_scale"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("weight_scale"), "weight_scale missing"),
        (lambda t: t.update(weight=t["weight"].to(torch.int16)), "int16"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:-1]), "one scale per row"),
    ],
    ids=["no scale", "dtype", "scales"],
)
def test_refuses_what_cannot_be(change, message: str) -> None:  # type: ignore[no-untyped-def]
    packed = INT8.pack(weight(32, 64, W8A8.spec), torch.float16)
    change(packed)
    with pytest.raises(FormatError, match=message):
        INT8.unpack(packed, W8A8)
