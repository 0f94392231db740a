"""Which recipe a model gets when nobody names one: by its size class and by what was measured of
that (:mod:`llmquant.planning.costs`).

The rule: among :data:`CANDIDATES`, smallest files first, the first whose KL is at most
:data:`CLOSE`; where none is that close, the closest. A class that was not measured gets the first.
Candidates whose scheme the wanted layout cannot hold, or vLLM's kernels refuse in it, are left out,
so that the default always runs, and rotations where the model cannot be rotated, or a tied head
would become a tensor of its own. A model that cannot be calibrated gets :data:`NEAREST`.

The numbers are of one model per class: a guess for another one, which ``llmquant eval`` replaces by
a measurement.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, SpecError
from llmquant.formats import Format, Scheme, layout_of
from llmquant.formats.engines import VLLM_AVX512, refusals
from llmquant.models.block_inputs import why_not_walked
from llmquant.models.rotation.rotated import rotated
from llmquant.planning.costs import SizeClass, class_of
from llmquant.quantization.prepare import prepare
from llmquant.recipe import Recipe, load_recipe

CANDIDATES = (
    "gptq-w4g128",
    "gptq-w4g64-asym",
    "gptq-w4g32",
    "gptq-w4g32-asym",
    "rotate-gptq-w4g32-asym",
    "awq-gptq-w4g32-asym",
)
"""Four bits by GPTQ, smallest files first, and of equal ones the quickest."""

NEAREST = "rtn-w4g128"
"""For what cannot be calibrated."""

_UNTIES = "its head shares the embeddings' weights, and a rotation gives it its own: a larger file"

_ANY_SHAPE = (4096, 4096)  # one that no layout refuses for its size

CLOSE = 0.02
"""Nats per token: from here down a default is good enough that smaller files count more."""


@dataclass(frozen=True, slots=True)
class DefaultRecipe:
    """The default of one model.

    Attributes:
        name: of the recipe.
        parameters: of the model.
        size_class: that it is in.
        format: of the result.
        refused: recipe → why vLLM does not take it in this format.
        unfit: recipe → why it is not for this model.
        limits: recipe → why transformers alone does not; no reason against a default, since
            :func:`llmquant.register_with_transformers` has it read everything.
        unheld: recipe → why the format cannot hold its result.
    """

    name: str
    parameters: int
    size_class: SizeClass
    format: str
    refused: Mapping[str, str]
    unfit: Mapping[str, str]
    limits: Mapping[str, str]
    unheld: Mapping[str, str]

    @property
    def recipe(self) -> Recipe:
        """The default recipe is stored without a name, as it always was."""
        return Recipe() if self.name == CANDIDATES[0] else load_recipe(self.name)

    @property
    def sentence(self) -> str:
        """For a screen."""
        return f"recipe {self.choice}"

    @property
    def choice(self) -> str:
        """The same without the word ``recipe``, for where that stands before it."""
        return f"{self.name}, chosen for {self.reason} (--explain shows the others)"

    @property
    def reason(self) -> str:
        """One sentence."""
        size = f"{self.parameters / 1e6:,.1f} million parameters ({self.size_class.name})"
        if self.name == NEAREST:
            return f"{size}; {self.unfit[CANDIDATES[0]]}"
        cost = self.size_class.costs.get(self.name)
        if cost is None:
            return f"{size}, {self.size_class.how}"
        close = cost.kl <= CLOSE
        rule = "the smallest that is close enough" if close else "the closest at 4 bits"
        return f"{size}, {rule} on {self.size_class.model}"


def choose_recipe(model: str | os.PathLike[str], layout: str) -> DefaultRecipe:
    """The default recipe for a model, in a format.

    Raises:
        UsageError: the model is quantized, or there is no such format.
        CheckpointError, ArchitectureError: it cannot be quantized, whatever the recipe.
    """
    source = prepare(model, Recipe(format=layout)).source
    tied = bool(source.model.config.get_text_config().tie_word_embeddings)
    tensors, shared = source.original.tensors, source.model.all_tied_weights_keys
    twice = {name for name, of in shared.items() if tied and of in tensors}
    parameters = sum(math.prod(info.shape) for name, info in tensors.items() if name not in twice)
    return choose(
        parameters,
        layout,
        tied=tied,
        unrotatable=_why_not_rotated(source.original),
        uncalibrated=why_not_walked(source.model),
    )


def _why_not_rotated(reader: CheckpointReader) -> str | None:
    try:
        for name in CANDIDATES:
            rotated(reader, load_recipe(name))
    except (ArchitectureError, SpecError) as e:
        return str(e)
    return None


def choose(
    parameters: int,
    layout: str,
    *,
    tied: bool,
    unrotatable: str | None = None,
    uncalibrated: str | None = None,
) -> DefaultRecipe:
    """The same for a model of so many parameters.

    Args:
        tied: whether its head shares the embeddings' weights.
        unrotatable: why it cannot be rotated; None: it can.
        uncalibrated: why it cannot be calibrated; None: as far as is known it can.
    """
    size_class = class_of(parameters, tied)
    recipes = {n: load_recipe(n) for n in dict.fromkeys((*CANDIDATES, NEAREST, *size_class.costs))}
    against = _UNTIES if tied else unrotatable
    schemes = {name: _schemes(recipe) for name, recipe in recipes.items()}
    unfit = {n: against for n, r in recipes.items() if against and r.rotation is not None}
    if uncalibrated:
        unfit |= {n: uncalibrated for n, r in recipes.items() if r.needs_text}
    held_by = layout_of(layout)
    unheld = {n: why for n, of in schemes.items() if (why := _why_not_held(held_by, of))}
    answers = {name: refusals(layout, of) for name, of in schemes.items()}
    refused, limits = (
        {name: reasons[0] for name, of in answers.items() if (reasons := of[engine])}
        for engine in (VLLM_AVX512, "transformers")
    )
    out = (refused, unfit, unheld)
    taken = [n for n in CANDIDATES if not any(n in why for why in out)]
    taken = taken or [NEAREST if uncalibrated else CANDIDATES[0]]
    measured = [name for name in taken if name in size_class.costs]
    close = [name for name in measured if size_class.costs[name].kl <= CLOSE]
    closest = sorted(measured, key=lambda name: size_class.costs[name].kl)
    chosen = next(iter([*close, *closest, *taken]))
    return DefaultRecipe(chosen, parameters, size_class, layout, refused, unfit, limits, unheld)


def _schemes(recipe: Recipe) -> dict[str, Scheme]:
    """Of a linear, and of the embeddings where the recipe packs them; by a name of each."""
    weights = recipe.weights
    schemes = {"q_proj": Scheme(weights.spec, activations=weights.activations)}
    if recipe.embeddings is not None:
        schemes["embed_tokens"] = Scheme(recipe.embeddings.weights.spec)
    return schemes


def _why_not_held(layout: Format, schemes: Mapping[str, Scheme]) -> str | None:
    """Why a layout cannot hold these, whatever the sizes of the model."""
    each = (layout.why_not(scheme, _ANY_SHAPE) for scheme in schemes.values())
    return next((why for why in (layout.why_not_together(schemes), *each) if why), None)
