"""A training run of which everything that can be refused was looked at, and its work: ask the
teacher, train, write, prove."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.check import check
from llmquant.conversion.source import Source, open_source
from llmquant.data.sources import refuse_texts
from llmquant.errors import UsageError
from llmquant.formats import Format
from llmquant.models.from_folder import load_tokenizer
from llmquant.models.load import load
from llmquant.quantization.finish import base_name, portable_source
from llmquant.quantization.state.fingerprint import Facts, flat, machine_facts, model_facts
from llmquant.recipe_sections import QAT
from llmquant.records import QatRecord
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import ChosenDtype
from llmquant.training.beforehand import (
    check_hidden,
    check_seed,
    original_of,
    target_file,
    text_of,
    wanted_of,
    where_of,
)
from llmquant.training.history import TrainingLog, draw_losses
from llmquant.training.loop import Training, accelerator_for
from llmquant.training.options import QatEvents, QatOptions, QatResult
from llmquant.training.result import (
    changed_codes,
    scale_dtype,
    target_of,
    trained_recipe,
    write_trained,
)
from llmquant.training.state.saved import Course, SavedTraining
from llmquant.training.student import Student, make_student, wants_checkpointing
from llmquant.training.teacher.targets import TargetSource, Teacher
from llmquant.training.teacher.text import Calibrated, TrainingText
from llmquant.training.teacher.vocabulary import same_vocabulary


def prepare(
    model: str | os.PathLike[str],
    destination: Path,
    section: QAT,
    reference: str | os.PathLike[str],
    seed: int,
    layout: str | None,
    options: QatOptions,
    on_phase: Callable[[str, int, int], None],
) -> Prepared:
    """Look at everything that can be refused; the arguments are those of
    :func:`llmquant.training.run.qat`.

    Raises:
        UsageError, CheckpointError, ArchitectureError, FormatError: as there.
    """
    device, dtype = where_of(options)
    check_seed(seed)
    start = open_source(model, None)
    teacher = original_of(reference)
    for named, folder in ((model, start.reader.path), (reference, teacher.path)):
        refuse_source(destination, named, folder)
    refuse_texts(destination, section.source, section.heldout_source, options.evaluation)
    target = target_of(start, layout)
    same_vocabulary(start.reader.path, teacher.path, load_tokenizer(start.reader.path))
    rotated = start.manifest is not None and start.manifest.rotation is not None
    check_hidden(section, rotated=rotated)
    text = text_of(section, start.reader.path, seed, options, Calibrated.of(start.manifest))
    if section.top_k:
        wanted = wanted_of(section, text)
        target_file(Path(), wanted, teacher.path, device).check_size(options.max_cache)
    # Trained scales are rounded to what holds the start's, so what refuses the result refuses this.
    check(start, target, scale_dtype(start), False, on_phase)
    return Prepared(
        start, teacher, os.fspath(reference), target, text, section, seed, device, dtype, options,
        accelerator_for(device, dtype.dtype),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run of which everything that can be refused was looked at."""

    start: Source
    teacher: CheckpointReader
    reference: str
    target: Format
    text: TrainingText
    section: QAT
    seed: int
    device: torch.device
    dtype: ChosenDtype
    options: QatOptions
    accelerator: Accelerator

    def together(self) -> Prepared:
        """On this process's device, where several share the work.

        Raises:
            UsageError: more processes than a step has windows.
        """
        processes = self.accelerator.num_processes
        if processes > self.section.batch_size:
            raise UsageError(
                f"{processes} processes cannot share steps of {self.section.batch_size} windows; give a larger "
                "--batch-size, or start fewer"
            )
        return self if processes == 1 else replace(self, device=self.accelerator.device)

    def facts(self) -> Facts:
        """Everything that the result's bytes depend on."""
        facts = {f"qat {n}": v for n, v in flat(self.section.model_dump(mode="json"))}
        facts |= model_facts(self.start.reader, "the start")
        facts |= model_facts(self.teacher, "the reference")
        facts["training token ids"] = self.text.sha256
        facts |= {"seed": str(self.seed), "--device": str(self.device), "--dtype": self.dtype.name}
        facts |= {"--format": self.target.name, "processes": str(self.accelerator.num_processes)}
        return facts | machine_facts(self.device)

    def execute(
        self, output: Path, saved: SavedTraining, log: TrainingLog, events: QatEvents
    ) -> QatResult:
        """Ask the teacher, train, write, prove."""
        begun = time.monotonic()
        targets = self._targets(saved, events)
        original = self.teacher if self.section.size != "scales" else None
        student = make_student(
            self.start,
            self.section,
            self.device,
            original=original,
            seed=self.seed,
            checkpointing=wants_checkpointing(self.start, self.section, self.device)
            if self.options.checkpointing is None
            else self.options.checkpointing,
        )
        computing = Computing.of(self.device, self.dtype)
        log("start", section=self.section.model_dump(mode="json"), computing=computing.as_dict())
        training = Training(
            student, self.text, targets, self.section, self.seed, self.accelerator, saved, log
        )
        course, resumed = training.run(events)
        found: list[QatResult | None] = [None]
        if self.accelerator.is_main_process:
            found = [self._written(output, student, course, events)]
            log("done", kept=course.best_step, kl=course.best, stopped=course.stopped)
            saved.remove()
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        assert found[0] is not None  # of the first process
        return replace(
            found[0], resumed=resumed, seconds=time.monotonic() - begun, computing=computing
        )

    def _written(
        self, output: Path, student: Student, course: Course, events: QatEvents
    ) -> QatResult:
        """The folder and the curve."""
        recipe = trained_recipe(self.start, self.section)
        record = self._record(course, student)
        checked, nbytes = write_trained(
            self.start,
            student,
            self.target,
            recipe,
            record,
            output,
            overwrite=self.options.overwrite,
            on_progress=events.on_phase,
        )
        warnings = list(_warnings(course, record))
        if self.options.plot is not None:
            without = draw_losses(course, self.options.plot)
            if without is not None:
                events.on_note(without)
        return QatResult(
            output, record, tuple(course.heldout), checked.bits_per_weight, nbytes,
            len(student.layers), 0, 0.0, Computing.of(self.device, self.dtype), tuple(warnings),
        )  # fmt: skip

    def _targets(self, saved: SavedTraining, events: QatEvents) -> TargetSource:
        """What the teacher says, from its file where one is kept."""
        wanted = wanted_of(self.section, self.text)

        def teacher() -> TargetSource:
            model = load(self.teacher.path, dtype=self.dtype.dtype, device=self.device)
            return Teacher(model, wanted)

        if self.section.top_k == 0:
            return teacher()
        file = target_file(saved.teacher, wanted, self.teacher.path, self.device)
        if self.accelerator.is_main_process:
            file.fill(teacher, events.on_phase)
        self.accelerator.wait_for_everyone()
        return file

    def _record(self, course: Course, student: Student) -> QatRecord:
        codes, changed = changed_codes(self.start, student)
        return QatRecord(
            options=self.section.model_dump(mode="json")
            | {
                n: None if s is None else portable_source(s)
                for n, s in (
                    ("source", self.section.source),
                    ("heldout_source", self.section.heldout_source),
                )
            },
            start_weights_sha256=self.start.reader.digest(),
            reference=base_name(self.reference),
            reference_weights_sha256=self.teacher.digest(),
            source=portable_source(self.text.source),
            source_sha256=self.text.source_sha256,
            ids_sha256=self.text.sha256,
            windows=len(self.text.training),
            heldout=len(self.text.heldout),
            tokens=self.text.tokens,
            before=course.start,
            after=course.best,
            step=course.best_step,
            steps=course.step,
            stopped=course.stopped,
            norms=len(student.norms),
            codes=codes,
            codes_changed=changed,
            device=self.device.type,
            dtype=self.dtype.name,
            processes=self.accelerator.num_processes,
        )


def _warnings(course: Course, record: QatRecord) -> list[str]:
    warnings = []
    if course.stopped is not None:
        warnings.append(course.stopped)
    if course.best_step == 0:
        warnings.append(
            "no state was better than the start on the held-out text, so the result has the start's numbers; "
            "try a smaller learning rate, more steps or more text"
        )
    elif record.options["size"] != "scales" and not record.codes_changed:
        rate = "--lora-lr" if record.options["size"] == "lora" else "--codes-lr"
        warnings.append(
            f"no code changed: the result is that of --size scales, which takes less memory; a larger {rate} or more "
            "steps would change codes"
        )
    return warnings
