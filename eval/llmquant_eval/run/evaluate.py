"""A whole evaluation: models and a text in, a Report out.

The order is chosen for memory and for early errors: everything that can be refused is refused
before a weight is read; then each model's cost is measured in a process of its own while this one
is still small; then the noise floor, with the reference twice in memory; then one pass per
protocol, with reference and candidates side by side; then the tasks.

What is measured is kept on disk until the run is done, batch by batch, so that the same command
resumes after a kill and ends with the same figures (:mod:`llmquant_eval.run.resume`).

With ``--cache`` the reference runs alone, once, and is let go before a candidate is loaded; all
candidates, in this run and in later ones, are compared with what it left on disk. The same command
therefore gives the same figures on a full cache as on an empty one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import llmquant
from llmquant.errors import LlmquantError, QuantizationError
from llmquant_eval.models.endpoint import tell_nobody
from llmquant_eval.models.exported import ExportedAnswers
from llmquant_eval.models.kept_work import KeptWork
from llmquant_eval.models.resolve import AnyModel, ServedModel
from llmquant_eval.report.paired import paired_tasks
from llmquant_eval.report.results import Cost, TaskResult
from llmquant_eval.report.schema import Missing, Report
from llmquant_eval.run.build_report import Measured, make_report, model_result
from llmquant_eval.run.cost import Progress, costs_of
from llmquant_eval.run.loaded import LoadedModels
from llmquant_eval.run.noise import noise_floor
from llmquant_eval.run.plan import EvaluationPlan, make_plan
from llmquant_eval.run.reference import references
from llmquant_eval.run.request import Request
from llmquant_eval.run.resume import work_of
from llmquant_eval.run.unfinished import missing_tasks, missing_windows, unfinished
from llmquant_eval.scoring.reference_cache import CachedReference
from llmquant_eval.scoring.score_models import Scores, cached_scores, score_models
from llmquant_eval.scoring.score_served import score_served
from llmquant_eval.scoring.token_stream import TokenStream


def _no_progress(stage: str, done: int, total: int) -> None:
    """The default: progress is not shown."""


def evaluate(
    request: Request,
    progress: Progress = _no_progress,
    tell: Callable[[str], None] = tell_nobody,
) -> Report:
    """Run an evaluation; ``tell`` gets what is said while a server is waited for.

    Raises:
        UsageError: the request cannot be right (models, window, dtype, tasks, tokenizers that
            differ).
        SourceError: the text is missing, empty or shorter than a window.
        CheckpointError: a folder that is not a model, or a damaged cache.
        QuantizationError: a model's output is NaN or infinite.
        UnfinishedError: a server failed for good; has the report of what is there.
        LlmquantError: measuring a model's cost, a task or a server failed.
    """
    plan = make_plan(request, tell)
    with work_of(request, plan, tell) as kept:
        costs = costs_of(request, plan, kept, progress) if request.cost else {}
        # TF32 keeps 10 bits of a float32 product: the papers' figures, and KL at float32, are taken
        # without it.
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            return _Run(request, plan, costs, kept, progress).report()
        finally:
            torch.set_float32_matmul_precision(precision)


class _Run:
    """The models of one evaluation as they are loaded and let go, and what they scored."""

    def __init__(
        self,
        request: Request,
        plan: EvaluationPlan,
        costs: dict[str, Cost],
        kept: KeptWork,
        progress: Progress,
    ) -> None:
        self.request, self.plan, self.costs, self.progress = request, plan, costs, progress
        self.kept = kept
        self.loaded = LoadedModels(plan, request.kernel)
        self.missing: list[Missing] = []
        self.failed: dict[str, LlmquantError] = {}  # servers, by label

    def report(self) -> Report:
        """Measures everything, in the order that the module text gives."""
        plan = self.plan
        cached = references(self.request, plan, self.loaded, self._advance)
        wanted = plan.streams and self.request.noise_floor
        floor = (
            noise_floor(self.request, plan, self.loaded, cached[0], self.kept, self._advance)
            if wanted
            else None
        )
        scores = [
            self._score(stream, source) for stream, source in zip(plan.streams, cached, strict=True)
        ]
        tasks = {m.label: self._tasks(m) for m in plan.models} if plan.tasks is not None else {}
        if plan.reference is not None and tasks:
            base_tasks = tasks[plan.reference.label]
            tasks |= {
                m.label: paired_tasks(tasks[m.label], base_tasks)
                for m in plan.models
                if m is not plan.reference
            }
        measured = {
            m.label: Measured(
                [s.get(m.label) for s in scores],
                self.loaded.kernels.get(m.label, {}),
                self.costs.get(m.label),
                tasks.get(m.label, ()),
            )
            for m in plan.models
        }
        base = None if plan.reference is None else measured[plan.reference.label]
        results = [
            model_result(plan, m, measured[m.label], None if m is plan.reference else base)
            for m in plan.models
        ]
        report = make_report(self.request, plan, floor, results, self.missing)
        served = [m for m in plan.models if isinstance(m, ServedModel)]
        if self.missing:
            raise unfinished([m for m in served if m.label in self.failed], report)
        for model in served:
            model.endpoint.kept.discard()
        return report

    def _advance(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)

    def _score(self, stream: TokenStream, cached: CachedReference | None) -> dict[str, Scores]:
        reference, name = self.plan.reference, stream.protocol.perplexity_id
        side_by_side = [m for m in self.plan.local if cached is None or m is not reference]
        scores: dict[str, Scores] = {}
        if side_by_side:
            scores = score_models(
                {m.label: self.loaded.get(m) for m in side_by_side},
                stream,
                reference=reference.label if reference is not None and cached is None else None,
                cached=cached,
                batch_size=self.request.batch_size,
                advance=self._advance(f"{name} and KL" if reference is not None else name),
                kept=self.kept,
            )
        if reference is not None and cached is not None:
            scores[reference.label] = cached_scores(cached, stream, reference.label)
        for served in self.plan.models:
            if isinstance(served, ServedModel):
                self._score_served(served, stream, scores)
        return scores

    def _score_served(
        self, model: ServedModel, stream: TokenStream, scores: dict[str, Scores]
    ) -> None:
        """Adds to ``scores``, or to what is missing: the other models' figures are not lost."""
        stage = f"{stream.protocol.perplexity_id} of {model.label}"
        if model.label not in self.failed:
            try:
                scores[model.label] = score_served(
                    model.endpoint, stream, model.label, self._advance(stage)
                )
                return
            except QuantizationError:
                raise  # the server answered; its model is broken
            except LlmquantError as e:
                self.failed[model.label] = e
        self.missing.append(missing_windows(model, stream, self.failed[model.label]))

    def _tasks(self, model: AnyModel) -> list[TaskResult]:
        from llmquant_eval.tasks.harness import run_tasks
        from llmquant_eval.tasks.harness_models import LocalModel, ServedLM
        from llmquant_eval.tasks.kept_requests import keep_requests

        assert self.plan.tasks is not None
        done = list(self.plan.models).index(model)
        self.progress("tasks", done, len(self.plan.models))
        tokenizer = self.plan.tokenizers[model.label]
        if isinstance(model, ServedModel):
            adapter: Any = ServedLM(model.endpoint, tokenizer)
        elif llmquant.is_onnx(model.path):
            adapter = ServedLM(ExportedAnswers(self.loaded.get(model), tokenizer), tokenizer)
        else:
            adapter = LocalModel(self.loaded.get(model), tokenizer, self.request.batch_size)
        if not isinstance(model, ServedModel):
            keep_requests(adapter, self.kept, model.label)
        results: list[TaskResult] = []
        try:
            if model.label not in self.failed:
                results = run_tasks(self.plan.tasks, adapter, model.label)
        except LlmquantError as e:
            if not isinstance(model, ServedModel):
                raise
            self.failed[model.label] = e
        if isinstance(model, ServedModel) and model.label in self.failed:
            self.missing.append(missing_tasks(model, self.failed[model.label]))
        self.progress("tasks", done + 1, len(self.plan.models))
        return results
