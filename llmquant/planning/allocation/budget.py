"""The size that an allocation may have, and the plan of a run that allocates first."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from llmquant.errors import UsageError
from llmquant.formats import Scheme
from llmquant.models.block_inputs import refuse_walk
from llmquant.models.from_folder import load_tokenizer
from llmquant.planning.allocation.candidates import Choice, choices_of
from llmquant.planning.allocation.chosen import check_layout, recipe_of_choice
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.preview import Plan, make_plan
from llmquant.quantization.prepare import check_calibration, prepare
from llmquant.recipe import Recipe


@dataclass(frozen=True)
class Budget:
    """What a run would make that chooses schemes for a size first, as far as no text has to be read
    for it.

    Attributes:
        least: the plan of the smallest choice.
        target_bpw: at most this many bits per selected weight.
        smallest, largest: what is possible.
        bytes_on_disk: at most, of a single weight file.
        items: sets of linears that get a scheme each.
        schemes: what may be chosen, smallest bits first.
    """

    least: Plan
    target_bpw: float
    smallest: float
    largest: float
    bytes_on_disk: int
    items: int
    schemes: tuple[str, ...]


def plan_budget(model: str | os.PathLike[str], recipe: Recipe, options: AllocateOptions) -> Budget:
    """Plan a run that allocates first.

    Raises:
        what :func:`llmquant.allocate` raises for the same request before it reads a text, and for
        a text that is not named nothing.
    """
    plan = prepare(model, recipe, options.device, options.dtype, options.store_dtype)
    refuse_walk(plan.model, "so no schemes can be chosen for a size: give --bits with --method rtn")
    load_tokenizer(plan.reader.path)
    if recipe.calibration.source is not None:
        check_calibration(plan)
    choices = choices_of(plan, options)
    check_layout(choices, plan)
    nbytes = budget_of(choices, options.target_bpw)
    least = [min(c.sizes.items(), key=lambda choice: choice[1]) for c in choices]
    smallest_recipe = recipe_of_choice(recipe, choices, [scheme for scheme, _ in least])
    made = make_plan(model, smallest_recipe, options.store_dtype)
    spare = nbytes - sum(size for _, size in least)
    offered = {scheme for c in choices for scheme in c.sizes}
    packed = sorted((s for s in offered if s is not None), key=lambda s: (s.spec.bits, str(s)))
    unpacked = ("unquantized",) if None in offered else ()
    smallest, largest = span_of(choices)
    return Budget(
        made,
        options.target_bpw,
        smallest,
        largest,
        made.tensor_bytes + spare + _longest_header(model, recipe, choices, options),
        len(choices),
        (*map(str, packed), *unpacked),
    )


def _longest_header(
    model: str | os.PathLike[str],
    recipe: Recipe,
    choices: Sequence[Choice],
    options: AllocateOptions,
) -> int:
    """Bytes of a weight file's header where it has the most tensors, and the largest: schemes with
    zero-points store a tensor more."""

    def tensors(scheme: Scheme | None) -> int:
        return 0 if scheme is None else 1 if scheme.spec.symmetric else 2

    wordy = [max(c.sizes, key=lambda s: (tensors(s), c.sizes[s])) for c in choices]
    made = make_plan(model, recipe_of_choice(recipe, choices, wordy), options.store_dtype)
    return made.bytes_on_disk - made.tensor_bytes


def budget_of(choices: Sequence[Choice], target: float) -> int:
    """Bytes that the selected linears may take.

    Raises:
        UsageError: outside the possible range, which the message gives.
    """
    weights = sum(c.weights for c in choices)
    smallest, largest = span_of(choices)
    if not smallest <= target < largest:
        side = "below the smallest" if target < smallest else "not below the largest"
        raise UsageError(
            f"a target of {target:g} bits per weight is {side} possible size; these choices reach from "
            f"{math.ceil(smallest * 1000) / 1000:g} to {largest:.3f}"
        )
    return math.floor(target * weights / 8)


def span_of(choices: Sequence[Choice]) -> tuple[float, float]:
    """Bits per weight of the smallest and of the largest allocation."""
    weights = sum(c.weights for c in choices)
    ends = (sum(end(c.sizes.values()) for c in choices) for end in (min, max))
    smallest, largest = (8 * nbytes / weights for nbytes in ends)
    return smallest, largest
