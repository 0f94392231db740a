"""Finding decoder blocks: the table fits the real modules, unknown models are searched, and nothing
is guessed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_kinds import small
from tiny_models import CONFIGS, random_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmquant.errors import ArchitectureError
from llmquant.models.architectures import ARCHITECTURES, blocks_of, find, norm_of, refuse_kind
from llmquant.models.naming.names import as_in_checkpoint
from llmquant.planning.preview import make_plan
from llmquant.recipe import Recipe


def on_meta(kind: str) -> nn.Module:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS.get(kind) or small(kind))
    as_in_checkpoint(model, kind)
    return model


# The others are text parts of models that also see (test_towers.py).
CAUSAL = [kind for kind in ARCHITECTURES if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def test_the_readme_names_the_table() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if "known by name" in line]
    named = {name for row in rows for name in re.findall("`([\\w-]+)`", row.split("|")[1])}
    assert named == {*CAUSAL}


@pytest.mark.parametrize("kind", CAUSAL)
def test_every_row_of_the_table_fits_its_model(kind):
    model = on_meta(kind)
    architecture = find(model, kind)
    assert architecture is ARCHITECTURES[kind]
    blocks = blocks_of(model, architecture)
    assert len(blocks) == model.config.num_hidden_layers
    if architecture.norm:
        assert norm_of(model, architecture) is model.get_submodule(architecture.norm)
    linears = {n: m for n, m in blocks[0].named_modules() if isinstance(m, nn.Linear)}
    for together in architecture.fused:
        members = {n for n in linears if architecture.fused_with(n) == together}
        if architecture.experts is None:
            assert members == set(together)
            assert len({linears[n].in_features for n in members}) == 1, (
                f"{together} do not read the same input"
            )
    if architecture.experts is not None:
        assert {n for n in linears if ".experts." in n} == {
            n for n in linears if architecture.fused_with(n) == architecture.experts.linears()
        }
    assert model.get_submodule(architecture.head) is model.get_output_embeddings()


@pytest.mark.parametrize(
    ("kind", "blocks", "norm"),
    [
        pytest.param("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm", id="GPT-NeoX"),
        pytest.param("mixtral", "model.layers", "model.norm", id="experts inside the blocks"),
        pytest.param("opt", "model.decoder.layers", "model.decoder.final_layer_norm", id="OPT"),
    ],
)
def test_a_model_that_is_not_in_the_table_is_searched(kind, blocks, norm):
    model = on_meta(kind)
    architecture = find(model, "new")
    assert (architecture.blocks, architecture.norm, architecture.scaled) == (blocks, norm, ())
    assert architecture.fused_with("self_attn.k_proj") == tuple(
        f"self_attn.{name}_proj" for name in "qkv"
    )
    assert len(blocks_of(model, architecture)) == 2
    assert norm_of(model, architecture) is model.get_submodule(norm)


class Block(nn.Module):
    """A linear, and a list of two more inside."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Model(nn.Module):
    """Whatever lists it is given, and a norm beside them."""

    def __init__(self, norm: bool = True, **lists: nn.ModuleList) -> None:
        super().__init__()
        for name, modules in lists.items():
            self.add_module(name, modules)
        if norm:
            self.norm = nn.LayerNorm(4)


def of_blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


def test_lists_inside_blocks_do_not_count():
    model = Model(layers=of_blocks(2))
    architecture = find(model, "new")
    assert architecture.blocks == "layers"
    assert norm_of(model, architecture) is model.norm


@pytest.mark.parametrize(
    ("model", "told"),
    [
        pytest.param(
            lambda: Model(encoder=of_blocks(2), decoder=of_blocks(2)),
            "has 2 lists .*encoder, decoder",
            id="two",
        ),
        pytest.param(lambda: Model(), r"has 0 lists of equal blocks \(none\)", id="no list"),
        pytest.param(lambda: Model(layers=of_blocks(1)), "has 0 lists", id="a list of one"),
        pytest.param(
            lambda: Model(layers=nn.ModuleList([Block(), nn.Linear(4, 4)])),
            "has 0 lists",
            id="unequal blocks",
        ),
        pytest.param(
            lambda: Model(layers=nn.ModuleList([nn.ReLU(), nn.ReLU()])),
            "has 0 lists",
            id="no linears",
        ),
    ],
)
def test_an_unknown_model_without_one_list_is_refused(model, told):
    with pytest.raises(
        ArchitectureError, match=f"model type 'new' is not in llmquant's table .*{told}"
    ):
        find(model(), "new")


def test_a_table_row_that_does_not_fit_is_refused():
    with pytest.raises(
        ArchitectureError, match=r"GPTNeoXForCausalLM has no block list at model\.layers"
    ):
        find(random_model("gpt_neox"), "llama")


def test_a_head_without_a_known_norm_is_refused():
    model = Model(norm=False, layers=of_blocks(2))
    with pytest.raises(
        ArchitectureError, match="cannot find the norm before the head of Model; --ignore lm_head"
    ):
        norm_of(model, find(model, "new"))


@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe"])
def test_experts_of_other_types_are_refused_before_most_of_a_model_is_left_alone(kind: str) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    with pytest.raises(
        ArchitectureError,
        match=r"stacks its experts.*\.experts\.gate_up_proj\); .* supports are mixtral",
    ):
        find(model, kind)


def test_a_model_that_sees_without_a_text_part_is_refused() -> None:
    config = PreTrainedConfig(vision_config={"hidden_size": 16})
    config.model_type = "x"
    told = r"model type 'x' is more than a text decoder \(its config has vision_config\)"
    with pytest.raises(ArchitectureError, match=told):
        refuse_kind(config)


def test_a_folder_without_the_text_part_of_its_model_is_refused(tmp_path: Path) -> None:
    Gemma3Config().save_pretrained(tmp_path)
    save_file({"vision_tower.a": torch.zeros(1)}, tmp_path / "model.safetensors")
    told = r"the text part of model type 'gemma3' is not among its tensors: none of its modules"
    with pytest.raises(ArchitectureError, match=told):
        make_plan(tmp_path, Recipe(method="rtn"))
