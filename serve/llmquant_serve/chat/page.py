"""The chat page (Gradio), mounted next to the API: chat, and A/B with the original model.

With API keys the page wants one of them as its password. Generation runs in the server's event loop
and through its gate, so people and programs share the same limits. Stop, Clear and leaving the page
free the engine's slot.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from llmquant_serve.api.app import UI_PATH
from llmquant_serve.chat.conversation import chat_tab
from llmquant_serve.chat.events import stopper
from llmquant_serve.chat.facts import Facts, facts_of
from llmquant_serve.chat.opening import Opening
from llmquant_serve.chat.settings import settings_panel
from llmquant_serve.chat.side_by_side import compare_tab
from llmquant_serve.chat.visitors import Runs
from llmquant_serve.service import Service

_HERE = Path(__file__).parent
_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")
# Four small squares, as the weights are; browsers ask the server's root for an icon otherwise.
_ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' "
    "fill='%236366f1'%3E%3Cpath d='M1 1h6v6H1zM9 1h6v6H9zM1 9h6v6H1zM10 10h4v4h-4z'/%3E%3C/svg%3E\">"
)
_NOT_MEASURED = """### Not measured yet

`llmquant eval MODEL --reference ORIGINAL --text SOURCE --card` measures this model and writes the table into its model card."""


def mount(
    app: FastAPI,
    service: Service,
    keys: Sequence[str],
    reference: Service | None,
    folder: Path,
    original: Path | None = None,
    opening: Opening | None = None,
) -> None:
    """Put the page at ``/ui``.

    Args:
        keys: API keys, any of which is the page's password; without any, it has none.
        reference: the original model for A/B; None leaves that tab out.
        folder: of the model, whose card may have a measured table.
        original: the folder of ``reference``.
        opening: what the settings are at first.
    """
    facts = facts_of(service, folder, original)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # the oldest Gradio has no such argument

    def is_key(_: str, password: str) -> bool:
        matches = [hmac.compare_digest(password.encode(), key.encode()) for key in keys]
        return any(matches)

    async def build() -> None:
        gr.mount_gradio_app(
            app,
            build_page(service, reference, facts, opening or Opening()),
            path=UI_PATH,
            auth=is_key if keys else None,
            auth_message="Log in with any name; the password is an API key of this server.",
            footer_links=[],
            ssr_mode=False,
            theme=_theme(),
            css=(_HERE / "page.css").read_text(encoding="utf-8"),
            head=_ICON + f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        )

    # Where no event loop runs, Gradio opens four and leaves them open.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, build()).result()


def build_page(
    service: Service, reference: Service | None, facts: Facts, opening: Opening
) -> gr.Blocks:
    """The page: what it talks to, chat, A/B if there is a reference, and the measured table."""
    comparisons: Runs[Any] = Runs()
    with gr.Blocks(
        title=f"{service.model} · llmquant", analytics_enabled=False, fill_height=True
    ) as page:
        gr.HTML(facts.html, elem_id="facts")
        settings = settings_panel(opening)
        with gr.Tabs(elem_id="tabs"):
            with gr.Tab("Chat"):
                talk = chat_tab(service, settings)
            if reference is not None:
                with gr.Tab("A/B"):
                    compare_tab(service, reference, settings, comparisons)
            with gr.Tab("Measured"):
                gr.Markdown(facts.table or _NOT_MEASURED, elem_id="measured")
        page.unload(talk.leave)
        page.unload(stopper(comparisons))
    built: gr.Blocks = page
    return built


def _theme() -> gr.themes.Base:
    """The system's own letters, one accent, little else: nothing is fetched from elsewhere."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", font=_FONT, font_mono=_MONO, radius_size="lg"
    )
