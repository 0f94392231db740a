"""Running a suite: one Report per model and protocol, each kept by the hash of what it depends on,
so a run can go on.

What that is, is in :mod:`llmquant_eval.suites.measurements`. Killed at any instant, the same suite
measures only what is missing; changed, only what the change touches. Labels and paths are written
into the Report when it leaves the cache. Results of a server are measured every time.

Tasks run once for each model, the reference included, and are paired item by item afterwards. Speed
and memory are measured once for each model, first of all. The noise floor belongs to the reference
alone, and one report of a ranking has it.

A model that cannot be measured does not stop the others: what failed is handed back beside what
succeeded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

import llmquant
from llmquant import replace_file
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.paired import paired_tasks
from llmquant_eval.report.results import Cost, ModelResult
from llmquant_eval.report.schema import Report, read_report
from llmquant_eval.run.cost import CostRun, measure_cost
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.suites.measurements import Measurement, Measurements
from llmquant_eval.suites.models import PreparedModel, prepare_models
from llmquant_eval.suites.outdated import suite_dtype
from llmquant_eval.suites.schema import Suite


@dataclass(slots=True)
class SuiteProgress:
    """Callbacks of a run: ``overall(what, done, to do)`` counts work that was not cached, ``stage``
    is inside one step; ``tell`` gets what is said while a server is waited for."""

    overall: Callable[[str, int, int], None] = lambda what, done, total: None
    stage: Callable[[str, int, int], None] = lambda stage, done, total: None
    tell: Callable[[str], None] = lambda note: None


@dataclass(frozen=True, slots=True)
class SuiteOutcome:
    """The reports by file name, how many measurements were made now, which failed and why, and
    where each model lies."""

    reports: dict[str, Report]
    measured: int
    failures: dict[str, str]
    folders: dict[str, Path]


def run_suite(suite: Suite, cache: Path, progress: SuiteProgress | None = None) -> SuiteOutcome:
    """Measure what is not in the cache; returns the reports of all of it.

    Raises:
        UsageError: what :func:`prepare_models` refuses, or a text or a protocol that cannot be.
        LlmquantError: what quantizing raises, or what measuring raises if nothing at all could be
            measured.
    """
    progress = progress or SuiteProgress()
    llmquant.set_threads(suite.threads)
    texts = {t.name: llmquant.read_documents(t.source).sha256 for t in suite.texts}
    reference, models = prepare_models(
        suite, cache, lambda what, done, total: progress.overall(f"quantizing {what}", done, total)
    )
    wanted = Measurements(suite, cache, reference, models, texts)
    return _Run(suite, cache, progress, reference, models, wanted).finish()


@dataclass(slots=True)
class _Run:
    suite: Suite
    cache: Path
    progress: SuiteProgress
    reference: PreparedModel | None
    models: Sequence[PreparedModel]
    wanted: Measurements
    raw: dict[str, Report] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    failures: dict[str, LlmquantError] = field(default_factory=dict)

    def finish(self) -> SuiteOutcome:
        measurements = self.wanted.all()
        for measurement in measurements:
            if (stored := self._stored(measurement)) is not None:
                self.raw[measurement.name] = stored
        missing = self._missing(measurements)
        to_measure = self._costs_missing()
        steps = [
            (f"speed of {model.label}", partial(self._measure_cost, model)) for model in to_measure
        ]
        steps += [
            (
                f"{measurement.model.label}: {measurement.protocol}",
                partial(self._measure, measurement),
            )
            for measurement in missing
        ]
        for done, (what, measure) in enumerate(steps):
            self.progress.overall(what, done, len(steps))
            try:
                measure()
            except LlmquantError as e:
                self.failures[what] = e
        self.progress.overall("done", len(steps), len(steps))
        reports = {
            measurement.name: self._finished(measurement)
            for measurement in measurements
            if self._is_row(measurement)
        }
        if self.failures and not reports:
            raise next(iter(self.failures.values()))
        failures = {what: str(error) for what, error in self.failures.items()}
        folders = {m.label: llmquant.resolve(m.source) for m in self._local()}
        return SuiteOutcome(reports, len(steps) - len(failures), failures, folders)

    def _local(self) -> list[PreparedModel]:
        """The models that are folders, the reference first."""
        everyone = [*self.models] if self.reference is None else [self.reference, *self.models]
        return [model for model in everyone if model.weights is not None]

    def _path(self, key: str) -> Path:
        return self.cache / "results" / f"{key}.json"

    def _stored(self, measurement: Measurement) -> Report | None:
        """A result of an earlier run; one of another version of the Report is measured again."""
        if measurement.key is None or not self._path(measurement.key).is_file():
            return None
        try:
            return read_report(self._path(measurement.key))
        except UsageError:
            return None

    def _missing(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        """What must be measured, the first of each ranking with the noise floor unless some report
        has it."""
        wanted = [measurement for measurement in measurements if measurement.name not in self.raw]
        if not self.suite.noise_floor or self.reference is None:
            return wanted
        for ranking in {(u.text, u.protocol): None for u in measurements if u.text is not None}:
            inside = [u for u in measurements if (u.text, u.protocol) == ranking]
            if any(self.raw[u.name].noise_floor is not None for u in inside if u.name in self.raw):
                continue
            first = next((u for u in inside if u in wanted), inside[0])
            with_floor = replace(first, request=replace(first.request, noise_floor=True))
            wanted = (
                [with_floor if u is first else u for u in wanted]
                if first in wanted
                else [*wanted, with_floor]
            )
        return wanted

    def _measure(self, measurement: Measurement) -> None:
        report = evaluate(measurement.request, self.progress.stage, self.progress.tell)
        self.raw[measurement.name] = report
        if measurement.key is not None:
            self._keep(self._path(measurement.key), report.to_json())

    def _keep(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text)
        except OSError as e:
            raise LlmquantError(
                f"{path} cannot be written, and a suite keeps its results there: {e}"
            ) from e

    def _costs_missing(self) -> list[PreparedModel]:
        if not self.suite.cost:
            return []
        for model in self._local():
            try:
                self.costs[model.label] = Cost.model_validate_json(
                    self._cost_path(model).read_text(encoding="utf-8")
                )
            except (OSError, ValidationError):
                continue
        return [m for m in self._local() if m.label not in self.costs]

    def _cost_path(self, model: PreparedModel) -> Path:
        return self._path(self.wanted.cost_key(model))

    def _measure_cost(self, model: PreparedModel) -> None:
        suite = self.suite
        device = str(llmquant.parse_device(suite.device))
        run = CostRun(suite_dtype(suite), device, suite.kernel, suite.threads)
        cost = measure_cost(llmquant.resolve(model.source), run)
        self.costs[model.label] = cost
        self._keep(self._cost_path(model), cost.model_dump_json())

    def _is_row(self, measurement: Measurement) -> bool:
        """Measured, and more than the reference's own tasks: those stand in every model's report,
        and alone are none."""
        if measurement.name not in self.raw or measurement.model is self.reference:
            return False
        return (
            measurement.text is not None
            or self.reference is None
            or replace(measurement, model=self.reference).name in self.raw
        )

    def _finished(self, measurement: Measurement) -> Report:
        """The report as it is handed out: labels, sources, commands and costs put in."""
        report = self.raw[measurement.name]
        base = None if self.reference is None else self.reference.label
        results = [
            self._result(m, self.reference if m.role == "reference" else measurement.model)
            for m in report.models
        ]
        if measurement.text is None and self.reference is not None:
            results = self._paired(measurement, results[0])
        source = {} if measurement.text is None or report.text is None else {
            "text": report.text.model_copy(update={"source": measurement.text.source})
        }  # fmt: skip
        return report.model_copy(
            update={"models": results, "reference": base, "command": self._command(measurement), **source}
        )  # fmt: skip

    def _result(self, result: ModelResult, model: PreparedModel | None) -> ModelResult:
        assert model is not None  # a report has a reference only if the suite has
        changes = {"label": model.label, "source": model.shown, "cost": self.costs.get(model.label)}
        return result.model_copy(update=changes)

    def _paired(self, measurement: Measurement, result: ModelResult) -> list[ModelResult]:
        assert self.reference is not None  # asked by the caller
        raw = self.raw[replace(measurement, model=self.reference).name].models[0]
        base = self._result(raw, self.reference).model_copy(update={"role": "reference"})
        return [
            base,
            result.model_copy(update={"tasks": paired_tasks(result.tasks, base.tasks)}),
        ]

    def _command(self, measurement: Measurement) -> str:
        """One line that makes the model and measures it, with the names that are shown."""
        request = replace(
            measurement.request,
            candidates=(measurement.model.shown,),
            cache=None,
            cache_form=None,
            reference=None if self.reference is None else self.reference.shown,
            cost=self.suite.cost,
        )
        if self.suite.cache_form is not None:
            request = replace(request, cache="out/reference", cache_form=self.suite.cache_form)
        return " && ".join(filter(None, (measurement.model.made_by, request.command())))
