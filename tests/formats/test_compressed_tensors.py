"""compressed-tensors ``pack-quantized``: llm-compressor's files are read exactly, ours are read
exactly by its own library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from format_cases import same, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from llmquant import bitpack
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import FormatError, QuantizationError
from llmquant.formats import FORMATS, Scheme, for_config
from llmquant.formats.compressed_tensors.pack_quantized import CompressedTensors
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(p.name for p in GOLDEN.glob("llmcompressor-*"))
LAYOUT = CompressedTensors()
SPECS = [QuantSpec(b, g, s) for b in (2, 3, 4, 8) for g in (None, 32, 64) for s in (True, False)]


def golden(folder: str) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor], dict[str, Any]]:
    """What we read, the tool's own numbers, and the config."""
    reader = CheckpointReader(GOLDEN / folder)
    config = reader.config["quantization_config"]
    layout = for_config(config)
    found = {}
    for name, scheme in layout.schemes(config, reader.tensors).items():
        tensors = {
            s: reader.read(f"{name}.{s}")
            for s in layout.tensor_suffixes()
            if f"{name}.{s}" in reader
        }
        found[name] = layout.unpack(tensors, scheme)
        assert (
            layout.shape_of({s: tuple(t.shape) for s, t in tensors.items()}, scheme)
            == found[name].shape
        )
    theirs = load_file(GOLDEN / folder / "expected.safetensors")
    return found, {n.removesuffix(".weight"): t for n, t in theirs.items()}, config


def test_every_kind_of_golden_is_there() -> None:
    kinds = (
        "w4-sym",
        "w4-asym",
        "w4-channel",
        "w8-sym",
        "w8-asym",
        "w2-sym",
        "w3-asym",
        "actorder-group",
        "mixed",
        "w8a8",
    )
    assert all(any(kind in f for f in FOLDERS) for kind in kinds)


@pytest.mark.parametrize("folder", FOLDERS)
def test_llm_compressors_folders_give_its_own_numbers(folder: str) -> None:
    ours, theirs, _ = golden(folder)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.equal(ours[name].dequantize(expected.dtype), expected), name


def test_both_packings_of_three_bits_are_told_apart_by_their_width() -> None:
    """The same base, calibration and method under two releases; what differs is how many words a
    row takes."""
    widths = {
        folder: CheckpointReader(GOLDEN / folder)
        .info("model.layers.0.self_attn.q_proj.weight_packed")
        .shape[1]
        for folder in ("llmcompressor-w3-asym", "llmcompressor-0.12-w3-asym")
    }
    assert widths == {"llmcompressor-w3-asym": 6, "llmcompressor-0.12-w3-asym": 7}


@pytest.mark.parametrize("columns", [32, 64, 96, 160])
def test_we_write_the_dense_packing(columns: int) -> None:
    packed = LAYOUT.pack(weight(4, columns, QuantSpec(3, 32, False)), torch.float16)
    assert packed["weight_packed"].shape[1] == columns * 3 // 32


def test_a_group_index_is_read_and_kept() -> None:
    ours, _, config = golden("llmcompressor-0.12-w4-actorder-group")
    assert {g["weights"]["actorder"] for g in config["config_groups"].values()} == {"group"}
    shuffled = [
        w
        for w in ours.values()
        if w.g_idx is not None and not torch.equal(w.g_idx, w.g_idx.sort().values)
    ]
    assert len(shuffled) == len(ours)


def test_two_groups_of_one_config_give_two_schemes() -> None:
    ours, _, _ = golden("llmcompressor-mixed")
    bits = {name.split(".")[3]: w.spec.bits for name, w in ours.items()}
    assert bits == {"self_attn": 8, "mlp": 4}


def library(tensors: dict[str, Tensor], config: dict[str, Any], module: str = "m") -> Tensor:
    """The weight as the compressed-tensors library decompresses it."""
    group = next(
        g for g in config["config_groups"].values() if {"Linear", module} & set(g["targets"])
    )
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    result: Tensor = compressor.decompress(tensors, QuantizationScheme(**group))["weight"]
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_library_decompresses_ours_to_our_numbers(spec: QuantSpec, dtype: torch.dtype) -> None:
    ours = weight(48, 192, spec, seed=spec.bits)
    config = LAYOUT.config({"m": Scheme(spec)}, [])
    QuantizationConfig.model_validate(config)
    theirs = library(LAYOUT.pack(ours, dtype), config)
    assert theirs.dtype == dtype
    assert torch.equal(theirs, ours.dequantize(dtype))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 8, 24]),
    rows=st.integers(1, 40),
    blocks=st.integers(1, 5),
    g_idx=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
def test_there_and_back_is_exact_for_odd_shapes(
    bits: int, symmetric: bool, group: int | None, rows: int, blocks: int, g_idx: bool, seed: int
) -> None:
    columns = blocks * (group or 7)
    spec = QuantSpec(bits, group, symmetric)
    before = weight(rows, columns, spec, seed=seed, g_idx=g_idx and group is not None)
    scheme = Scheme(spec, g_idx=before.g_idx is not None)
    packed = LAYOUT.pack(before, torch.bfloat16)
    assert packed.keys() <= LAYOUT.tensor_suffixes()
    assert same(LAYOUT.unpack(packed, scheme), before)
    assert packed["weight_packed"][0].tolist() == bitpack.pack_slow(before.codes[0].tolist(), bits)
    if not symmetric:
        assert packed["weight_zero_point"][:, 0].tolist() == bitpack.pack_slow(
            before.zeros[:, 0].tolist(), bits
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_a_scale_that_the_dtype_would_round_is_refused(dtype: torch.dtype) -> None:
    whole = weight(4, 32, QuantSpec(4, 32))
    scales = whole.scales * (1 + 2.0**-12)
    with pytest.raises(
        FormatError, match=r"4 of 4 scales are not exact in .*; quantize with portable scales"
    ):
        LAYOUT.pack(QuantizedWeight(whole.codes, scales, whole.zeros, whole.spec), dtype)


ASYM = QuantSpec(4, 32, symmetric=False)


def test_zero_points_that_the_config_denies_are_refused() -> None:
    denied, said = QuantSpec(4, 32), Scheme(QuantSpec(4, 32))
    whole = weight(8, 96, ASYM)
    with pytest.raises(FormatError, match="says symmetric but its weight_zero_point is not zero"):
        LAYOUT.unpack(LAYOUT.pack(whole, torch.float16), said)
    middle = QuantizedWeight(
        whole.codes, whole.scales, torch.full_like(whole.zeros, denied.middle), ASYM
    )
    tensors = LAYOUT.pack(middle, torch.float16)
    unpacked = tensors | {"weight_zero_point": torch.zeros(8, 3, dtype=torch.int8)}
    for stored in (tensors, unpacked):
        assert torch.equal(LAYOUT.unpack(stored, said).dequantize(), middle.dequantize())


def change(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: edit(tensors[name])})


TORN = [
    pytest.param(lambda t: t.pop("weight_packed"), "weight_packed missing beside", id="no codes"),
    pytest.param(lambda t: t.pop("weight_scale"), "weight_scale missing beside", id="no scale"),
    pytest.param(lambda t: t.pop("weight_shape"), "weight_shape missing beside", id="no shape"),
    pytest.param(
        lambda t: t.pop("weight_zero_point"),
        "asymmetric but there is no weight_zero_point",
        id="no zeros",
    ),
    pytest.param(
        change("weight_shape", lambda t: t[:1]),
        r"weight_shape holds \[8\], not \[out, in\]",
        id="shape of one",
    ),
    pytest.param(
        change("weight_shape", lambda t: t * 0),
        r"weight_shape holds \[0, 0\]",
        id="shape of nothing",
    ),
    pytest.param(
        change("weight_shape", lambda t: t + 1),
        "does not divide the 97 columns",
        id="shape indivisible",
    ),
    pytest.param(
        change("weight_shape", lambda t: t * 2),
        "weight_shape says .16, 192. with 6 groups",
        id="shape too large",
    ),
    pytest.param(
        change("weight_packed", lambda t: t.reshape(-1)), "weight_shape says", id="codes in one row"
    ),
    pytest.param(
        change("weight_packed", lambda t: t[:, 1:]),
        "codes of 4 bits need 12 int32 words",
        id="codes too few",
    ),
    pytest.param(
        change("weight_packed", lambda t: t.to(torch.int64)),
        "the tensor has 12 of torch.int64",
        id="codes int64",
    ),
    pytest.param(
        change("weight_scale", lambda t: t[:, :1]), "and weight_scale .8, 1.", id="a scale too few"
    ),
    pytest.param(
        change("weight_scale", lambda t: t * float("nan")),
        "a scale is NaN or infinite",
        id="NaN scale",
    ),
    pytest.param(
        change("weight_zero_point", lambda t: t[:, :1]),
        "weight_zero_point is .1, 1., not",
        id="zeros too few",
    ),
    pytest.param(
        change("weight_zero_point", lambda t: t.repeat(2, 1)),
        "8 codes of 4 bits need 1",
        id="zeros too many",
    ),
]


@pytest.mark.parametrize(("tear", "words"), TORN)
def test_torn_tensors_are_refused(tear: Callable[[dict[str, Tensor]], object], words: str) -> None:
    tensors = LAYOUT.pack(weight(8, 96, ASYM), torch.float16)
    tear(tensors)
    with pytest.raises((FormatError, QuantizationError), match=words):
        LAYOUT.unpack(tensors, Scheme(ASYM))


NAMES = ["a.weight_packed", "a.weight_scale", "a.weight_shape"]


def config_with(path: str, value: object) -> dict[str, Any]:
    """The config of one symmetric module ``a`` with one value replaced; ``path`` is dotted, the
    group is ``g``."""
    config = copy.deepcopy(LAYOUT.config({"a": Scheme(QuantSpec(4, 32))}, ["lm_head"]))
    config["config_groups"] = {"g": config["config_groups"].pop("group_0")}
    *parents, last = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


LIES = [
    pytest.param("config_groups", [1], "is no mapping of names to groups", id="groups no mapping"),
    pytest.param(
        "config_groups", {"g": None}, "is no mapping of names to groups", id="group is null"
    ),
    pytest.param("config_groups", None, "no config group targets it", id="no groups"),
    pytest.param(
        "config_groups.g.targets",
        "Linear",
        "is no mapping of names to groups",
        id="targets no list",
    ),
    pytest.param(
        "config_groups.g.targets",
        ["b"],
        "a has quantized weights but no config group targets it",
        id="no target",
    ),
    pytest.param(
        "config_groups.g.targets", ["re:("], "which is no regular expression", id="target no regex"
    ),
    pytest.param(
        "config_groups.g.format",
        "marlin-24",
        "'marlin-24' is not one llmquant reads",
        id="other layout",
    ),
    pytest.param("config_groups.g.weights", None, "cannot read weights", id="no weights"),
    pytest.param(
        "config_groups.g.weights.type", "float", "cannot read weights of type float", id="floats"
    ),
    pytest.param("config_groups.g.weights.strategy", "block", "strategy block", id="blocks"),
    pytest.param("config_groups.g.weights.num_bits", 5, "a: bits=5 is not supported", id="5 bits"),
    pytest.param(
        "config_groups.g.weights.num_bits", "4", "cannot read weights", id="bits a string"
    ),
    pytest.param(
        "config_groups.g.weights.group_size",
        None,
        "strategy group with group_size None",
        id="no group size",
    ),
    pytest.param(
        "config_groups.g.weights.group_size",
        0,
        "a: group_size=0 must be a positive divisor",
        id="group of 0",
    ),
    pytest.param(
        "config_groups.g.weights.actorder", "group", "there is no weight_g_idx", id="g_idx missing"
    ),
    pytest.param(
        "config_groups.g.input_activations",
        {"num_bits": 8},
        "quantized activations",
        id="activations",
    ),
    pytest.param("ignore", ["a"], "the config's ignore list names it", id="ignored but packed"),
    pytest.param("ignore", ["re:.*"], "the config's ignore list names it", id="ignored by regex"),
    pytest.param("transform_config", {"x": 1}, "rotates activations", id="transforms"),
]


@pytest.mark.parametrize(("path", "value", "words"), LIES)
def test_a_config_that_contradicts_the_tensors_is_refused(
    path: str, value: object, words: str
) -> None:
    config = config_with(path, value)
    with pytest.raises(FormatError, match=words):
        for_config(config).schemes(config, NAMES)


def test_the_most_specific_target_counts() -> None:
    groups = {
        "by class": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
        "by pattern": {
            "targets": ["re:.*mlp.*"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
        },
        "by name": {
            "targets": ["x.mlp.down"],
            "weights": {"num_bits": 2, "strategy": "group", "group_size": 32},
        },
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
    }
    names = [f"x.{m}.weight_packed" for m in ("attn.q", "mlp.up", "mlp.down")]
    found = for_config(config).schemes(config, names)
    assert {n: s.spec.bits for n, s in found.items()} == {
        "x.attn.q": 8,
        "x.mlp.up": 4,
        "x.mlp.down": 2,
    }


MIXES = [
    pytest.param({"a": QuantSpec(4, 32), "b": QuantSpec(4, 32)}, ["Linear"], id="uniform"),
    pytest.param(
        {"a": QuantSpec(4, 32), "lm_head": QuantSpec(4, 32)}, ["Linear", "lm_head"], id="head named"
    ),
    pytest.param({"a": QuantSpec(4, 32), "b": QuantSpec(8, None)}, ["a"], id="mixed, by name"),
]


@pytest.mark.parametrize(("specs", "first_targets"), MIXES)
def test_the_config_we_write_says_what_we_read(
    specs: dict[str, QuantSpec], first_targets: list[str]
) -> None:
    schemes = {n: Scheme(s) for n, s in specs.items()}
    config = LAYOUT.config(schemes, ["other"])
    assert next(iter(config["config_groups"].values()))["targets"] == first_targets
    assert (
        FORMATS["compressed-tensors"].schemes(config, [f"{n}.weight_packed" for n in specs])
        == schemes
    )
    QuantizationConfig.model_validate(config)
