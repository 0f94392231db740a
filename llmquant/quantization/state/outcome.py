"""What the proof and the manifest need of each tensor written: gathered block by block, and kept in
the journal of a run.

Numbers survive the way through JSON exactly: Python writes a float's shortest form that reads back
as the same float.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter

from llmquant.checkpoint.manifest import fallback_notes
from llmquant.formats import Scheme
from llmquant.quantization.steps.moves import METHOD
from llmquant.recipe import Recipe
from llmquant.records import ModuleReport, PairReport, TuneReport
from llmquant.runtime.finite import some


@dataclass(slots=True)
class Outcome:
    """Reports and schemes of quantized linears by full name; digests of the tensors carried
    over."""

    modules: dict[str, ModuleReport] = field(default_factory=dict)
    tuned: dict[str, TuneReport] = field(default_factory=dict)
    scaled: dict[str, tuple[PairReport, ...]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    packed_bytes: int = 0

    def add(self, more: Outcome) -> None:
        """Take in another part of the run."""
        for f in fields(self):
            if f.name != "packed_bytes":
                getattr(self, f.name).update(getattr(more, f.name))
        self.packed_bytes += more.packed_bytes

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized linears, as stored."""
        return self.packed_bytes * 8 / sum(math.prod(m.shape) for m in self.modules.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a line of the journal."""
        plain: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return plain

    @staticmethod
    def from_json(value: Any) -> Outcome:
        """The inverse of :meth:`as_json`."""
        return _adapter().validate_python(value)


def _adapter() -> TypeAdapter[Outcome]:
    return TypeAdapter(Outcome)


def warnings_of(outcome: Outcome, recipe: Recipe) -> Iterator[str]:
    """What a user should know though the run succeeded."""
    for note in fallback_notes({n: r.fallback for n, r in outcome.modules.items()}):
        yield f"{note}; give more calibration text, or show every token to every expert (--all-experts)"
    yield from _scale_warnings(outcome)
    for report in outcome.modules.values():
        if report.damping is not None and report.damping > recipe.gptq.damping:
            yield (
                f"{report.name}: Cholesky failed at damping {recipe.gptq.damping:g}, {report.damping:g} was used; "
                "more calibration tokens make this rarer"
            )
        if report.dropped:
            yield f"{report.name}: {report.dropped} of {report.dropped + report.tokens} calibration tokens were NaN or Inf"
        if report.coarse:
            yield (
                f"{report.name}: {report.coarse} groups hold weights so small that 16-bit scales have fewer than five bits "
                "for them; together they are less than a millionth of its squares"
            )
        if report.dead:
            yield f"{report.name}: {report.dead} input channels were zero on all calibration tokens; rounded to nearest"


def _scale_warnings(outcome: Outcome) -> Iterator[str]:
    """What was done so that scales keep their bits."""
    moved = [p for pairs in outcome.scaled.values() for p in pairs if p.method == METHOD]
    if moved:
        yield (
            f"powers of two were moved between layers in {len(moved)} places (such as from {moved[0].producer} to "
            f"{moved[0].readers[0]}), so that 16 bits hold the scales; the function is the same, bit for bit"
        )
    wide = [name for name, report in outcome.modules.items() if report.wide]
    if wide:
        yield (
            f"{some(wide)}: scales are smaller or larger than float16 holds and stay exact in bfloat16 only; serve this model "
            "with --dtype bfloat16"
        )
