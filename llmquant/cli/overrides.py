"""What a command line means: the recipe, a file or name with options laid over it, and what
``--target-bpw`` may choose."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from llmquant.cli.method import parse_method
from llmquant.cli.options import Engine
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.planning.allocation.options import AllocateOptions
    from llmquant.planning.defaults import DefaultRecipe
    from llmquant.quantization.options import QuantizeOptions
    from llmquant.recipe import Recipe

KEYS = {
    "bits": "weights.bits",
    "group_size": "weights.group_size",
    "sym": "weights.symmetric",
    "act_order": "gptq.act_order",
    "layout": "format",
    "calibration": "calibration.source",
    "nsamples": "calibration.nsamples",
    "seqlen": "calibration.seqlen",
    "packing": "calibration.packing",
    "all_experts": "calibration.all_experts",
    "seed": "seed",
}
"""A command's parameter → the recipe's key."""


BY_HAND = ("recipe", "method", "bits", "group_size", "sym", "act_order", "target_bpw")
"""Parameters that say how to quantize; without any of them the recipe goes by the model's size."""


def default_of(options: Mapping[str, Any]) -> DefaultRecipe | None:
    """The recipe for the size of ``model``; None where the options say how to quantize.

    Raises:
        UsageError, CheckpointError, ArchitectureError: the model is none that can be quantized.
    """
    from llmquant.planning.defaults import choose_recipe
    from llmquant.recipe import Recipe

    if any(options.get(name) is not None for name in BY_HAND):
        return None
    return choose_recipe(options["model"], options.get("layout") or Recipe().format)


def recipe_of(options: Mapping[str, Any], default: DefaultRecipe | None = None) -> Recipe:
    """The recipe that a command's options ask for. None, or no such option, leaves what it says.

    Args:
        default: the recipe where none is named; default: gptq-w4g128.
        options: by the names of the command's parameters: those of ``KEYS``, and

            - ``recipe``: file or shipped recipe;
            - ``method``: see :func:`llmquant.cli.method.parse_method`;
            - ``rotate``: switch the recipe's rotation on (its own settings kept where it has any)
              or off;
            - ``embeddings``: ``8`` or ``4`` bits for token embeddings and head, or ``none``; the
              recipe's own section is kept where it has these bits already;
            - ``include``: replaces the recipe's patterns. One that the recipe ignores by the same
              words is no longer ignored: asking for ``lm_head`` means it;
            - ``ignore``: adds to the recipe's patterns.

    Raises:
        RecipeError: no such recipe, or values that cannot be right.
        UsageError: no such method.
    """
    from llmquant.recipe import Recipe, load_recipe

    name, rotate, method = (options.get(key) for key in ("recipe", "rotate", "method"))
    start = Recipe() if default is None else default.recipe
    recipe = load_recipe(name) if name is not None else start
    changes: dict[str, Any] = {
        key: value.value if isinstance(value, StrEnum) else value
        for option, key in KEYS.items()
        if (value := options.get(option)) is not None
    }
    if "weights.group_size" in changes:  # asked for by itself: that size or none
        changes["weights.strict_groups"] = True
    if "calibration.seqlen" in changes:
        changes["calibration.strict_seqlen"] = True
    include, ignore = options.get("include") or (), options.get("ignore") or ()
    if include:
        changes["include"] = tuple(include)
    changes["ignore"] = (*(p for p in recipe.ignore if p not in include), *ignore)
    recipe = recipe.updated(changes)
    if rotate is not None:
        recipe = recipe.updated({"rotation": (recipe.rotation or {}) if rotate else None})
    bits = options.get("embeddings")
    if bits is not None and (recipe.embeddings is None or str(recipe.embeddings.bits) != bits):
        recipe = recipe.updated({"embeddings": None if bits == "none" else {"bits": int(bits)}})
    return recipe if method is None else parse_method(method).applied_to(recipe)


def check_together(given: Mapping[str, Any], method: str) -> None:
    """Raises UsageError for options that have no effect beside each other."""
    if given["act_order"] is not None and method != "gptq":
        raise UsageError(
            f"--act-order applies only to GPTQ, but the method is {method}; leave one of them out"
        )
    if given["target_bpw"] is None:
        if given["engine"] is not None:
            raise UsageError("--engine limits what --target-bpw may choose; give both or neither")
    elif given["bits"] is not None or given["group_size"] is not None:
        raise UsageError(
            "--target-bpw chooses bits and group sizes itself; leave out --bits and --group-size"
        )


def options_for(
    size: float, engine: Engine | None, symmetric: bool | None, run: QuantizeOptions
) -> AllocateOptions:
    """What ``--target-bpw`` of another command lets be chosen."""
    from llmquant.planning.allocation.options import AllocateOptions

    wanted = engine or Engine.any
    return AllocateOptions(
        size,
        widths_of(None, wanted),
        symmetric=symmetric,
        engine=wanted.value,
        device=run.device,
        dtype=run.dtype,
        store_dtype=run.store_dtype,
        evaluation=run.evaluation,
    )


def numbers(option: str, text: str) -> tuple[int, ...]:
    """``2,3,4`` as numbers, each once.

    Raises:
        UsageError: something else stands there.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as e:
        raise UsageError(f"{option} {text!r} must be whole numbers separated by commas") from e


def widths_of(widths: str | None, engine: Engine) -> tuple[int, ...]:
    """The widths asked for; without any, those that make sense for the engine."""
    if widths is not None:
        return numbers("--widths", widths)
    return (4, 8, 16) if engine is Engine.vllm else (2, 3, 4, 8, 16)
