"""Limits that depend on numbers: however the sizes of a model's layers are spread, the same
function is quantized equally well, or the run says why it cannot be.

A model is multiplied by random powers of two between its layers, which leaves its function alone to
the bit. What comes out of ``llmquant quantize`` must then lie as near to it as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from children import Run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.models.load import load

Tensors = dict[str, Tensor]
IDS = torch.randint(6, 4000, (4, 24), generator=torch.Generator().manual_seed(1))
CALIBRATED = ("--nsamples", "6", "--seqlen", "32")


def write(kind: str, folder: Path, **changes: Any) -> Path:
    tiny_models.save(kind, folder, vocab_size=4096, **changes)
    for name in tiny_models.TOKENIZER:
        shutil.copyfile(tiny_models.EXAMPLE / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(kind, tmp_path_factory.mktemp("kinds") / kind.replace(" ", "-"))
        return made[kind]

    return model


def copied(model: Path, folder: Path, change: Callable[[Tensors, dict[str, Any]], object]) -> Path:
    """A copy of a model with its tensors changed."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / SINGLE)
    change(tensors, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / SINGLE, {"format": "pt"})
    return folder


# --- what may be multiplied, written down once more and by other means -------


def moves(
    kind: str, tensors: Tensors, config: Mapping[str, Any]
) -> Iterator[list[tuple[str, Any, int]]]:
    """Sets of (tensor, rows or columns of it, sign) that can be multiplied by a power of two
    together."""
    every, kind = slice(None), kind.split(" ")[0]
    norms = {
        "opt": ("self_attn_layer_norm", "final_layer_norm"),
        "gemma2": (),
        "gemma3_text": (),
    }.get(kind, ("input_layernorm", "post_attention_layernorm"))
    heads, shared = config["num_attention_heads"], config.get("num_key_value_heads", 0)
    blocks = sorted({n[: n.index(".", n.index("layers.") + 7)] for n in tensors if "layers." in n})
    for block in blocks:
        here = {n.removeprefix(f"{block}."): n for n in tensors if n.startswith(f"{block}.")}
        attention = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
        others = (
            "gate_proj",
            "up_proj",
            "gate_up_proj",
            "gate",
            "w1",
            "w3",
            "c_fc",
            "fc1",
            "dense_h_to_4h",
        )
        for norm, leaves in zip(norms, (attention, others), strict=False):
            reads = [n for n in here if n.endswith(".weight") and n.split(".")[-2] in leaves]
            yield [
                (here[n], every, -1) for n in (f"{norm}.weight", f"{norm}.bias") if n in here
            ] + [(here[n], every, 1) for n in reads]

        if kind == "gpt_neox":
            rows = torch.arange(96).reshape(heads, 3, -1)
            q, k, v = (rows[:, i].reshape(-1) for i in range(3))
            yield _pair(here, "attention.query_key_value", q, "attention.query_key_value", k, False)
            yield _pair(here, "attention.query_key_value", v, "attention.dense", every, True)
            continue
        if kind == "phi3":
            size = 32 // heads
            q, k, v = torch.arange(32 + 2 * shared * size).split([32, shared * size, shared * size])
            yield _pair(here, "self_attn.qkv_proj", q, "self_attn.qkv_proj", k, False)
            yield _pair(here, "self_attn.qkv_proj", v, "self_attn.o_proj", every, True)
            yield _pair(here, "mlp.gate_up_proj", slice(48, 96), "mlp.down_proj", every, True)
            continue
        if "self_attn.q_norm.weight" not in here:
            yield _pair(here, "self_attn.q_proj", every, "self_attn.k_proj", every, False)
        out = "self_attn.out_proj" if kind == "opt" else "self_attn.o_proj"
        yield _pair(here, "self_attn.v_proj", every, out, every, True)
        ups = {"up_proj": "down_proj", "w3": "w2", "fc1": "fc2"}
        for name in [n for n in here if n.endswith(".weight") and n.split(".")[-2] in ups]:
            first = name.removesuffix(".weight")
            parent, _, leaf = first.rpartition(".")
            yield _pair(here, first, every, f"{parent}.{ups[leaf]}".lstrip("."), every, True)


def _pair(
    here: Mapping[str, str], first: str, rows: Any, second: str, columns: Any, by_column: bool
) -> list[tuple[str, Any, int]]:
    up = [(here[n], rows, 1) for n in (f"{first}.weight", f"{first}.bias") if n in here]
    leaves = ("weight",) if by_column else ("weight", "bias")
    return up + [(here[n], columns, -1) for n in (f"{second}.{x}" for x in leaves) if n in here]


def rescaled(kind: str, most: int, seed: int = 0) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for move in moves(kind, tensors, config):
            power = int(torch.randint(-most, most + 1, (), generator=generator))
            for name, part, sign in move:
                tensors[name][part] *= 2.0 ** (sign * power)

    return change


def divergence(original: Path, quantized: Path) -> float:
    """Mean KL in nats."""
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        wanted = whole(IDS).logits.double().log_softmax(-1)
        got = load(quantized, dtype="float32")(IDS).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


# What may be multiplied in the others is not written down above: latent attention, stacked experts,
# routers that read what a shared expert does.
UNKNOWN = ("qwen2_moe", "deepseek_v3", "granitemoe", "gpt_oss", "llama4_text", "gpt2")
KINDS = [k for k in tiny_models.CONFIGS if "mixed" not in k and k not in UNKNOWN]
RTN = ("--method", "rtn", "--group-size", "16", "--store-dtype", "source")
GPTQ = ("--method", "gptq", "--group-size", "16", *CALIBRATED)
WAYS = {
    "rtn w8": (*RTN, "--bits", "8"),
    "rtn w4 gptq v2 asym": (*RTN, "--format", "gptq_v2", "--asym"),
    "rtn w3 per row": ("--method", "rtn", "--bits", "3", "--group-size", "-1"),
    "rtn w2 asym": (*RTN, "--bits", "2", "--asym"),
    "rtn w8 gptq": (*RTN, "--bits", "8", "--format", "gptq"),
    "gptq w8 gptq": (*GPTQ, "--bits", "8", "--format", "gptq"),
    "gptq w4 gptq asym": (*GPTQ, "--format", "gptq", "--asym"),
    "gptq w4 awq asym": (*GPTQ, "--format", "awq", "--asym"),
    "gptq w4": GPTQ,
    "awq w4": ("--method", "awq", "--group-size", "16", *CALIBRATED),
    "awq+gptq w4 awq": (
        "--method",
        "awq+gptq",
        "--group-size",
        "16",
        "--format",
        "awq",
        *CALIBRATED,
    ),
    "w8a8": ("--recipe", "w8a8", *CALIBRATED),
    "smoothquant": ("--recipe", "smoothquant-w8a8", *CALIBRATED),
    "tuned w3": ("--recipe", "tuned.yaml", *CALIBRATED),
}


TUNED = "method: gptq\nweights: {bits: 3, group_size: 16}\ntune: {steps: 8}\n"


def arguments(way: str, text: Path) -> list[str]:
    Path("tuned.yaml").write_text(TUNED, encoding="utf-8")
    options = list(WAYS[way])
    return options + (["--calibration", f"file:{text}"] if "--nsamples" in options else [])


def check_equal(
    run: Run, kind: str, way: str, model: Path, text: Path, tmp_path: Path, most: int
) -> None:
    other = copied(model, tmp_path / "other", rescaled(kind, most))
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32).eval()(IDS).logits
            for m in (model, other)
        ]
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-4 * float(logits[0].abs().max())
    kl = []
    for name, source in (("a", model), ("b", other)):
        ran = run("quantize", source, "-o", tmp_path / name, *arguments(way, text))
        assert ran.code == 0, ran.err
        kl.append(divergence(source, tmp_path / name))
    assert 0.9 * kl[0] < kl[1] < 1.1 * kl[0], kl


@pytest.mark.parametrize("way", WAYS)
def test_powers_of_two_between_layers_change_nothing(run, models, text, tmp_path, way):
    check_equal(run, "llama", way, models("llama"), text, tmp_path, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_powers_of_two_change_nothing_in_any_architecture(run, models, text, tmp_path, kind):
    check_equal(run, kind, "rtn w8 gptq", models(kind), text, tmp_path, 12)


def half_the_rows(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"][::2] *= 2.0**-12
    tensors["model.layers.0.mlp.down_proj.weight"][:, ::2] *= 2.0**12


@pytest.mark.parametrize("way", ["rtn w8 gptq", "rtn w3 per row", "gptq w4"])
def test_rows_of_another_size_change_nothing(run, models, text, tmp_path, way):
    model = models("llama")
    kl = []
    for name, source in (("a", model), ("b", copied(model, tmp_path / "o", half_the_rows))):
        ran = run("quantize", source, "-o", tmp_path / name, *arguments(way, text))
        assert ran.code == 0, ran.err
        kl.append(divergence(source, tmp_path / name))
    assert 0.9 * kl[0] < kl[1] < 1.1 * kl[0], kl


def test_an_ordinary_model_is_left_as_it_is(run, models, tmp_path):
    ran = run("quantize", models("llama"), "-o", tmp_path / "q", *RTN, "--bits", "8")
    assert ran.code == 0
    assert "powers of two" not in ran.out + ran.err
    before, after = (load_file(f / SINGLE) for f in (models("llama"), tmp_path / "q"))
    for name in (n for n in after if n in before):
        assert torch.equal(before[name], after[name]), name


def test_what_was_moved_is_said(run, models, tmp_path):
    def shrink(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 2.0**-12
        tensors["model.layers.1.mlp.down_proj.weight"] *= 2.0**12

    source = copied(models("llama"), tmp_path / "o", shrink)
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN, "--bits", "8", "--format", "gptq")
    assert ran.code == 0
    said = "from model.layers.1.mlp.up_proj to model.layers.1.mlp.down_proj"
    assert said in " ".join(ran.err.split())
    manifest = json.loads((tmp_path / "q" / "manifest.json").read_text(encoding="utf-8"))
    assert [p["method"] for p in manifest["scaled"]["model.layers.1"]] == ["power-of-two"]
    assert "Powers of two were moved" in (tmp_path / "q" / "README.md").read_text(encoding="utf-8")
    assert run("verify", tmp_path / "q").code == 0


# --- where nothing can be moved ---------------------------------------------


def tiny_gate(tensors: Tensors, config: dict[str, Any]) -> None:
    """An activation stands between a gate and everything else, and its norm is ordinary."""
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 2.0**-24


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_wider_dtype_takes_what_fp16_cannot(run, models, text, tmp_path, method):
    source = copied(models("llama"), tmp_path / "o", tiny_gate)
    options = {"rtn": RTN, "gptq": (*GPTQ, "--calibration", f"file:{text}")}[method]
    ran = run("quantize", source, "-o", tmp_path / "q", *options)
    assert ran.code == 0, ran.err
    assert "model.layers.1.mlp.gate_proj: scales are smaller" in " ".join(ran.err.split())
    gate = PackedCheckpoint(CheckpointReader(tmp_path / "q")).weight("model.layers.1.mlp.gate_proj")
    original = load_file(source / SINGLE)["model.layers.1.mlp.gate_proj.weight"]
    error = (gate.dequantize() - original).norm() / original.norm()
    assert float(error) < 0.15


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "awq"])
def test_a_layout_of_fp16_scales_refuses_by_name_and_keeps_nothing(run, models, tmp_path, layout):
    source = copied(models("llama"), tmp_path / "o", tiny_gate)
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN, "--format", layout)
    said = " ".join(ran.err.split())
    assert ran.code == 1
    assert "model.layers.1.mlp.gate_proj: " in said
    assert "--format compressed-tensors" in said
    assert not [p.name for p in tmp_path.iterdir() if "q" in p.name and "log" not in p.name]
    # The remedy that it names is not blocked by what was done so far.
    assert run("quantize", source, "-o", tmp_path / "q", *RTN).code == 0


def test_rows_of_next_to_nothing_are_not_fatal(run, models, tmp_path):
    def dead(tensors: Tensors, config: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.gate_proj.weight"][3] *= 2.0**-60
        tensors["model.layers.1.self_attn.q_proj.weight"][5] = 0
        tensors["model.layers.0.mlp.up_proj.weight"][7] *= 2.0**-100

    source = copied(models("llama"), tmp_path / "o", dead)
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN, "--format", "gptq")
    assert ran.code == 0, ran.err


# --- GPTQ v1 has no zero-point 0 --------------------------------------------


def one_sided(tensors: Tensors, config: dict[str, Any]) -> None:
    """Only the last block: everything before it is done when that is met."""
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        weight = tensors[f"model.layers.1.{name}.weight"]
        weight[:3] = weight[:3].abs() + 0.01


ZERO_POINTS = {
    "rtn": RTN,
    "rtn w2": (*RTN, "--bits", "2"),
    "rtn w8": (*RTN, "--bits", "8"),
    "min-max": ("--recipe", "minmax.yaml"),
    "gptq": GPTQ,
    "act-order off": ("--recipe", "order.yaml", *CALIBRATED),
    "awq": ("--method", "awq", "--group-size", "16", *CALIBRATED),
    "tuned": ("--recipe", "tuned.yaml", *CALIBRATED),
}


@pytest.mark.parametrize("way", ZERO_POINTS)
def test_gptq_v1_takes_one_sided_groups(run, models, text, tmp_path, way):
    Path("minmax.yaml").write_text("method: rtn\nscales: {steps: 0}\nweights: {group_size: 16}\n")
    Path("order.yaml").write_text("gptq: {act_order: 'off'}\nweights: {group_size: 16}\n")
    Path("tuned.yaml").write_text(TUNED)
    options = [*ZERO_POINTS[way], "--asym", "--format", "gptq"]
    if "--nsamples" in options:
        options += ["--calibration", f"file:{text}"]
    if way == "tuned":
        options += ["--bits", "4"]
    source = copied(models("llama"), tmp_path / "o", one_sided)
    ran = run("quantize", source, "-o", tmp_path / "q", *options)
    assert ran.code == 0, ran.err
    packed = PackedCheckpoint(CheckpointReader(tmp_path / "q"))
    lowest = min(int(packed.weight(name).zeros.min()) for name in packed.schemes)
    assert lowest == 1
    assert run("verify", tmp_path / "q").code == 0


def test_other_layouts_keep_zero_point_0(run, models, tmp_path):
    source = copied(models("llama"), tmp_path / "o", one_sided)
    assert run("quantize", source, "-o", tmp_path / "q", *RTN, "--asym").code == 0
    packed = PackedCheckpoint(CheckpointReader(tmp_path / "q"))
    assert int(packed.weight("model.layers.1.mlp.down_proj").zeros.min()) == 0
