"""Model types that the table lacks get the names of their files from transformers' own table of
conversions: the names are those that it saves, and the model computes what it did."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_kinds import small
from sweep import built, kl, logits, recipe
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant import inspect, load
from llmquant.errors import ArchitectureError
from llmquant.models.architectures import find
from llmquant.models.experts import ExpertList
from llmquant.models.naming.conversions import follow_conversions, in_memory, moved_modules
from llmquant.models.naming.joined import take_apart
from llmquant.models.naming.moves import relocate
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

# A renamed router and shared expert, a tensor of another module, a tensor with another name, a
# renamed model and experts without a gate, states beside attention, renamed experts, convolutions
# in parts, and what moves up into the module that holds it.
KINDS = (
    *("hy_v3", "exaone_moe", "ernie4_5_moe", "flint", "nemotron_h", "qwen3_next", "jamba"),
    *("minimax", "kolibri1", "laguna", "olmo_hybrid", "kimi_linear"),
)


def dense(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(small(kind), dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_that_transformers_saves(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    as_in_checkpoint(model, kind)
    assert {n for n, _ in model.named_parameters()} <= saved
    assert set(model.state_dict()) == saved


@pytest.mark.parametrize("kind", KINDS)
def test_a_renamed_model_computes_what_it_did(kind: str) -> None:
    model = dense(kind)
    before = logits(model)
    as_in_checkpoint(model, kind)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(again), before, rtol=1e-5, atol=1e-5)


def test_a_replaced_module_is_found_by_its_old_name() -> None:
    model = dense("hy_v3")
    as_in_checkpoint(model, "hy_v3")
    moved = moved_modules(model)
    old = next(n for n in moved if n.endswith("shared_experts"))
    identity = nn.Identity()
    parent, _, leaf = moved[old].rpartition(".")
    setattr(model.get_submodule(parent), leaf, identity)
    parent, _, leaf = old.rpartition(".")
    assert getattr(model.get_submodule(parent), leaf) is identity
    inside = f"{moved[old]}.up_proj"
    assert in_memory([inside, "lm_head"], moved) == [f"{old}.up_proj"]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)


def test_names_that_are_exchanged_are_left() -> None:
    model = Pair()
    names = {f"{m}.{t}": f"{n}.{t}" for m, n in ("ab", "ba") for t in ("weight", "bias")}
    before = dict(model.named_parameters())
    assert relocate(model, names) == {}
    assert dict(model.named_parameters()) == before


def test_a_list_that_would_lose_a_module_is_left() -> None:
    """The model walks through it, and would skip what is elsewhere."""
    model = nn.ModuleDict({"layers": nn.ModuleList([Pair(), Pair()]), "norm": nn.LayerNorm(2)})
    names = {n: n.replace("layers.0", "blocks.0") for n in model.state_dict()}
    assert relocate(model, names) == {}
    whole = {n: n.replace("layers", "blocks") for n in model.state_dict()}
    del whole["layers.1.a.weight"]  # a name that is not known goes with the others
    assert relocate(model, whole) == {"layers": "blocks"}
    assert {n.partition(".")[0] for n in model.state_dict()} == {"blocks", "norm"}


def test_a_tensor_and_a_module_go_to_places_that_were_not_there() -> None:
    model = Pair()
    weight, b = model.a.weight, model.b
    names = {n: n for n in model.state_dict()} | {"a.weight": "c.d.matrix"}
    names |= {f"b.{t}": f"c.e.{t}" for t in ("weight", "bias")}
    assert relocate(model, names) == {"a.weight": "c.d.matrix", "b": "c.e"}
    assert set(model.state_dict()) == {"a.bias", "c.d.matrix", "c.e.weight", "c.e.bias"}
    assert model.a.weight is weight
    assert model.b is b
    model.get_submodule("c.d").matrix = nn.Parameter(torch.ones(2, 2))
    assert torch.equal(model.a(torch.ones(1, 2)), 2 + model.a.bias.unsqueeze(0))


@pytest.mark.parametrize(
    "trait", ["has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated"]
)
def test_experts_that_compute_something_else_stay_stacked_and_are_refused(trait: str) -> None:
    model = dense("jamba")
    for module in model.modules():
        if hasattr(module, trait):
            setattr(module, trait, not getattr(module, trait))
    follow_conversions(model, {})
    assert not any(isinstance(m, ExpertList) for m in model.modules())
    with pytest.raises(ArchitectureError, match="stacks its experts' weights"):
        find(model, "jamba")


def test_a_module_goes_up_into_the_one_that_holds_it() -> None:
    model = nn.ModuleDict({"outer": nn.ModuleDict({"inner": Pair(), "c": nn.Linear(2, 2)})})
    names = {n: n.replace("outer.inner", "outer") for n in model.state_dict()}
    inner = model["outer"]["inner"]
    a = inner.a
    assert relocate(model, names) == {"outer.inner.a": "outer.a", "outer.inner.b": "outer.b"}
    assert set(model.state_dict()) == set(names.values())
    assert inner.a is a


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 5, 3, groups=5)
        self.both = nn.Linear(4, 5)


def test_parts_of_a_module_are_one_to_the_models_code() -> None:
    model, x, y = Split(), torch.randn(2, 5, 8), torch.randn(3, 4)
    before = model.conv(x), model.both(y)
    for name, first in (("conv", "q"), ("both", "gate")):
        take_apart(model, name, {first: 3, f"{first}_rest": 2})
    assert {n: len(t) for n, t in model.state_dict().items()} == {
        f"{n}{rest}.{t}": rows
        for n in ("q", "gate")
        for rest, rows in (("", 3), ("_rest", 2))
        for t in ("weight", "bias")
    }
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(again.conv(x), before[0])
    torch.testing.assert_close(again.both(y), before[1])
    assert not model.conv(x).any()
    assert type(again.gate) is nn.Linear
    again.gate = nn.Linear(4, 7)
    assert again.both(y).shape == (3, 9)


def test_a_module_stays_whole_where_a_part_has_no_place() -> None:
    model = Split()
    take_apart(model, "both", {"conv": 3, "rest": 2})
    assert set(model.state_dict()) == {
        f"{m}.{t}" for m in ("conv", "both") for t in ("weight", "bias")
    }


def test_the_widths_of_the_parts_are_those_that_are_stored() -> None:
    """transformers saves thirds of what it joins; values may be wider than keys."""
    model = dense("olmo_hybrid")
    joined = next(m for m in model.modules() if isinstance(m, nn.Conv1d)).weight.clone()
    rows, place = len(joined), "model.layers.0.linear_attn"
    widths = {"q": rows // 4, "k": rows // 4, "v": rows // 2}
    follow_conversions(model, {f"{place}.{n}_conv1d.weight": (w, 1, 4) for n, w in widths.items()})
    conv = model.get_submodule(f"{place}.conv1d")
    assert torch.equal(conv.weight, joined)
    found = model.state_dict()
    assert {n: len(found[f"{place}.{n}_conv1d.weight"]) for n in widths} == widths


@pytest.mark.parametrize("unequal", [(1, 1, 1), (0, 0, 0)])
def test_parts_that_do_not_add_up_are_left(unequal: tuple[int, ...]) -> None:
    model = dense("olmo_hybrid")
    place = "model.layers.0.linear_attn"
    shapes = {f"{place}.{n}_conv1d.weight": (w, 1, 4) for n, w in zip("qkv", unequal, strict=True)}
    follow_conversions(model, shapes)
    assert f"{place}.conv1d.weight" in model.state_dict()


def test_a_checkpoint_may_have_other_names_than_transformers_saves(tmp_path: Path) -> None:
    """By transformers' table Kimi Linear's first block has an ``mlp``; saved by it, it has a
    ``block_sparse_moe`` as the others do."""
    model = dense("kimi_linear")
    model.save_pretrained(tmp_path / "saved")
    published = tmp_path / "published"
    shutil.copytree(tmp_path / "saved", published)
    tensors = load_file(published / "model.safetensors")
    old, new = "layers.0.block_sparse_moe.", "layers.0.mlp."
    assert any(old in name for name in tensors)
    save_file({n.replace(old, new): t for n, t in tensors.items()}, published / "model.safetensors")
    before = logits(load(tmp_path / "saved", dtype="float32"))
    assert torch.equal(logits(load(published, dtype="float32")), before)
    quantize(published, tmp_path / "packed", recipe({"method": "rtn"}))
    assert kl(before, logits(load(tmp_path / "packed", dtype="float32"))) < 1e-3
    with safe_open(tmp_path / "packed" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(new in name for name in names)
    assert not any(old in name for name in names)


def test_fused_layers_and_experts_of_a_derived_row_share_a_scheme() -> None:
    model = dense("qwen3_5_moe_text")
    as_in_checkpoint(model, "qwen3_5_moe_text")
    row = find(model, "qwen3_5_moe_text")
    assert row.experts is not None
    assert row.fused_with("mlp.experts.3.up_proj") == row.experts.linears()
    together = row.fused_with("linear_attn.in_proj_z")
    assert together == ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")


def test_what_the_models_own_code_reads_is_left_alone(tmp_path: Path) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    assert built("jamba", source) is None
    recipe = {"method": "rtn", "weights": {"bits": 8, "group_size": 16}}
    result = quantize(source, packed, Recipe.model_validate(recipe))
    left = {
        n for n, why in result.skipped.items() if why == "the model's own code reads its weight"
    }
    assert left == {"model.layers.0.mamba.dt_proj"}
    assert not any("dt_proj" in n for n in result.modules)


def test_ignored_linears_have_transformers_names_in_the_config_too(tmp_path: Path) -> None:
    """Else transformers would look for a packed weight in their place."""
    source, packed = tmp_path / "source", tmp_path / "packed"
    assert built("hy_v3", source) is None
    values = {"method": "rtn", "ignore": ["lm_head", "*.shared_mlp.*"]}
    weights = {"weights": {"bits": 8, "group_size": 16}}
    quantize(source, packed, Recipe.model_validate(values | weights))
    assert not inspect(packed).engines["transformers"]
    theirs = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    ours = load(packed, dtype="float32", kernel="reference")
    assert kl(logits(ours), logits(theirs)) < 1e-6
