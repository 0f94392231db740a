"""``llmquant eval``: the command that proves what quantization cost.

Registered through the entry-point group ``llmquant.commands``. Importing this module must stay
cheap, because every ``llmquant`` command does it: typer and the standard library here, torch and
the models inside the command. People get a table on stdout and progress on stderr; with ``--json``
stdout holds the Report and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmquant.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    KernelOption,
    ThreadsOption,
)
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval import cli_options as options
from llmquant_eval.auto.cli import auto_command
from llmquant_eval.cli_progress import stages
from llmquant_eval.decide.cli import compare_command
from llmquant_eval.leaderboard.cli import leaderboard_command
from llmquant_eval.speed.cli import bench_command
from llmquant_eval.validate.cli import validate_command

if TYPE_CHECKING:
    from llmquant_eval.report.schema import Report
    from llmquant_eval.run.request import Request


def register(app: typer.Typer) -> None:
    """Add this package's commands to the command line."""
    app.command("eval")(eval_command)
    app.command("leaderboard")(leaderboard_command)
    app.command("validate")(validate_command)
    app.command("compare")(compare_command)
    app.command("bench")(bench_command)
    app.command("auto")(auto_command)


def eval_command(
    context: typer.Context,
    model: options.ModelsArgument = None,
    text: options.TextOption = None,
    reference: options.ReferenceOption = None,
    protocol: options.ProtocolOption = None,
    window: options.WindowOption = None,
    bos: options.BosOption = "default",
    max_windows: options.MaxWindowsOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    batch_size: options.BatchSizeOption = None,
    tokenizer: options.TokenizerOption = None,
    cache: options.CacheOption = None,
    cache_form: options.CacheFormOption = None,
    tasks: options.TasksOption = None,
    include_path: options.IncludePathOption = None,
    limit: options.LimitOption = None,
    log_samples: options.LogSamplesOption = None,
    retry_for: options.RetryForOption = None,
    output: options.OutputOption = None,
    card: options.CardOption = False,
    as_json: JsonOption = False,
    quiet: options.QuietOption = False,
    cost: options.CostOption = True,
    noise_floor: options.NoiseFloorOption = True,
    plots: options.PlotsOption = None,
    suite: options.SuiteOption = None,
    missing: options.MissingOption = False,
) -> None:
    """Measure what quantization cost.

    Perplexity, divergence from a reference, size, speed and memory. A run that was stopped is
    resumed by the same command.
    """
    if suite is not None:
        from llmquant_eval.suite_cli import suite_command

        suite_command(context)
        return
    if missing:
        raise UsageError("--missing belongs to --suite; give --suite with it, or leave it out")
    request = _request(context.params)
    if card:
        _check_card_folders(request.candidates)
    if output is not None:
        _check_output(output, request)
    report, failure = _evaluate(request, hidden=quiet or as_json)
    _write(report, output, card, plots)
    if report.text is not None and (lost := report.text.lost()):
        sys.stderr.write(f"warning: {lost}\n")
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        _show(report)
    if failure is not None:
        raise failure


def _check_output(output: Path, request: Request) -> None:
    """Raises UsageError where the report cannot be written, or would take the place of the text."""
    from llmquant import FileKind, refuse_texts
    from llmquant_eval.report.files import check_file

    refuse_texts(output, request.text)
    check_file(output, FileKind.REPORT)


def _request(given: Mapping[str, Any]) -> Request:
    """The command's options as a Request, whose fields have the options' names."""
    from llmquant_eval.run.request import Request

    values = {field.name: given[field.name] for field in fields(Request) if field.name in given}
    lists = {name: _joined(given[name]) for name in ("protocol", "tasks")}
    return Request(candidates=tuple(given["model"] or ()), **values | lists)


def _evaluate(request: Request, hidden: bool) -> tuple[Report, LlmquantError | None]:
    """The report, and the error of one that a server left unfinished."""
    from transformers.utils import logging as transformers_logging

    from llmquant_eval.run.evaluate import evaluate
    from llmquant_eval.run.unfinished import UnfinishedError

    # transformers' own bars would be drawn across ours, and in spite of --quiet.
    transformers_logging.disable_progress_bar()
    with stages(hidden) as (progress, tell):
        try:
            return evaluate(request, progress, tell), None
        except UnfinishedError as e:
            return e.report, e


def _joined(values: list[str] | None) -> str | None:
    """An option that may be given more than once, as one with commas."""
    return ",".join(values) if values else None


def _check_card_folders(candidates: tuple[str, ...]) -> None:
    """A card belongs to a folder of the user's, not to a cached download."""
    for source in candidates:
        if not Path(source).is_dir():
            raise UsageError(
                f"--card writes into the README.md of a model folder, and {source} is not one; leave out --card"
            )


def _write(report: Report, output: Path | None, card: bool, plots: Path | None) -> None:
    from llmquant import write_file
    from llmquant_eval.report.card import write_card

    if output is not None:
        write_file(output, report.to_json())
    for result in report.models:
        if card and result.role == "candidate":
            write_card(Path(result.source), report, result.label)
    if plots is not None:
        from llmquant_eval.leaderboard.plots import write_report_plots

        for path in write_report_plots(plots, report):
            sys.stderr.write(f"wrote {path}\n")


def _show(report: Report) -> None:
    from llmquant_eval.report.terminal import render, stdout_console

    console = stdout_console()
    console.print(render(report, console.width))
