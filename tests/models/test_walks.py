"""A run that goes from block to block computes what the whole model computes: hidden states, with
all that a checkpoint has, not only its matrices."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_kinds import KINDS, small
from sweep import EXAMPLE, TEXTS, TOKENIZER, outcome_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant import Recipe
from llmquant.errors import ArchitectureError, LlmquantError
from llmquant.models.architectures import blocks_of
from llmquant.models.block_inputs import first_inputs, run_block
from llmquant.models.precision import stored_buffers
from llmquant.planning.allocation.allocate import allocate
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.defaults import choose_recipe
from llmquant.planning.preview import make_plan
from llmquant.quantization.blocks.materialize import materialized, outer_names
from llmquant.quantization.blocks.whole_model import whole

sys.path.insert(0, str(Path(__file__).parents[1] / "quantization"))
from walk_plans import plan_of

IDS = torch.randint(10, 4000, (2, 24), generator=torch.Generator().manual_seed(1))
RTN = Recipe.model_validate({"method": "rtn", "weights": {"bits": 8, "group_size": 16}})
# Plain, windows, states, a mixture with a bias for its router, one with factors in buffers.
FEW = (
    "llama",
    "gemma2",
    "nemotron_h",
    "deepseek_v3",
    "gemma4_text",
    "gemma3n_text",
    "openai-gpt",
    "lfm2_moe",
)


CALIBRATED = re.findall(
    r"^\| `([\w-]+)` \| all \|", TEXTS.page.read_text(encoding="utf-8"), re.MULTILINE
)
"""Kinds that docs/models.md says are calibrated."""


def written(kind: str, folder: Path, **changes: Any) -> PreTrainedModel | None:
    """A small model with vectors and buffers that are not those of its class; None of a kind of
    which none can be built and run."""
    try:
        config = small(kind, **changes)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        if sum(p.numel() for p in empty.parameters()) > TEXTS.largest:
            return None
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model(input_ids=IDS, use_cache=False)
    except Exception:  # noqa: BLE001 - a hundred models' own code
        return None
    vectors = [p for n, p in model.named_parameters() if p.ndim == 1 and not n.endswith("A_log")]
    with torch.no_grad():
        for tensor in (*vectors, *(b for _, b in stored_buffers(model))):
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def walked(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The last block's output by a walk and in the whole model, and the whole model's logits."""
    plan = plan_of(folder, RTN)
    blocks, seen = blocks_of(plan.model, plan.architecture), list[Tensor]()

    def note(_module: nn.Module, _args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, (tuple, list)) else out)

    with torch.no_grad():
        with whole(plan):
            hook = blocks[-1].register_forward_hook(note)
            logits: Tensor = plan.model(input_ids=IDS, use_cache=False).logits
            hook.remove()
        with materialized(plan, plan.model, "", outer_names(plan)):
            (inputs,) = first_inputs(plan.model, blocks, [IDS])
        for index, block in enumerate(blocks):
            with materialized(plan, block, f"{plan.architecture.blocks}.{index}."):
                hidden = run_block(block, inputs)
            inputs = inputs.after(hidden)
    return hidden, seen[-1], logits


def check(kind: str, folder: Path) -> None:
    model = written(kind, folder)
    if model is None:
        return
    try:
        hidden, whole_hidden, logits = walked(folder)
    except LlmquantError:
        assert kind not in CALIBRATED
        return
    with torch.no_grad():
        torch.testing.assert_close(logits, model(input_ids=IDS, use_cache=False).logits)
    torch.testing.assert_close(hidden, whole_hidden)


@pytest.mark.parametrize("kind", FEW)
def test_a_walk_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    assert written(kind, tmp_path / "made") is not None
    walked(tmp_path / "made")
    check(kind, tmp_path / "checked")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_every_walk_computes_what_the_model_does(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text"])
def test_blocks_that_read_the_keys_of_earlier_ones_are_rounded_only(
    kind: str, tmp_path: Path
) -> None:
    """As in Gemma 3n and Gemma 4's small models: no block of these can be calibrated without the
    ones before."""
    shared = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    written(kind, tmp_path, **shared)
    default = choose_recipe(tmp_path, "compressed-tensors")
    assert (default.name, default.recipe.needs_text) == ("rtn-w4g128", False)
    assert "read keys and values of earlier ones" in default.reason
    assert {"gptq-w4g128", "best-w4g128"} <= set(default.unfit)
    with pytest.raises(ArchitectureError, match=r"num_kv_shared_layers.*without --calibration"):
        walked(tmp_path)
    with pytest.raises(ArchitectureError, match="num_kv_shared_layers"):
        make_plan(tmp_path, Recipe())
    text = {"calibration.source": f"file:{EXAMPLE / 'calibration.txt'}"}
    with pytest.raises(ArchitectureError, match="give --bits with --method rtn"):
        allocate(tmp_path, RTN.updated(text), AllocateOptions(6.0))
    found = outcome_of(kind, {"8-bit RTN": {"method": "rtn"}}, **shared)
    assert (found.works, found.wrong) == (("8-bit RTN",), ())
