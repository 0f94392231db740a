"""The command line: ``llmquant quantize | qat | inspect | generate | recipes`` and whatever
installed packages add.

Importing this package must not import torch, so that ``--help`` and a mistyped option answer at
once: commands import what they need when they run. Further commands join through the entry-point
group ``llmquant.commands`` (each entry a function ``register(app)``), so the library never imports
the packages above it.

Exit codes: 0 done, 1 the work failed, 2 the request cannot be right, 130 interrupted (Ctrl-C or
SIGTERM). Errors go to stderr, one paragraph, no traceback; results to stdout.
"""

from __future__ import annotations

import io
import os
import sys
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.commands.advise import advise_command
from llmquant.cli.commands.allocate.command import allocate_command
from llmquant.cli.commands.convert import convert_command
from llmquant.cli.commands.doctor import doctor_command
from llmquant.cli.commands.edge.export import export_command
from llmquant.cli.commands.generate import generate_command
from llmquant.cli.commands.import_ import import_command
from llmquant.cli.commands.inspect import inspect_command
from llmquant.cli.commands.plan import plan_command
from llmquant.cli.commands.qat.command import qat_command
from llmquant.cli.commands.quantize import quantize_command
from llmquant.cli.commands.recipes import recipes_command
from llmquant.cli.commands.verify import verify_command
from llmquant.cli.every_command import check_values, name_values
from llmquant.cli.stopping import tell
from llmquant.errors import LlmquantError

app = typer.Typer(
    name="llmquant",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmquant {version('llmquant')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Quantize a Hugging Face LLM, prove what it cost, and serve it."""


app.command("advise")(advise_command)
app.command("plan")(plan_command)
app.command("allocate")(allocate_command)
app.command("quantize")(quantize_command)
app.command("qat")(qat_command)
app.command("convert")(convert_command)
app.command("export")(export_command)
app.command("import")(import_command)
app.command("inspect")(inspect_command)
app.command("verify")(verify_command)
app.command("generate")(generate_command)
app.command("recipes")(recipes_command)
app.command("doctor")(doctor_command)


@cache
def _add_commands() -> None:
    """The commands of other packages, and what every command has; once, however often ``main`` is
    called in a process."""
    for entry in sorted(entry_points(group="llmquant.commands"), key=lambda e: e.name):
        entry.load()(app)
    name_values(app)
    check_values(app)


def _open_streams() -> None:
    """Of a process that was started with closed streams Python has None for them: nothing can be
    read there, and what is written is lost."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - until the end
            setattr(sys, name, stream)


def main() -> None:
    """Entry point: run the app, turn our errors into a message and an exit code."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal that cannot show a character shows a question mark
    _add_commands()
    try:
        app()
    except LlmquantError as e:
        sys.stderr.write(f"error: {e}\n")
        raise SystemExit(e.exit_code) from None
    except KeyboardInterrupt as e:  # before or after a command
        tell(e)
    except BrokenPipeError:
        # The reader of our stdout has gone (a pager was closed): not an error, and nothing more can
        # be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as e:
        sys.stderr.write(f"error: the operating system refused: {e}\n")
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as e:
        from llmquant.runtime.memory import out_of_memory

        if not out_of_memory(e):
            raise
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        sys.stderr.write(
            f"error: there is no memory left: {said}; close other programs, or ask for less at once (smaller batches, shorter windows)\n"
        )
        raise SystemExit(1) from None
