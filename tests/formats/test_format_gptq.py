"""GPTQ v1 and v2: bytes against a loop over bits, exact round trips, the zero that v1 cannot say,
configs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from format_cases import bits_at, same, weight, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.errors import FormatError
from llmquant.formats import FORMATS, Scheme, for_config
from llmquant.formats.gptq import Gptq
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

LABELS = pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
W4 = QuantSpec(4, 32, True)
W4A = QuantSpec(4, 32, False)


def scheme_of(w: QuantizedWeight) -> Scheme:
    return Scheme(w.spec, w.g_idx is not None)


def slow_dequantize(tensors: dict[str, torch.Tensor], bits: int, v2: bool) -> list[list[float]]:
    """The format's definition in loops: (q - z) * s, z from ``qzeros`` plus one in v1."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    scales, g_idx = tensors["scales"].tolist(), tensors["g_idx"].tolist()
    out_features, in_features = len(scales[0]), len(g_idx)
    rows = []
    for out in range(out_features):
        stream = [words[out] for words in qweight]
        row = []
        for column in range(in_features):
            group = g_idx[column]
            zero = bits_at(qzeros[group], out * bits, bits) + (0 if v2 else 1)
            row.append((bits_at(stream, column * bits, bits) - zero) * scales[group][out])
        rows.append(row)
    return rows


@LABELS
@settings(deadline=None, max_examples=60)
@given(w=weights(out_step=32, in_step=32, lowest_zero=1))
def test_round_trip(label: str, w: QuantizedWeight) -> None:
    layout = FORMATS[label]
    assert layout.why_not(scheme_of(w), w.shape) is None
    packed = layout.pack(w, torch.float16)
    assert set(packed) <= layout.tensor_suffixes()
    assert layout.shape_of({n: tuple(t.shape) for n, t in packed.items()}, scheme_of(w)) == w.shape
    assert same(layout.unpack(packed, scheme_of(w)), w)


@LABELS
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("g_idx", [False, True], ids=["natural", "desc_act"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_mean_what_the_format_says(
    label: str, bits: int, symmetric: bool, group_size: int | None, g_idx: bool
) -> None:
    if g_idx and group_size is None:
        assert "no meaning" in str(
            FORMATS[label].why_not(Scheme(QuantSpec(bits, None, symmetric), True), (32, 96))
        )
        return
    w = weight(32, 96, QuantSpec(bits, group_size, symmetric), lowest_zero=1, g_idx=g_idx)
    packed = FORMATS[label].pack(w, torch.float16)
    assert torch.equal(
        torch.tensor(slow_dequantize(packed, bits, label == "gptq_v2")), w.dequantize()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_refuses_to_write_a_zero_of_0(bits: int) -> None:
    w = weight(32, 64, QuantSpec(bits, 32, False), lowest_zero=1)
    w.zeros[3, 1] = 0
    with pytest.raises(FormatError, match=r"1 of 64 zero-points are 0.*gptq_v2"):
        FORMATS["gptq"].pack(w, torch.float16)
    assert same(
        FORMATS["gptq_v2"].unpack(FORMATS["gptq_v2"].pack(w, torch.float16), Scheme(w.spec)), w
    )


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**31))
def test_v1_reads_a_zero_of_0_as_the_tools_write_it(bits: int, seed: int) -> None:
    """They subtract one from the whole word (at 3 bits from each field, modulo 8)."""
    w = weight(32, 64, QuantSpec(bits, 32, False), seed=seed)
    w.zeros[::3] = 0
    packed = FORMATS["gptq_v2"].pack(w, torch.float16)
    if bits == 3:
        shifted = QuantizedWeight(w.codes, w.scales, (w.zeros - 1) & 7, w.spec)
        packed["qzeros"] = FORMATS["gptq_v2"].pack(shifted, torch.float16)["qzeros"]
    else:
        ones = sum(1 << s for s in range(0, 32, bits))
        words = [[(int(x) - ones) & 0xFFFFFFFF for x in row] for row in packed["qzeros"].tolist()]
        packed["qzeros"] = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert same(FORMATS["gptq"].unpack(packed, Scheme(w.spec)), w)


@LABELS
@pytest.mark.parametrize("stored_by", ["gptq", "gptq_v2"])
def test_symmetric_zeros_need_no_convention(label: str, stored_by: str) -> None:
    """z is the middle by definition: both tools' bytes are read, whatever the label."""
    w = weight(32, 64, W4)
    assert same(FORMATS[label].unpack(FORMATS[stored_by].pack(w, torch.float16), Scheme(W4)), w)


@pytest.mark.parametrize(
    ("change", "scheme", "message"),
    [
        (lambda t: t.pop("scales"), Scheme(W4A), "scales missing"),
        (lambda t: t.pop("qzeros"), Scheme(W4A), "no qzeros"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), Scheme(W4A), "qzeros are"),
        (lambda t: t.update(scales=t["scales"][:, :-1]), Scheme(W4A), "needs scales"),
        (lambda t: t.update(scales=t["scales"].to(torch.int16)), Scheme(W4A), "needs scales"),
        (lambda t: t.update(g_idx=t["g_idx"][:-1]), Scheme(W4A), "g_idx is"),
        (lambda t: t.update(g_idx=t["g_idx"].flip(0)), Scheme(W4A), "desc_act: false"),
        (lambda t: t.update(qweight=t["qweight"].to(torch.int64)), Scheme(W4A), "int64"),
        (lambda t: None, Scheme(W4), "not all 8"),
        (lambda t: None, Scheme(QuantSpec(8, 32, False)), "needs scales"),
        (lambda t: None, Scheme(QuantSpec(4, 24, False)), "does not divide"),
    ],
    ids=[
        "no scales",
        "no zeros",
        "zeros",
        "scales",
        "scale dtype",
        "g_idx",
        "order",
        "word",
        "sym",
        "bits",
        "group",
    ],
)
def test_refuses_what_cannot_be(change, scheme: Scheme, message: str) -> None:  # type: ignore[no-untyped-def]
    packed = FORMATS["gptq_v2"].pack(weight(32, 64, W4A), torch.float16)
    change(packed)
    with pytest.raises(FormatError, match=message):
        FORMATS["gptq_v2"].unpack(packed, scheme)


def test_missing_zeros_of_a_symmetric_weight_are_known() -> None:
    w = weight(32, 64, W4)
    packed = FORMATS["gptq"].pack(w, torch.float16)
    del packed["qzeros"], packed["g_idx"]
    assert same(FORMATS["gptq"].unpack(packed, Scheme(W4)), w)


def test_bf16_scales_are_read() -> None:
    w = weight(32, 64, W4)
    packed = FORMATS["gptq"].pack(w, torch.float16)
    packed["scales"] = packed["scales"].to(torch.bfloat16)
    assert same(FORMATS["gptq"].unpack(packed, Scheme(W4)), w)


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (Scheme(W4), (32, 60), "input size 60"),
        (Scheme(QuantSpec(3, 16)), (48, 64), "output size 48 at 3 bits"),
        (Scheme(W4, activations="int8-dynamic"), (32, 64), "activations"),
    ],
    ids=["input", "output", "activations"],
)
def test_why_not(scheme: Scheme, shape: tuple[int, int], message: str) -> None:
    assert message in str(FORMATS["gptq"].why_not(scheme, shape))


def test_a_scale_that_fp16_would_round_is_refused() -> None:
    w = weight(32, 64, W4)
    w.scales[5, 1] = 1e-3 + 1e-9
    with pytest.raises(FormatError, match="1 of 64 scales are not exact in float16"):
        FORMATS["gptq"].pack(w, torch.float16)


MIXED = {
    "model.layers.0.self_attn.q_proj": Scheme(W4),
    "model.layers.0.self_attn.k_proj": Scheme(W4),
    "model.layers.0.self_attn.v_proj": Scheme(W4),
    "model.layers.0.mlp.gate_proj": Scheme(QuantSpec(8, 64, False)),
    "model.layers.0.mlp.up_proj": Scheme(QuantSpec(8, 64, False)),
    "model.layers.10.self_attn.q_proj": Scheme(QuantSpec(4, None, True)),
    "lm_head": Scheme(W4),
}


def names_of(schemes: dict[str, Scheme]) -> list[str]:
    return [f"{m}.{t}" for m in schemes for t in ("qweight", "qzeros", "scales", "g_idx")]


@LABELS
def test_config_round_trip_with_exceptions_and_skips(label: str) -> None:
    layout = FORMATS[label]
    config = json.loads(json.dumps(layout.config(MIXED, ["model.layers.1.mlp.down_proj"])))
    assert for_config(config) is layout
    assert (
        layout.schemes(config, [*names_of(MIXED), "model.layers.1.mlp.down_proj.weight"]) == MIXED
    )
    assert config["lm_head"] is True
    assert json.loads(layout.side_files(config)["quantize_config.json"]) == config
    with pytest.raises(FormatError, match="leaves it unquantized"):
        layout.schemes(config, ["model.layers.1.mlp.down_proj.qweight"])


def test_patterns_name_the_layers_that_engines_fuse() -> None:
    """vLLM asks for gate_up_proj; of layer 10 only q_proj is an exception, so no qkv_proj may
    match."""
    dynamic = FORMATS["gptq"].config(MIXED, [f"model.layers.2.self_attn.{x}_proj" for x in "qkv"])[
        "dynamic"
    ]
    asked = [
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.2.self_attn.qkv_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.10.mlp.gate_up_proj",
        "model.layers.10.self_attn.qkv_proj",
    ]
    assert [n for n in asked if any(re.match(p[2:], n) for p in dynamic)] == asked[:2]
    assert [p[:2] for p in dynamic] == ["-:", "+:", "+:"]


@LABELS
def test_an_order_is_never_written_without_desc_act(label: str) -> None:
    layout, ordered = FORMATS[label], Scheme(W4, g_idx=True)
    assert layout.config({"a": Scheme(W4)}, [])["desc_act"] is False
    config = layout.config({"a": Scheme(W4), "b": ordered}, [])
    assert config["desc_act"] is True
    read = layout.schemes(config, names_of({"a": ordered, "b": ordered}))
    trivial = weight(32, 64, W4)
    assert same(layout.unpack(layout.pack(trivial, torch.float16), read["a"]), trivial)


PLAIN = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({"is_marlin_format": True}, ["a.qweight"], "Marlin"),
        ({"checkpoint_format": "marlin"}, ["a.qweight"], "checkpoint_format 'marlin'"),
        ({"format": "bitblas"}, ["a.qweight"], "checkpoint_format 'bitblas'"),
        (
            {"checkpoint_format": "gptq", "format": "gptq_v2"},
            ["a.qweight"],
            "two checkpoint formats",
        ),
        ({"pack_dtype": "int16"}, ["a.qweight"], "pack_dtype"),
        ({"lm_head": False}, ["lm_head.qweight"], "lm_head: false"),
        ({"desc_act": True}, ["a.qweight"], "no g_idx"),
        ({"bits": "4"}, ["a.qweight"], "bits '4'"),
        ({"data_type": "mx_fp"}, ["a.qweight"], "mx_fp"),
        ({"dynamic": {"+:(": {"bits": 8}}}, ["a.qweight"], "no regular expression"),
    ],
    ids=[
        "marlin flag",
        "marlin",
        "bitblas",
        "two labels",
        "pack_dtype",
        "head",
        "desc_act",
        "bits",
        "dtype",
        "regex",
    ],
)
def test_configs_that_cannot_be_read(
    change: dict[str, object], names: list[str], message: str
) -> None:
    config = {**PLAIN, **change}
    with pytest.raises(FormatError, match=message):
        for_config(config).schemes(config, names)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Scheme(W4)),
        ({"sym": None}, Scheme(W4A)),
        ({"group_size": -1, "desc_act": True}, Scheme(QuantSpec(4, None, True))),
        (
            {"dynamic": {r"-:.*\.b": {}, r".*\.a$": {"bits": 8}, r"+:.*": {"bits": 2}}},
            Scheme(QuantSpec(8, 32, True)),
        ),
        ({"dynamic": None, "meta": None, "damp_percent": 0.1}, Scheme(W4)),
    ],
    ids=["no label", "no sym", "desc_act per row", "first pattern wins", "nulls"],
)
def test_configs_as_tools_write_them(change: dict[str, object], expected: Scheme) -> None:
    config = {**PLAIN, **change}
    layout = for_config(config)
    assert isinstance(layout, Gptq)
    assert not layout.v2
    assert layout.schemes(config, ["m.a.qweight", "m.b.weight"]) == {"m.a": expected}
