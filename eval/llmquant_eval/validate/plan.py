"""Before a run: everything that can be refused is refused, then the model is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import llmquant
from llmquant.errors import UsageError
from llmquant_eval.decide.read import read_results
from llmquant_eval.decide.results import ItemResults, unlike
from llmquant_eval.models.endpoint import Contact
from llmquant_eval.models.resolve import ServedModel, resolve_models
from llmquant_eval.report.files import check_file
from llmquant_eval.validate.data import Data
from llmquant_eval.validate.engines.engine import Engine, Generation
from llmquant_eval.validate.metrics.own import load_scorer
from llmquant_eval.validate.metrics.registry import NAMES, chosen
from llmquant_eval.validate.run import Progress, Run, Tell, Wanted, journal_of


@dataclass(frozen=True, slots=True)
class Execution:
    """Where and how the model runs; ``tokenizer`` and ``retry_for`` are for servers. ``observing``:
    answers are observed for a drift profile."""

    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    batch_size: int | None = None
    tokenizer: str | None = None
    retry_for: float | None = None
    observing: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is to be scored, by name: metrics of ours (none: all), scorers of the user's, and those
    of their metrics of which less is better."""

    metrics: Sequence[str] = ()
    scorers: Sequence[str] = ()
    lower: Sequence[str] = ()


def check_output(output: Path, *read: str | None, overwrite: bool) -> None:
    """Raises UsageError where results cannot or must not be written, among them what is ``read``;
    an unfinished run may go on."""
    check_file(output, llmquant.FileKind.ITEMS, *read)
    if output.exists() and not overwrite and not journal_of(output).exists():
        raise UsageError(
            f"{output} has results already; give another --output, or --overwrite to replace them"
        )


def check_profile(
    path: Path | None, output: Path, data: Data, reference: str | None, *, overwrite: bool
) -> None:
    """Raises UsageError where a drift profile cannot or must not be written beside ``output``."""
    from llmquant import DriftProfile, FileKind

    if path is None:
        return
    check_file(path, FileKind.PROFILE, data.source, reference)
    if path.resolve() == output.resolve():
        raise UsageError(f"--profile {path} is --output too; give two files")
    if path.exists() and not overwrite:
        raise UsageError(
            f"--profile {path} is there already; give another file, or --overwrite to replace it"
        )
    if len(data.examples) < DriftProfile.FEWEST:
        raise UsageError(
            f"--profile needs {DriftProfile.FEWEST} prompts or more, and {data.source} has "
            f"{len(data.examples)}; give more, or leave --profile out"
        )


def read_reference(source: str, data: Data, generation: Generation) -> ItemResults:
    """Results of another model on the same data.

    Raises:
        UsageError: they are of other data, were asked for in another way, or are no results.
    """
    reference = read_results(source)
    if reference.data_sha256 not in (None, data.sha256):
        raise UsageError(
            f"--reference {source} was measured on other data than {data.source} is now ({reference.data}); "
            "measure both on the same file with the same --limit"
        )
    if said := unlike(reference.conditions, generation.conditions(data.system)):
        raise UsageError(
            f"--reference {source} was not asked alike, {said} here; measure both with the same options"
        )
    return reference


def plan_run(
    model: str,
    data: Data,
    generation: Generation,
    execution: Execution,
    names: Chosen,
    progress: Progress,
    tell: Tell,
) -> Run:
    """A run that is ready; what cannot be measured is said.

    Raises:
        UsageError: the request cannot be right.
        LlmquantError: the model or the server cannot be used.
    """
    llmquant.set_threads(execution.threads)
    scorers = [load_scorer(source) for source in names.scorers]
    chosen(names.metrics, thinks=True)  # a wrong name is told before a server is asked
    engine = _engine(model, generation, execution, tell)
    metrics = chosen(names.metrics, thinks=engine.thinks)
    fitting = [m for m in metrics if any(map(m.applies, data.examples))]
    _check_fit(names, [m.name for m in fitting], data)
    without = [m.name for m in fitting if not m.generates and not engine.scores]
    if without:
        if lacking := [name for name in without if name in names.metrics]:
            raise UsageError(
                f"--metric {lacking[0]} needs log-probabilities of a server; give --tokenizer MODEL"
            )
        tell(f"left out, because it needs log-probabilities (--tokenizer): {', '.join(without)}")
    for key in data.unknown:
        tell(f"key {key!r} of {data.source} is not used{'; scorers see it' if scorers else ''}")
    kept = [m for m in fitting if m.name not in without]
    wanted = Wanted(kept, generation, scorers, names.lower, execution.observing)
    return Run(engine, data, wanted, progress, tell)


def _check_fit(names: Chosen, fitting: Sequence[str], data: Data) -> None:
    """Raises UsageError for a metric that no row has what it takes for, or a scorer's that has a
    name of ours."""
    for name in names.metrics:
        if name not in fitting:
            raise UsageError(
                f"--metric {name}: no row of {data.source} has what it needs; "
                f"rows have: {', '.join(fitting) or 'nothing else that was asked for'}"
            )
    for name in names.lower:
        if name in NAMES:
            raise UsageError(f"--lower-is-better {name} is for metrics of your own scorers")


def _engine(model: str, generation: Generation, execution: Execution, tell: Tell) -> Engine:
    from transformers.utils import logging as transformers_logging

    from llmquant_eval.validate.engines.local import TOGETHER, LocalEngine
    from llmquant_eval.validate.engines.served import ServedEngine

    transformers_logging.disable_progress_bar()
    (found,) = resolve_models([model], Contact(patience=execution.retry_for, tell=tell))
    if isinstance(found, ServedModel):
        if execution.observing:
            raise UsageError(
                f"--profile needs the model's own tokens, which {model} does not show; give the model folder, "
                "or make the profile while serving: llmquant monitor LOG --profile FILE"
            )
        return ServedEngine(found, generation, execution.tokenizer)
    if execution.tokenizer is not None:
        raise UsageError("--tokenizer is for served models; a model folder has its own")
    where = (execution.dtype, execution.device, execution.kernel)
    together = execution.batch_size or TOGETHER
    return LocalEngine(found, generation, where, together, observing=execution.observing)
