"""``llmquant eval --suite``: the suite with the command line's changes laid over it, its progress,
and the files that it writes.

Options that say nothing to a suite are refused rather than ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.words import counted

if TYPE_CHECKING:
    from llmquant_eval.leaderboard.board import StoredReport
    from llmquant_eval.suites.run import SuiteOutcome, SuiteProgress
    from llmquant_eval.suites.schema import Suite

# Options of `llmquant eval` that change a suite, and its switches that are about the run.
_CHANGES = frozenset(
    {
        "reference",
        "dtype",
        "device",
        "kernel",
        "threads",
        "batch_size",
        "cost",
        "noise_floor",
        "cache_form",
    }
)
_ACCEPTED = _CHANGES | {
    "suite",
    "model",
    "text",
    "max_windows",
    "protocol",
    "output",
    "cache",
    "quiet",
    "plots",
    "missing",
}
_FOREVER = 1e9  # seconds that the estimate of the time left looks back over


def suite_command(context: typer.Context) -> None:
    """Run the suite that ``llmquant eval`` was given.

    Raises:
        UsageError: an option that a suite does not take, or what the suite itself refuses.
    """
    # By the source's name: typer has click's classes of its own since 0.20 and click's before.
    sources = {name: context.get_parameter_source(name) for name in context.params}
    typed = [
        name
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]
    given = {name: context.params[name] for name in typed}
    strange = sorted(given.keys() - _ACCEPTED)
    if strange:
        option = strange[0].replace("_", "-")
        raise UsageError(
            f"--{option} does not go with --suite; write it into a suite file, or leave it out"
        )
    from llmquant_eval.leaderboard.cli import check_pages

    suite = changed_suite(given)
    cache = Path(given["cache"]) if given.get("cache") else default_cache()
    results = given.get("output") or (Path(suite.outputs.results) if suite.outputs else None)
    if results is not None and results.is_file():
        raise UsageError(
            f"--output {results} is a file; a suite writes one report per model and protocol into a folder"
        )
    check_pages(*_pages(suite))
    from transformers.utils import logging as transformers_logging

    from llmquant_eval.suites.run import SuiteOutcome, run_suite

    transformers_logging.disable_progress_bar()
    wanted = _missing(suite, results) if given.get("missing") else suite
    outcome = SuiteOutcome({}, 0, {}, {})
    if wanted.all_models() or not given.get("missing"):
        with _progress(hidden=bool(given.get("quiet"))) as progress:
            outcome = run_suite(wanted, cache, progress)
    write_outcome(suite, outcome, results, given.get("plots"))


def _missing(suite: Suite, results: Path | None) -> Suite:
    """The suite without the models whose reports are there and current; says why it keeps each of
    the others."""
    from llmquant_eval.suites.outdated import outdated_models

    if results is None:
        raise UsageError(
            "--missing looks for results that are already there; say where with --output DIR or the suite's outputs"
        )
    reasons = outdated_models(suite, results)
    for label, reason in reasons.items():
        sys.stderr.write(f"{label}: {reason}\n")
    return suite.only(reasons)


def changed_suite(given: Mapping[str, Any]) -> Suite:
    """The suite with what the command line says instead."""
    from llmquant_eval.suites.schema import load_suite

    suite = load_suite(given["suite"])
    changes = {name: given[name] for name in _CHANGES & given.keys()}
    if given.get("model"):
        extra = [
            {"label": source.rstrip("/").rsplit("/", 1)[-1], "model": source}
            for source in given["model"]
        ]
        changes["models"] = [*(m.model_dump() for m in suite.models), *extra]
    if given.get("protocol"):
        changes["protocols"] = [name for joined in given["protocol"] for name in joined.split(",")]
    texts = [t.model_dump() for t in suite.texts]
    if given.get("text") is not None:
        texts = [{"name": "text", "source": given["text"]}]
    if given.get("max_windows") is not None:
        texts = [t | {"max_windows": given["max_windows"]} for t in texts]
    return suite.changed(**changes, texts=texts)


def default_cache() -> Path:
    """Where results and quantized models are kept between runs."""
    return llmquant.user_cache("suites")


def write_outcome(
    suite: Suite, outcome: SuiteOutcome, results: Path | None, plots: Path | None
) -> None:
    """Write the reports, render what the suite wants rendered, show the rankings.

    Raises:
        LlmquantError: something cannot be written, or some measurement failed; the others are kept
            all the same.
    """
    from llmquant import replace_file
    from llmquant_eval.leaderboard.board import StoredReport
    from llmquant_eval.leaderboard.cli import render_files, show
    from llmquant_eval.leaderboard.ranking import load_reports, make_boards
    from llmquant_eval.suites.outdated import unexpected_files

    stored: list[StoredReport] = [
        StoredReport(Path(name), report) for name, report in outcome.reports.items()
    ]
    if results is not None:
        try:
            results.mkdir(parents=True, exist_ok=True)
            for name, report in outcome.reports.items():
                replace_file(results / name, report.to_json())
        except OSError as e:
            raise LlmquantError(f"{results} cannot be written: {e}") from e
        stored = load_reports(results)
    boards = make_boards(stored)
    out = suite.outputs
    markdown, html = _pages(suite)
    rendered = render_files(
        boards, stored, markdown=markdown, html=html,
        plots=plots or (Path(out.plots) if out and out.plots else None), folders=outcome.folders,
    )  # fmt: skip
    show(boards)
    written = (
        [f"{counted(len(outcome.reports), 'report')} in {results}"] if results is not None else []
    )
    sys.stderr.write(
        f"{outcome.measured} measured now; wrote {', '.join([*written, *map(str, rendered)]) or 'nothing'}\n"
    )
    if results is not None and (others := unexpected_files(suite, results)):
        sys.stderr.write(
            f"{results} also has files of no model of this suite: {', '.join(others)}\n"
        )
    texts = [report.text for report in outcome.reports.values() if report.text is not None]
    for lost in dict.fromkeys(filter(None, (text.lost() for text in texts))):
        sys.stderr.write(f"warning: {lost}\n")
    if outcome.failures:
        listed = "; ".join(f"{what}: {why}" for what, why in outcome.failures.items())
        raise LlmquantError(
            f"{counted(len(outcome.failures), 'measurement')} failed, the others are kept: {listed}"
        )


def _pages(suite: Suite) -> tuple[Path | None, Path | None]:
    """Where the suite wants its rankings as Markdown and as a page."""
    out = suite.outputs
    return (
        Path(out.markdown) if out and out.markdown else None,
        Path(out.html) if out and out.html else None,
    )


@contextmanager
def _progress(hidden: bool) -> Iterator[SuiteProgress]:
    """Two bars on stderr: the whole suite with the time left, and the step at hand."""
    from rich.console import Console
    from rich.progress import Progress

    from llmquant.cli.progress import bar_columns
    from llmquant_eval.suites.run import SuiteProgress

    console = Console(stderr=True)
    drawn = console.is_terminal and not hidden  # a log gets lines instead, see below
    with Progress(
        *bar_columns(),
        console=console,
        disable=not drawn,
        speed_estimate_period=_FOREVER,
        transient=True,
    ) as bars:
        whole = bars.add_task("reading", total=None)
        step = bars.add_task("", total=None, visible=False)

        def overall(what: str, done: int, total: int) -> None:
            bars.update(whole, description=what, completed=done, total=total)
            bars.reset(step, visible=False)
            if not hidden and not console.is_terminal and done < total:
                console.print(
                    f"{done + 1}/{total} {what}", markup=False, highlight=False
                )  # a log has no bars

        def stage(name: str, done: int, total: int) -> None:
            bars.update(step, description=f"  {name}", completed=done, total=total, visible=True)

        def tell(note: str) -> None:
            if not hidden:
                console.print(note, markup=False, highlight=False, soft_wrap=True)

        yield SuiteProgress(overall, stage, tell)
