"""From a climb to the report: what was chosen, why, and what the next rung would give."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from llmquant_eval.auto.answer.render import check_text, checks_text, sentence
from llmquant_eval.auto.climb import Climb
from llmquant_eval.auto.request import AutoRequest
from llmquant_eval.auto.schema import AutoReport, Rung
from llmquant_eval.report import machine
from llmquant_eval.report.table import size, speed
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.token_stream import TokenStream


def make_report(
    climb: Climb, nsamples: int, seqlen: int, stream: TokenStream, looks: int
) -> AutoReport:
    """The report of a search that ended."""
    trial = climb.trial
    request = trial.request
    chosen = None if climb.best is None else climb.best[0].name
    return AutoReport(
        created=datetime.now(UTC).replace(microsecond=0),
        command=request.command,
        model=request.model,
        output=str(request.output),
        decision="keep the original" if chosen is None else "chosen",
        chosen=chosen,
        why=_why(climb),
        next=_next(climb),
        bounds=request.bounds.texts(),
        limits=_limits(request),
        alpha=request.alpha,
        looks=looks,
        alpha_each=climb.alpha,
        split=trial.split,
        calibration_windows=nsamples,
        calibration_window=seqlen,
        heldout_windows=len(stream.windows),
        heldout_windows_available=stream.available,
        heldout_window=stream.protocol.window,
        baseline=climb.baseline.report.models[0],
        baseline_spent=climb.baseline.spent,
        rungs=climb.rungs,
        stopped=climb.stopped,
        evaluate=None if chosen is None else repeating(trial.evaluation, request).command(),
        versions=machine.versions(),
        hardware=machine.hardware(climb.baseline.report.settings.device),
    )


def repeating(evaluation: Request, request: AutoRequest) -> Request:
    """The evaluation that repeats the chosen folder's numbers."""
    return replace(
        evaluation,
        candidates=(str(request.output),),
        tasks=request.tasks,
        include_path=request.include_path,
        limit=request.limit,
    )


def _limits(request: AutoRequest) -> list[str]:
    given = {
        "weight files of at most {}": None
        if request.max_bytes is None
        else size(request.max_bytes),
        "runs in {} of RAM with a whole context": None
        if request.fit is None
        else size(request.fit),
        "{} takes it": None if request.engine == "any" else request.engine,
        "the fastest, not the smallest{}": "" if request.fastest else None,
    }
    return [text.format(value) for text, value in given.items() if value is not None]


def _why(climb: Climb) -> str:
    met = [r for r in climb.rungs if r.outcome == "met"]
    if climb.best is None:
        return _why_none(climb)
    best = next(r for r in met if r.name == climb.best[0].name)
    model = climb.best[1].model
    assert model is not None
    fastest = climb.trial.request.fastest
    figure = size(model.bytes_on_disk)
    if fastest and model.cost is not None:
        figure = f"{speed(model.cost.decode_tokens_per_second)} tokens/s"
    kind = "the only measured candidate that meets the bound"
    if len(met) > 1:
        word = "fastest" if fastest else "smallest"
        kind = f"the {word} of {len(met)} measured candidates that meet the bound"
    return f"{kind}, {figure}. {sentence(checks_text(best.checks))}"


def _why_none(climb: Climb) -> str:
    """The closest candidate, and which of its bounds is in the way."""
    tried = [r for r in climb.rungs if r.outcome == "not met"]
    if not tried:
        reason = (
            "every rung was excluded or failed" if climb.stopped is None else "no time was left"
        )
        return f"no candidate was measured: {reason}."
    closest = min(tried, key=_distance)
    missed = "; ".join(check_text(c) for c in closest.checks if not c.met)
    return f"none of {len(tried)} measured candidates meets the bound. The closest is {closest.name}: {missed}."


def _distance(rung: Rung) -> float:
    """How many times its bound the worst upper limit is."""
    return max(float("inf") if c.upper is None else c.upper / c.bound for c in rung.checks)


def _next(climb: Climb) -> str:
    """Of the rung that was not reached; else of the one after the chosen; else what else helps."""
    rungs = [r for r in climb.rungs if r.outcome not in ("excluded", "failed")]
    after = next((r for r in rungs if r.outcome == "not reached"), None)
    if after is None and climb.best is None:
        return (
            "Nothing is left on the ladder. Keep the original, allow a larger loss, "
            "or name recipes of your own with --rung."
        )
    if after is None:
        names = [r.name for r in rungs]
        place = names.index(climb.best[0].name) if climb.best is not None else 0
        after = next(iter(rungs[place + 1 :]), None)
    if after is None:
        return "The chosen one is the last rung that is possible; after it comes the original."
    if after.checks:
        return f"{after.name}, the next rung, was measured: {checks_text(after.checks)}."
    return (
        f"{after.name}, the next rung, was not measured: {_forecast(after)}. {sentence(after.why)}"
    )


def _forecast(rung: Rung) -> str:
    words = [f"about {size(rung.forecast_bytes)}", f"{rung.forecast_bits:.4g} bits per weight"]
    if rung.expected_kl is not None and rung.expected_ratio is not None:
        words.append(
            f"KL {rung.expected_kl:.2g} and perplexity × {rung.expected_ratio:.3f} on a measured model of this size"
        )
    return ", ".join(words)
