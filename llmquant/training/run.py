"""qat: from a quantized folder and its original to a proved folder that is nearer to the original.

Everything that can be refused is refused before a weight is trained: the destination, a teacher
with another vocabulary, too little text, targets that take more disk than allowed. Then the teacher
is asked once, the loop runs (:mod:`llmquant.training.loop`), and the best state is written and
proved. What a killed run had done is continued and ends with the same bytes.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from llmquant.checkpoint.atomic import check_destination, lock_folder, refuse_source
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.source import Source, open_source
from llmquant.errors import QuantizationError, UsageError
from llmquant.formats import Format
from llmquant.models.from_folder import load_tokenizer, read_config
from llmquant.models.load import load
from llmquant.quantization.finish import base_name, portable_source
from llmquant.quantization.prepare import deterministic
from llmquant.quantization.state.fingerprint import Facts, flat, machine_facts, model_facts
from llmquant.recipe_sections import QAT
from llmquant.records import QatRecord
from llmquant.runtime import signals as interruption
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import ChosenDtype, parse_device, parse_dtype
from llmquant.training.history import TrainingLog, draw_losses
from llmquant.training.loop import Training, accelerator_for
from llmquant.training.options import QatEvents, QatOptions, QatResult
from llmquant.training.result import target_of, trained_recipe, write_trained
from llmquant.training.saved import Course, SavedTraining
from llmquant.training.student import Student, make_student, wants_checkpointing
from llmquant.training.teacher.targets import TargetFile, TargetSource, Teacher, Wanted
from llmquant.training.teacher.text import Calibrated, TrainingText, read_text
from llmquant.training.teacher.vocabulary import same_vocabulary


def qat(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    section: QAT,
    *,
    reference: str | os.PathLike[str],
    seed: int = 0,
    layout: str | None = None,
    options: QatOptions | None = None,
    events: QatEvents | None = None,
) -> QatResult:
    """Train a quantized folder towards its original, into a new folder.

    Args:
        model: folder or hub name of a quantized model, of llmquant or another tool.
        output: folder to make; appears whole, after its proof, or not at all. A run that was killed
            leaves ``.NAME.qat`` beside it.
        section: what is trained, on which text, for how long.
        reference: the unquantized model.
        seed: draws windows, their order and adapters.
        layout: of the result; default: the start's own.
        options: where to do it.
        events: callbacks.

    Raises:
        UsageError: the request is impossible as written (destination, text, a reference with
            another tokenizer or vocabulary), or what is to be resumed was another run.
        CheckpointError, ArchitectureError, FormatError: a model that cannot be read, or a layout
            that cannot hold the result.
        QuantizationError: the start or the reference gives NaN or infinite logits.
        ProofError: what was written is not what was trained.
    """
    options, events = options or QatOptions(), events or QatEvents()
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    prepared = _prepare(model, destination, section, reference, seed, layout, options)
    prepared = prepared.together()
    saved, first = SavedTraining(destination), prepared.accelerator.is_main_process
    with ExitStack() as stack:
        stack.callback(prepared.accelerator.end_training)
        if first:
            stack.callback(os.close, lock_folder(saved.folder))
            saved.begin(prepared.facts(), restart=options.restart)
        else:
            events = QatEvents()
        prepared.accelerator.wait_for_everyone()
        log = TrainingLog(options.log if first else None, append=saved.load() is not None)
        stack.callback(log.close)
        for line in prepared.text.lines:
            events.on_note(line)
        try:
            with deterministic(seed):
                return prepared.execute(Path(output), saved, log, events)
        except BaseException as e:
            kept = saved.load()
            if first and kept is None and isinstance(e, UsageError | QuantizationError):
                saved.remove()  # the same command would meet it again, so that nothing is kept
            if interruption.stops(e):
                taken = 0 if kept is None else kept[0].step
                raise KeyboardInterrupt(
                    f"{taken} of {section.steps} steps are saved next to {destination.name}; run the same command to "
                    "resume, or add --restart to start over"
                ) from e
            raise


def _prepare(
    model: str | os.PathLike[str],
    destination: Path,
    section: QAT,
    reference: str | os.PathLike[str],
    seed: int,
    layout: str | None,
    options: QatOptions,
) -> _Prepared:
    """Everything that can be refused is refused here."""
    device = parse_device(options.device)
    dtype = parse_dtype(options.dtype, device, stored=torch.bfloat16)
    if dtype.dtype == torch.float16:
        raise UsageError("training in float16 loses small gradients; give float32 or bfloat16")
    if section.source is None:
        raise UsageError("training needs a text; give --data SOURCE, or qat.source in the recipe")
    start = open_source(model, None)
    teacher = CheckpointReader(resolve(reference))
    for folder in (start.reader.path, teacher.path):
        refuse_source(destination, folder)
    target = target_of(start, layout)
    tokenizer = load_tokenizer(start.reader.path)
    vocab_size = same_vocabulary(start.reader.path, teacher.path, tokenizer)
    config = read_config(start.reader.path).get_text_config()
    text = read_text(
        section,
        section.source,
        tokenizer,
        seed=seed,
        vocab_size=vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        evaluation=options.evaluation,
        calibrated=Calibrated.of(start.manifest),
    )
    if section.hidden_loss and start.manifest is not None and start.manifest.rotation is not None:
        raise UsageError(
            f"{start.reader.path} is rotated, so its hidden states are not the reference's; leave out --hidden-loss"
        )
    return _Prepared(
        start, teacher, os.fspath(reference), target, text, section, seed, device, dtype, options,
        accelerator_for(device, dtype.dtype),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Prepared:
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

    def together(self) -> _Prepared:
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
            checkpointing=wants_checkpointing(self.start, self.section)
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
        record = self._record(course, len(student.norms))
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
        warnings = list(_warnings(course))
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
        o = self.section
        wanted = Wanted(
            (*self.text.heldout, *self.text.training), len(self.text.heldout), o.top_k,
            o.temperature, o.hidden_loss > 0,
        )  # fmt: skip

        def teacher() -> TargetSource:
            model = load(self.teacher.path, dtype=self.dtype.dtype, device=self.device)
            return Teacher(model, wanted)

        if o.top_k == 0:
            return teacher()
        config = read_config(self.teacher.path).get_text_config()
        width = int(getattr(config, "hidden_size", 0))
        file = TargetFile(saved.teacher, wanted, int(config.vocab_size), width, self.device)
        file.check_size(self.options.max_cache)
        if self.accelerator.is_main_process:
            file.fill(teacher, events.on_phase)
        self.accelerator.wait_for_everyone()
        return file

    def _record(self, course: Course, norms: int) -> QatRecord:
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
            norms=norms,
            device=self.device.type,
            dtype=self.dtype.name,
            processes=self.accelerator.num_processes,
        )


def _warnings(course: Course) -> list[str]:
    warnings = []
    if course.stopped is not None:
        warnings.append(course.stopped)
    if course.best_step == 0:
        warnings.append(
            "no state was better than the start on the held-out text, so the result has the start's numbers; "
            "try a smaller learning rate, more steps or more text"
        )
    return warnings
