"""What the page's tabs have in common: how Gradio queues their events, whose they are, how they
fail."""

from __future__ import annotations

import html
from collections.abc import Callable, Coroutine
from typing import Any

import gradio as gr

from llmquant.errors import LlmquantError
from llmquant_serve.chat.visitors import Runs

# "multiple": Gradio drops an event of its own accord while the one before it is still ending.
_QUIET: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "trigger_mode": "multiple",
}
UNQUEUED: dict[str, Any] = {"queue": False, **_QUIET}
UNLIMITED: dict[str, Any] = {"concurrency_limit": None, **_QUIET}


def visitor(request: gr.Request) -> str:
    """Whose event it is: one page in one browser."""
    return str(request.session_hash)


def notice(e: LlmquantError) -> gr.Error:
    """An error as a notice of the page, which takes its text for HTML. A refused message is no
    fault of the server, and the engine logs its own faults: no traceback here."""
    return gr.Error(html.escape(str(e), quote=False), print_exception=False)


def stopper(runs: Runs[Any]) -> Callable[[gr.Request], Coroutine[Any, Any, None]]:
    """What ends everything that a visitor has running."""

    async def stop_runs(request: gr.Request) -> None:
        runs.stop(visitor(request))

    return stop_runs
