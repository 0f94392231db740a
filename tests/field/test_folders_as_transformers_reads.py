"""One folder, several readers: transformers, plan, quantize, load, convert and inspect find the
same tensors in it, or all refuse it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from children import Run
from folder_kit import (
    EMBEDDINGS,
    HEAD,
    INDEX,
    NORM,
    RTN,
    SHARDS,
    SINGLE,
    Case,
    Q,
    as_transformers_reads,
    configure,
    index,
    move,
    other,
    put,
    shards,
    twice,
    unprefixed,
    with_more,
    without,
    write_case,
)

from llmquant import load
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import LlmquantError

TIED = {"tie_word_embeddings": True}
ONES = torch.ones(2)
LAYER = "model.layers.1."


def named(folder: Path, tensors: dict[str, torch.Tensor], name: str) -> None:
    put(folder, tensors, name)
    (folder / SINGLE).unlink()
    configure(folder, transformers_weights=name)


FILES = [
    Case("single", lambda f, t: None),
    Case("sharded", shards),
    Case("stale index", lambda f, t: index(f, dict.fromkeys(t, SHARDS[0])), says="not read"),
    Case(
        "new single beside older shards",
        lambda f, t: (shards(f, other(t)), put(f, t)),
        says="not read: model-00001",
    ),
    Case(
        "shards beside another model's leftover",
        lambda f, t: (shards(f, t), put(f, other(t), "model-00003-of-00003.safetensors")),
        says="not read: model-00003",
    ),
    Case("pickle beside it", lambda f, t: torch.save(other(t), f / "pytorch_model.bin")),
    Case("pickle beside shards", lambda f, t: (shards(f, t), torch.save(t, f / "pytorch_model.bin"))),
    Case("consolidated beside it", lambda f, t: put(f, other(t), "consolidated.safetensors")),
    Case("fp16 variant beside it", lambda f, t: put(f, other(t), "model.fp16.safetensors")),
    Case("adapter weights beside it", lambda f, t: put(f, {"a": ONES}, "adapter_model.safetensors")),
    Case("a subfolder of older weights", lambda f, t: put(f, other(t), f"old/{SINGLE}")),
    Case("shards in a subfolder", lambda f, t: shards(f, t, ("w/a.safetensors", "w/b.safetensors"))),
    Case("a folder called model.safetensors", lambda f, t: (shards(f, t), (f / SINGLE).mkdir())),
    Case("named by the config", lambda f, t: named(f, t, "weights-v2.safetensors")),
    Case("another name", lambda f, t: move(f, "weights.safetensors"), False, says="rename it"),
    Case("fp16 variant alone", lambda f, t: move(f, "model.fp16.safetensors"), False, says="rename"),
    Case("adapter alone", lambda f, t: (move(f, "adapter_model.safetensors"), (f / "adapter_config.json").write_text("{}")), False, says="adapter"),
    Case("pickle alone", lambda f, t: move(f, "model.pt"), False, says="pickle"),
    Case("two files, no index", lambda f, t: (put(f, t, "b.safetensors"), move(f, "a.safetensors")), False, says="index"),
    Case("a shard is gone", lambda f, t: (shards(f, t), (f / SHARDS[1]).unlink()), False, says="not there"),
    Case("an empty index", lambda f, t: (move(f, SHARDS[0]), index(f, {})), False, says="weight_map"),
    Case("twice, alike", twice(True, True), says="more than one shard"),
    Case("twice, the index names the first", twice(True, False), says="more than one shard"),
    Case("twice, the index names the last", twice(False, False), says="more than one shard"),
    Case("the index names what nobody needs", lambda f, t: index(f, {**shards(f, t), "x": SHARDS[0]}), says="names x"),
    Case("the index names what is gone", lambda f, t: (shards(f, t), put(f, {k: v for k, v in t.items() if k != NORM}, SHARDS[1])), False, says=f"lacks {NORM}"),
]  # fmt: skip

NAMES = [
    Case("no prefix", lambda f, t: put(f, unprefixed(t)), says="read as"),
    Case("no prefix, sharded", lambda f, t: shards(f, unprefixed(t)), says="read as"),
    Case("no prefix, tied", lambda f, t: put(f, unprefixed(t)), config=TIED, says="read as"),
    Case("no prefix, no head", lambda f, t: put(f, {k: v for k, v in unprefixed(t).items() if k != HEAD}), False, says="output head"),
    Case("one prefix too many", lambda f, t: put(f, {f"model.{k}": v for k, v in t.items()}), says="read as"),
    Case("compiled", lambda f, t: put(f, {f"_orig_mod.{k}": v for k, v in t.items()}), False, says="'_orig_mod.' stands before"),
    Case("compiled, tied", lambda f, t: put(f, {f"_orig_mod.{k}": v for k, v in t.items() if k != HEAD}), False, config=TIED, says="'_orig_mod.' stands before"),
    Case("in parallel: gpt_neox", lambda f, t: put(f, {f"module.{k}": v for k, v in t.items()}), False, kind="gpt_neox", says="'module.' stands before"),
    Case("both names, alike", with_more(norm__weight=torch.ones(32)), says="no place"),
    Case("no prefix: opt", lambda f, t: put(f, unprefixed(t)), kind="opt", says="read as"),
    Case("no prefix: gpt_neox", lambda f, t: put(f, unprefixed(t, "gpt_neox.")), kind="gpt_neox", says="read as"),
    Case("no prefix: mixtral", lambda f, t: put(f, unprefixed(t)), kind="mixtral", says="read as"),
    Case("no prefix: qwen3_moe", lambda f, t: put(f, unprefixed(t)), kind="qwen3_moe", says="read as"),
    Case("another name in memory", lambda f, t: put(f, {k.replace("embed_out", "lm_head"): v for k, v in t.items()}), kind="gpt_neox", says="read as"),
    Case("tied, embeddings alone", lambda f, t: None, config=TIED),
    Case("tied, head alone", lambda f, t: put(f, {k.replace(EMBEDDINGS, HEAD): v for k, v in t.items()}), config=TIED, says="in place of"),
    Case("tied, head alone: qwen3", lambda f, t: put(f, {k.replace(EMBEDDINGS, HEAD): v for k, v in t.items()}), kind="qwen3", config=TIED, says="in place of"),
    Case("tied, head alone: gemma2", lambda f, t: put(f, {k.replace(EMBEDDINGS, HEAD): v for k, v in t.items()}), kind="gemma2", config=TIED, says="in place of"),
    Case("tied, head alone, no prefix", lambda f, t: put(f, unprefixed({k.replace(EMBEDDINGS, HEAD): v for k, v in t.items()})), config=TIED, says="in place of"),
    Case("tied, stored twice", lambda f, t: put(f, {**t, HEAD: t[EMBEDDINGS]}), config=TIED),
    Case("tied, two tensors", lambda f, t: configure(f, **TIED), says="the two differ"),
    Case("tied, neither", without(EMBEDDINGS), False, config=TIED, says="lacks"),
    Case("untied, no head", without(HEAD), False, says="output head"),
    Case("untied, no embeddings", without(EMBEDDINGS), False, says="lacks"),
]  # fmt: skip

EXTRAS = [
    Case("mtp", with_more(mtp__fc__weight=torch.ones(32, 64), mtp__norm__weight=ONES), says="mtp.fc.weight"),
    Case("value head", with_more(v_head__summary__weight=torch.ones(1, 32), v_head__summary__bias=torch.ones(1)), says="v_head"),
    Case("rotary tables", lambda f, t: put(f, {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": ONES})),
    Case("an extra layer", lambda f, t: put(f, {**t, **{k.replace(LAYER, "model.layers.2."): v for k, v in t.items() if k.startswith(LAYER)}}), says="model.layers.2."),
    Case("layers cut", lambda f, t: configure(f, num_hidden_layers=1), says="model.layers.1."),
    Case("zero biases", lambda f, t: put(f, {**t, f"{Q}.bias": torch.zeros(32)}), says="all zero"),
    Case("biases", lambda f, t: put(f, {**t, f"{Q}.bias": torch.ones(32)}), says="not zero"),
    Case("a leftover of NaN", with_more(mtp__x=torch.full((2,), torch.nan)), says="mtp.x"),
    Case("leftovers of other dtypes", with_more(a=torch.ones(2).to(torch.uint16), b=torch.ones(2, dtype=torch.bool), c=torch.ones(2, dtype=torch.int64)), says="a, b, c"),
    Case("a leftover inside a block", lambda f, t: put(f, {**t, "model.layers.0.extra.weight": torch.ones(4, 4)}), says="model.layers.0.extra"),
    Case("KV-cache scales", lambda f, t: put(f, {**t, "model.layers.0.self_attn.k_scale": torch.ones(1)}), says="KV cache"),
    Case("an empty label", lambda f, t: configure(f, quantization_config=None)),
    Case("layers invented", lambda f, t: configure(f, num_hidden_layers=3), False, says="lacks model.layers.2"),
    Case("a norm lost", without(NORM), False, says=f"lacks {NORM}"),
    Case("a linear lost", without(f"{Q}.weight"), False, says=f"lacks {Q}"),
    Case("mtp, a norm lost", lambda f, t: put(f, {**{k: v for k, v in t.items() if k != NORM}, "mtp.x": ONES}), False, says=f"lacks {NORM}"),
    Case("another shape", lambda f, t: put(f, {**t, f"{Q}.weight": torch.ones(16, 32)}), False, says="[16, 32]"),
    Case("another width", lambda f, t: configure(f, intermediate_size=64), False, says="config.json makes it"),
    Case("a label that lies", lambda f, t: configure(f, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}), False, says="no tensor is packed"),
]  # fmt: skip

FAMILY = [pytest.param(case, id=case.name) for case in (*FILES, *NAMES, *EXTRAS)]


LORA = {f"{Q}.lora_{x}.default.weight": torch.ones(2) for x in "AB"}
ADAPTERS = [
    Case("beside the weights", lambda f, t: put(f, {**t, **LORA})),
    Case("around the weights", lambda f, t: put(f, {k.replace(f"{Q}.", f"{Q}.base_layer."): v for k, v in t.items()} | LORA)),
    Case("of another kind", lambda f, t: put(f, {k.replace(f"{Q}.", f"{Q}.base_layer."): v for k, v in t.items()} | {f"{Q}.ia3_l.default": torch.ones(32)})),
    Case("a module trained beside it", lambda f, t: put(f, {k.replace("lm_head.", "lm_head.original_module."): v for k, v in t.items()} | {"lm_head.modules_to_save.default.weight": t[HEAD]})),
    Case("in peft's model", lambda f, t: put(f, {f"base_model.model.{k}": v for k, v in {**t, **LORA}.items()})),
]  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in ADAPTERS])
def test_adapters_that_are_not_merged_are_refused(case: Case, tmp_path: Path, run: Run) -> None:
    """transformers leaves them out with a warning, or draws what is missing."""
    folder, out = write_case(case, tmp_path / "m"), tmp_path / "q"
    for done in (run("quantize", folder, "-o", out, *RTN), run("plan", folder, *RTN)):
        assert (done.code, "holds an adapter (such as LoRA) that is not merged" in done.err) == (
            1,
            True,
        ), done.err
        assert "merge_and_unload" in done.err
    assert not out.exists()
    assert ours(folder) is None


def ours(folder: Path) -> dict[str, torch.Tensor] | None:
    try:
        return {n: t.detach() for n, t in load(folder, dtype="float32").state_dict().items()}
    except LlmquantError:
        return None


@pytest.mark.parametrize("case", FAMILY)
def test_every_reader_finds_the_same_or_refuses(case: Case, tmp_path: Path, run: Run) -> None:
    folder, out = write_case(case, tmp_path / "m"), tmp_path / "q"
    theirs, loaded = as_transformers_reads(folder), ours(folder)
    assert (theirs is not None) == case.reads
    quantized = run("quantize", folder, "-o", out, *RTN)
    planned, inspected = run("plan", folder, *RTN), run("inspect", folder)
    codes = [quantized.code, planned.code, inspected.code]
    if theirs is None:
        assert loaded is None
        assert codes in ([1, 1, 1], [2, 2, 2]), quantized
        assert all(case.says in r.err for r in (quantized, planned, inspected))
        assert not out.exists()
        return
    assert codes == [0, 0, 0], (quantized, planned, inspected)
    assert loaded is not None
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[n], theirs[n]) for n in theirs)
    if case.says:
        assert case.says in " ".join(quantized.err.split())
        assert case.says in " ".join(planned.out.split())
    holds(out, theirs, folder)
    assert ours(out) is not None
    assert run("inspect", out).code == 0
    if case in EXTRAS:
        for target in ("gptq", "dense"):
            assert run("convert", out, "--to", target, "-o", tmp_path / target).code == 0
            assert ours(tmp_path / target) is not None
            assert run("inspect", tmp_path / target, "--verify").code == 0


def holds(out: Path, theirs: dict[str, torch.Tensor], folder: Path) -> None:
    """Packed weights are near transformers' tensors (4 bits: 0.1 of their norm), all others are
    equal to them, and what transformers leaves out is carried over byte for byte."""
    packed = PackedCheckpoint(CheckpointReader(out))
    reader = packed.reader
    assert packed.schemes
    found = {n: reader.read(n) for n in packed.others}
    stored = CheckpointReader(folder)
    stacked = any("gate_up_proj" in n and t.ndim == 3 for n, t in theirs.items())
    for name in packed.schemes:
        weight = packed.weight(name)
        memory = name.replace("embed_out", "lm_head")
        if f"{memory}.weight" in theirs:
            original = theirs[f"{memory}.weight"]
            assert (weight.dequantize() - original).norm() < 0.2 * original.norm(), name
        else:
            assert stacked
    for name, tensor in found.items():
        memory = name.replace("embed_out", "lm_head").replace("block_sparse_moe", "mlp")
        if memory in theirs:
            assert torch.equal(tensor, theirs[memory]), name
        else:
            before = stored.read(name)
            assert tensor.dtype == before.dtype
            assert torch.equal(tensor.nan_to_num(), before.nan_to_num()), name


@pytest.mark.parametrize("label", [{}, None], ids=["empty", "null"])
def test_an_empty_label_says_nothing(label: object, tmp_path: Path, run: Run) -> None:
    """transformers 5.23 refuses an empty mapping; here it is no quantization."""
    folder = write_case(
        Case("", lambda f, t: configure(f, quantization_config=label)), tmp_path / "m"
    )
    assert ours(folder) is not None
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *RTN),
        ("plan", folder, *RTN),
        ("inspect", folder),
    ):
        assert run(*command).code == 0  # fmt: skip
    assert "quantization_config" in json.loads((tmp_path / "q" / "config.json").read_text())


def test_an_index_without_metadata_is_read(tmp_path: Path, run: Run) -> None:
    """transformers 5.23 fails on it, for want of a number that nobody needs."""

    def edit(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        weight_map = shards(folder, tensors)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    folder = write_case(Case("", edit), tmp_path / "m")
    assert ours(folder) is not None
    assert run("quantize", folder, "-o", tmp_path / "q", *RTN).code == 0


def test_two_tensors_for_one_place_contradict_each_other(tmp_path: Path, run: Run) -> None:
    case = Case("", with_more(norm__weight=torch.full((32,), 2.0)))
    folder = write_case(case, tmp_path / "m")
    for command in (("quantize", folder, "-o", tmp_path / "q", *RTN), ("plan", folder, *RTN)):
        ran = run(*command)
        assert (ran.code, "they differ; remove one" in ran.err) == (1, True)
