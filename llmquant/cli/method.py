"""``--method``: a sum of steps, as in ``gptq+tune``. What a step does is the recipe's to say; here it is switched on or off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.recipe import Recipe

ROUNDINGS = ("rtn", "gptq")
TUNE = "tune"


@dataclass(frozen=True, slots=True)
class Method:
    """A rounding algorithm, and whether blocks are tuned after it."""

    rounding: str
    tuned: bool

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with this method; a section of it that is switched on keeps its own settings where it has any."""
        return recipe.updated({"method": self.rounding, "tune": (recipe.tune or {}) if self.tuned else None})


def parse_method(text: str) -> Method:
    """Read ``rtn``, ``gptq``, ``rtn+tune`` or ``gptq+tune``.

    Raises:
        UsageError: anything else.
    """
    rounding, plus, rest = text.partition("+")
    if rounding not in ROUNDINGS or (plus and rest != TUNE):
        choices = [f"{r}{tail}" for r in ROUNDINGS for tail in ("", f"+{TUNE}")]
        raise UsageError(f"--method {text!r} is not one of {', '.join(choices)}")
    return Method(rounding, bool(plus))
