"""What the shipped recipes cost models of each size: ``recipes/costs.json``.

It has, for each class of sizes, one model and what was measured on it, with the source of the
numbers and the texts. Where it matters for what wins, a size has a class for heads that share the
embeddings' weights and one for heads of their own. A class without a measured model says so.
Importing this costs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from llmquant.errors import RecipeError
from llmquant.recipe import recipes_folder


@dataclass(frozen=True, slots=True)
class Cost:
    """What a recipe costs a model: stored bits per quantized weight, mean KL in nats, perplexity
    ratio, and processor seconds of quantizing on one thread."""

    bits_per_weight: float
    kl: float
    perplexity_ratio: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class SizeClass:
    """Models of a size.

    Attributes:
        name: for people.
        below: parameters; None: no limit.
        tied: whether the head shares the embeddings' weights; None: either.
        model: that was measured, with its size; None: none was.
        how: the texts and windows of that.
        source: where the numbers are from.
        costs: recipe → cost.
    """

    name: str
    below: int | None
    tied: bool | None
    model: str | None
    how: str
    source: str
    costs: Mapping[str, Cost]

    def has(self, parameters: int, tied: bool) -> bool:
        """Whether a model with that many parameters and such a head is in it, if it is in none of
        the classes before it."""
        return (self.below is None or parameters < self.below) and self.tied in (None, tied)


def size_classes() -> tuple[SizeClass, ...]:
    """The classes, smallest first, with what was measured.

    Raises:
        RecipeError: the table is missing from the installation.
    """
    path = recipes_folder() / "costs.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["classes"]
    except OSError as e:
        raise RecipeError(f"{path} cannot be read ({e.strerror}); install llmquant again") from e
    return tuple(
        SizeClass(**{**row, "costs": {name: Cost(**cost) for name, cost in row["costs"].items()}})
        for row in rows
    )


def class_of(parameters: int, tied: bool) -> SizeClass:
    """The class of a model with that many parameters, whose head is tied to the embeddings or
    not."""
    return next(c for c in size_classes() if c.has(parameters, tied))
