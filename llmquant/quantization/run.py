"""quantize: from a model and a recipe to a proved folder. The only place where the nouns meet.

Everything that can be refused is refused before a weight is touched: the destination, the recipe
against the model, the calibration text. Then blocks stream from the walk into the writer, the
finished folder is read back and compared with what the algorithm returned, and only then does it
get its name. What a killed run had finished is continued
(:mod:`llmquant.quantization.state.resume`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from llmquant.checkpoint.atomic import check_destination, refuse_source
from llmquant.checkpoint.companions.code import own_code
from llmquant.checkpoint.companions.files import companions, left_behind
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sizes import Sizes
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.data.calibration import Calibration
from llmquant.formats.engines import on_this_cpu
from llmquant.models.architectures import blocks_of
from llmquant.models.selection import Selection
from llmquant.quantization.blocks.hidden_states import Placement
from llmquant.quantization.finish import base_name, describe, prove
from llmquant.quantization.memory import placement
from llmquant.quantization.plan import ModuleReport, Progress, WalkPlan
from llmquant.quantization.prepare import Prepared, deterministic, prepare
from llmquant.quantization.reports import Outcome, warnings_of
from llmquant.quantization.state.fingerprint import Facts, fingerprint
from llmquant.quantization.state.log import RunLog
from llmquant.quantization.state.resume import SavedRun, finished_before, state_of
from llmquant.quantization.steps.channel_scaling import PairReport
from llmquant.quantization.steps.tuning import TuneReport
from llmquant.quantization.walk import walk
from llmquant.quantization.workers import assist, check_together
from llmquant.quantization.write import carry, store_block
from llmquant.recipe import Recipe
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import AUTO, parse_device
from llmquant.runtime.distributed import ALONE, World


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Where and how a run happens; nothing here is meant to change what is computed but ``dtype``
    and ``device``.

    Attributes:
        device: torch device that holds the current block; ``auto``: cuda where there is one, else
            cpu.
        dtype: in which blocks are run for calibration: float32 (``auto``), bfloat16 or float16.
            Statistics and rounding are float32 whatever it is.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per safetensors file.
        base_model: name for the model card; default: the model as it was given.
        evaluation: text that calibration must not overlap with, as a source.
        resume: keep what is needed to continue after a kill, and continue what such a run left.
            False: keep nothing.
        restart: start over even if there is something to resume.
        max_memory: bytes of RAM to stay under by keeping hidden states in files; None: what the
            machine has left.
        log: file for one JSON line per module, block and turn of the run; None: none.
        world: the processes that do it together, each with the same arguments; see
            :mod:`llmquant.runtime.distributed`.
    """

    device: str = "cpu"
    dtype: str = "auto"
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000
    base_model: str | None = None
    evaluation: str | None = None
    resume: bool = True
    restart: bool = False
    max_memory: int | None = None
    log: Path | None = None
    world: World = ALONE


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What came out, and how it was computed. ``resumed``: blocks that an earlier process had
    finished."""

    path: Path
    recipe: Recipe
    modules: tuple[ModuleReport, ...]
    tuned: Mapping[str, TuneReport]
    scaled: Mapping[str, tuple[PairReport, ...]]
    skipped: Mapping[str, str]
    bits_per_weight: float
    source_bytes: int
    bytes_written: int
    calibration: Calibration | None
    warnings: tuple[str, ...]
    computing: Computing
    resumed: int = 0


@dataclass(slots=True)
class Events:
    """Callbacks of a run, all optional: calibration is ready, a module begins, a phase begins, a
    warning before work starts, something worth knowing (an earlier run is continued, hidden states
    go to files)."""

    on_calibration: Callable[[Calibration], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    on_phase: Callable[[str], None] = lambda _: None
    on_warning: Callable[[str], None] = lambda _: None
    on_note: Callable[[str], None] = lambda _: None


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
    if options.device == AUTO:
        options = replace(options, device=parse_device(AUTO).type)
    destination = Path(os.path.abspath(output))
    with suppress(OSError):  # left empty by a kill at the very end
        state_of(destination).rmdir()
    if not state_of(destination).exists() or options.restart:
        check_destination(destination, options.overwrite)
    work, notes = _checked(os.fspath(model), Path(output), recipe, options, events)
    plan = work.plan
    facts = fingerprint(
        plan.reader, recipe, work.calibration, plan.device, plan.dtype, options.max_shard_size
    )
    check_together(plan, work.windows, destination, restart=options.restart)
    if not plan.world.first:
        with deterministic(recipe.seed):
            assist(plan, work.windows, destination, work.placement)
            return work.shared(None)
    before = None if options.restart or plan.world.size > 1 else finished_before(destination, facts)
    if before is not None:
        written = sum(i.nbytes for i in CheckpointReader(destination).tensors.values())
        return work.result(before, work.total, written)
    for note in notes:  # not earlier: what stops a run should stand alone
        events.on_note(note)
    return work.shared(_ran(work, destination, facts))


def _checked(
    model: str, output: Path, recipe: Recipe, options: QuantizeOptions, events: Events
) -> tuple[_Work, Sequence[str]]:
    """Everything that can be refused is refused here; what is worth a note comes with the work."""
    prepared = prepare(model, recipe, options.world.device(options.device), options.dtype)
    refuse_source(Path(os.path.abspath(output)), prepared.reader.path)
    selection = prepared.selection()
    warnings, notes = on_this_cpu(prepared.layout.name, selection.schemes)
    for warning in warnings:
        events.on_warning(warning)
    calibration = prepared.calibration(options.evaluation)
    if calibration is not None:
        events.on_calibration(calibration)
    plan = prepared.plan(selection, options.world)
    return _Work(output, model, prepared, plan, selection, calibration, options, events), notes


def _ran(work: _Work, destination: Path, facts: Facts) -> QuantizeResult:
    """The run, or the rest of one that was interrupted."""
    options, plan = work.options, work.plan
    with (
        deterministic(plan.recipe.seed),
        CheckpointWriter(
            work.output,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            keep=state_of(destination).exists() and not options.restart,
        ) as writer,
        SavedRun(
            writer,
            facts,
            work.total,
            plan.device,
            enabled=work.keeps_state,
            restart=options.restart,
            placement=work.placement,
        ) as run,
        RunLog(options.log, append=run.blocks > 0) as log,
    ):
        work.run(writer, run, log)
    return work.result(run.outcome, run.resumed, writer.total_bytes)


@dataclass(frozen=True, slots=True)
class _Work:
    """A run of which everything that can be refused was looked at."""

    output: Path
    model: str
    prepared: Prepared
    plan: WalkPlan
    selection: Selection
    calibration: Calibration | None
    options: QuantizeOptions
    events: Events

    @property
    def windows(self) -> tuple[Tensor, ...]:
        return self.calibration.windows if self.calibration is not None else ()

    @property
    def blocks(self) -> int:
        return len(blocks_of(self.plan.model, self.plan.architecture))

    @property
    def total(self) -> int:
        """Blocks, and the head where it is quantized."""
        return self.blocks + (self.plan.head is not None)

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

    def run(self, writer: CheckpointWriter, run: SavedRun, log: RunLog) -> None:
        run.bytes_expected = self._bytes_expected()
        log.start(self.plan.recipe, run, self.plan.device)
        if self.plan.world.size > 1:
            kept = (
                "; a run of several processes keeps nothing to continue from"
                if self.options.resume
                else ""
            )
            self.events.on_note(f"{self.plan.world.size} processes share the work{kept}")
        if run.resumed:
            self.events.on_note(
                f"resuming after block {run.resumed} of {run.total} of an interrupted run"
            )
        if run.store.placement.spill:
            self.events.on_note(
                f"hidden states are kept in {run.folder}: they do not fit in memory"
            )
        self._blocks(writer, run, log)
        self.events.on_phase("writing")
        log.phase("writing")
        if not run.weights_done:
            rest = carry(self._left(run.outcome), self.plan.reader, writer)
            writer.next_shard()
            run.all_written(Outcome(copied=rest))
        writer.finish_weights()
        manifest = describe(
            writer, self.plan, self.prepared.layout, self.selection, run.outcome, self.calibration,
            base_model=self.options.base_model or base_name(self.model), device=self.options.device,
        )  # fmt: skip
        self.events.on_phase("proving")
        log.phase("proving")
        run.proving = True
        prove(writer, self.plan.reader, self.prepared.layout, run.outcome, manifest)
        run.proving = False
        run.whole(manifest.to_json())
        writer.publish()

    def shared(self, result: QuantizeResult | None) -> QuantizeResult:
        """The result, which every process of a run has at the end; the others pass None."""
        found = self.plan.world.broadcast(
            None if result is None else replace(result, calibration=None)
        )
        assert found is not None
        return replace(found, calibration=self.calibration)

    def _blocks(self, writer: CheckpointWriter, run: SavedRun, log: RunLog) -> None:
        """Walk through what is not done yet."""
        if run.blocks == run.total:
            return
        for block in walk(
            self.plan,
            self.windows,
            self.events.on_progress,
            run.store,
            min(run.blocks, self.blocks),
        ):
            prefix = f"{self.plan.architecture.blocks}.{block.index}"
            done = store_block(
                block, prefix, self.plan.reader, writer, self.prepared.layout, self.selection
            )
            run.block_done(done)
            log.block(run, done)

    def _left(self, outcome: Outcome) -> list[str]:
        packed = {f"{name}.weight" for name in outcome.modules}
        return [n for n in self.plan.reader.tensors if n not in outcome.copied and n not in packed]

    def _bytes_expected(self) -> int:
        """Of all tensors of the result."""
        sizes, schemes, total = Sizes(self.prepared.layout), self.selection.schemes, 0
        for name, info in self.plan.reader.tensors.items():
            scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if scheme is None or len(info.shape) != 2:
                total += info.nbytes
            else:
                stored = sizes.tensors(scheme, (info.shape[0], info.shape[1]), info.dtype)
                total += sum(t.nbytes for t in stored.values())
        return total

    def _beside(self) -> list[str]:
        """What became of the files beside the weights, where that is worth a word."""
        original = self.prepared.original
        found = companions(original.path, original.files())
        return [*left_behind(found), *own_code(original.path, found)]

    def result(self, outcome: Outcome, resumed: int, bytes_written: int) -> QuantizeResult:
        weights = sum(o * i for o, i in outcome.shapes.values())
        return QuantizeResult(
            path=self.output,
            recipe=self.plan.recipe,
            modules=tuple(outcome.modules.values()),
            tuned=outcome.tuned,
            scaled=outcome.scaled,
            skipped=self.selection.skipped,
            bits_per_weight=outcome.packed_bytes * 8 / weights,
            source_bytes=sum(i.nbytes for i in self.prepared.original.tensors.values()),
            bytes_written=bytes_written,
            calibration=self.calibration,
            warnings=(*warnings_of(outcome, self.plan.recipe), *self._beside()),
            computing=self.prepared.computing,
            resumed=resumed,
        )
