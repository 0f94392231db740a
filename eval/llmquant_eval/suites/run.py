"""Running a suite: one Report per model and protocol, each kept by the hash of what it depends on,
so a run can go on.

A result's key covers the weights and tokenizers of the model and its reference, the text, the
protocol, how much of the text, dtype, device, kernel, versions and processor. Killed at any
instant, the same suite measures only what is missing; changed, only what the change touches. Labels
and paths are not in the key: they are written into the Report when it leaves the cache. A server
tells no weights, so its results are measured every time.

Tasks run once for each model, the reference included, and are paired item by item afterwards. Speed
and memory are measured once for each model, first of all. The noise floor belongs to the reference
alone, and one report of a ranking has it.

A model that cannot be measured does not stop the others: what failed is handed back beside what
succeeded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report import machine
from llmquant_eval.report.files import replace_file
from llmquant_eval.report.paired import with_pairs
from llmquant_eval.report.results import Cost, ModelResult
from llmquant_eval.report.schema import Report, read_report
from llmquant_eval.run.cost import CostRun, measure_apart
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.suites.models import PreparedModel, digest, prepare_models
from llmquant_eval.suites.outdated import suite_dtype
from llmquant_eval.suites.schema import Suite, SuiteText, file_name


@dataclass(slots=True)
class SuiteProgress:
    """Callbacks of a run: ``overall(what, done, to do)`` counts work that was not cached, ``stage``
    is inside one step."""

    overall: Callable[[str, int, int], None] = lambda what, done, total: None
    stage: Callable[[str, int, int], None] = lambda stage, done, total: None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model under one protocol on one text, or (``text`` None) on the suite's tasks. ``key``
    None: never cached."""

    model: PreparedModel
    request: Request
    text: SuiteText | None
    protocol: str
    key: str | None

    @property
    def name(self) -> str:
        """File name of its report."""
        return file_name(self.model.label, self.text.name if self.text else None, self.protocol)


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
    return _Run(suite, cache, progress, reference, models, texts).finish()


@dataclass(slots=True)
class _Run:
    suite: Suite
    cache: Path
    progress: SuiteProgress
    reference: PreparedModel | None
    models: Sequence[PreparedModel]
    texts: dict[str, str]
    raw: dict[str, Report] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    failures: dict[str, LlmquantError] = field(default_factory=dict)

    def finish(self) -> SuiteOutcome:
        measurements = [*self._text_measurements(), *self._task_measurements()]
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

    def _text_measurements(self) -> Iterator[Measurement]:
        suite = self.suite
        for text in suite.texts:
            for protocol in suite.protocols:
                for model in self.models:
                    request = Request(
                        (model.source,),
                        text.source,
                        protocol=protocol,
                        max_windows=text.max_windows,
                        noise_floor=False,
                        reference=None if self.reference is None else self.reference.source,
                        **self._common(),
                    )
                    if suite.cache_form is not None:
                        request = replace(
                            request,
                            cache=str(self.cache / "reference"),
                            cache_form=suite.cache_form,
                        )
                    key = self._key(
                        model,
                        self.reference,
                        [self.texts[text.name], protocol, text.max_windows, suite.cache_form],
                    )
                    yield Measurement(model, request, text, protocol, key)

    def _task_measurements(self) -> Iterator[Measurement]:
        tasks = self.suite.tasks
        if tasks is None:
            return
        everyone = self.models if self.reference is None else [self.reference, *self.models]
        for model in everyone:
            request = Request(
                (model.source,),
                tasks=",".join(tasks.names),
                include_path=tasks.include_path,
                limit=tasks.limit,
                tokenizer=self.reference.source
                if model.weights is None and self.reference is not None
                else None,
                **self._common(),
            )
            key = self._key(
                model,
                None,
                [*tasks.names, tasks.limit, _files_of(tasks.names, tasks.include_path), _lm_eval()],
            )
            yield Measurement(
                model, request, None, ", ".join(n.partition("=")[0] for n in tasks.names), key
            )

    def _common(self) -> dict[str, Any]:
        """Options of every request. Speed and memory are measured apart."""
        suite = self.suite
        return {
            "dtype": suite.dtype,
            "device": suite.device,
            "kernel": suite.kernel,
            "batch_size": suite.batch_size,
            "threads": suite.threads,
            "cost": False,
        }

    def _key(
        self, model: PreparedModel, reference: PreparedModel | None, measured: list[Any]
    ) -> str | None:
        if model.weights is None:
            return None
        base = None if reference is None else [reference.weights, reference.tokenizer]
        return digest([model.weights, model.tokenizer, base, *measured, *self._place()])

    def _place(self) -> list[Any]:
        suite = self.suite
        return [
            suite_dtype(suite),
            str(llmquant.parse_device(suite.device)),
            suite.kernel,
            suite.batch_size,
            machine.versions(),
            machine.processor(),
            llmquant.this_processor().instruction_sets,
            suite.threads,
        ]

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
        report = evaluate(measurement.request, self.progress.stage)
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
        return self._path(digest(["cost", model.weights, *self._place()]))

    def _measure_cost(self, model: PreparedModel) -> None:
        suite = self.suite
        device = str(llmquant.parse_device(suite.device))
        run = CostRun(suite_dtype(suite), device, suite.kernel, suite.threads)
        cost = measure_apart(llmquant.resolve(model.source), run)
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
        by_task = {task.task: task for task in base.tasks}
        return [
            base,
            result.model_copy(
                update={"tasks": [with_pairs(t, by_task[t.task]) for t in result.tasks]}
            ),
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


def _files_of(names: Sequence[str], include_path: str | None) -> list[str]:
    """sha256 of the data and task files that the tasks' results depend on and that lie here."""
    paths = [Path(name.partition("=")[2]) for name in names if "=" in name]
    paths += sorted(Path(include_path).rglob("*.yaml")) if include_path is not None else []
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]


def _lm_eval() -> str:
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return ""  # the run itself says how to install it
