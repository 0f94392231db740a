"""AWQ GEMM: bytes against a loop over nibbles, exact round trips, and the mixes that one config
cannot say."""

from __future__ import annotations

import json

import pytest
import torch
from format_cases import bits_at, same, weight, weights
from hypothesis import given, settings

from llmquant.errors import FormatError
from llmquant.formats import FORMATS, Scheme, for_config
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

AWQ = FORMATS["awq"]
W4 = QuantSpec(4, 32, True)
W4A = QuantSpec(4, 32, False)
# Where output row r of eight stands in its word: AutoAWQ's documented order, inverted by hand.
NIBBLE = {0: 0, 2: 1, 4: 2, 6: 3, 1: 4, 3: 5, 5: 6, 7: 7}


def slow_dequantize(tensors: dict[str, torch.Tensor], group_size: int) -> list[list[float]]:
    qweight, qzeros, scales = (tensors[n].tolist() for n in ("qweight", "qzeros", "scales"))

    def nibble(words: list[int], out: int) -> int:
        return bits_at([words[out // 8]], NIBBLE[out % 8] * 4, 4)

    return [
        [
            (nibble(qweight[column], out) - nibble(qzeros[column // group_size], out))
            * scales[column // group_size][out]
            for column in range(len(qweight))
        ]
        for out in range(len(scales[0]))
    ]


@settings(deadline=None, max_examples=60)
@given(w=weights(out_step=8, bits=(4,)).filter(lambda w: w.g_idx is None))
def test_round_trip(w: QuantizedWeight) -> None:
    assert AWQ.why_not(Scheme(w.spec), w.shape) is None
    packed = AWQ.pack(w, torch.float16)
    assert set(packed) == AWQ.tensor_suffixes()
    assert AWQ.shape_of({n: tuple(t.shape) for n, t in packed.items()}, Scheme(w.spec)) == w.shape
    assert same(AWQ.unpack(packed, Scheme(w.spec)), w)


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, None], ids=["g32", "row"])
def test_bytes_mean_what_the_format_says(group_size: int | None, symmetric: bool) -> None:
    w = weight(24, 96, QuantSpec(4, group_size, symmetric))
    packed = AWQ.pack(w, torch.float16)
    assert torch.equal(torch.tensor(slow_dequantize(packed, group_size or 96)), w.dequantize())


@pytest.mark.parametrize(
    ("scheme", "shape", "message"),
    [
        (Scheme(QuantSpec(8, 32)), (32, 64), "4 bits only"),
        (Scheme(W4, g_idx=True), (32, 64), "no g_idx"),
        (Scheme(W4), (20, 64), "20 is not a multiple of 8"),
        (Scheme(W4, activations="int8-dynamic"), (32, 64), "activations"),
    ],
    ids=["bits", "g_idx", "output", "activations"],
)
def test_why_not(scheme: Scheme, shape: tuple[int, int], message: str) -> None:
    assert message in str(AWQ.why_not(scheme, shape))


def test_pack_refuses_what_why_not_names() -> None:
    with pytest.raises(FormatError, match="no g_idx"):
        AWQ.pack(weight(32, 64, W4, g_idx=True), torch.float16)


@pytest.mark.parametrize(
    ("schemes", "ignore", "message"),
    [
        (
            {"a": Scheme(W4), "b": Scheme(QuantSpec(4, 64))},
            (),
            "one scheme for all modules, not W4 g32 sym and W4 g64 sym",
        ),
        ({"a": Scheme(W4), "b": Scheme(W4A)}, (), "one scheme"),
        ({"m.mlp.gate_proj": Scheme(W4)}, ("m.mlp.gate",), "m.mlp.gate_proj cannot be quantized"),
    ],
    ids=["group sizes", "symmetry", "part of a name"],
)
def test_why_not_together(
    schemes: dict[str, Scheme], ignore: tuple[str, ...], message: str
) -> None:
    assert message in str(AWQ.why_not_together(schemes, ignore))
    with pytest.raises(FormatError):
        AWQ.config(schemes, ignore)


@pytest.mark.parametrize("spec", [W4, W4A, QuantSpec(4, None, True)], ids=str)
def test_config_round_trip(spec: QuantSpec) -> None:
    schemes = {"m.q_proj": Scheme(spec), "lm_head": Scheme(spec)}
    config = json.loads(json.dumps(AWQ.config(schemes, ["m.down_proj"])))
    assert for_config(config) is AWQ
    assert (
        AWQ.schemes(config, ["m.q_proj.qweight", "lm_head.qweight", "m.down_proj.weight"])
        == schemes
    )
    assert (config["zero_point"], config["lm_head"], config["modules_to_not_convert"]) == (
        True,
        True,
        ["m.down_proj"],
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {
                "bits": 4,
                "group_size": 32,
                "zero_point": True,
                "version": "gemm",
                "modules_to_not_convert": None,
            },
            W4A,
        ),
        ({"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, W4A),
        ({"bits": 4, "group_size": -1, "zero_point": False}, QuantSpec(4, None, True)),
        ({"bits": 4, "group_size": 32, "zero_point": False, "sym": True, "version": "gemm"}, W4),
    ],
    ids=["AutoAWQ", "llm-awq", "no zero points", "AutoRound"],
)
def test_configs_as_tools_write_them(config: dict[str, object], expected: QuantSpec) -> None:
    assert AWQ.schemes(config, ["a.qweight", "lm_head.weight"]) == {"a": Scheme(expected)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 4, "group_size": 32, "version": "gemv_fast"}, "'gemv_fast'"),
        ({"bits": 4, "group_size": 32, "version": "marlin"}, "'marlin'"),
        ({"bits": 8, "group_size": 32}, "bits 8"),
        ({"bits": 4}, "group_size None"),
        (
            {"bits": 4, "group_size": 32, "modules_to_not_convert": ["a"]},
            "modules_to_not_convert names it",
        ),
    ],
    ids=["gemv", "marlin", "bits", "group", "denied"],
)
def test_configs_that_cannot_be_read(config: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        AWQ.schemes(config, ["a.qweight"])


@pytest.mark.parametrize(
    ("change", "scheme", "message"),
    [
        (lambda t: t.pop("scales"), Scheme(W4A), "scales missing"),
        (lambda t: t.pop("qzeros"), Scheme(W4A), "no qzeros"),
        (lambda t: t.update(qzeros=t["qzeros"][:1]), Scheme(W4A), "qzeros are"),
        (lambda t: t.update(scales=t["scales"][:, :-1]), Scheme(W4A), "needs scales"),
        (lambda t: None, Scheme(W4), "not all zero-points are 8"),
        (lambda t: None, Scheme(QuantSpec(4, 48, False)), "does not divide"),
    ],
    ids=["no scales", "no zeros", "zeros", "scales", "sym", "group"],
)
def test_refuses_what_cannot_be(change, scheme: Scheme, message: str) -> None:  # type: ignore[no-untyped-def]
    packed = AWQ.pack(weight(32, 64, W4A), torch.float16)
    change(packed)
    with pytest.raises(FormatError, match=message):
        AWQ.unpack(packed, scheme)
