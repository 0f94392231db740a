"""convert: equal numbers in every layout, or every reason why not, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_kit import links_to
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from llmquant.checkpoint.card import MEASURED_END, MEASURED_START
from llmquant.checkpoint.manifest import read_manifest, verify
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.cli import app
from llmquant.conversion import TARGETS, ConvertOptions, convert
from llmquant.errors import FormatError, LayoutError, ProofError, UsageError
from llmquant.formats import FORMATS, Scheme
from llmquant.formats.engines import ENGINES, VLLM_AVX512, VLLM_NO_AVX512, why_not
from llmquant.models.load import load
from llmquant.quantization.options import Events, QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, portable

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = GOLDEN / "base"
Q_PROJ = "model.layers.0.self_attn.q_proj"
K_PROJ = "model.layers.0.self_attn.k_proj"
# tests/golden/README.md, "Bytes that lie".
MISLABELLED = "autoround-auto_round-model-free-asym"
WRONG_READER = "autoround-auto_gptq-asym"

NO_INT8 = "it holds W8 row sym without g_idx"
ZERO = rf"{K_PROJ}: \d of \d+ zero-points are 0, which GPTQ v1 .* use format gptq_v2"
BITS = "it holds 4 bits only"
ORDER = "it has no g_idx"
ACTIVATIONS = "no place for quantized activations"
MIXED = "taken together: AWQ has one scheme for all modules"
# Folder → what refuses it, by target. What is not named here must come out equal.
GOLDENS: dict[str, dict[str, str]] = {
    "autoawq-w4-asym": {"gptq": ZERO},
    "autoround-auto_awq-asym": {"gptq": ZERO},
    "autoround-auto_gptq-asym": {"gptq": ZERO},
    "autoround-auto_gptq-sym": {},
    "autoround-auto_round-asym": {"gptq": ZERO},
    "autoround-auto_round-sym": {},
    "autoround-auto_round-w3-asym": {"gptq": ZERO, "awq": BITS},
    "gptqmodel-w2-v2-sym": {"awq": BITS},
    "gptqmodel-w3-v1-asym": {"gptq": ZERO, "awq": BITS},
    "gptqmodel-w4-v1-asym": {"gptq": ZERO},
    "gptqmodel-w4-v1-desc_act-sym": {"awq": ORDER},
    "gptqmodel-w4-v1-sym": {},
    "gptqmodel-w4-v2-asym": {"gptq": ZERO},
    "gptqmodel-w4-v2-desc_act-asym": {"gptq": ZERO, "awq": ORDER},
    "gptqmodel-w8-v1-row-asym": {"gptq": ZERO, "awq": BITS},
    "llmcompressor-0.12-w3-asym": {"gptq": ZERO, "awq": BITS},
    "llmcompressor-0.12-w4-actorder-group": {"awq": ORDER},
    "llmcompressor-mixed": {"awq": MIXED},
    "llmcompressor-mixed-formats": {"gptq": ACTIVATIONS, "gptq_v2": ACTIVATIONS, "awq": MIXED},
    "llmcompressor-w2-sym": {"awq": BITS},
    "llmcompressor-w3-asym": {"gptq": ZERO, "awq": BITS},
    "llmcompressor-w4-actorder-static": {},
    "llmcompressor-w4-asym": {"gptq": ZERO},
    "llmcompressor-w4-channel": {},
    "llmcompressor-w4-channel-asym": {"gptq": ZERO},
    "llmcompressor-w4-sym": {},
    "llmcompressor-w8-asym": {"gptq": ZERO, "awq": BITS},
    "llmcompressor-w8-sym": {"awq": BITS},
    "llmcompressor-w8a8": {"gptq": ACTIVATIONS, "gptq_v2": ACTIVATIONS, "awq": ACTIVATIONS},
}


def nothing_left(output: Path) -> bool:
    return not output.exists() and not list(output.parent.glob(f".{output.name}*"))


def weights_of(folder: Path) -> dict[str, QuantizedWeight]:
    reader = CheckpointReader(folder)
    packed = PackedCheckpoint(reader)
    return {n: packed.weight(n) for n in packed.schemes}


def other_files(folder: Path) -> dict[str, bytes]:
    """Everything but the record of how the folder came about."""
    return {
        p.name: p.read_bytes()
        for p in folder.iterdir()
        if p.name not in ("README.md", "manifest.json")
    }


def test_every_golden_folder_is_in_the_table() -> None:
    assert GOLDENS.keys() | {MISLABELLED} == {
        p.parent.name for p in GOLDEN.glob("*/expected.safetensors")
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("folder", GOLDENS)
def test_other_tools_folders_become_equal_or_are_refused(
    folder: str, target: str, tmp_path: Path
) -> None:
    """Equal to what the *other tool* dequantizes, in fp16, and by our own reader to the source's
    codes, scales and zeros."""
    output = tmp_path / "out"
    words = GOLDENS[folder].get(
        target, NO_INT8 if target == "int-quantized" and folder != "llmcompressor-w8a8" else None
    )
    if words is not None:
        with pytest.raises(FormatError, match=f"(?s)cannot become {target} without loss:.*{words}"):
            convert(GOLDEN / folder, target, output)
        assert nothing_left(output)
        return
    result = convert(GOLDEN / folder, target, output)
    assert (result.format, result.modules) == (target, 7)
    verify(output)
    expected = load_file(GOLDEN / folder / "expected.safetensors")
    if target == "dense":
        written = load_file(output / "model.safetensors")
        found = {n: written[n] for n in expected}
        assert "quantization_config" not in json.loads((output / "config.json").read_text())
    else:
        source, converted = weights_of(GOLDEN / folder), weights_of(output)
        assert {n: w.digest() for n, w in source.items()} == {
            n: w.digest() for n, w in converted.items()
        }
        found = {f"{n}.weight": w.dequantize(torch.float16) for n, w in converted.items()}
    assert found.keys() == expected.keys()
    wrong = {n for n in expected if not torch.equal(found[n], expected[n])}
    assert wrong == ({f"{K_PROJ}.weight"} if folder == WRONG_READER else set())
    others = {
        n: t
        for n, t in load_file(GOLDEN / folder / "model.safetensors").items()
        if n.endswith("norm.weight")
    }
    assert len(others) == 3
    assert all(
        torch.equal(t, load_file(output / "model.safetensors")[n]) for n, t in others.items()
    )


def test_a_lying_label_is_not_carried_on(tmp_path: Path) -> None:
    for base in (None, BASE):
        with pytest.raises(FormatError, match="the label is wrong"):
            convert(GOLDEN / MISLABELLED, "awq", tmp_path / "out", ConvertOptions(base=base))
    assert nothing_left(tmp_path / "out")


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({"method": "rtn", "weights": {"group_size": 32}, **changes})


ASYM = {"group_size": 32, "symmetric": False}
MIX = [
    {"match": "*.mlp.*", "bits": 8},
    {"match": "*.self_attn.o_proj", "symmetric": False, "group_size": 64},
]
THERE_AND_BACK = {
    "compressed-tensors sym": (recipe(), ["gptq", "gptq_v2", "awq"]),
    "compressed-tensors asym": (recipe(weights=ASYM), ["gptq_v2", "awq"]),
    "compressed-tensors row": (
        recipe(weights={"group_size": -1, "symmetric": False}),
        ["gptq_v2", "awq"],
    ),
    "compressed-tensors w3": (recipe(weights={**ASYM, "bits": 3}), ["gptq_v2"]),
    "compressed-tensors mixed": (recipe(overrides=MIX), ["gptq_v2"]),
    "compressed-tensors head": (recipe(ignore=[]), ["gptq", "awq"]),
    "gptq sym": (recipe(format="gptq"), ["compressed-tensors", "gptq_v2", "awq"]),
    "gptq_v2 mixed": (recipe(format="gptq_v2", overrides=MIX), ["compressed-tensors"]),
    "awq asym": (recipe(format="awq", weights=ASYM), ["compressed-tensors", "gptq_v2"]),
    "int-quantized": (
        recipe(
            format="int-quantized",
            weights={"bits": 8, "group_size": -1, "activations": "int8-dynamic"},
        ),
        ["compressed-tensors"],
    ),
}


@pytest.mark.parametrize("size", [10**9, 20_000], ids=["one shard", "shards"])
@pytest.mark.parametrize("name", THERE_AND_BACK)
def test_there_and_back_gives_the_same_files(name: str, size: int, tmp_path: Path) -> None:
    made, targets = THERE_AND_BACK[name]
    quantize(BASE, tmp_path / "a", made, QuantizeOptions(max_shard_size=size))
    files = other_files(tmp_path / "a")
    assert (sum(n.endswith(".safetensors") for n in files) > 2) == (size < 10**9)
    for target in targets:
        convert(tmp_path / "a", target, tmp_path / "b", ConvertOptions(overwrite=True))
        convert(tmp_path / "b", made.format, tmp_path / "c", ConvertOptions(overwrite=True))
        assert other_files(tmp_path / "c") == files, target
        assert (other_files(tmp_path / "b") == files) == (
            name == "int-quantized"
        )  # one layout under two names
        assert ("quantize_config.json" in other_files(tmp_path / "b")) == target.startswith("gptq")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "rtn"
    quantize(BASE, folder, recipe(), QuantizeOptions(base_model="some/base"))
    return folder


def test_the_record_is_carried_on(quantized: Path, tmp_path: Path) -> None:
    convert(quantized, "awq", tmp_path / "b")
    convert(tmp_path / "b", "compressed-tensors", tmp_path / "c")
    before, after = read_manifest(quantized), verify(tmp_path / "c")
    steps = [(s.source_format, s.format, s.source_weights_sha256) for s in after.conversions]
    assert steps == [
        ("compressed-tensors", "awq", CheckpointReader(quantized).digest()),
        ("awq", "compressed-tensors", CheckpointReader(tmp_path / "b").digest()),
    ]
    same = {"conversions": before.conversions}
    assert after.model_copy(update=same) == before
    card = (tmp_path / "b" / "README.md").read_text()
    assert "base_model: some/base" in card
    assert "Converted from `compressed-tensors` to `awq`" in card
    assert before.recipe_sha256 == read_manifest(tmp_path / "b").recipe_sha256


def test_a_measured_table_is_carried_on_with_one_note(quantized: Path, tmp_path: Path) -> None:
    source = shutil.copytree(quantized, tmp_path / "a")
    card = (source / "README.md").read_text()
    head, _, rest = card.partition(MEASURED_START)
    (source / "README.md").write_text(
        f"{head}{MEASURED_START}\n| ppl | 12.5 |\n{MEASURED_END}{rest.partition(MEASURED_END)[2]}"
    )
    convert(source, "awq", tmp_path / "b")
    convert(tmp_path / "b", "gptq", tmp_path / "c")
    for folder in ("b", "c"):
        text = (tmp_path / folder / "README.md").read_text()
        assert text.count("Measured before the conversion as `compressed-tensors`") == 1
        assert text.count("| ppl | 12.5 |") == 1
    convert(quantized, "awq", tmp_path / "d")
    assert "Nothing was measured yet" in (tmp_path / "d" / "README.md").read_text()


def test_the_tokenizer_goes_along(quantized: Path, tmp_path: Path) -> None:
    convert(quantized, "dense", tmp_path / "b")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "recipe.yaml",
    ):
        assert (tmp_path / "b" / name).read_bytes() == (quantized / name).read_bytes()


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_dense_is_what_the_packed_model_computes_with(
    dtype: str, quantized: Path, tmp_path: Path
) -> None:
    convert(quantized, "dense", tmp_path / "dense", ConvertOptions(dtype=dtype))
    verify(tmp_path / "dense")
    wanted = {"auto": torch.float16}.get(dtype) or getattr(torch, dtype)
    written = load_file(tmp_path / "dense" / "model.safetensors")
    for name, weight in weights_of(quantized).items():
        assert torch.equal(written[f"{name}.weight"], weight.dequantize(wanted))
    assert written["model.norm.weight"].dtype == torch.float16
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    assert model.dtype == wanted
    ids = torch.arange(5, 30)[None]
    assert torch.equal(
        model(ids).logits, load(quantized, dtype=wanted, kernel="reference")(ids).logits
    )


def test_what_a_dense_dtype_rounds_is_counted_and_said(quantized: Path, tmp_path: Path) -> None:
    weights = weights_of(quantized)
    exact = {n: w.dequantize() for n, w in weights.items()}
    rounded = sum(int((w.bfloat16().float() != w).sum()) for w in exact.values())
    every = sum(w.numel() for w in exact.values())
    assert rounded
    words = f"{rounded:,} of {every:,} weights were rounded once, to bfloat16"
    result = convert(quantized, "dense", tmp_path / "b", ConvertOptions(dtype="bfloat16"))
    assert result.rounding == words
    assert f"all are equal at that dtype ({words})" in (tmp_path / "b" / "README.md").read_text()
    whole = convert(quantized, "dense", tmp_path / "c", ConvertOptions(dtype="float32"))
    assert whole.rounding is None
    assert "all are equal. Every" in (tmp_path / "c" / "README.md").read_text()
    assert convert(quantized, "gptq_v2", tmp_path / "d").rounding is None


def test_who_quantizes_a_dense_result_is_told_what_it_is(quantized: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    notes: list[str] = []
    convert(quantized, "dense", dense)
    quantize(dense, tmp_path / "b", recipe(), events=Events(on_note=notes.append))
    assert [
        n for n in notes if f"{dense} holds the numbers of" in n and "after a quantization" in n
    ]
    notes.clear()
    (dense / "manifest.json").write_text('{"of": "another tool"}')
    quantize(dense, tmp_path / "c", recipe(), events=Events(on_note=notes.append))
    assert not [n for n in notes if "after a quantization" in n]


def test_a_dense_result_is_divided_by_size(quantized: Path, tmp_path: Path) -> None:
    convert(quantized, "dense", tmp_path / "dense", ConvertOptions(max_shard_size=40_000))
    assert len(CheckpointReader(tmp_path / "dense").files()) > 2
    assert "shard" not in {p.name for p in (tmp_path / "dense").iterdir()}


def test_a_dense_head_is_untied(tmp_path: Path) -> None:
    quantize(BASE, tmp_path / "a", recipe(ignore=[]))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert(tmp_path / "a", "dense", tmp_path / "dense")
    assert (
        json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"] is False
    )


def folder_of(
    path: Path, make: Callable[[int, int], QuantizedWeight], layout: str, **config: Any
) -> Path:
    """``base/`` with every linear of layer 0 replaced by ``make(out, in)``, without a manifest; for
    W4 g32 weights."""
    reader = CheckpointReader(BASE)
    tensors: dict[str, Tensor] = {}
    schemes: dict[str, Scheme] = {}
    for name in reader.tensors:
        module = name.removesuffix(".weight")
        if ".layers." in name and module.endswith("_proj"):
            weight = make(*reader.info(name).shape)
            tensors |= {
                f"{module}.{s}": t for s, t in FORMATS[layout].pack(weight, torch.float32).items()
            }
            schemes[module] = Scheme(weight.spec, weight.g_idx is not None)
        else:
            tensors[name] = reader.read(name)
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    quantization = FORMATS[layout].config(schemes, ["lm_head"])
    (path / "config.json").write_text(
        json.dumps({**reader.config, **config, "quantization_config": quantization})
    )
    return path


def weight(
    out: int,
    columns: int,
    *,
    zero: int = 1,
    bits_of: torch.dtype | None = None,
    order: str = "none",
) -> QuantizedWeight:
    """W4 g32 asymmetric with scales of both signs: portable, or with as many bits as ``bits_of``
    has."""
    generator = torch.Generator().manual_seed(out * columns)
    groups = columns // 32
    scales = (torch.rand(out, groups, generator=generator) - 0.5) * 0.1
    scales = portable(scales) if bits_of is None else scales.to(bits_of).to(torch.float32)
    orders = {
        "none": None,
        "trivial": (torch.arange(columns) // 32).to(torch.int32),
        "shuffled": (torch.randperm(columns, generator=generator) // 32).to(torch.int32),
    }
    zeros = torch.randint(zero, 16, (out, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(0, 16, (out, columns), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, QuantSpec(4, 32, False), orders[order])


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_negative_scales_survive(target: str, tmp_path: Path) -> None:
    source = folder_of(tmp_path / "a", weight, "compressed-tensors")
    convert(source, target, tmp_path / "b")
    before, after = weights_of(source), weights_of(tmp_path / "b")
    assert any((w.scales < 0).any() for w in before.values())
    assert {n: w.digest() for n, w in before.items()} == {n: w.digest() for n, w in after.items()}


def test_an_order_that_says_nothing_is_dropped_and_one_that_does_is_told(tmp_path: Path) -> None:
    trivial = folder_of(
        tmp_path / "a", lambda o, i: weight(o, i, order="trivial"), "compressed-tensors"
    )
    convert(trivial, "awq", tmp_path / "b")
    shuffled = folder_of(
        tmp_path / "c", lambda o, i: weight(o, i, order="shuffled"), "compressed-tensors"
    )
    convert(shuffled, "gptq_v2", tmp_path / "d")
    assert (
        json.loads((tmp_path / "d" / "config.json").read_text())["quantization_config"]["desc_act"]
        is True
    )
    assert all(w.g_idx is not None for w in weights_of(tmp_path / "d").values())


def test_scales_that_the_models_dtype_would_round_are_refused_with_the_dtype_that_would_not(
    tmp_path: Path,
) -> None:
    source = folder_of(
        tmp_path / "a",
        lambda o, i: weight(o, i, bits_of=torch.float16),
        "gptq_v2",
        dtype="bfloat16",
    )
    told = "224 of 256 scales are not exact in bfloat16.*; --scale-dtype float16 or float32 would hold it"
    with pytest.raises(FormatError, match=told):
        convert(source, "compressed-tensors", tmp_path / "b")
    assert nothing_left(tmp_path / "b")
    convert(source, "compressed-tensors", tmp_path / "b", ConvertOptions(scale_dtype="float16"))
    assert CheckpointReader(tmp_path / "b").info(f"{Q_PROJ}.weight_scale").dtype == torch.float16
    assert {n: w.digest() for n, w in weights_of(tmp_path / "b").items()} == {
        n: w.digest() for n, w in weights_of(source).items()
    }


def test_a_layout_with_a_scale_dtype_of_its_own_offers_no_other(tmp_path: Path) -> None:
    source = folder_of(
        tmp_path / "a", lambda o, i: weight(o, i, bits_of=torch.float32), "compressed-tensors"
    )
    with pytest.raises(FormatError, match="scales are not exact in float16") as caught:
        convert(source, "awq", tmp_path / "b")
    assert "--scale-dtype" not in str(caught.value)
    assert all(name in str(caught.value) for name in weights_of(source)), "every module is named"


def test_modules_that_refuse_for_one_reason_share_a_line(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        convert(quantized, "int-quantized", tmp_path / "b")
    assert str(caught.value).splitlines()[1:] == [
        "  all 14 linears: it holds W8 row sym without g_idx (bits 8, group size -1), not W4 g32 sym"
    ]


def test_weights_alone_do_not_become_w8a8(tmp_path: Path) -> None:
    quantize(BASE, tmp_path / "a", recipe(weights={"bits": 8, "group_size": -1}))
    with pytest.raises(
        FormatError, match="all 14 linears: engines quantize the activations of such weights"
    ):
        convert(tmp_path / "a", "int-quantized", tmp_path / "b")


def test_a_weight_too_large_for_a_dense_dtype_is_refused(tmp_path: Path) -> None:
    def huge(out: int, columns: int) -> QuantizedWeight:
        small = weight(out, columns)
        return QuantizedWeight(small.codes, small.scales.sign() * 32768.0, small.zeros, small.spec)

    source = folder_of(tmp_path / "a", huge, "compressed-tensors")
    with pytest.raises(
        FormatError, match="too large for float16; --dtype bfloat16 or float32 would hold it"
    ):
        convert(source, "dense", tmp_path / "b")
    convert(source, "dense", tmp_path / "b", ConvertOptions(dtype="bfloat16"))


@pytest.mark.parametrize("target", ["compressed-tensors", "gptq", "gptq_v2"])
def test_engines_that_will_not_take_the_result_are_named(target: str, tmp_path: Path) -> None:
    warnings = convert(GOLDEN / "gptqmodel-w4-v1-desc_act-sym", target, tmp_path / "b").warnings
    scheme = Scheme(QuantSpec(4, 32, True), g_idx=True)
    told = {
        "vllm (CPU)" if e == VLLM_AVX512 else e: why_not(e, target, scheme)
        for e in ENGINES
        if e != VLLM_NO_AVX512
    }
    assert set(warnings) == {f"{e} will not take it: {r}" for e, r in told.items() if r}
    assert any(w.startswith("vllm") for w in warnings)


@pytest.mark.parametrize(
    ("folder", "target", "words"),
    [
        pytest.param(
            "llmcompressor-w8a8", "dense", "inputs of these linears to int8", id="activations"
        ),
        pytest.param("llmcompressor-w4-sym", "dense", None, id="nothing to say"),
    ],
)
def test_what_dense_engines_do_otherwise_is_said(
    folder: str, target: str, words: str | None, tmp_path: Path
) -> None:
    warnings = convert(GOLDEN / folder, target, tmp_path / "b").warnings
    assert [words in w for w in warnings if words] == ([True] if words else [])
    assert bool(warnings) == (words is not None)


@pytest.mark.parametrize(
    ("target", "options", "error", "words"),
    [
        pytest.param(
            "gptq3",
            {},
            UsageError,
            "format 'gptq3' does not exist; choose one of .*dense",
            id="format",
        ),
        pytest.param("gguf", {}, UsageError, "gguf is a file and no folder", id="gguf"),
        pytest.param(
            "awq", {"dtype": "float16"}, UsageError, "dtype is for dense results", id="dtype"
        ),
        pytest.param(
            "dense",
            {"scale_dtype": "float16"},
            UsageError,
            "which has no scales",
            id="scale dtype of dense",
        ),
        pytest.param(
            "awq",
            {"scale_dtype": "float32"},
            UsageError,
            "a dtype of its own",
            id="scale dtype of awq",
        ),
        pytest.param(
            "dense", {"dtype": "int8"}, UsageError, "dtype 'int8' does not exist", id="no dtype"
        ),
    ],
)
def test_a_request_that_cannot_be(
    target: str,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
    quantized: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=words):
        convert(quantized, target, tmp_path / "b", ConvertOptions(**options))
    assert nothing_left(tmp_path / "b")


def test_folders_that_cannot_be_source_or_destination(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not quantized, so there is nothing to convert"):
        convert(BASE, "awq", tmp_path / "b")
    with pytest.raises(UsageError, match="already exists and is not empty"):
        convert(quantized, "awq", quantized)
    with pytest.raises(UsageError, match="is the model itself"):
        convert(quantized, "awq", quantized, ConvertOptions(overwrite=True))
    inner = shutil.copytree(quantized, shutil.copytree(quantized, tmp_path / "outer") / "inner")
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        convert(inner, "awq", tmp_path / "outer", ConvertOptions(overwrite=True))
    links = links_to(inner, tmp_path / "links")
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        convert(links, "awq", inner, ConvertOptions(overwrite=True))
    with pytest.raises(UsageError, match="is the model itself"):
        convert(quantized, "awq", inner, ConvertOptions(overwrite=True, base=inner))
    assert verify(quantized)
    assert verify(inner)


def test_a_cache_scheme_is_not_lost_in_silence(tmp_path: Path) -> None:
    source = shutil.copytree(GOLDEN / "llmcompressor-w4-sym", tmp_path / "a")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(LayoutError, match="kv_cache_scheme changes what engines compute"):
        convert(source, "awq", tmp_path / "b")


def flipped(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[0] ^= 1
    return copy


def test_a_source_that_is_not_what_its_manifest_says_is_refused(
    quantized: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(quantized, tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{Q_PROJ}.weight_packed"] = flipped(tensors[f"{Q_PROJ}.weight_packed"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ProofError, match=rf"{Q_PROJ} does not hold the numbers that manifest\.json records"
    ):
        convert(source, "awq", tmp_path / "b")


def test_a_source_whose_unquantized_tensors_were_changed_is_refused(
    quantized: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(quantized, tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"model\.safetensors is not the file that was written"):
        convert(source, "awq", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("target", "tensor"),
    [
        ("awq", f"{Q_PROJ}.qweight"),
        ("gptq", f"{Q_PROJ}.g_idx"),
        ("dense", f"{Q_PROJ}.weight"),
        ("awq", "model.norm.weight"),
    ],
    ids=["codes", "groups", "dense", "another tensor"],
)
def test_the_proof_sees_one_flipped_bit(
    target: str, tensor: str, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CheckpointWriter.add_together

    def faulty(writer: CheckpointWriter, tensors: dict[str, Tensor]) -> None:
        whole(
            writer,
            {
                n: flipped(t.view(torch.int16)).view(t.dtype) if n == tensor else t
                for n, t in tensors.items()
            },
        )

    monkeypatch.setattr(CheckpointWriter, "add_together", faulty)
    with pytest.raises(ProofError, match=tensor if "norm" in tensor else Q_PROJ):
        convert(quantized, target, tmp_path / "b")
    assert nothing_left(tmp_path / "b")


def test_progress_tells_three_passes(quantized: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert(quantized, "awq", tmp_path / "b", on_progress=lambda *step: seen.append(step))
    assert seen == [
        (phase, i, 14) for phase in ("checking", "writing", "proving") for i in range(14)
    ]


def test_the_command(quantized: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(quantized), "--to", "awq", "-o", str(tmp_path / "b")]
    outcome = CliRunner().invoke(app, [*arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output
    told = json.loads(outcome.stdout)
    assert (told["source_format"], told["format"], told["modules"]) == (
        "compressed-tensors",
        "awq",
        14,
    )
    assert told["bytes_written"] == sum(
        i.nbytes for i in CheckpointReader(tmp_path / "b").tensors.values()
    )
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, UsageError)
    summary = CliRunner().invoke(app, [*arguments, "--overwrite"])
    assert "proved: the numbers of 14 packed modules" in summary.stdout
    assert CliRunner().invoke(app, [*arguments, "--overwrite", "--quiet"]).stdout == ""


def test_the_command_takes_gguf_too(tmp_path: Path) -> None:
    model = Path(__file__).parents[2] / "examples" / "tiny-llama"
    quantize(model, tmp_path / "a", recipe(include=["model.layers.0.mlp.down_proj"]))
    arguments = ["convert", str(tmp_path / "a"), "--to", "gguf", "-o", str(tmp_path / "b.gguf")]
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert told["bytes_written"] == (tmp_path / "b.gguf").stat().st_size
    assert told["types"]["blk.0.ffn_down.weight"] == "Q4_0"
    refused = CliRunner().invoke(app, [*arguments, "--scale-dtype", "float32"])
    assert isinstance(refused.exception, UsageError)
