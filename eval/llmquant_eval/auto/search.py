"""A whole search: everything that can be refused first, then the climb, then the folder and the
report.

The chosen folder gets its name by a rename, after the note of whose it is; so a search that was
killed at its very end finds that it is done.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import llmquant
from llmquant.errors import LlmquantError, SourceError, UsageError
from llmquant_eval.auto.answer.outcome import make_report, repeating
from llmquant_eval.auto.answer.screen import Screen
from llmquant_eval.auto.climb import Climb
from llmquant_eval.auto.ladder import Step, expected, make_ladder
from llmquant_eval.auto.request import AutoRequest
from llmquant_eval.auto.schema import AutoReport, Split
from llmquant_eval.auto.split import make_split
from llmquant_eval.auto.trials.rung import Trial, common_facts, without_bars
from llmquant_eval.auto.trials.work import Published, Work, key_of
from llmquant_eval.models.resolve import max_positions
from llmquant_eval.report.card import write_card
from llmquant_eval.report.machine import versions
from llmquant_eval.report.schema import Report
from llmquant_eval.run.plan import EvaluationPlan, make_plan
from llmquant_eval.run.request import Request

FEWEST_WINDOWS = 4
"""Held-out windows below which no limit can be told."""
_CALIBRATION = "calibration.source"


@dataclass(frozen=True, slots=True)
class Texts:
    """The text as it is used: calibration windows and their length, and how the held-out part is
    scored."""

    split: Split
    nsamples: int
    seqlen: int
    plan: EvaluationPlan

    @property
    def changes(self) -> dict[str, object]:
        """What a recipe says of it."""
        return {
            _CALIBRATION: self.split.calibration.source,
            "calibration.nsamples": self.nsamples,
            "calibration.seqlen": self.seqlen,
        }


def search(request: AutoRequest, screen: Screen) -> AutoReport:
    """Find the smallest candidate that meets the bounds, and publish it.

    Raises:
        UsageError: the request cannot be right as written (bounds, output, text, rungs).
        LlmquantError: the model cannot be read, or the disk refuses.
    """
    llmquant.set_threads(request.threads)
    work = Work(request.work, request.output.name)
    _check_output(request, work)
    lock = llmquant.lock_folder(work.folder)
    try:
        with without_bars():
            return _locked(request, work, screen)
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(
            f"finished rungs are kept in {work.folder}; run the same command to resume"
        ) from e
    finally:
        os.close(lock)


def _check_output(request: AutoRequest, work: Work) -> None:
    """Refuse a destination that this search could not have made."""
    llmquant.refuse_source(request.output, request.model)
    llmquant.refuse_texts(request.output, *request.data, request.calibration)
    if work.published() is None or not request.output.exists():
        llmquant.check_destination(request.output, request.overwrite)
    if "#" in str(request.work):
        raise UsageError(f"-o {request.output}: a path with # cannot be a text source; rename it")


def _locked(request: AutoRequest, work: Work, screen: Screen) -> AutoReport:
    texts = _texts(request, work)
    steps = make_ladder(request, texts.changes)
    looks = sum(step.refused is None for step in steps)
    evaluation = _evaluation(request, work, texts.split)
    facts = common_facts(request, texts.split, evaluation, texts.plan.dtype, versions())
    trial = Trial(request, work, texts.split, facts, evaluation, screen)
    wanted = _request_key(request, trial, steps)
    standing = _standing(request, work, wanted)
    screen.begin([step.name for step in steps])
    baseline = trial.baseline()
    screen.original(baseline.report.models[0], baseline.spent)
    climb = Climb(trial, baseline, steps, expected(request, steps), request.alpha / max(looks, 1))
    climb.run()
    if climb.best is not None and not standing:
        _publish(climb, trial, wanted)
    report = make_report(climb, texts.nsamples, texts.seqlen, texts.plan.streams[0], looks)
    _write(work, report)
    return report


def _request_key(request: AutoRequest, trial: Trial, steps: list[Step]) -> str:
    """Of everything that the choice depends on."""
    return key_of(
        {
            "rungs": [trial.key(step) for step in steps],
            "refused": [step.refused for step in steps],
            "bounds": request.bounds,
            "alpha": request.alpha,
            "fastest": request.fastest,
            "time": request.time_budget,
        }
    )


def _standing(request: AutoRequest, work: Work, wanted: str) -> bool:
    """Whether the output is what an earlier run of this request chose.

    Raises:
        UsageError: something else stands there.
    """
    if not request.output.exists():
        return False
    published = work.published()
    if published is not None and published.key == wanted:
        try:
            if llmquant.inspect(request.output).weights_sha256 == published.weights_sha256:
                return True
        except LlmquantError:
            pass  # then it is another folder, which is refused or replaced
    llmquant.check_destination(request.output, request.overwrite)
    return False


def _texts(request: AutoRequest, work: Work) -> Texts:
    """Divide the text, and see that both parts are long enough."""
    split = make_split(request.data, request.calibration, work.data)
    model = llmquant.resolve(request.model)
    default = llmquant.Recipe().calibration
    longest = max_positions(model)
    seqlen = request.seqlen or min(default.seqlen, longest or default.seqlen)
    available = _available(model, split, request.nsamples or 1, seqlen, longest)
    nsamples = request.nsamples or min(default.nsamples, available)
    plan = _plan(request, work, split)
    stream = plan.streams[0]
    found = len(stream.windows if stream.chats is None else stream.chats)
    if found < FEWEST_WINDOWS:
        few = f"windows of {stream.protocol.window} tokens" if stream.chats is None else "chats"
        raise SourceError(
            f"--data {', '.join(request.data)}: the held-out part has {found} {few}, and {FEWEST_WINDOWS} are the fewest that "
            f"tell an error; give more {'chats' if stream.chats else 'text or a smaller --window'}"
        )
    return Texts(split, nsamples, seqlen, plan)


def _available(model: Path, split: Split, wanted: int, seqlen: int, longest: int | None) -> int:
    """Calibration windows that the text has.

    Raises:
        UsageError, SourceError: fewer than wanted, or numbers that cannot be.
    """
    try:
        calibration = llmquant.calibrate(
            llmquant.read_documents(split.calibration.source),
            llmquant.load_tokenizer(model),
            nsamples=wanted,
            seqlen=seqlen,
            seed=0,
            max_positions=longest,
        )
    except SourceError as e:
        raise SourceError(f"the calibration text is too short: {e}") from e
    return calibration.summary.windows_available


def _plan(request: AutoRequest, work: Work, split: Split) -> EvaluationPlan:
    asked = replace(_evaluation(request, work, split), reference=None, cache=None)
    try:
        return make_plan(asked)
    except SourceError as e:
        raise SourceError(f"the held-out part of --data is too short: {e}") from e


def _evaluation(request: AutoRequest, work: Work, split: Split) -> Request:
    """How every model is scored; the candidate is filled in."""
    return Request(
        (request.model,),
        text=split.heldout.source,
        protocol="ppl/chat" if split.chats else None,
        reference=request.model,
        window=request.window,
        bos=request.bos,
        max_windows=request.max_windows,
        dtype=request.dtype,
        device=request.device,
        kernel=request.kernel,
        threads=request.threads,
        cache=str(work.reference),
        tasks=None,
        cost=request.fastest,
        noise_floor=False,
    )


def _publish(climb: Climb, trial: Trial, wanted: str) -> None:
    """Give the best candidate's folder its name; one that was deleted is made again."""
    assert climb.best is not None
    (step, measured), request, work = climb.best, trial.request, trial.work
    assert measured.model is not None
    made = trial.made(step)
    if made.weights_sha256 != measured.model.weights_sha256:
        raise LlmquantError(
            f"{step.name} was made again, and its weights are not the measured ones; use the threads and the machine of the "
            f"first run, or delete {work.rung(step.folder)} to have it measured again"
        )
    folder = work.candidate(step.folder)
    result = measured.model.model_copy(update={"source": str(request.output)})
    base = climb.baseline.report
    command = repeating(trial.evaluation, request).command()
    card: Report = base.model_copy(update={"models": [*base.models, result], "command": command})
    write_card(folder, card, result.label)
    work.keep_published(Published(key=wanted, weights_sha256=made.weights_sha256))
    try:
        llmquant.put_in_place(folder, request.output)
    except OSError as e:
        raise LlmquantError(
            f"{request.output} cannot be put in place: {e.strerror or e}; {folder} has the result, "
            "and the same command tries again"
        ) from e


def _write(work: Work, report: AutoReport) -> None:
    from llmquant import write_file
    from llmquant_eval.auto.answer.render import html, markdown

    texts: dict[str, Callable[[], str]] = {
        "report.json": report.to_json,
        "report.md": lambda: markdown(report),
        "report.html": lambda: html(report),
    }
    for name, text in texts.items():
        write_file(work.folder / name, text())
