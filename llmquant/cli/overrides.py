"""The recipe that a command line means: a file or name, with options laid over it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmquant.recipe import Recipe


def recipe_of(
    name: str | None,
    changes: dict[str, Any],
    include: list[str] | None = None,
    ignore: list[str] | None = None,
) -> Recipe:
    """The recipe ``name`` (or the default one) with changes.

    Args:
        changes: dotted key → value; None leaves the recipe's.
        include: replaces the recipe's patterns. One that the recipe ignores by the same words is no
            longer ignored: asking for ``lm_head`` means it.
        ignore: adds to the recipe's patterns.

    Raises:
        RecipeError: no such recipe, or values that cannot be right.
    """
    from llmquant.recipe import Recipe, load_recipe

    chosen = load_recipe(name) if name is not None else Recipe()
    given = {
        k: v.value if isinstance(v, StrEnum) else v for k, v in changes.items() if v is not None
    }
    if include:
        given["include"] = tuple(include)
    given["ignore"] = (*(p for p in chosen.ignore if p not in (include or ())), *(ignore or ()))
    return chosen.updated(given)


def with_rotation(recipe: Recipe, rotate: bool | None) -> Recipe:
    """The recipe with its rotation switched on (its own settings kept where it has any) or off;
    None leaves it."""
    if rotate is None:
        return recipe
    return recipe.updated({"rotation": (recipe.rotation or {}) if rotate else None})
