"""docs/formats.md's table, every cell from a run: who writes and who reads each layout, with the
numbers unchanged.

The rows are small models quantized here; "exact" means equal dequantized numbers, tensor by tensor.
Cells about vLLM come from ``tests/vllm/results.json``, which the suite marked ``vllm`` writes.
``LLMQUANT_WRITE_RESULTS=1`` renders the page anew; without it a page that differs from what was
just measured is a failure.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from llmquant import QuantizeOptions, load, quantize, verify
from llmquant.checkpoint.detect import quantization_config
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.recipe import Recipe

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "formats.md"
VLLM = ROOT / "tests" / "vllm" / "results.json"
START, END = "<!-- table:start -->", "<!-- table:end -->"
IDS = torch.arange(1, 33).view(1, 32)


@dataclass(frozen=True)
class Row:
    """One layout and variant: the recipe that writes it, other tools' goldens of the same kind,
    rows of the vLLM suite."""

    title: str
    changes: dict[str, Any]
    goldens: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()
    calibrated: bool = field(default=False)


ROWS = (
    Row(
        "compressed-tensors W4 sym",
        {},
        ("llmcompressor-w4-sym", "llmcompressor-w4-actorder-static"),
        ("ct-w4-sym-g32",),
    ),
    Row(
        "compressed-tensors W4 asym",
        {"weights.symmetric": False},
        ("llmcompressor-w4-asym",),
        ("ct-w4-asym-g32",),
    ),
    Row(
        "compressed-tensors W4 per row",
        {"weights.group_size": -1},
        ("llmcompressor-w4-channel", "llmcompressor-w4-channel-asym"),
        ("ct-w4-sym-row",),
    ),
    Row(
        "compressed-tensors W4 g_idx",
        {"method": "gptq", "gptq.act_order": "group"},
        ("llmcompressor-0.12-w4-actorder-group",),
        calibrated=True,
    ),
    Row(
        "compressed-tensors W8A16",
        {"weights.bits": 8},
        ("llmcompressor-w8-sym", "llmcompressor-w8-asym"),
    ),
    Row(
        "compressed-tensors W3",
        {"weights.bits": 3},
        ("llmcompressor-w3-asym", "llmcompressor-0.12-w3-asym"),
    ),
    Row("compressed-tensors W2", {"weights.bits": 2}, ("llmcompressor-w2-sym",)),
    Row(
        "compressed-tensors W8A8 (int-quantized)",
        {"weights.bits": 8, "weights.group_size": -1, "weights.activations": "int8-dynamic"},
        ("llmcompressor-w8a8",),
        ("ct-w8a8",),
    ),
    Row(
        "compressed-tensors mixed",
        {"overrides": ({"match": "*.mlp.*", "bits": 8},)},
        ("llmcompressor-mixed", "llmcompressor-mixed-formats"),
        ("ct-mixed-groups",),
    ),
    Row(
        "gptq v1 sym",
        {"format": "gptq"},
        ("gptqmodel-w4-v1-sym", "autoround-auto_gptq-sym"),
        ("gptq-v1-sym-g32",),
    ),
    Row(
        "gptq v2 sym",
        {"format": "gptq_v2"},
        ("gptqmodel-w2-v2-sym",),
        ("gptq-v2-sym-g32",),
    ),
    Row(
        "gptq v2 asym",
        {"format": "gptq_v2", "weights.symmetric": False},
        (
            "gptqmodel-w4-v2-asym",
            "gptqmodel-w4-v1-asym",
            "gptqmodel-w3-v1-asym",
            "gptqmodel-w8-v1-row-asym",
        ),
    ),
    Row(
        "gptq v2 desc_act",
        {"format": "gptq_v2", "method": "gptq", "gptq.act_order": "group"},
        ("gptqmodel-w4-v1-desc_act-sym", "gptqmodel-w4-v2-desc_act-asym"),
        calibrated=True,
    ),
    Row(
        "awq asym",
        {"format": "awq", "weights.symmetric": False},
        ("autoawq-w4-asym", "autoround-auto_awq-asym"),
        ("awq-asym-g32",),
    ),
    Row("awq sym", {"format": "awq"}, (), ("awq-sym-g32",)),
    Row(
        "auto-round (read only)",
        {},
        (
            "autoround-auto_round-sym",
            "autoround-auto_round-asym",
            "autoround-auto_round-w3-asym",
        ),
    ),
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Row title → cells, all measured now."""
    transformers_logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("formats")
    text = folder / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p " * 400, encoding="utf-8")
    return {row.title: cells(row, folder, text) for row in ROWS}


def cells(row: Row, folder: Path, text: Path) -> list[str]:
    if "read only" in row.title:
        return ["–", "–", "–", *in_vllm(row), by_others(row)]
    calibration = {
        "calibration.source": f"file:{text}",
        "calibration.nsamples": 4,
        "calibration.seqlen": 32,
    }
    base = Recipe(method="rtn").updated(
        {"weights.group_size": 32, **(calibration if row.calibrated else {})}
    )
    out = folder / row.title.replace(" ", "-")
    quantize(GOLDEN / "base", out, base.updated(row.changes), QuantizeOptions())
    return [
        by_us(out),
        by_compressed_tensors(out),
        by_transformers(out),
        *in_vllm(row),
        by_others(row),
    ]


def by_us(out: Path) -> str:
    """Read back to the algorithm's numbers, and multiplied with them."""
    verify(out)
    model = load(out, dtype="float32", kernel="reference")
    reader = CheckpointReader(out)
    packed = PackedCheckpoint(reader)
    for name in packed.schemes:
        linear = model.get_submodule(name)
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.dequantize(), packed.weight(name).dequantize()), name
    return "exact"


def by_compressed_tensors(out: Path) -> str:
    """What the compressed-tensors library makes of the same bytes."""
    reader = CheckpointReader(out)
    config = quantization_config(reader)
    assert config is not None
    if config["quant_method"] != "compressed-tensors":
        return "–"
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    try:
        parsed = QuantizationConfig.model_validate(config)
    except ValidationError:
        return "refused"
    groups = list(parsed.config_groups.values())
    packed = PackedCheckpoint(reader)
    for name in packed.schemes:
        ours = packed.weight(name).dequantize(torch.float16)
        group = next(g for g in groups if "Linear" in g.targets or name in g.targets)
        tensors = {s: reader.read(full) for s, full in packed.tensors[name].items()}
        compressor = BaseCompressor.get_value_from_registry(group.format)
        theirs = compressor.decompress(tensors, group)["weight"]
        assert torch.equal(theirs.to(torch.float16), ours), name
    return "exact"


def by_transformers(out: Path) -> str:
    """transformers alone, without llmquant: the logits of the dequantized weights, or what it asks
    for."""
    dense = load(out, dtype="float32", kernel="dense")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own deprecations are not what is tested
            theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            logits = theirs(IDS).logits
    except (ImportError, ValueError, RuntimeError) as e:
        return (
            "needs gptqmodel" if "gptqmodel" in str(e).lower() else f"refused ({type(e).__name__})"
        )
    with torch.no_grad():
        worst = float((logits - dense(IDS).logits).abs().max())
    return "equal" if worst < 1e-3 else f"differs by {worst:.1g}"


def in_vllm(row: Row) -> list[str]:
    """The real vLLM on a CPU with and without AVX-512, from its suite's results."""
    results = json.loads(VLLM.read_text(encoding="utf-8"))
    found = [
        [results[cpu][k] for k in row.vllm if k in results[cpu]] for cpu in ("avx512", "no-avx512")
    ]
    return [
        ", ".join("refused" if "refused" in r else f"Δ ≤ {r['max_abs_delta']:.3f}" for r in rows)
        or "–"
        for rows in found
    ]


def by_others(row: Row) -> str:
    """Checkpoints of other tools that we read to exactly their own numbers."""
    for name in row.goldens:
        reader = CheckpointReader(GOLDEN / name)
        packed = PackedCheckpoint(reader)
        expected = load_file(GOLDEN / name / "expected.safetensors")
        assert {f"{n}.weight" for n in packed.schemes} == expected.keys()
        for module in packed.schemes:
            weight = packed.weight(module).dequantize(torch.float16)
            assert torch.equal(weight, expected[f"{module}.weight"]), (name, module)
    return ", ".join(row.goldens) or "–"


def test_the_page_is_what_was_measured(table: dict[str, list[str]]) -> None:
    head = "| layout | written and read by llmquant | compressed-tensors | transformers alone "
    head += "| vLLM on a CPU with AVX-512 | without AVX-512 "
    lines = [f"{head}| other tools' files read exactly |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {title} | {' | '.join(row)} |" for title, row in table.items()]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    fresh = f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}"
    if os.environ.get("LLMQUANT_WRITE_RESULTS"):
        PAGE.write_text(fresh, encoding="utf-8")
    assert page == fresh, "docs/formats.md is stale; run this test with LLMQUANT_WRITE_RESULTS=1"
