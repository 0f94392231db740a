"""From a choice for every item back to a recipe, and what refuses one before a text is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmquant.formats import Scheme
from llmquant.models.groups import fit_groups
from llmquant.models.selection import select
from llmquant.planning.allocation.candidates import Choice
from llmquant.quantization.plan import WalkPlan
from llmquant.recipe import Recipe
from llmquant.recipe_sections import Override, Weights


def recipe_of_choice(
    recipe: Recipe,
    choices: Sequence[Choice],
    chosen: Sequence[Scheme | None],
    description: str = "",
) -> Recipe:
    """The recipe that gives each item its scheme: the one with most weights for all, overrides by
    full name for the others."""
    votes: Counter[Scheme] = Counter()
    for choice, scheme in zip(choices, chosen, strict=True):
        if scheme is not None:
            votes[scheme] += choice.weights
    common = votes.most_common(1)[0][0]
    overrides, ignore = [], list(recipe.ignore)
    for choice, scheme in zip(choices, chosen, strict=True):
        for name in choice.names:
            if scheme is None:
                ignore.append(name)
            elif scheme != common:
                override = Override.between(name, _weights(common), _weights(scheme))
                overrides.append(override.model_dump())
    return recipe.updated(
        {
            "description": description or recipe.description,
            "weights": _weights(common).model_dump(),
            "overrides": tuple(overrides),
            "ignore": tuple(ignore),
        }
    )


def check_layout(choices: Sequence[Choice], plan: WalkPlan) -> None:
    """Refuse early what the run would refuse: one allocation with as many different schemes as can
    be is put to the test.

    Raises:
        FormatError: the layout holds no such mix.
    """
    chosen = []
    for i, choice in enumerate(choices):
        schemes: list[Scheme | None] = [s for s in choice.sizes if s is not None] or [None]
        chosen.append(schemes[i % len(schemes)])
    trial = recipe_of_choice(plan.recipe, choices, chosen)
    linears = plan.source.linears
    trial, _ = fit_groups(linears, plan.architecture, trial, plan.layout)  # of the embeddings
    select(linears, plan.architecture, trial, plan.layout)


def _weights(scheme: Scheme) -> Weights:
    return Weights(activations=scheme.activations).with_spec(scheme.spec)
