"""``llmquant monitor``: has anything drifted, in a log or at a server?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.options import JsonOption, OverwriteOption, from_home
from llmquant.errors import UsageError
from llmquant_serve.cli.launch import require

DRIFTED = 3
"""The exit code where there are alarms."""

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="The log of `llmquant serve --drift`, or the server's http://HOST:PORT.",
        metavar="LOG|URL",
        callback=from_home,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help="Also draw it: .png, .svg, .pdf, or .html with the table.",
        metavar="FILE",
        callback=from_home,
    ),
]
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        help="Make a new profile of the requests in LOG, for the next `serve --drift`.",
        metavar="FILE",
        callback=from_home,
    ),
]


def monitor_command(
    source: SourceArgument,
    plot: PlotOption = None,
    profile: ProfileOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show whether prompts or answers have drifted.

    Exit code 3 if they have.
    """
    require("httpx")
    from llmquant import FileKind, refuse_foreign
    from llmquant_serve.drift.show import check_plot, show, write_plot
    from llmquant_serve.drift.sources import profile_of, report_of

    check_plot(plot)
    if profile is not None and profile.exists() and not overwrite:
        raise UsageError(f"--profile {profile} is there already; add --overwrite to replace it")
    if profile is not None and profile.exists():
        if Path(source).exists():
            _refuse_log(profile, source)
        refuse_foreign(profile, FileKind.PROFILE)
    report = report_of(source)
    if as_json:
        sys.stdout.write(report.model_dump_json(indent=1) + "\n")
    else:
        from rich.console import Console

        show(
            report,
            Console(width=None if sys.stdout.isatty() else 140, markup=False, highlight=False),
        )
    if plot is not None:
        write_plot(report, plot)
        sys.stderr.write(f"wrote {plot}\n")
    if profile is not None:
        _write_profile(profile, profile_of(source).to_json())
    if report.alarms:
        raise typer.Exit(DRIFTED)


def _refuse_log(profile: Path, source: str) -> None:
    """Raises UsageError for a profile in place of the log that is read."""
    if profile.samefile(source):
        raise UsageError(f"--profile {profile} is the log itself; give another file")


def _write_profile(path: Path, text: str) -> None:
    from llmquant import write_file

    write_file(path, text)
    sys.stderr.write(f"wrote {path}\n")
