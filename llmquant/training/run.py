"""qat: from a quantized folder and its original to a proved folder that is nearer to the original.

Everything that can be refused is refused before a weight is trained: the destination, a teacher
that is quantized or has another vocabulary, too little text, targets that take more disk than
allowed, a layout that cannot hold the result
(:mod:`llmquant.training.prepared`). Then the teacher is asked once, the loop runs
(:mod:`llmquant.training.loop`), and the best state is written and proved. What a killed run had
done is continued and ends with the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llmquant.checkpoint.atomic import check_destination, lock_folder
from llmquant.errors import QuantizationError, UsageError
from llmquant.quantization.prepare import deterministic
from llmquant.recipe_sections import QAT
from llmquant.runtime import signals as interruption
from llmquant.training.history import TrainingLog
from llmquant.training.options import QatEvents, QatOptions, QatResult
from llmquant.training.prepared import prepare
from llmquant.training.state.saved import SavedTraining


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
        UsageError: the request is impossible as written (destination, text, a reference that is
            quantized or has another tokenizer or vocabulary), or what is to be resumed was
            another run.
        CheckpointError, ArchitectureError, FormatError: a model that cannot be read, or a layout
            that cannot hold the result.
        QuantizationError: the start or the reference gives NaN or infinite logits.
        ProofError: what was written is not what was trained.
    """
    options, events = options or QatOptions(), events or QatEvents()
    destination = Path(os.path.abspath(output))
    if not options.overwrite:
        SavedTraining(destination).forget_used(destination)
    check_destination(destination, options.overwrite)
    prepared = prepare(
        model, destination, section, reference, seed, layout, options, events.on_phase
    )
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
        with _kept(saved, section, destination, first=first), deterministic(seed):
            return prepared.execute(Path(output), saved, log, events)


@contextmanager
def _kept(saved: SavedTraining, section: QAT, destination: Path, *, first: bool) -> Iterator[None]:
    """What a training that ends early leaves: nothing where the same command would meet the same
    again; after an interruption, the sentence that says how far it came."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as e:  # native code makes others of an interruption
        kept = saved.load()
        if first and kept is None and isinstance(e, UsageError | QuantizationError):
            saved.remove()
        if not interruption.stops(e):
            raise
        taken = 0 if kept is None else kept[0].step
        raise KeyboardInterrupt(
            f"{taken} of {section.steps} steps are saved next to {destination.name}; "
            "run the same command to resume, or add --restart to start over"
        ) from e
