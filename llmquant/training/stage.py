"""quantize and rerun, for recipes with a ``qat`` section too: round as the rest of the recipe says,
then train what came out.

What is rounded lies in ``.NAME.start`` beside the destination until the trained folder has its
name, so that an interrupted run resumes in whichever of the two it was. The result is byte for byte
that of ``llmquant quantize`` followed by ``llmquant qat``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from llmquant.checkpoint.atomic import check_destination
from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.manifest import read_manifest
from llmquant.data.sources import refuse_texts
from llmquant.errors import UsageError
from llmquant.quantization import rerun as repetition
from llmquant.quantization.options import Events, QuantizeOptions, QuantizeResult
from llmquant.quantization.plan import Progress
from llmquant.quantization.rerun import Comparison, recorded_recipe
from llmquant.quantization.run import quantize as round_only
from llmquant.quantization.state.resume import state_of
from llmquant.recipe import Recipe
from llmquant.training.beforehand import check_recipe
from llmquant.training.options import QatEvents, QatOptions
from llmquant.training.run import qat
from llmquant.training.state.rounded import RoundedFolder, facts_of
from llmquant.training.state.saved import SavedTraining


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    recipe: Recipe,
    options: QuantizeOptions | None = None,
    events: Events | None = None,
    training: tuple[QatOptions, QatEvents] | None = None,
) -> QuantizeResult:
    """Quantize a checkpoint into a new folder, or continue doing so; train it where the recipe has
    a ``qat`` section.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        output: folder to make; appears whole, after its proof, or not at all. A run that was killed
            leaves ``.NAME.partial`` and ``.NAME.resume`` beside it; one that trains,
            ``.NAME.start`` and ``.NAME.qat``.
        recipe: what to do.
        options: where to do it.
        events: callbacks.
        training: how and with which callbacks it is trained; default: as ``options`` and ``events``
            say.

    Raises:
        UsageError: the request is impossible as written (destination, recipe, text source, group
            size, device), or what is to be continued was another run.
        CheckpointError, ArchitectureError: the model cannot be read or walked.
        QuantizationError: NaN or Inf in weights, activations or results.
        ProofError: what was written is not what was computed.
    """
    if recipe.qat is None:
        return round_only(model, output, recipe, options, events)
    options, events = options or QuantizeOptions(), events or Events()
    if options.world.size > 1:
        raise UsageError("a recipe that trains does not run in several processes; start one")
    how, told = training or (_options(options), _events(events))
    destination = Path(os.path.abspath(output))
    start = RoundedFolder.of(destination)
    if not options.overwrite:
        start.forget_used(destination)
        SavedTraining(destination).forget_used(destination)
    check_destination(destination, options.overwrite)
    recipe = recipe.with_training_text()
    assert recipe.qat is not None
    _refuse_read(destination, model, recipe, how)
    check_recipe(model, recipe, how)
    rounded = _rounded(model, start, recipe.updated({"qat": None}), options, events)
    how = replace(how, overwrite=options.overwrite, restart=options.restart)
    done = qat(
        start.path, output, recipe.qat, reference=model, seed=recipe.seed, options=how, events=told
    )
    start.forget()
    trained = rounded.recipe.updated({"qat": recipe.qat.model_dump(mode="json")})
    return replace(
        rounded,
        path=Path(output),
        recipe=trained,
        bytes_written=done.bytes_written,
        warnings=(*rounded.warnings, *done.warnings),
        trained=done.record,
    )


def _refuse_read(
    destination: Path, model: str | os.PathLike[str], recipe: Recipe, how: QatOptions
) -> None:
    """Raises UsageError for a destination that holds the model or a text: what rounds before the
    training has another."""
    assert recipe.qat is not None  # it is what trains
    refuse_source(destination, model)
    texts = (recipe.calibration.source, recipe.qat.source, recipe.qat.heldout_source)
    refuse_texts(destination, *texts, how.evaluation)


def _rounded(
    model: str | os.PathLike[str],
    start: RoundedFolder,
    recipe: Recipe,
    options: QuantizeOptions,
    events: Events,
) -> QuantizeResult:
    """The folder that is trained; made now, or by the run that is resumed.

    Raises:
        UsageError: it was made by another run; says what differs.
    """
    facts, calibration = facts_of(model, recipe, options)
    if not options.restart and start.made_by(facts):
        if calibration is not None:
            events.on_calibration(calibration)
        events.on_note("the linears were rounded before the run was interrupted; training them")
        return start.result(model, calibration)
    start.begin(facts)
    try:
        rounded = round_only(model, start.path, recipe, replace(options, overwrite=True), events)
    except BaseException:
        if not start.path.exists() and not state_of(start.path).exists():
            start.forget()  # nothing was kept that a note could be of
        raise
    start.note(facts, rounded.warnings)
    return rounded


def rerun(
    folder: Path,
    model: str | os.PathLike[str] | None = None,
    *,
    calibration: str | None = None,
    device: str | None = None,
    max_shard_size: int = 5_000_000_000,
    events: Events | None = None,
) -> Comparison:
    """Quantize again, beside ``folder`` and for the length of the call, train again where its
    recipe does, and compare every file and every linear.

    Args:
        folder: written by ``llmquant quantize`` or ``llmquant qat``.
        model: the original; default: the name that the manifest gives.
        calibration: its calibration text, if it is not where the recipe says; the training text
            too, where both are one.
        device: default: the recorded one.
        max_shard_size: as in the first run.
        events: callbacks of the run.

    Raises:
        UsageError: the folder was converted or has no recipe, or the model or the text is not the
            recorded one.
    """
    then = read_manifest(folder)

    def again(
        source: Path, path: Path, recipe: Recipe, options: QuantizeOptions, told: Events | None
    ) -> None:
        told = told or Events()
        if then.qat is not None and recipe.qat is not None and calibration is not None:
            before = recorded_recipe(folder, then)
            if before.qat is not None and before.qat.source == before.calibration.source:
                recipe = recipe.updated({"qat.source": calibration})
        how = _options(options)
        if then.qat is not None:
            how = replace(how, device=device or then.qat.device, dtype=then.qat.dtype)
        quantize(source, path, recipe, options, told, (how, _events(told)))

    return repetition.rerun(
        folder,
        model,
        calibration=calibration,
        device=device,
        max_shard_size=max_shard_size,
        events=events,
        run=again,
    )


def _options(options: QuantizeOptions) -> QatOptions:
    log = options.log
    return QatOptions(
        device=options.device,
        evaluation=options.evaluation,
        overwrite=options.overwrite,
        restart=options.restart,
        log=None if log is None else log.with_name(log.name.replace(".quantize.", ".qat.")),
    )


def _events(events: Events) -> QatEvents:
    """A run's callbacks, told of training."""
    return QatEvents(
        on_note=events.on_note,
        on_phase=lambda phase, done, total: events.on_progress(Progress(done, total, phase)),
        on_step=lambda s: events.on_progress(
            Progress(s.step, s.steps, f"training, loss {s.loss:.4f}, held-out KL {s.heldout:.4f}")
        ),
    )
