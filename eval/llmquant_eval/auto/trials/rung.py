"""One rung: made, measured, and kept on disk, so that neither is done twice.

Making is ``llmquant.quantize`` (after ``llmquant.allocate`` for ``mixed``), which resumes from its
own journal. Measuring is ``llmquant eval`` against the original's distributions, which are on disk
since the baseline. Tasks run on the candidate alone and are paired with the baseline's answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

import llmquant
from llmquant import AllocateOptions, Events, QuantizeOptions, Recipe
from llmquant.errors import FormatError, LlmquantError, ProofError, QuantizationError, UsageError
from llmquant_eval.auto.answer.render import ORIGINAL
from llmquant_eval.auto.answer.screen import Screen
from llmquant_eval.auto.ladder import SUPPORTED, UNQUANTIZED, VLLM_WIDTHS, Step
from llmquant_eval.auto.request import AutoRequest
from llmquant_eval.auto.schema import Baseline, Made, Measured, Spent, Split
from llmquant_eval.auto.split import check_disjoint
from llmquant_eval.auto.trials.watch import Limit, Watch
from llmquant_eval.auto.trials.work import Meter, Work, key_of
from llmquant_eval.report.paired import paired_tasks
from llmquant_eval.report.results import ModelResult
from llmquant_eval.run.cost import CostRun, measure_cost
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request

# Of other threads or another processor.
_OTHER_MACHINE = "its saved state does not fit this machine; starts over"
_BROKEN = (QuantizationError, FormatError, ProofError)
"""What says of a rung that it cannot be made; the search continues with the next."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What all rungs of a search have in common.

    Attributes:
        facts: what every record depends on.
        evaluation: of a candidate that is yet to be named.
    """

    request: AutoRequest
    work: Work
    split: Split
    facts: Mapping[str, object]
    evaluation: Request
    screen: Screen

    def baseline(self) -> Baseline:
        """The original's scores; its distributions are on disk afterwards."""
        key = key_of(self.facts)
        found = self.work.baseline(key)
        if found is not None:
            return found
        meter = Meter()
        model = self.request.model
        request = replace(self.evaluation, candidates=(model,), tasks=self.request.tasks)
        report = evaluate(
            request, lambda stage, done, total: self.screen.doing(ORIGINAL, stage, done, total)
        )
        baseline = Baseline(key=key, spent=meter.spent(), report=report)
        self.work.keep_baseline(baseline)
        return baseline

    def key(self, step: Step) -> str:
        """Of a rung's record: its recipe without the path of its text, and the text's hash."""
        recipe = step.recipe.updated({"calibration.source": None})
        if recipe.qat is not None:
            recipe = recipe.updated({"qat.source": None})
        text = self.split.calibration.rows_sha256 if step.recipe.reads_text else None
        engine = self.request.engine if step.target is not None else None
        return key_of(
            {
                **self.facts,
                "recipe": recipe.sha256(),
                "calibration": text,
                "target": step.target,
                "engine": engine,
            }
        )

    def measured(self, step: Step) -> Measured | None:
        """What an earlier run has measured of the rung."""
        return self.work.measured(step.folder, self.key(step))

    def run(self, step: Step, baseline: Baseline, elsewhere: float) -> Measured:
        """Make the rung and measure it; ``elsewhere`` are the seconds that the rest of the search
        has taken.

        Raises:
            BudgetSpentError: the time budget ended.
        """
        key = self.key(step)
        meter = Meter(self.work.begin(step.folder, key))
        limit = Limit(self.request.time_budget, elsewhere)
        watch = Watch(self.work, self.screen, step, key, meter, limit)
        watch.check()
        try:
            made = self.made(step, watch)
            model = self._score(step, baseline, watch)
        except _BROKEN as e:
            measured = Measured(key=key, quantizing=meter.spent(), failure=str(e))
        else:
            total = meter.spent()
            measuring = Spent(
                wall=max(0.0, total.wall - made.quantizing.wall),
                cpu=max(0.0, total.cpu - made.quantizing.cpu),
            )
            measured = Measured(
                key=key,
                quantizing=made.quantizing,
                measuring=measuring,
                recipe=made.recipe,
                overlap=made.overlap,
                model=model,
            )
        self.work.keep_measured(step.folder, measured)
        return measured

    def made(self, step: Step, watch: Watch | None = None) -> Made:
        """The rung's folder, made if it is not there."""
        key, folder = self.key(step), self.work.candidate(step.folder)
        found = self.work.made(step.folder, key)
        if found is not None and folder.is_dir() and _sha256(folder) == found.weights_sha256:
            return found
        if step.recipe.reads_text:
            check_disjoint(self.split)
        watch = watch or Watch(self.work, self.screen, step, key, Meter(), None)
        events = Events(on_progress=watch.block, on_phase=watch.phase, on_warning=self.screen.note)
        recipe = self._recipe(step, events)
        result = self._quantized(step, folder, recipe, events)
        calibration = result.calibration
        if calibration is not None and calibration.source_sha256 != (
            self.split.calibration.rows_sha256
        ):
            raise LlmquantError(
                f"{step.name} was calibrated on another text than {self.split.calibration.source}; run the same command again"
            )
        overlap = None if calibration is None else calibration.summary.overlap
        made = Made(
            key=key,
            quantizing=watch.meter.spent(),
            recipe=result.recipe.to_yaml(),
            overlap=None if overlap is None else overlap.fraction,
            weights_sha256=_sha256(folder),
        )
        self.work.keep_made(step.folder, made)
        watch.save()
        return made

    def _recipe(self, step: Step, events: Events) -> Recipe:
        """The rung's recipe; an allocation and what it measured are kept, so that a killed run does
        nothing twice."""
        if step.target is None:
            return step.recipe
        kept = self.work.rung(step.folder) / "recipe.yaml"
        if kept.is_file():
            return llmquant.load_recipe(kept)
        engine = self.request.engine
        widths = (*(VLLM_WIDTHS if engine == "vllm" else SUPPORTED), UNQUANTIZED)
        state = kept.with_name("allocation.measured")
        options = AllocateOptions(
            step.target, widths, engine=engine, device=self.request.device, store_dtype="auto",
            state=state,
        )  # fmt: skip
        model = self.request.model
        try:
            recipe = llmquant.allocate(model, step.recipe, options, events).recipe
        except UsageError:
            if not state.is_file():
                raise
            self.screen.note(f"{step.name}: {_OTHER_MACHINE}")
            state.unlink()
            recipe = llmquant.allocate(model, step.recipe, options, events).recipe
        llmquant.write_file(kept, yaml.safe_dump(recipe.model_dump(mode="json")))
        state.unlink(missing_ok=True)
        return llmquant.load_recipe(kept)

    def _quantized(
        self, step: Step, folder: Path, recipe: Recipe, events: Events
    ) -> llmquant.QuantizeResult:
        heldout = self.split.heldout.source if recipe.needs_text else None
        options = QuantizeOptions(
            device=self.request.device,
            store_dtype="auto",
            overwrite=True,
            evaluation=heldout,
            max_memory=self.request.max_memory,
        )
        rounded = f".{folder.name}.start"
        states = (f".{folder.name}.resume", f".{rounded}.resume", rounded, f".{folder.name}.qat")
        saved = any(folder.with_name(name).exists() for name in states)
        try:
            return llmquant.quantize(self.request.model, folder, recipe, options, events)
        except UsageError:
            if not saved:
                raise
            self.screen.note(f"{step.name}: {_OTHER_MACHINE}")
            again = replace(options, restart=True)
            return llmquant.quantize(self.request.model, folder, recipe, again, events)

    def _score(self, step: Step, baseline: Baseline, watch: Watch) -> ModelResult:
        """The candidate's result, its tasks paired with the original's."""
        folder = str(self.work.candidate(step.folder))
        asked = replace(self.evaluation, candidates=(folder,), cost=False)
        report = evaluate(asked, watch.stage)
        result = next(m for m in report.models if m.role == "candidate")
        if self.request.fastest:  # of the candidate alone: the original's is known
            settings = report.settings
            run = CostRun(settings.dtype, settings.device, settings.kernel, self.request.threads)
            cost = measure_cost(self.work.candidate(step.folder), run)
            result = result.model_copy(update={"cost": cost})
        if self.request.tasks is None:
            return result
        only = Request(
            (folder,),
            dtype=self.evaluation.dtype,
            device=self.evaluation.device,
            kernel=self.evaluation.kernel,
            threads=self.evaluation.threads,
            tasks=self.request.tasks,
            include_path=self.request.include_path,
            limit=self.request.limit,
            cost=False,
            noise_floor=False,
        )
        tasks = evaluate(only, watch.stage).models[0].tasks
        return result.model_copy(
            update={"tasks": paired_tasks(tasks, baseline.report.models[0].tasks)}
        )


def common_facts(
    request: AutoRequest, split: Split, evaluation: Request, dtype: str, versions: Mapping[str, str]
) -> dict[str, object]:
    """What every record of a search depends on."""
    from llmquant_eval.texts.tokens import tokenizer_sha256

    model = llmquant.resolve(request.model)
    ignored = {"candidates", "reference", "cache", "text", "threads", "tasks", "include_path"}
    asked = {k: getattr(evaluation, k) for k in Request.__dataclass_fields__ if k not in ignored}
    return {
        "model": llmquant.inspect(model).weights_sha256,
        "tokenizer": tokenizer_sha256(llmquant.load_tokenizer(model)),
        "heldout": split.heldout.rows_sha256,
        "evaluation": asked | {"dtype": dtype},
        "tasks": [_task_fact(task) for task in (request.tasks or "").split(",") if task],
        "items": [request.limit, request.include_path],
        "versions": dict(versions),
    }


def _task_fact(task: str) -> str:
    """A task's name with its file's content instead of the path."""
    name, equals, file = task.partition("=")
    if not equals or not Path(file).is_file():
        return task
    return f"{name}={hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def _sha256(folder: Path) -> str:
    return llmquant.inspect(folder).weights_sha256


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers' own bars would be drawn across the table."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
