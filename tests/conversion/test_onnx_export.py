"""export --to onnx without ONNX: what is refused, what the builder is given, what the proof sees.

``fake_onnx.py`` stands for the environment; ``tests/onnx`` asks the real one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from folder_kit import links_to

from llmquant import bitpack
from llmquant.checkpoint.inspect import inspect
from llmquant.checkpoint.manifest import read_manifest, verify
from llmquant.conversion.onnx.environment import find_onnx
from llmquant.conversion.onnx.export import export_onnx
from llmquant.conversion.onnx.options import OnnxOptions, choose_weights
from llmquant.conversion.onnx.proving.graph import unpack_bits
from llmquant.conversion.onnx.proving.places import Places, Rows
from llmquant.conversion.onnx.source import _as_gptq, why_not
from llmquant.conversion.onnx.worker import OnnxWorker
from llmquant.errors import (
    ArchitectureError,
    DiskError,
    LayoutError,
    LlmquantError,
    ProofError,
    UnfitModelError,
    UsageError,
)
from llmquant.formats import Scheme
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

FAKE = Path(__file__).parents[1] / "fake_onnx.py"
Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment's Python, so to say."""
    path = tmp_path_factory.mktemp("env") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def options(python: Path) -> OnnxOptions:
    return OnnxOptions(python=python, check=False)


@pytest.fixture(scope="session")
def asymmetric(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "method": "rtn",
        "weights": {"group_size": 32, "symmetric": False},
        "scales": {"steps": 0},
    }
    return quantize(
        model, tmp_path_factory.mktemp("quantized") / "asym", Recipe.model_validate(recipe)
    ).path


def drawn(bits: int) -> QuantizedWeight:
    seeded = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (32, 64), generator=seeded, dtype=torch.uint8)
    points = torch.randint(0, 1 << bits, (32, 2), generator=seeded, dtype=torch.uint8)
    points[0] = 0
    scales = torch.rand(32, 2, generator=seeded) + 0.5
    return QuantizedWeight(codes, scales, points, QuantSpec(bits, 32, False))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_come_back_by_adding_one_in_their_own_bits(bits: int) -> None:
    weight = drawn(bits)
    tensors = _as_gptq(weight)
    fields = bitpack.unpack(tensors["qzeros"], bits, 32)
    back = [[(int(z) + 1) % (1 << bits) for z in row] for row in fields]
    assert back == weight.zeros.T.tolist()
    assert tensors["scales"].dtype == torch.float32
    assert torch.equal(tensors["scales"].T, weight.scales)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_are_unpacked_as_a_loop_does_it(bits: int) -> None:
    seeded = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (3, 5), generator=seeded, dtype=torch.uint8)
    count = 5 * (8 // bits) - (8 // bits > 1)
    wanted = [
        [(int(byte) >> shift) & ((1 << bits) - 1) for byte in row for shift in range(0, 8, bits)]
        for row in data
    ]
    assert unpack_bits(data, bits, count).tolist() == [row[:count] for row in wanted]


REFUSED = {
    "bits": (Scheme(QuantSpec(3, 32)), (64, 64), "2, 4 and 8 bits, not 3"),
    "order": (Scheme(QuantSpec(4, 32), g_idx=True), (64, 64), "act-order static"),
    "not a power": (Scheme(QuantSpec(4, 24)), (64, 96), "every 24 columns"),
    "too small": (Scheme(QuantSpec(4, 8)), (64, 64), "16 or more"),
    "a row": (Scheme(QuantSpec(4, None)), (64, 576), "every 576 columns"),
    "words": (Scheme(QuantSpec(4, 32)), (60, 64), "output size 60"),
}


@pytest.mark.parametrize(("scheme", "shape", "reason"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_cannot_be_held_is_refused(
    scheme: Scheme, shape: tuple[int, int], reason: str
) -> None:
    assert reason in (why_not(scheme, shape) or "")


@pytest.mark.parametrize("group", [16, 32, 128, None])
def test_powers_of_two_are_taken(group: int | None) -> None:
    assert why_not(Scheme(QuantSpec(4, group)), (64, 256)) is None


KINDS = {
    "packed as int8 activations": ({"weights": "packed"}, True, True, "export it as int8"),
    "packed of floats": ({"weights": "packed"}, False, False, "not quantized"),
    "int8 elsewhere": ({"weights": "int8", "provider": "cuda"}, False, False, "--ep cpu"),
    "int4 head": ({"weights": "int8", "head": "int4"}, False, False, "int8 or fp16"),
    "head of floats": ({"head": "int8"}, False, False, "needs packed or int8"),
    "level of floats": ({"accuracy_level": 4}, False, False, "accuracy level"),
    "fp32 for dml": ({"weights": "fp32", "provider": "dml"}, False, False, "export fp16"),
}


@pytest.mark.parametrize(
    ("given", "packed", "rounds", "reason"), list(KINDS.values()), ids=list(KINDS)
)
def test_options_that_do_not_go_together(
    given: Mapping[str, Any], packed: bool, rounds: bool, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        choose_weights(OnnxOptions(**given), packed, rounds)


def test_what_an_export_is_by_default() -> None:
    assert choose_weights(OnnxOptions(), True, False) == "packed"
    assert choose_weights(OnnxOptions(), True, True) == "int8"
    assert choose_weights(OnnxOptions(), False, False) == "fp32"
    assert choose_weights(OnnxOptions(provider="dml"), False, False) == "fp16"


@pytest.mark.parametrize("kind", ["provider", "head", "weights", "accuracy_level"])
def test_a_word_that_is_none(kind: str) -> None:
    with pytest.raises(UsageError, match="does not exist; choose one of"):
        OnnxOptions(**{kind: 7 if kind == "accuracy_level" else "none"})


@pytest.mark.parametrize("source", ["quantized", "asymmetric"])
def test_an_export_is_proved_and_recorded(
    source: str, options: OnnxOptions, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(source)
    result = export_onnx(folder, tmp_path / "out", options)
    record = result.record
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not {"built", "source", "cache"} & {p.name for p in (tmp_path / "out").iterdir()}
    assert record.nodes.keys() - {"lm_head"} == read_manifest(folder).modules.keys()
    assert record.nodes["model.layers.0.self_attn.v_proj"].endswith("qkv_proj/MatMulNBits")
    assert record.requantized == record.altered == {}
    assert verify(tmp_path / "out").onnx == record
    tokenizer = "tokenizer.json"
    assert (tmp_path / "out" / tokenizer).read_bytes() == (folder / tokenizer).read_bytes()
    facts = inspect(tmp_path / "out")
    assert facts.format == "onnx"
    assert facts.parameters == inspect(folder).parameters
    assert facts.bits_per_weight is not None
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "onnxruntime-genai" in card


def test_a_destination_to_which_the_model_leads_is_refused(
    quantized: Path, options: OnnxOptions, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    links = links_to(out, tmp_path / "links")
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        export_onnx(links, out, replace(options, overwrite=True))
    assert verify(out)


def test_a_head_that_the_tools_rounded_is_named(
    quantized: Path, python: Path, tmp_path: Path
) -> None:
    options = OnnxOptions(python=python, check=False, head="int8")
    result = export_onnx(quantized, tmp_path / "out", options)
    assert result.record.requantized == {"/lm_head/MatMul_Q8": "int8, groups of 32"}
    assert any("rounded by ONNX Runtime's tools" in w for w in result.warnings)


FLIPS = {
    "flip-code": "does not hold the codes of model.layers.1.mlp.down_proj: 1 of 6144 differ",
    "flip-scale": "does not hold the scales of model.layers.1.mlp.down_proj: 1 of 192 differ",
    "flip-zero": "does not hold the zero-points of model.layers.1.mlp.down_proj: 1 of 192 differ",
    "lose": "the graph does not hold model.layers.0.mlp.up_proj",
}


@pytest.mark.parametrize("mode", FLIPS)
def test_one_number_that_differs_is_found(
    mode: str,
    asymmetric: Path,
    options: OnnxOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_ONNX", mode)
    with pytest.raises(ProofError, match=FLIPS[mode]):
        export_onnx(asymmetric, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


FAILURES: dict[str, tuple[type[LlmquantError], str]] = {
    "crash": (LlmquantError, "(?s)model builder .* failed.*does not like this"),
    "kill": (LlmquantError, "killed, probably for memory"),
    "full": (DiskError, "No space left on device; free some space"),
    "lacking": (UsageError, "lacks what the export needs .*onnxruntime-genai.*make onnx-env"),
}


@pytest.mark.parametrize("mode", FAILURES)
def test_what_fails_says_so_and_leaves_nothing(
    mode: str,
    quantized: Path,
    options: OnnxOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAKE_ONNX", mode)
    kind, said = FAILURES[mode]
    with pytest.raises(kind, match=said):
        export_onnx(quantized, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_what_stood_there(
    quantized: Path, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OnnxOptions(python=python, check=False, overwrite=True)
    export_onnx(quantized, tmp_path / "out", options)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    monkeypatch.setenv("FAKE_ONNX", "crash")
    with pytest.raises(LlmquantError):
        export_onnx(quantized, tmp_path / "out", options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_no_environment(
    run: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMQUANT_ONNX_PYTHON", raising=False)
    done = run("export", quantized, "--to", "onnx", "-o", "out")
    assert done.code == 2
    assert ".venv-onnx/bin/python is not there: make onnx-env" in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_that_the_builder_lacks(
    quantized: Path, tampered: Path, options: OnnxOptions, tmp_path: Path, edit_json: Edit
) -> None:
    edit_json(tampered / "config.json", lambda c: c.update(architectures=["OPTForCausalLM"]))
    with pytest.raises(ArchitectureError, match="OPTForCausalLM is not among the architectures"):
        export_onnx(tampered, tmp_path / "out", options)


def test_blocks_that_are_packed_in_part(
    model: Path, rtn: Recipe, options: OnnxOptions, tmp_path: Path
) -> None:
    partly = quantize(
        model, tmp_path / "partly", rtn.model_copy(update={"ignore": ("lm_head", "*.o_proj")})
    ).path
    with pytest.raises(LayoutError, match=r"o_proj.*: not quantized; the builder takes no block"):
        export_onnx(partly, tmp_path / "out", options)


def test_other_requests_that_cannot_be(
    run: Run, quantized: Path, model: Path, python: Path
) -> None:
    for arguments, said in (
        ((quantized, "--to", "tflite", "-o", "x"), "--to tflite does not exist"),
        ((quantized, "--to", "gguf", "-o", "x", "--ep", "cpu"), "--ep belongs to --to onnx"),
        ((quantized, "--to", "onnx", "-o", quantized), "already exists"),
        ((model, "--to", "onnx", "-o", "x", "--weights", "packed"), "not quantized"),
    ):
        done = run("export", *arguments)
        assert (done.code, said in done.err) == (2, True), done.err


def test_the_screen_and_the_json(run: Run, quantized: Path, python: Path) -> None:
    common = ("export", quantized, "--to", "onnx", "--onnx-python", python, "--no-check")
    said = run(*common, "-o", "out").out
    assert "proved: 15 of 15 linears and 6 other tensors, read back from the graph" in said
    facts = json.loads(run(*common, "-o", "out", "--overwrite", "--json").out)
    assert facts["weights"] == "packed"
    assert facts["accuracy_level"] == 0
    assert run(*common, "-o", "quiet", "--quiet").out == ""
    shown = run("inspect", "out", "--verify")
    assert shown.code == 0, shown.err
    assert "W4 g32 sym, ONNX cpu, accuracy level 0" in shown.out


def test_an_export_is_not_exported_again(
    quantized: Path, options: OnnxOptions, tmp_path: Path
) -> None:
    export_onnx(quantized, tmp_path / "out", options)
    with pytest.raises(UsageError, match="is an ONNX export already"):
        export_onnx(tmp_path / "out", tmp_path / "again", options)


def test_an_export_is_not_loaded_as_a_model(
    quantized: Path, options: OnnxOptions, tmp_path: Path, run: Run
) -> None:
    export_onnx(quantized, tmp_path / "out", options)
    done = run("generate", tmp_path / "out", "--raw", "a")
    assert done.code == 2
    assert "holds an ONNX graph and no safetensors weights" in done.err


def test_a_process_that_ends_says_why(
    quantized: Path, python: Path, options: OnnxOptions, tmp_path: Path
) -> None:
    export_onnx(quantized, tmp_path / "out", options)
    with pytest.raises(LlmquantError, match=r"ended \(exit 1\): this machine has no libonnx"):
        OnnxWorker(tmp_path / "out", python=python)
    with pytest.raises(UnfitModelError, match="it is no ONNX export"):
        OnnxWorker(quantized, python=python)


def test_the_environment_is_found_as_it_is_named(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMQUANT_ONNX_PYTHON", str(python))
    assert find_onnx().python == python
    assert find_onnx().versions["onnx"] == "1.0"
    with pytest.raises(UsageError, match="nowhere is not there"):
        find_onnx(tmp_path / "nowhere")


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
PLACED = {
    "fused by the builder": (
        {"model.layers.3.self_attn.q_proj": 64, "model.layers.3.self_attn.k_proj": 32}
        | {"model.layers.3.self_attn.v_proj": 32},
        "/model/layers.3/attn/qkv_proj/MatMulNBits",
        [("q_proj", 0, 64), ("k_proj", 0, 32), ("v_proj", 0, 32)],
    ),
    "fused in the folder": (
        {"model.layers.0.self_attn.qkv_proj": 128},
        "/model/layers.0/attn/v_proj/MatMulNBits",
        [("qkv_proj", 96, 128)],
    ),
    "half of a fused pair": (
        {"model.layers.0.mlp.gate_up_proj": 192},
        "/model/layers.0/mlp/up_proj/MatMulNBits",
        [("gate_up_proj", 96, 192)],
    ),
    "head": ({"lm_head": 4096}, "/lm_head/MatMul_Q4", [("lm_head", 0, 4096)]),
    "another layer": ({"model.layers.0.mlp.up_proj": 9}, "/model/layers.1/mlp/up_proj/MatMul", []),
}


@pytest.mark.parametrize(("rows", "node", "wanted"), list(PLACED.values()), ids=list(PLACED))
def test_which_rows_stand_in_a_node(
    rows: dict[str, int], node: str, wanted: list[tuple[str, int, int]]
) -> None:
    found = Places.of(rows, "lm_head", CONFIG).rows_of(node)
    assert [(r.module.rpartition(".")[2], r.start, r.stop) for r in found] == wanted
    assert all(isinstance(r, Rows) for r in found)


def test_packed_embeddings_become_floats(
    make_model: Callable[..., Path], run: Run, options: OnnxOptions, tmp_path: Path
) -> None:
    tied = make_model(tie_word_embeddings=True)
    common = ("--method", "rtn", "--group-size", "32", "--embeddings", "8")
    assert run("quantize", tied, "-o", "packed", *common).code == 0
    record = export_onnx(tmp_path / "packed", tmp_path / "out", options).record
    assert "model.embed_tokens" not in record.nodes
    assert record.altered == {}
