"""What the proof and the manifest need of each tensor written: gathered block by block, and kept in
the journal of a run.

Numbers survive the way through JSON exactly: Python writes a float's shortest form that reads back
as the same float.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import TypeAdapter

from llmquant.formats import Scheme
from llmquant.records import ModuleReport, PairReport, TuneReport


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
