"""quantize: from a model and a recipe to a proved folder. The only place where the nouns meet.

Everything that can be refused is refused before a weight is touched: the destination, the recipe against the model, the
calibration text. Then blocks stream from the walk into the writer, the finished folder is read back and compared with what
the algorithm returned, and only then does it get its name. What a killed run had finished is continued
(:mod:`llmquant.resume`).
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant import architectures
from llmquant.architectures import blocks_of
from llmquant.calibration import Calibration, calibrate
from llmquant.card import front_matter, model_card
from llmquant.checkpoint import CheckpointReader, CheckpointWriter, sha256_file, sha256_tensor
from llmquant.destination import check_destination, refuse_source
from llmquant.detect import quantization_config
from llmquant.devices import parse_device, parse_dtype
from llmquant.engines import refusals
from llmquant.errors import ProofError, QuantizationError, SourceError, UsageError
from llmquant.fingerprint import fingerprint
from llmquant.finite import all_finite
from llmquant.fit import check_fit
from llmquant.formats import FORMATS, Format, Scheme
from llmquant.hub import resolve
from llmquant.manifest import (
    MANIFEST,
    Manifest,
    ModuleEntry,
    RotationEntry,
    ScaledEntry,
    TuneEntry,
    file_hashes,
    packed_bytes,
    prove_modules,
    told_fallbacks,
    versions,
)
from llmquant.outcome import Outcome
from llmquant.parallel import ALONE, World
from llmquant.plan import Sizes
from llmquant.recipe import Recipe
from llmquant.resume import SavedRun, finished_before, state_of
from llmquant.rotation import RotatedReader, rotated
from llmquant.runlog import RunLog
from llmquant.scaling import PairReport
from llmquant.selection import Selection, linears_of, select
from llmquant.skeleton import empty_model, read_tokenizer
from llmquant.sources import Documents, read_documents
from llmquant.spilling import must_spill
from llmquant.together import assist, check_together
from llmquant.tuning import TuneReport
from llmquant.walk import BlockResult, ModuleReport, Progress, WalkPlan, walk


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Where and how a run happens; nothing here is meant to change what is computed but ``dtype`` and ``device``.

    Attributes:
        device: torch device that holds the current block.
        dtype: in which blocks are run for calibration: float32 (``auto``), bfloat16 or float16. Statistics and rounding
            are float32 whatever it is.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per safetensors file.
        base_model: name for the model card; default: the model as it was given.
        evaluation: text that calibration must not overlap with, as a source.
        resume: keep what is needed to continue after a kill, and continue what such a run left. False: keep nothing.
        restart: begin anew even if there is something to continue.
        max_memory: bytes of RAM to stay under by keeping hidden states in files; None: what the machine has left.
        log: file for one JSON line per module, block and turn of the run; None: none.
        world: the processes that do it together, each with the same arguments; see :mod:`llmquant.parallel`.
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
    """What came out. ``resumed``: blocks that an earlier process had finished."""

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
    resumed: int = 0


@dataclass(slots=True)
class Events:
    """Callbacks of a run, all optional: calibration is ready, a module begins, a phase begins, a warning before work starts,
    something worth knowing (an earlier run is continued, hidden states go to files)."""

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
        output: folder to make; appears whole, after its proof, or not at all. A run that was killed leaves ``.NAME.partial`` and
            ``.NAME.resume`` beside it.
        recipe: what to do.
        options: where to do it.
        events: callbacks.

    Raises:
        UsageError: the request is impossible as written (destination, recipe, text source, group size, device), or what is to be
            continued was another run.
        CheckpointError, ArchitectureError: the model cannot be read or walked.
        QuantizationError: NaN or Inf in weights, activations or results.
        ProofError: what was written is not what was computed.
    """
    options, events = options or QuantizeOptions(), events or Events()
    destination = Path(os.path.abspath(output))
    with suppress(OSError):  # left empty by a kill at the very end
        state_of(destination).rmdir()
    if not state_of(destination).exists() or options.restart:
        check_destination(destination, options.overwrite)
    original = CheckpointReader(resolve(model))
    refuse_quantized(original)
    reader = rotated(original, recipe)
    refuse_source(destination, reader.path)
    device, dtype = parse_device(options.world.device(options.device)), parse_dtype(options.dtype, auto=torch.float32)
    skeleton = empty_model(reader, dtype)
    architecture = architectures.find(skeleton, str(reader.config.get("model_type")))
    layout = _layout(recipe.format)
    selection = select(linears_of(skeleton), architecture, recipe, layout)
    check_fit(reader, skeleton)
    for reason in refusals(layout.name, selection.schemes)["vllm (CPU)"]:
        events.on_warning(f"vLLM on a CPU will refuse this model: {reason}")
    calibration = calibration_of(reader, recipe, options, skeleton)
    if calibration is not None:
        events.on_calibration(calibration)
    plan = WalkPlan(skeleton, architecture, reader, selection.specs, recipe, device, dtype, selection.head, options.world)
    work = _Work(Path(output), os.fspath(model), original, plan, layout, selection, calibration, options, events)
    facts = fingerprint(reader, recipe, calibration, device, dtype, options.max_shard_size)
    check_together(plan, work.windows, destination, restart=options.restart)
    if not plan.world.first:
        with deterministic(recipe.seed):
            assist(plan, work.windows, destination, spill=work.spill)
            return work.told(None)
    before = None if options.restart or plan.world.size > 1 else finished_before(destination, facts)
    if before is not None:
        return work.result(before, work.total, sum(i.nbytes for i in CheckpointReader(destination).tensors.values()))
    with deterministic(recipe.seed), CheckpointWriter(
        output, max_shard_size=options.max_shard_size, overwrite=options.overwrite,
        keep=state_of(destination).exists() and not options.restart,
    ) as writer, SavedRun(
        writer, facts, work.total, device, enabled=work.keeps_state, restart=options.restart, spill=work.spill,
    ) as run, RunLog(options.log, append=run.blocks > 0) as log:  # fmt: skip
        work.run(writer, run, log)
    return work.told(work.result(run.outcome, run.resumed, writer.total_bytes))


@dataclass(frozen=True, slots=True)
class _Work:
    """A run of which everything that can be refused was looked at."""

    output: Path
    model: str
    original: CheckpointReader
    plan: WalkPlan
    layout: Format
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
    def spill(self) -> bool:
        return must_spill(self.plan, self.plan.world.mine(self.windows), self.options.max_memory, self.plan.world.local)

    def run(self, writer: CheckpointWriter, run: SavedRun, log: RunLog) -> None:
        run.bytes_expected = self._bytes_expected()
        log.start(self.plan.recipe, run, self.plan.device)
        if self.plan.world.size > 1:
            kept = "; a run of several processes keeps nothing to continue from" if self.options.resume else ""
            self.events.on_note(f"{self.plan.world.size} processes share the work{kept}")
        if run.resumed:
            self.events.on_note(f"continuing behind block {run.resumed} of {run.total} of an interrupted run")
        if run.room.spill:
            self.events.on_note(f"hidden states are kept in {run.folder}: they do not fit in memory")
        self._blocks(writer, run, log)
        self.events.on_phase("writing")
        log.phase("writing")
        if not run.weights_done:
            rest = Outcome()
            _copy(self.plan.reader, writer, run.outcome, rest, self._left(run.outcome), {})
            writer.next_shard()
            run.all_written(rest)
        writer.finish_weights()
        manifest = self._finish(writer, run.outcome)
        self.events.on_phase("proving")
        log.phase("proving")
        run.proving = True
        _prove(writer, self.plan.reader, self.layout, run.outcome, manifest)
        run.proving = False
        run.whole(manifest.to_json())
        writer.publish()

    def told(self, result: QuantizeResult | None) -> QuantizeResult:
        """The result, which every process of a run has at the end; the others pass None."""
        found = self.plan.world.told(None if result is None else replace(result, calibration=None))
        assert found is not None
        return replace(found, calibration=self.calibration)

    def _blocks(self, writer: CheckpointWriter, run: SavedRun, log: RunLog) -> None:
        """Walk through what is not done yet."""
        if run.blocks == run.total:
            return
        for block in walk(self.plan, self.windows, self.events.on_progress, run.room, min(run.blocks, self.blocks)):
            done = Outcome()
            _write_block(block, self.plan.architecture.blocks, self.plan.reader, writer, self.layout, self.selection, done)
            run.block_done(done)
            log.block(run, done)

    def _left(self, outcome: Outcome) -> list[str]:
        return [n for n in self.plan.reader.tensors if n not in outcome.copied]

    def _bytes_expected(self) -> int:
        """Of all tensors of the result."""
        sizes, schemes, total = Sizes(self.layout), self.selection.schemes, 0
        for name, info in self.plan.reader.tensors.items():
            scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if scheme is None or len(info.shape) != 2:
                total += info.nbytes
            else:
                stored = sizes.tensors(scheme, (info.shape[0], info.shape[1]), info.dtype)
                total += sum(t.nbytes for t in stored.values())
        return total

    def _finish(self, writer: CheckpointWriter, outcome: Outcome) -> Manifest:
        return _finish(
            writer, self.plan.reader, self.plan.recipe, self.options, self.model, self.layout, self.selection, outcome,
            self.calibration, self.plan.dtype,
        )  # fmt: skip

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
            source_bytes=sum(i.nbytes for i in self.original.tensors.values()),
            bytes_written=bytes_written,
            calibration=self.calibration,
            warnings=tuple(_warnings(outcome, self.plan.recipe)),
            resumed=resumed,
        )


def refuse_quantized(reader: CheckpointReader) -> None:
    config = quantization_config(reader)
    if config is not None:
        raise UsageError(
            f"{reader.path} is already quantized ({config.get('quant_method')}); give the original FP16 or BF16 model"
        )


def _layout(name: str) -> Format:
    if name not in FORMATS:
        raise UsageError(f"format {name!r} does not exist; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def _positions(config: object) -> int | None:
    value = getattr(config, "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def calibration_of(
    reader: CheckpointReader, recipe: Recipe, options: QuantizeOptions, skeleton: PreTrainedModel
) -> Calibration | None:
    """The recipe's calibration windows; None where it names no text and needs none."""
    wanted = recipe.calibration
    if wanted.source is None:
        if options.evaluation:
            raise UsageError(
                f"--eval-text {options.evaluation} is compared with the calibration text, and this run has none; leave it out"
            )
        if not recipe.needs_text:
            return None
        raise SourceError(
            f"method {recipe.steps} needs a calibration text: --calibration file:PATH, "
            "jsonl:PATH#FIELD or hf:NAME[:CONFIG]:SPLIT[:FIELD] (or --method rtn, which needs none)"
        )
    documents = read_documents(wanted.source)
    evaluation: Documents | None = read_documents(options.evaluation) if options.evaluation else None
    return calibrate(
        documents,
        read_tokenizer(reader.path),
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=recipe.seed,
        packing=wanted.packing,
        evaluation=evaluation,
        vocab_size=int(skeleton.config.vocab_size),
        max_positions=_positions(skeleton.config),
    )


class deterministic:  # noqa: N801 - used as a with-statement verb
    """Seed torch and switch TF32 off for the length of a run; both are put back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._rng = torch.get_rng_state()
        self._precision = torch.get_float32_matmul_precision()
        torch.manual_seed(self.seed)
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self._rng)
        torch.set_float32_matmul_precision(self._precision)
        gc.collect()


def _write_block(
    block: BlockResult,
    blocks_path: str,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    layout: Format,
    selection: Selection,
    outcome: Outcome,
) -> None:
    """Pack a block's linears and carry its other tensors over."""
    for name, (weight, report) in block.weights.items():
        stored = reader.info(f"{name}.weight").dtype
        activations = selection.schemes[name].activations
        packed = layout.pack(weight, stored, activations)
        writer.add_together({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        outcome.packed_bytes += packed_bytes(packed)
        outcome.modules[name] = report
        outcome.shapes[name] = weight.shape
        outcome.schemes[name] = Scheme(weight.spec, weight.g_idx is not None, activations)
    if block.tuned is not None:
        outcome.tuned[f"{blocks_path}.{block.index}"] = block.tuned
    if block.scaled:
        outcome.scaled[f"{blocks_path}.{block.index}"] = block.scaled
    if block.index is not None:
        prefix = f"{blocks_path}.{block.index}."
        names = [n for n in reader.tensors if n.startswith(prefix)]
        _copy(reader, writer, outcome, outcome, names, block.changed)


def _copy(
    reader: CheckpointReader,
    writer: CheckpointWriter,
    before: Outcome,
    outcome: Outcome,
    names: list[str],
    changed: Mapping[str, Tensor],
) -> None:
    """Carry tensors that are not replaced by packed ones over, byte for byte; those that scaling changed, as it left them.

    ``before`` knows the linears that were packed; what is carried is noted in ``outcome``.
    """
    for name in names:
        if name.removesuffix(".weight") in before.modules and name.endswith(".weight"):
            continue
        tensor = changed[name] if name in changed else reader.read(name)
        if not all_finite(tensor):
            raise QuantizationError(f"{reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?")
        writer.add(name, tensor)
        outcome.copied[name] = sha256_tensor(tensor)


def _finish(
    writer: CheckpointWriter,
    reader: CheckpointReader,
    recipe: Recipe,
    options: QuantizeOptions,
    model: str,
    layout: Format,
    selection: Selection,
    outcome: Outcome,
    calibration: Calibration | None,
    dtype: torch.dtype,
) -> Manifest:
    """Everything beside the weights: config, tokenizer, recipe, manifest, model card."""
    writer.copy_side_files(reader.path)
    config = {k: v for k, v in reader.config.items() if k != "quantization_config"}
    # Sorted, so that the order in which a config is written says nothing of the run: a conversion there and back is equal.
    config["quantization_config"] = layout.config(dict(sorted(outcome.schemes.items())), selection.skipped)
    writer.write_json("config.json", config)
    for name, text in layout.side_files(config["quantization_config"]).items():
        writer.write_text(name, text)
    writer.write_text("recipe.yaml", recipe.to_yaml())
    weights = sum(o * i for o, i in outcome.shapes.values())
    manifest = Manifest(
        base_model=options.base_model or _base_name(model),
        base_weights_sha256=reader.digest(),
        recipe_sha256=recipe.sha256(),
        calibration=None if calibration is None else _calibration_entry(calibration),
        seed=recipe.seed,
        device=options.device,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=options.world.size,
        versions=versions(),
        bits_per_weight=outcome.packed_bytes * 8 / weights,
        rotation=RotationEntry(**asdict(reader.report)) if isinstance(reader, RotatedReader) else None,
        modules={n: _module_entry(r, outcome.shapes[n]) for n, r in outcome.modules.items()},
        tuned={n: TuneEntry(before=t.before, after=t.after, step=t.step, steps=t.steps) for n, t in outcome.tuned.items()},
        scaled={block: tuple(map(_scaled_entry, pairs)) for block, pairs in outcome.scaled.items()},
        skipped=dict(selection.skipped),
        files=file_hashes(writer.partial),
    )
    writer.write_text(MANIFEST, manifest.to_json())
    scheme = ", ".join(sorted({str(s) for s in outcome.schemes.values()}))
    card = model_card(manifest, recipe.to_yaml(), scheme, layout.name, front_matter(reader.path / "README.md"))
    writer.write_text("README.md", card)
    return manifest


def _base_name(model: str) -> str:
    """A hub name without its revision; of a folder only its own name, since a path means nothing on another machine."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.partition("@")[0]


def _calibration_entry(calibration: Calibration) -> dict[str, object]:
    summary = calibration.summary.as_dict()
    if summary["overlap"] is not None:
        summary["overlap"]["evaluation"] = _portable_source(summary["overlap"]["evaluation"])
    return {
        "source": _portable_source(calibration.source),
        "source_sha256": calibration.source_sha256,
        "ids_sha256": calibration.sha256,
        **summary,
    }


def _portable_source(source: str) -> str:
    """A text source without the folders of this machine: what identifies its content is the hash beside it."""
    kind, _, rest = source.partition(":")
    return f"{kind}:{rest.rpartition('/')[2]}" if kind != "hf" or Path(rest.partition(":")[0]).is_dir() else source


def _scaled_entry(report: PairReport) -> ScaledEntry:
    fields = {name: getattr(report, name) for name in ScaledEntry.model_fields}
    return ScaledEntry(**fields)


def _module_entry(report: ModuleReport, shape: tuple[int, int]) -> ModuleEntry:
    return ModuleEntry(
        spec=str(report.spec),
        shape=shape,
        digest=report.digest,
        weight_error=report.weight_error,
        output_error=report.output_error,
        damping=report.damping,
        dead=report.dead,
        tokens=report.tokens,
        dropped=report.dropped,
        fallback=report.fallback,
    )


def _prove(
    writer: CheckpointWriter, source: CheckpointReader, layout: Format, outcome: Outcome, manifest: Manifest
) -> None:
    """Open the written folder as a stranger would and compare it with the run, tensor by tensor.

    Raises:
        ProofError: naming what differs.
    """
    written = CheckpointReader(writer.partial)
    prove_modules(written, {n: r.digest for n, r in outcome.modules.items()})
    for name, expected in outcome.copied.items():
        if name not in written or sha256_tensor(written.read(name)) != expected:
            raise ProofError(f"{writer.partial}: tensor {name} is not what was to be written")
    lost = [
        n
        for n in source.tensors
        if n not in written and not (n.endswith(".weight") and n.removesuffix(".weight") in outcome.modules)
    ]
    if lost:
        raise ProofError(f"{writer.partial}: tensors of the original are missing: {', '.join(lost[:3])}")
    packed = {f"{m}.{s}" for m in outcome.modules for s in layout.tensor_suffixes()}
    extra = sorted(written.tensors.keys() - outcome.copied.keys() - packed)
    if extra:
        raise ProofError(f"{writer.partial} has tensors that nobody wrote: {', '.join(extra[:3])}")
    for name, expected in manifest.files.items():
        if sha256_file(writer.partial / name) != expected:
            raise ProofError(f"{writer.partial / name} changed while it was being written")


def _warnings(outcome: Outcome, recipe: Recipe) -> Iterator[str]:
    """What a user should know though the run succeeded."""
    for told in told_fallbacks({n: r.fallback for n, r in outcome.modules.items()}):
        yield f"{told}; give more calibration text, or show every token to every expert (--all-experts)"
    for report in outcome.modules.values():
        if report.damping is not None and report.damping > recipe.gptq.damping:
            yield (
                f"{report.name}: Cholesky failed at damping {recipe.gptq.damping:g}, {report.damping:g} was used; "
                "more calibration tokens make this rarer"
            )
        if report.dropped:
            yield f"{report.name}: {report.dropped} of {report.dropped + report.tokens} calibration tokens were NaN or Inf"
        if report.dead:
            yield f"{report.name}: {report.dead} input channels were zero on all calibration tokens; rounded to nearest"
