"""The scaling of a block that a recipe wants: AWQ's, SmoothQuant's or none, found by one process
and given to all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from llmquant.models.block_inputs import BlockInput
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.steps.channel_scaling import AWQFinder, BlockScaling, Finder, scale_block
from llmquant.quantization.steps.smoothquant import SmoothFinder

_UNSCALED = BlockScaling({}, {}, ())


def scaled(
    plan: WalkPlan,
    block: nn.Module,
    prefix: str,
    sets: Sequence[tuple[str, ...]],
    inputs: Sequence[BlockInput],
) -> BlockScaling:
    """Scale a block's channels as the recipe wants, in the block too.

    Args:
        plan: of the walk.
        block: with its original weights.
        prefix: its path in the checkpoint.
        sets: its linears that share an input, in execution order, named from the block.
        inputs: of the block.
    """
    find = _finder(plan, block, prefix, sets, inputs)
    if find is None:
        return _UNSCALED
    config = plan.model.config.get_text_config()
    heads: int = (
        getattr(config, "num_key_value_heads", None)
        or getattr(config, "num_attention_heads", 1)
        or 1
    )
    scaling = _UNSCALED
    if plan.world.first:
        scaling = scale_block(
            block, prefix, sets, inputs, plan.reader, plan.architecture, heads, find
        )
    if plan.world.size == 1:
        return scaling
    names = [name.removeprefix(f"{prefix}.") for name in (*scaling.weights, *scaling.changed)]
    scaling, values = plan.world.broadcast(
        (scaling, {name: block.get_parameter(name).data for name in names})
    )
    for name, value in values.items():
        block.get_parameter(name).data.copy_(value)
    return scaling


def _finder(
    plan: WalkPlan,
    block: nn.Module,
    prefix: str,
    sets: Sequence[tuple[str, ...]],
    inputs: Sequence[BlockInput],
) -> Finder | None:
    """The recipe's search for channel scales; None where it wants none or has nothing to scale
    for."""
    awq, smooth = plan.awq_options, plan.smooth_options
    if not sets:
        return None
    if smooth is not None:
        names = (f"{prefix}.{member}" for members in sets for member in members)
        int8 = frozenset(
            n for n in names if plan.recipe.weights_of(n).activations == "int8-dynamic"
        )
        return SmoothFinder(
            block, sets, inputs, plan.specs, int8, plan.search, smooth, plan.all_experts
        )
    if awq is None:
        return None
    return AWQFinder(
        block,
        sets,
        inputs,
        plan.specs,
        plan.search,
        awq,
        plan.all_experts,
        plan.world,
        plan.first_token_share,
    )
