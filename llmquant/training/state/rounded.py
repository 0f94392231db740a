"""The rounded folder that a recipe's training begins with, ``.NAME.start`` beside the destination,
and the note of which run made it, ``.NAME.start.json``.

The note is written before the folder is begun, and the folder gets its name when it is whole: so
where both are there, the note tells what the folder is. What a run of other settings rounded is
refused, not deleted: it may be hours of work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.checkpoint.atomic import disk, remove
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.manifest import MANIFEST, read_manifest
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.data.calibration import Calibration
from llmquant.errors import CheckpointError, UsageError
from llmquant.quantization.options import QuantizeOptions, QuantizeResult
from llmquant.quantization.prepare import calibration_of, prepare, selected
from llmquant.quantization.rerun import recorded_recipe
from llmquant.quantization.state.fingerprint import Facts, differences, fingerprint
from llmquant.recipe import Recipe
from llmquant.records import ModuleReport, PairReport, TuneReport
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import parse_dtype
from llmquant.written import replace_file


def facts_of(
    model: str | os.PathLike[str], recipe: Recipe, options: QuantizeOptions
) -> tuple[Facts, Calibration | None]:
    """What the rounded folder's bytes depend on, and the calibration text.

    Raises:
        what rounding raises for the same request before it begins.
    """
    plan = prepare(model, recipe, options.device, options.dtype, options.store_dtype)
    plan = selected(plan)
    calibration = calibration_of(plan, options.evaluation)
    facts = fingerprint(
        plan.reader, plan.recipe, calibration, plan.device, plan.dtype, options.max_shard_size
    )
    overlap = None if calibration is None else calibration.summary.overlap
    facts["--base-model"] = options.base_model or "none"
    facts["overlap with --eval-text"] = "none" if overlap is None else str(overlap)
    return facts, calibration


@dataclass(frozen=True, slots=True)
class RoundedFolder:
    """The folder of one destination.

    Attributes:
        path: where it is.
    """

    path: Path

    @classmethod
    def of(cls, destination: Path) -> RoundedFolder:
        return cls(destination.with_name(f".{destination.name}.start"))

    @property
    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def begin(self, facts: Facts) -> None:
        """Remove what is there, and note which run makes the folder anew."""
        self.forget()
        self.note(facts)

    def note(self, facts: Facts, warnings: Sequence[str] = ()) -> None:
        """Write down which run makes the folder, and what was warned of.

        Raises:
            DiskError: the disk refused.
        """
        told = json.dumps({"facts": facts, "warnings": list(warnings)}, indent=1)
        with disk(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._note, told)

    def _noted(self) -> dict[str, Any] | None:
        try:
            told = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return told if isinstance(told, dict) and "facts" in told else None

    def made_by(self, facts: Facts) -> bool:
        """Whether the folder is there, whole, and made by a run of these facts.

        Raises:
            UsageError: it is another run's; says what differs.
        """
        told = self._noted() if (self.path / MANIFEST).is_file() else None
        if told is None:
            return False
        different = differences(told["facts"], facts)
        if different:
            raise UsageError(
                f"{self.path} is the rounded model of an interrupted run with other settings: {different}. "
                "Repeat that run's command to resume it, or add --restart to delete the state and start over"
            )
        return True

    def result(
        self, model: str | os.PathLike[str], calibration: Calibration | None
    ) -> QuantizeResult:
        """What the process that made it did, as the folder tells.

        Args:
            model: the original.
            calibration: of the run, read anew.
        """
        made, reader = read_manifest(self.path), CheckpointReader(self.path)
        source = CheckpointReader(resolve(model))
        return QuantizeResult(
            path=self.path,
            recipe=recorded_recipe(self.path, made),
            modules=tuple(
                ModuleReport.model_validate({"name": n, **m.model_dump()})
                for n, m in made.modules.items()
            ),
            tuned={
                n: TuneReport.model_validate({**t.model_dump(), "seconds": 0.0})
                for n, t in made.tuned.items()
            },
            scaled={
                n: tuple(PairReport.model_validate(p.model_dump()) for p in pairs)
                for n, pairs in made.scaled.items()
            },
            skipped=made.skipped,
            bits_per_weight=made.bits_per_weight,
            source_bytes=sum(i.nbytes for i in source.tensors.values()),
            bytes_written=sum(i.nbytes for i in reader.tensors.values()),
            calibration=calibration,
            warnings=tuple((self._noted() or {}).get("warnings", ())),
            computing=Computing.of(made.device, parse_dtype(made.dtype)),
            regrouped=made.regrouped,
        )

    def forget(self) -> None:
        """Remove the folder; first what says that it is whole."""
        self._note.unlink(missing_ok=True)
        remove(self.path)

    def forget_used(self, destination: Path) -> None:
        """Remove the folder where a run was killed between giving the trained one its name and
        this. One that is younger than what stands at the destination is of a later run."""
        try:
            trained = read_manifest(destination).qat
            made, used = ((f / MANIFEST).stat().st_mtime_ns for f in (self.path, destination))
        except (CheckpointError, OSError):
            return
        if trained is None or made > used:
            return
        if trained.start_weights_sha256 == CheckpointReader(self.path).digest():
            self.forget()
