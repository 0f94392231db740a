"""Which recipe a model gets when nobody names one: by its size class and by what was measured of
that (:mod:`llmquant.planning.costs`).

The rule: among :data:`CANDIDATES`, smallest files first, the first whose KL is at most
:data:`CLOSE`; where none is that close, the closest. A class that was not measured gets the first.
Candidates whose scheme vLLM's kernels refuse in the wanted layout are left out, so that the default
always runs, and rotations where the model cannot be rotated, or a tied head would become a tensor
of its own. The numbers are of one model per class: a guess for another one, which ``llmquant eval``
replaces by a measurement.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from llmquant.checkpoint.detect import unquantized
from llmquant.errors import ArchitectureError, SpecError
from llmquant.formats import Scheme, layout_of
from llmquant.formats.engines import VLLM_AVX512, why_not
from llmquant.models.from_folder import read_config
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

_UNTIES = "its head shares the embeddings' weights, and a rotation gives it its own: a larger file"
_HEADS = ("lm_head.weight", "embed_out.weight")

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
        refused: candidate → why vLLM does not take it in this format.
        unfit: candidate → why it is not for this model.
        limits: candidate → why transformers alone does not; no reason against a default, since
            :func:`llmquant.register_with_transformers` has it read everything.
    """

    name: str
    parameters: int
    size_class: SizeClass
    format: str
    refused: Mapping[str, str]
    unfit: Mapping[str, str]
    limits: Mapping[str, str]

    @property
    def recipe(self) -> Recipe:
        """The default recipe is stored without a name, as it always was."""
        return Recipe() if self.name == CANDIDATES[0] else load_recipe(self.name)

    @property
    def sentence(self) -> str:
        """For a screen."""
        return f"recipe {self.name}, chosen for {self.reason} (--explain shows the others)"

    @property
    def reason(self) -> str:
        """One sentence."""
        size = f"{self.parameters / 1e6:,.1f} million parameters ({self.size_class.name})"
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
        CheckpointError: the model cannot be read.
        ArchitectureError: transformers does not know its type.
    """
    layout_of(layout)
    reader = unquantized(model)
    tied = bool(read_config(reader.path).get_text_config().tie_word_embeddings)
    parameters = sum(
        math.prod(info.shape)
        for name, info in reader.tensors.items()
        if not (tied and name.endswith(_HEADS))  # the embeddings' numbers, stored again
    )
    default = choose(parameters, layout, tied=tied)
    if default.recipe.rotation is None:
        return default
    try:
        prepare(model, default.recipe.updated({"format": layout}))
    except (ArchitectureError, SpecError) as e:
        rotations = {name: str(e) for name in CANDIDATES if _rotates(name)}
        return choose(parameters, layout, tied=tied, unfit=rotations)
    return default


def choose(
    parameters: int, layout: str, *, tied: bool, unfit: Mapping[str, str] | None = None
) -> DefaultRecipe:
    """The same for a model of so many parameters.

    Args:
        tied: whether its head shares the embeddings' weights.
        unfit: candidate → why it is not for this model.
    """
    size_class = class_of(parameters, tied)
    unfit = {name: _UNTIES for name in CANDIDATES if tied and _rotates(name)} | dict(unfit or {})
    schemes = {name: Scheme(load_recipe(name).weights.spec) for name in CANDIDATES}
    refused, limits = (
        {n: why for n, scheme in schemes.items() if (why := why_not(engine, layout, scheme))}
        for engine in (VLLM_AVX512, "transformers")
    )
    taken = [n for n in CANDIDATES if n not in refused and n not in unfit] or [CANDIDATES[0]]
    measured = [name for name in taken if name in size_class.costs]
    close = [name for name in measured if size_class.costs[name].kl <= CLOSE]
    closest = sorted(measured, key=lambda name: size_class.costs[name].kl)
    chosen = next(iter([*close, *closest, *taken]))
    return DefaultRecipe(chosen, parameters, size_class, layout, refused, unfit, limits)


def _rotates(name: str) -> bool:
    return load_recipe(name).rotation is not None
