"""``llmquant serve``, ``chat`` and ``monitor``, registered through the entry-point group
``llmquant.commands``.

Importing this package must stay cheap, because every ``llmquant`` command does it: torch, FastAPI
and Gradio are imported by the commands when they run.
"""

from __future__ import annotations

import typer

from llmquant_serve.cli.chat import chat_command
from llmquant_serve.cli.monitor import monitor_command
from llmquant_serve.cli.serve import serve_command


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of llmquant."""
    app.command("serve")(serve_command)
    app.command("chat")(chat_command)
    app.command("monitor")(monitor_command)
