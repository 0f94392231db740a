"""``--method``: a sum of steps, as in ``awq+gptq+tune``. The recipe says what a step does; here it
is switched on or off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.recipe import Recipe

ROUNDINGS = ("rtn", "gptq")
AWQ = "awq"
SMOOTH = "smooth"
TUNE = "tune"


@dataclass(frozen=True, slots=True)
class Method:
    """A rounding algorithm, how channels are scaled before it (``awq``, ``smooth``), and whether
    blocks are tuned after it."""

    rounding: str
    tuned: bool
    scaled: str | None = None

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with this method; a section of it that is switched on keeps its own settings
        where it has any."""
        sections: dict[str, object] = {
            AWQ: (recipe.awq or {}) if self.scaled == AWQ else None,
            SMOOTH: (recipe.smooth or {}) if self.scaled == SMOOTH else None,
            TUNE: (recipe.tune or {}) if self.tuned else None,
        }
        return recipe.updated({"method": self.rounding, **sections})


def parse_method(text: str) -> Method:
    """Read ``rtn`` or ``gptq``, with ``awq+`` or ``smooth+`` before it and ``+tune`` behind it
    where wanted.

    ``awq`` alone is ``awq+rtn``, ``smooth`` alone ``smooth+rtn``, and SmoothQuant's full name means
    the same.

    Raises:
        UsageError: anything else.
    """
    choices = {
        f"{head}+{rounding}{tail}".lstrip("+"): Method(rounding, bool(tail), head or None)
        for head in ("", AWQ, SMOOTH)
        for rounding in ROUNDINGS
        for tail in ("", f"+{TUNE}")
    }
    choices |= {head: choices[f"{head}+rtn"] for head in (AWQ, SMOOTH)}
    known = text.replace("smoothquant", SMOOTH, 1)
    if known not in choices:
        raise UsageError(f"--method {text!r} is not one of {', '.join(choices)}")
    return choices[known]
