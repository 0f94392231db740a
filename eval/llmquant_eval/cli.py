"""``llmquant eval``: the command that proves what quantization cost.

Registered through the entry-point group ``llmquant.commands``. Importing this module must stay
cheap, because every ``llmquant`` command does it: typer and the standard library here, torch and
the models inside the command. People get a table on stdout and progress on stderr; with ``--json``
stdout holds the Report and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.options import DeviceOption, DtypeOption, KernelOption, ThreadsOption
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.leaderboard import cli as leaderboard_cli

if TYPE_CHECKING:
    from llmquant_eval.report.schema import Report
    from llmquant_eval.run.evaluate import Progress


_LOG_WIDTH = 120


def register(app: typer.Typer) -> None:
    """Add ``eval`` and ``leaderboard`` to the command line."""
    app.command("eval")(eval_command)
    leaderboard_cli.register(app)


def eval_command(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folders or hub names, dense or packed, or http://HOST:PORT/v1#MODEL.",
            metavar="MODEL…",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD]."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Model that the others are compared with (KL, ratio).")
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(
            help="ppl/gptq[-N], ppl/strided[-N[-STRIDE]], ppl/word[-N], ppl/word-wikitext[-N]; several: A,B."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window [default: 2048, or the context].")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Score only the first N windows.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows per batch [default: about 4096 tokens].")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder whose tokenizer a served model has.")
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Folder that keeps the reference's distributions for later runs.", metavar="DIR"
        ),
    ] = None,
    cache_form: Annotated[
        str | None, typer.Option(help="full-16 or top-K [default: by size].")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="lm-eval tasks, NAME or NAME=FILE.jsonl for those of ours; several: A,B."
        ),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Folder of lm-eval task files.", metavar="DIR")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N items of every task.")] = None,
    log_samples: Annotated[
        str | None,
        typer.Option(
            help="Folder for everything lm-eval logs of each item, as JSON Lines.", metavar="DIR"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the Report there as JSON.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Put the table into each candidate's README.md.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the Report as JSON and nothing else.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure load time, speed and memory.")
    ] = True,
    noise_floor: Annotated[
        bool, typer.Option(help="Measure the KL of rounding alone, on a few windows.")
    ] = True,
    plots: Annotated[
        Path | None, typer.Option(help="Write plots as PNG and SVG.", metavar="DIR")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Suite of models, texts and protocols: a YAML file, or quick or standard."
        ),
    ] = None,
    missing: Annotated[
        bool,
        typer.Option(
            "--missing",
            help="With --suite: only models without a current report among its results.",
        ),
    ] = False,
) -> None:
    """Measure perplexity, divergence from a reference, size, speed and memory."""
    import llmquant

    llmquant.set_threads(threads)
    if suite is not None:
        from llmquant_eval.suite_cli import suite_command

        suite_command(context)
        return
    if missing:
        raise UsageError("--missing belongs to --suite")
    from llmquant_eval.run.plan import Request

    request = Request(
        candidates=tuple(model or ()),
        text=text,
        reference=reference,
        protocol=_joined(protocol),
        window=window,
        max_windows=max_windows,
        dtype=dtype,
        device=device,
        kernel=kernel,
        threads=threads,
        batch_size=batch_size,
        tokenizer=tokenizer,
        cache=cache,
        cache_form=cache_form,
        tasks=_joined(tasks),
        include_path=include_path,
        limit=limit,
        log_samples=log_samples,
        cost=cost,
        noise_floor=noise_floor,
    )
    if card:
        _check_card_folders(request.candidates)
    if output is not None and not output.resolve().parent.is_dir():
        raise UsageError(
            f"--output {output}: the folder {output.resolve().parent} does not exist; make it first"
        )
    from transformers.utils import logging as transformers_logging

    from llmquant_eval.run.evaluate import evaluate

    # transformers' own bars would be drawn across ours, and in spite of --quiet.
    transformers_logging.disable_progress_bar()
    with _progress(hidden=quiet or as_json) as progress:
        report = evaluate(request, progress)
    _write(report, output, card)
    if plots is not None:
        from llmquant_eval.leaderboard.plots import write_report_plots

        for path in write_report_plots(plots, report):
            sys.stderr.write(f"wrote {path}\n")
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        _show(report)


def _joined(values: list[str] | None) -> str | None:
    """An option that may be given more than once, as one with commas."""
    return ",".join(values) if values else None


def _check_card_folders(candidates: tuple[str, ...]) -> None:
    """A card belongs to a folder of the user's, not to a cached download."""
    for source in candidates:
        if not Path(source).is_dir():
            raise UsageError(
                f"--card writes into a model folder and {source} is not one; leave out --card"
            )


def _write(report: Report, output: Path | None, card: bool) -> None:
    from llmquant_eval.report.card import replace_file, write_card

    if output is not None:
        try:
            replace_file(output, report.to_json())
        except OSError as e:
            raise LlmquantError(f"{output} cannot be written: {e}") from e
    for result in report.models:
        if card and result.role == "candidate":
            write_card(Path(result.source), report, result.label)


def _show(report: Report) -> None:
    from rich.console import Console

    from llmquant_eval.report.table import render

    # rich takes 80 columns where it sees no terminal; a log or a pipe has room for the whole table.
    console = Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)
    console.print(render(report, console.width))


@contextmanager
def _progress(hidden: bool) -> Iterator[Progress]:
    """A bar with the time left per stage, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), disable=hidden) as bars:
        tasks: dict[str, object] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield advance
