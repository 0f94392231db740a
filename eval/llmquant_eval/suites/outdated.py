"""Which of a suite's results are already there: reports in a folder compared with what the suite
asks for.

The cache of :mod:`llmquant_eval.suites.run` knows results by everything that they depend on,
versions and processor included, but only those of one machine. Here committed reports are judged by
what a reader of a leaderboard relies on: the recipe with its calibration, the reference's weights,
the text, the protocol, how much of the text, and the dtype. So a suite with one new recipe measures
one model, on any machine, and a test can tell when a result no longer belongs to the recipe of its
name.
"""

from __future__ import annotations

from pathlib import Path

import llmquant
from llmquant.errors import CheckpointError, UsageError
from llmquant_eval.models.endpoint import is_url
from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.schema import Report, read_report
from llmquant_eval.suites.models import suite_recipe
from llmquant_eval.suites.schema import Suite, SuiteModel, SuiteText, file_name


def outdated_models(suite: Suite, results: Path) -> dict[str, str]:
    """Model label → why its results in the folder are not those that the suite asks for; current
    ones are left out.

    Raises:
        UsageError, RecipeError, SourceError, CheckpointError: a text, recipe or reference that is
            not there.
    """
    texts = {text.name: llmquant.read_documents(text.source).sha256 for text in suite.texts}
    reference = (
        None if suite.reference is None else llmquant.inspect(suite.reference).weights_sha256
    )
    reasons_by_label = {}
    for model in suite.all_models():
        reasons = [
            _why_not(
                results / file_name(model.label, text.name, protocol),
                model,
                suite,
                reference,
                (text, protocol, texts),
            )
            for text in suite.texts
            for protocol in suite.protocols
        ]
        if suite.tasks is not None:
            reasons.append(
                _why_not(results / file_name(model.label, None, ""), model, suite, reference, None)
            )
        reason = next(filter(None, reasons), None)
        if reason is not None:
            reasons_by_label[model.label] = reason
    return reasons_by_label


def suite_dtype(suite: Suite) -> str:
    """What a suite's dtype is on this machine: ``auto`` asks what suits its reference, or else its
    first model."""
    first = suite.reference or next(
        (m.model for m in suite.all_models() if m.model is not None and not is_url(m.model)), None
    )
    if first is None:
        return llmquant.parse_dtype(suite.dtype, suite.device).name
    return llmquant.compute_dtype(first, suite.dtype, suite.device).name


def unexpected_files(suite: Suite, results: Path) -> list[str]:
    """Files of the results folder that no model of the suite accounts for, sorted."""
    expected = {
        file_name(model.label, text.name, protocol)
        for model in suite.all_models() for text in suite.texts for protocol in suite.protocols
    }  # fmt: skip
    if suite.tasks is not None:
        expected |= {file_name(model.label, None, "") for model in suite.all_models()}
    return sorted({path.name for path in results.glob("*.json")} - expected)


def _why_not(
    path: Path,
    model: SuiteModel,
    suite: Suite,
    reference: str | None,
    what: tuple[SuiteText, str, dict[str, str]] | None,
) -> str | None:
    """Why the report is not the one wanted; ``what`` is its text, protocol and the texts' hashes,
    None for tasks."""
    if not path.is_file():
        return f"{path.name} is not there"
    try:
        report = read_report(path)
    except UsageError as e:
        return str(e)
    own = next((m for m in report.models if m.label == model.label and m.role == "candidate"), None)
    if own is None:
        return f"{path.name} has no candidate called {model.label}"
    base = next((m.weights_sha256 for m in report.models if m.role == "reference"), None)
    if base != reference:
        return f"{path.name} was measured against other reference weights"
    if report.settings.dtype != suite_dtype(suite):
        return f"{path.name} was measured in {report.settings.dtype}"
    if suite.cost and own.cost is None and own.weights_sha256 is not None:
        return f"{path.name} has no speed and memory"
    return _other_model(path, own, model, suite) or (
        _other_pass(path, report, *what) if what is not None else None
    )


def _other_model(path: Path, own: ModelResult, model: SuiteModel, suite: Suite) -> str | None:
    if model.recipe is not None:
        recipe = suite_recipe(model, suite)
        # A folder's record has the recipe with group sizes that fit its model.
        if own.recipe_sha256 in (recipe.sha256(), _fitted_sha256(model, suite, recipe)):
            return None
        return f"{path.name} is of another version of the recipe {model.recipe}"
    assert model.model is not None  # a model of a suite is one or the other
    if is_url(model.model):
        return None
    try:
        now = llmquant.inspect(model.model).weights_sha256
    except (CheckpointError, UsageError):
        return None  # it is not here any more, so nothing speaks against what was measured
    return (
        None
        if now == own.weights_sha256
        else f"{path.name} is of other weights than {model.model} has now"
    )


def _fitted_sha256(model: SuiteModel, suite: Suite, recipe: llmquant.Recipe) -> str | None:
    """Of the recipe as its model's folder would record it; None where the model is not here."""
    base = model.base or suite.reference
    if base is None or not Path(base).is_dir():
        return None
    return llmquant.make_plan(base, recipe).recipe.with_training_text().sha256()


def _other_pass(
    path: Path, report: Report, text: SuiteText, protocol: str, texts: dict[str, str]
) -> str | None:
    if report.text is None or report.text.sha256 != texts[text.name]:
        return f"{path.name} was measured on another text"
    first = report.passes[0] if report.passes else None
    if first is None or (
        first.perplexity != protocol and not first.perplexity.startswith(f"{protocol}-")
    ):
        return f"{path.name} was measured by another protocol"
    wanted = (
        first.windows_available
        if text.max_windows is None
        else min(text.max_windows, first.windows_available)
    )
    return (
        None
        if first.windows == wanted
        else f"{path.name} has {first.windows} windows and not {wanted}"
    )
