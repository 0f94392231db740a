"""quantize: from a model and a recipe to a proved folder. The only place where the nouns meet.

Everything that can be refused is refused before a weight is touched: the destination, the recipe
against the model, the calibration text. Then blocks stream from the walk into the writer, the
finished folder is read back and compared with what the algorithm returned, and only then does it
get its name. What a killed run had finished is continued
(:mod:`llmquant.quantization.state.resume`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from llmquant.checkpoint.atomic import check_destination
from llmquant.checkpoint.companions.code import own_code
from llmquant.checkpoint.companions.files import companions, left_behind
from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sizes import Sizes
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.data.calibration import Calibration
from llmquant.data.sources import refuse_texts
from llmquant.errors import UsageError
from llmquant.formats.engines import of_the_model_type, on_this_cpu
from llmquant.formats.rules import Beside
from llmquant.models.reading.stored_dtype import StoredReader
from llmquant.quantization.blocks.full_device import full_device
from llmquant.quantization.blocks.hidden_states import Placement
from llmquant.quantization.finish import base_name, carry, describe, prove, store_block
from llmquant.quantization.memory import placement
from llmquant.quantization.options import Events, QuantizeOptions, QuantizeResult
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.prepare import calibration_of, deterministic, prepare, selected
from llmquant.quantization.state.fingerprint import Facts, fingerprint
from llmquant.quantization.state.log import RunLog
from llmquant.quantization.state.outcome import Outcome, warnings_of
from llmquant.quantization.state.resume import SavedRun, finished_before, state_of
from llmquant.quantization.walk import walk
from llmquant.quantization.workers import assist, check_together
from llmquant.recipe import Recipe
from llmquant.runtime.devices import AUTO, parse_device


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Recipe,
    options: QuantizeOptions | None = None,
    events: Events | None = None,
) -> QuantizeResult:
    """Quantize a checkpoint into a new folder, or continue doing so.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        output: folder to make; appears whole, after its proof, or not at all. A run that was killed
            leaves ``.NAME.partial`` and ``.NAME.resume`` beside it.
        recipe: what to do.
        options: where to do it.
        events: callbacks.

    Raises:
        UsageError: the request is impossible as written (destination, recipe, text source, group
            size, device), or what is to be continued was another run.
        CheckpointError, ArchitectureError: the model cannot be read or walked.
        QuantizationError: NaN or Inf in weights, activations or results.
        ProofError: what was written is not what was computed.
    """
    options, events = options or QuantizeOptions(), events or Events()
    if recipe.qat is not None:
        raise UsageError(
            "this recipe trains after rounding, which llmquant.quantize does and this step of it does not"
        )
    if options.device == AUTO:
        options = replace(options, device=parse_device(AUTO).type)
    destination = Path(os.path.abspath(output))
    with suppress(OSError):  # left empty by a kill at the very end
        state_of(destination).rmdir()
    if not state_of(destination).exists() or options.restart:
        check_destination(destination, options.overwrite)
    run, notes = _checked(os.fspath(model), Path(output), recipe, options, events)
    plan = run.plan
    facts = fingerprint(
        plan.reader, plan.recipe, run.calibration, plan.device, plan.dtype, options.max_shard_size
    )
    check_together(plan, run.windows, destination, restart=options.restart)
    if not plan.world.first:
        with deterministic(recipe.seed):
            assist(plan, run.windows, destination, run.placement)
            return run.shared(None)
    before = None if options.restart or plan.world.size > 1 else finished_before(destination, facts)
    if before is not None:
        written = sum(i.nbytes for i in CheckpointReader(destination).tensors.values())
        return run.result(before, plan.total, written)
    for note in notes:  # not earlier: what stops a run should stand alone
        events.on_note(note)
    return run.shared(run.execute(destination, facts))


def _checked(
    model: str, output: Path, recipe: Recipe, options: QuantizeOptions, events: Events
) -> tuple[_Run, Sequence[str]]:
    """Everything that can be refused is refused here; what is worth a note comes with the run."""
    device = options.world.device(options.device)
    plan = prepare(model, recipe, device, options.dtype, options.store_dtype, options.world)
    destination = Path(os.path.abspath(output))
    refuse_source(destination, model, plan.reader.path)
    refuse_texts(destination, recipe.calibration.source, options.evaluation)
    plan = selected(plan)
    beside = Beside.of(plan.reader.config, plan.selection.skipped)
    warnings, notes = on_this_cpu(plan.layout.name, plan.selection.schemes, beside)
    if isinstance(plan.reader, StoredReader):
        notes = [plan.reader.note(), *notes]
    notes = [*map(str, plan.selection.regrouped), *notes]
    warnings += of_the_model_type(plan.layout.name, plan.selection.schemes, beside)
    for warning in warnings:
        events.on_warning(warning)
    calibration = calibration_of(plan, options.evaluation)
    if calibration is not None:
        events.on_calibration(calibration)
    first = [options.note] if options.note else []
    notes = [*first, *plan.source.notes, *notes]
    return _Run(output, model, plan, calibration, options, events), notes


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of which everything that can be refused was looked at."""

    output: Path
    model: str
    plan: WalkPlan
    calibration: Calibration | None
    options: QuantizeOptions
    events: Events

    @property
    def windows(self) -> tuple[Tensor, ...]:
        return self.calibration.windows if self.calibration is not None else ()

    @property
    def keeps_state(self) -> bool:
        return self.options.resume and self.plan.world.size == 1

    @property
    def placement(self) -> Placement:
        return placement(
            self.plan,
            self.plan.world.shard(self.windows),
            self.options.max_memory,
            self.plan.world.local,
        )

    def execute(self, destination: Path, facts: Facts) -> QuantizeResult:
        """The run, or the rest of one that was interrupted."""
        options = self.options
        with (
            deterministic(self.plan.recipe.seed),
            CheckpointWriter(
                self.output,
                max_shard_size=options.max_shard_size,
                overwrite=options.overwrite,
                keep=state_of(destination).exists() and not options.restart,
            ) as writer,
            SavedRun(
                writer,
                facts,
                self.plan.total,
                self.plan.device,
                enabled=self.keeps_state,
                restart=options.restart,
                placement=self.placement,
            ) as saved,
            RunLog(options.log, append=saved.blocks > 0) as log,
        ):
            saved.bytes_expected = self._bytes_expected()
            log.start(self.plan.recipe, saved, self.plan.device)
            self._announce(saved)
            self._blocks(writer, saved, log)
            self._finish(writer, saved, log)
        return self.result(saved.outcome, saved.resumed, writer.total_bytes)

    def _announce(self, saved: SavedRun) -> None:
        """Say what a user cannot see from the command: processes, a continued run, files."""
        if self.plan.world.size > 1:
            kept = (
                "; a run of several processes keeps nothing to continue from"
                if self.options.resume
                else ""
            )
            self.events.on_note(f"{self.plan.world.size} processes share the work{kept}")
        if saved.resumed:
            self.events.on_note(
                f"resuming after block {saved.resumed} of {saved.total} of an interrupted run"
            )
        if saved.store.placement.spill:
            self.events.on_note(
                f"hidden states are kept in {saved.folder}: they do not fit in memory"
            )

    def _blocks(self, writer: CheckpointWriter, saved: SavedRun, log: RunLog) -> None:
        """Walk through what is not done yet."""
        if saved.blocks == saved.total:
            return
        steps = self.plan.blocks + (self.plan.embedding is not None)
        start = min(saved.blocks, steps)
        with full_device(self.plan, lambda: self._reached(saved)):
            for block in walk(self.plan, self.windows, self.events.on_progress, saved.store, start):
                done = store_block(block, self.plan, writer)
                saved.block_done(done)
                log.block(saved, done)

    def _reached(self, saved: SavedRun) -> str:
        return f"in block {saved.blocks + 1} of {saved.total}: {saved.progress()}"

    def _finish(self, writer: CheckpointWriter, saved: SavedRun, log: RunLog) -> None:
        """Everything after the blocks: other tensors, other files, the proof, the name."""
        self.events.on_phase("writing")
        log.phase("writing")
        if not saved.weights_done:
            rest = carry(self._left(saved.outcome), self.plan, writer)
            writer.next_shard()
            saved.all_written(Outcome(copied=rest))
        writer.finish_weights()
        manifest = describe(
            writer,
            self.plan,
            saved.outcome,
            self.calibration,
            base_model=self.options.base_model or base_name(self.model),
            device=self.options.device,
        )
        self.events.on_phase("proving")
        log.phase("proving")
        with saved.proof():
            prove(writer, self.plan, saved.outcome, manifest)
        saved.whole(manifest.to_json())
        writer.publish()

    def _left(self, outcome: Outcome) -> list[str]:
        packed = {f"{name}.weight" for name in outcome.modules}
        return [
            n
            for n in self.plan.reader.tensors
            if n not in outcome.copied and n not in packed and not self.plan.repeats(n)
        ]

    def _bytes_expected(self) -> int:
        """Of all tensors of the result."""
        sizes, schemes, total = Sizes(self.plan.layout), self.plan.selection.schemes, 0
        for name, info in self.plan.reader.tensors.items():
            scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if self.plan.repeats(name):
                continue
            if scheme is None or len(info.shape) != 2:
                total += info.nbytes
            else:
                stored = sizes.tensors(scheme, (info.shape[0], info.shape[1]), info.dtype)
                total += sum(t.nbytes for t in stored.values())
        return total

    def _beside(self) -> list[str]:
        """What became of the files beside the weights, where that is worth a word."""
        original = self.plan.source.original
        files = companions(original.path, original.files())
        return [*left_behind(files), *own_code(original.path, files)]

    def shared(self, result: QuantizeResult | None) -> QuantizeResult:
        """The result, which every process of a run has at the end; the others pass None."""
        everywhere = self.plan.world.broadcast(
            None if result is None else replace(result, calibration=None)
        )
        assert everywhere is not None
        return replace(everywhere, calibration=self.calibration)

    def result(self, outcome: Outcome, resumed: int, bytes_written: int) -> QuantizeResult:
        """What the caller gets.

        Args:
            outcome: of all blocks.
            resumed: how many of them an earlier process had finished.
            bytes_written: of all tensors.
        """
        return QuantizeResult(
            path=self.output,
            recipe=self.plan.recipe,
            modules=tuple(outcome.modules.values()),
            tuned=outcome.tuned,
            scaled=outcome.scaled,
            skipped=self.plan.selection.skipped,
            regrouped=self.plan.selection.regrouped,
            bits_per_weight=outcome.bits_per_weight,
            source_bytes=sum(i.nbytes for i in self.plan.source.original.tensors.values()),
            bytes_written=bytes_written,
            calibration=self.calibration,
            warnings=(*warnings_of(outcome, self.plan.recipe), *self._beside()),
            computing=self.plan.computing,
            resumed=resumed,
        )
