"""``--method``: a sum of steps, as in ``awq+gptq+tune``. The recipe says what a step does; here it is switched on or off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.recipe import Recipe

ROUNDINGS = ("rtn", "gptq")
AWQ = "awq"
TUNE = "tune"


@dataclass(frozen=True, slots=True)
class Method:
    """A rounding algorithm, whether channels are scaled before it, and whether blocks are tuned after it."""

    rounding: str
    tuned: bool
    scaled: bool = False

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with this method; a section of it that is switched on keeps its own settings where it has any."""
        sections: dict[str, object] = {
            "awq": (recipe.awq or {}) if self.scaled else None,
            "tune": (recipe.tune or {}) if self.tuned else None,
        }
        return recipe.updated({"method": self.rounding, **sections})


def parse_method(text: str) -> Method:
    """Read ``rtn`` or ``gptq``, with ``awq+`` before it and ``+tune`` behind it where wanted; ``awq`` alone is ``awq+rtn``.

    Raises:
        UsageError: anything else.
    """
    choices = {
        f"{head}{rounding}{tail}": Method(rounding, bool(tail), bool(head))
        for head in ("", f"{AWQ}+")
        for rounding in ROUNDINGS
        for tail in ("", f"+{TUNE}")
    }
    choices[AWQ] = choices[f"{AWQ}+rtn"]
    if text not in choices:
        raise UsageError(f"--method {text!r} is not one of {', '.join(choices)}")
    return choices[text]
