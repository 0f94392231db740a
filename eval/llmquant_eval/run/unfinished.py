"""An evaluation whose server gave out: what is there is a report, what is missing is said in it and
in the error, and what the server answered is kept for the next run."""

from __future__ import annotations

from collections.abc import Sequence

from llmquant.errors import LlmquantError
from llmquant_eval.models.resolve import ServedModel
from llmquant_eval.report.schema import Missing, Report
from llmquant_eval.scoring.score_served import prompts_of
from llmquant_eval.scoring.token_stream import TokenStream


class UnfinishedError(LlmquantError):
    """A server failed for good. ``report`` has what was measured, and what was not."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def missing_windows(model: ServedModel, stream: TokenStream, why: LlmquantError) -> Missing:
    """One protocol that a server has not answered, or not all of it."""
    prompts = prompts_of(stream)
    return Missing(
        label=model.label,
        protocol=stream.protocol.perplexity_id,
        windows=len(prompts) - model.endpoint.scored(prompts),
        windows_wanted=len(prompts),
        reason=str(why),
    )


def missing_tasks(model: ServedModel, why: LlmquantError) -> Missing:
    return Missing(label=model.label, protocol="tasks", reason=str(why))


def unfinished(models: Sequence[ServedModel], report: Report) -> UnfinishedError:
    """The error of a report that misses something of these models."""
    reasons = dict.fromkeys(m.reason for m in report.missing)
    gaps = "; ".join(m.text() for m in report.missing)
    kept = [str(m.endpoint.kept.path) for m in models if len(m.endpoint.kept)]
    resume = (
        f" The answers so far are kept in {', '.join(kept)}: run the same command again to resume."
        if kept
        else ""
    )
    return UnfinishedError(f"{' '.join(reasons)}\nnot measured: {gaps}.{resume}", report)
