"""Checkpoints written by GPTQModel, AutoRound, AutoAWQ and llm-compressor dequantize to those
tools' own numbers, exactly.

Two of their readers are wrong (tests/golden/README.md, "Bytes that lie"); the tests name the rows
and say why.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llmquant.checkpoint.detect import quantization_config
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import FormatError
from llmquant.formats import FORMATS, Scheme, for_config
from llmquant.formats.zero_points import check_zero_convention, doubtful, refuse_shifted
from llmquant.weight import QuantizedWeight

GOLDEN = Path(__file__).parent.parent / "golden"
WRONG_READER = "autoround-auto_gptq-asym"
MISLABELLED = "autoround-auto_round-model-free-asym"
TOOLS = ("gptqmodel", "autoround", "autoawq", "llmcompressor-w8a8", "llmcompressor-mixed")
FOLDERS = sorted(p.name for tool in TOOLS for p in GOLDEN.glob(f"{tool}*"))
EXACT = [f for f in FOLDERS if f != WRONG_READER]
ASYMMETRIC_GPTQ = [
    f for f in FOLDERS if "asym" in f and "awq" not in f and "auto_round-asym" not in f
]


def read(folder: str) -> tuple[dict[str, QuantizedWeight], dict[str, Scheme], dict[str, object]]:
    reader = CheckpointReader(GOLDEN / folder)
    config = quantization_config(reader)
    assert config is not None
    layout = for_config(config)
    schemes = layout.schemes(config, reader.tensors)
    weights = {}
    for name, scheme in schemes.items():
        tensors = {
            s: reader.read(f"{name}.{s}")
            for s in layout.tensor_suffixes()
            if f"{name}.{s}" in reader
        }
        weights[name] = layout.unpack(tensors, scheme)
        assert (
            layout.shape_of({s: tuple(t.shape) for s, t in tensors.items()}, scheme)
            == weights[name].shape
        )
    return weights, schemes, config


def expected(folder: str) -> dict[str, Tensor]:
    return {
        n.removesuffix(".weight"): t
        for n, t in load_file(GOLDEN / folder / "expected.safetensors").items()
    }


def test_there_are_goldens_of_every_tool() -> None:
    assert len(FOLDERS) >= 19
    assert len(ASYMMETRIC_GPTQ) >= 7


@pytest.mark.parametrize("folder", EXACT)
def test_exactly_the_tools_own_numbers(folder: str) -> None:
    ours, theirs = read(folder)[0], expected(folder)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight.dequantize(torch.float16), theirs[name]), name


def test_where_autoround_misreads_its_own_bytes() -> None:
    """Its v1 writer borrows through the word for z = 0, its reader adds one field by field: a z of
    0 is read as 16, and the next row's as one too few. The same codes in its AWQ file, where zeros
    are stored as they are, settle who is right."""
    ours, theirs = read(WRONG_READER)[0], expected(WRONG_READER)
    wrong = {
        name: (weight.dequantize(torch.float16) != theirs[name]).any(1).nonzero().flatten().tolist()
        for name, weight in ours.items()
    }
    assert {name: rows for name, rows in wrong.items() if rows} == {
        "model.layers.0.self_attn.k_proj": [0, 1, 2]
    }
    zeros = ours["model.layers.0.self_attn.k_proj"].zeros
    assert (zeros[:2] == 0).all()
    assert not (zeros[2:] == 0).any()
    for name, weight in read("autoround-auto_awq-asym")[0].items():
        assert weight.digest() == ours[name].digest(), name


def relative_error(weights: dict[str, QuantizedWeight]) -> float:
    base = load_file(GOLDEN / "base" / "model.safetensors")
    pairs = [(w.dequantize(), base[f"{n}.weight"].to(torch.float32)) for n, w in weights.items()]
    return (
        float(
            sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)
        )
        ** 0.5
    )


def with_zeros_plus_one() -> dict[str, QuantizedWeight]:
    """The mislabelled file, read as GPTQ v1."""
    reader = CheckpointReader(GOLDEN / MISLABELLED)
    _, schemes, _ = read(MISLABELLED)
    return {
        n: FORMATS["gptq"].unpack(
            {t: reader.read(f"{n}.{t}") for t in ("qweight", "qzeros", "scales")}, s
        )
        for n, s in schemes.items()
    }


def test_the_mislabelled_file_is_one_scale_off() -> None:
    assert relative_error(read(MISLABELLED)[0]) > 3 * relative_error(with_zeros_plus_one())


def test_magnitudes_find_the_lie() -> None:
    weights, schemes, config = read(MISLABELLED)
    assert set(doubtful(config, schemes)) == set(weights)
    verdict = check_zero_convention(weights)
    assert (verdict.shift, verdict.by) == (1, "magnitude")
    with pytest.raises(
        FormatError, match=r"packing_format: auto_round but 1\d\d\d groups .* the label is wrong"
    ):
        refuse_shifted(verdict, "packing_format: auto_round")
    assert check_zero_convention(with_zeros_plus_one()).shift == 0


@pytest.mark.parametrize("folder", ASYMMETRIC_GPTQ)
def test_verdicts(folder: str) -> None:
    """Every asymmetric fixture in GPTQ's layout, as labelled and against the base model; at 8 bits
    magnitudes say nothing."""
    weights, schemes, config = read(folder)
    base = {n: load_base(n) for n in weights}
    right = 1 if folder == MISLABELLED else 0
    assert doubtful(config, schemes)
    assert check_zero_convention(weights).shift == (None if "w8" in folder else right)
    assert check_zero_convention(weights, base).shift == right
    assert check_zero_convention(weights, base).by == "base"


def load_base(name: str) -> Tensor:
    return CheckpointReader(GOLDEN / "base").read(f"{name}.weight")


@pytest.mark.parametrize(
    "folder", [f for f in ASYMMETRIC_GPTQ if "w8" not in f and f != MISLABELLED]
)
def test_the_opposite_lie_is_found_too(folder: str) -> None:
    """Read one convention as the other, both ways."""
    weights = {
        n: QuantizedWeight(
            w.codes, w.scales, (w.zeros + 1).clamp(max=w.spec.max_code), w.spec, w.g_idx
        )
        for n, w in read(folder)[0].items()
    }
    assert check_zero_convention(weights).shift == -1


def test_uncentred_neighbours_void_the_argument() -> None:
    weights = read(MISLABELLED)[0]
    neighbour = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert check_zero_convention(weights, neighbours=[neighbour]).shift == 1
    assert check_zero_convention(weights, neighbours=[neighbour + 1.0]).shift is None


@pytest.mark.parametrize("base", [None, "base"], ids=["magnitude", "base"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_door_refuses_the_lie_and_nothing_else(folder: str, base: str | None) -> None:
    reader = CheckpointReader(GOLDEN / folder)
    original = CheckpointReader(GOLDEN / base) if base else None
    packed = PackedCheckpoint(reader)
    if folder != MISLABELLED:
        packed.refuse_shifted_zeros(original)
        return
    with pytest.raises(FormatError, match=f"{folder}: .*label is wrong"):
        packed.refuse_shifted_zeros(original)


@pytest.fixture
def apart(tmp_path: Path) -> Path:
    """A GPTQModel folder with its quantization beside config.json instead of inside it."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "gptqmodel-w4-v1-asym", folder)
    config = json.loads((folder / "config.json").read_text())
    side = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(side))
    return folder


@pytest.mark.parametrize(
    "dropped",
    [(), ("quant_method", "method", "meta", "checkpoint_format", "format")],
    ids=["whole", "old"],
)
def test_a_config_beside_config_json(apart: Path, dropped: tuple[str, ...]) -> None:
    side = json.loads((apart / "quantize_config.json").read_text())
    (apart / "quantize_config.json").write_text(
        json.dumps({k: v for k, v in side.items() if k not in dropped})
    )
    reader = CheckpointReader(apart)
    config = quantization_config(reader)
    assert config is not None
    layout = for_config(config)
    assert layout is FORMATS["gptq"]
    for name, scheme in layout.schemes(config, reader.tensors).items():
        tensors = {s: reader.read(f"{name}.{s}") for s in layout.tensor_suffixes()}
        assert torch.equal(
            layout.unpack(tensors, scheme).dequantize(torch.float16),
            expected("gptqmodel-w4-v1-asym")[name],
        )


def test_a_leftover_side_file_quantizes_nothing(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "base", tmp_path / "base")
    (tmp_path / "base" / "quantize_config.json").write_text(
        '{"bits": 4, "group_size": 32, "desc_act": false}'
    )
    assert quantization_config(CheckpointReader(tmp_path / "base")) is None
    assert quantization_config(CheckpointReader(GOLDEN / "base")) is None


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"compression_config": {"config_groups": {}}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"quantization_config": {"bits": 4, "group_size": 32, "zero_point": True}}, "awq"),
        ({"quantization_config": {"bits": 4, "group_size": 32, "desc_act": False}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, None),
        ({"quantization_config": "int4"}, None),
    ],
    ids=["older name", "multimodal", "awq", "gptq", "unknown", "no mapping"],
)
def test_where_a_config_may_stand(
    tmp_path: Path, config: dict[str, object], method: str | None
) -> None:
    shutil.copytree(GOLDEN / "base", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    reader = CheckpointReader(tmp_path / "m")
    if method is None:
        with pytest.raises(FormatError):
            quantization_config(reader)
    else:
        assert (quantization_config(reader) or {})["quant_method"] == method


AUTO = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}


def test_autoround_exceptions() -> None:
    extra = {
        "m.a": {"bits": 8},
        r"m\..*down": {"group_size": 64, "sym": False},
        "lm_head": {"bits": 16},
    }
    config = {**AUTO, "extra_config": extra}
    names = ["m.a.qweight", "m.x.down.qweight", "m.b.qweight", "lm_head.weight"]
    found = for_config(config).schemes(config, names)
    assert {n: str(s.spec) for n, s in found.items()} == {
        "m.a": "W8 g32 sym",
        "m.b": "W4 g32 sym",
        "m.x.down": "W4 g64 asym",
    }


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({"packing_format": "auto_round:exllamav3"}, ["a.qweight"], "exllamav3"),
        ({"packing_format": "auto_round:llm_compressor"}, ["a.qweight"], "llm_compressor"),
        ({"act_bits": 8}, ["a.qweight"], "activations of 8 bits"),
        ({"data_type": "mx_fp"}, ["a.qweight"], "mx_fp"),
        ({"extra_config": {"a": {"bits": 16}}}, ["a.qweight"], "leaves it at 16"),
        ({"extra_config": {"(": {"bits": 16}}}, ["a.qweight"], "no regular expression"),
    ],
    ids=["unknown packing", "other layout", "activations", "floats", "skipped", "regex"],
)
def test_autoround_configs_that_cannot_be_read(
    change: dict[str, object], names: list[str], message: str
) -> None:
    config = {**AUTO, **change}
    with pytest.raises(FormatError, match=message):
        for_config(config).schemes(config, names)


def test_autoround_is_not_written() -> None:
    layout = for_config(AUTO)
    weight = read("autoround-auto_round-sym")[0]["model.layers.0.mlp.down_proj"]
    assert "write gptq" in str(layout.why_not(Scheme(weight.spec), weight.shape))
    with pytest.raises(FormatError, match="write gptq"):
        layout.pack(weight, torch.float16)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(FormatError, match="'hqq'"):
        for_config({"quant_method": "hqq"})
