"""Processes that tests start, what they find (signals, stdin), and signals in the tests' own.

A shell has commands that it starts in the background ignore Ctrl-C (SIGINT), and whatever they
start inherits that. A run of ours then goes on ignoring it, as it should; a test of what Ctrl-C
does must therefore say that it is heeded, wherever the tests run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import Handlers
from typing import Any, NamedTuple

from llmquant.cli import main

_START = """
import os, signal, sys
action, *command = sys.argv[1:]
if action == "closed":
    os.close(0)
else:
    signal.signal(signal.SIGINT, signal.SIG_IGN if action == "ignored" else signal.SIG_DFL)
os.execv(command[0], command)
"""


def _started(action: str, command: Sequence[str]) -> list[str]:
    # A program of its own and no preexec_fn, which may hang in a process that has threads.
    return [sys.executable, "-S", "-c", _START, action, *command]


def heeding_interrupts(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` with SIGINT as a terminal leaves it."""
    return _started("heeded", command)


def ignoring_interrupts(command: Sequence[str]) -> list[str]:
    """The command that runs ``command`` with SIGINT as in a shell's background."""
    return _started("ignored", command)


class Ended(NamedTuple):
    """A command that ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """stderr as one line, however wide the terminal is."""
        return " ".join(self.err.split())


Run = Callable[..., Ended]


def run_here(*arguments: object) -> Ended:
    """Run an llmquant command in this process; an exception that is no error in words comes
    through."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["llmquant", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    return Ended(code or 0, out.getvalue(), err.getvalue())


# Several commands in one process: torch is imported once.
_COMMANDS = """
import contextlib, io, json, sys
from llmquant.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv, out, err = ["llmquant", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as e:
            code = e.code
    print("ended", json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run_commands(commands: Sequence[Sequence[str]], *, at_terminal: bool) -> list[Ended]:
    """Run llmquant commands one after the other in a process whose stdin is closed, or a terminal
    at which nobody types."""
    program = [sys.executable, "-c", _COMMANDS, json.dumps(commands)]
    terminal, keyboard = pty.openpty() if at_terminal else (None, None)
    done = subprocess.run(
        program if at_terminal else _started("closed", program),
        stdin=subprocess.DEVNULL if keyboard is None else keyboard,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    for end in filter(None, (terminal, keyboard)):
        os.close(end)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ended ")]
    return [Ended(*json.loads(line.removeprefix("ended "))) for line in lines]


def make_foreign(folder: Path) -> Path:
    """Change a model folder into one whose type only its own code knows; the code leaves a file
    ``ran`` in it when it is run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "foreign"
    config["architectures"] = ["ForeignForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": "foreign.Config",
        "AutoModelForCausalLM": "foreign.Model",
        "AutoTokenizer": ["foreign.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "foreign.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", encoding="utf-8")
    return folder


@contextmanager
def interrupts(ignored: bool) -> Iterator[None]:
    """In this process SIGINT is ignored, as in the background, or raises KeyboardInterrupt, as
    Python has it in a terminal."""
    before = signal.signal(
        signal.SIGINT, Handlers.SIG_IGN if ignored else signal.default_int_handler
    )
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
