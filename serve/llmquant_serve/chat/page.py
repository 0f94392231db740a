"""The chat page (Gradio), mounted next to the API: chat, and A/B with the original model.

With API keys the page wants one of them as its password. Generation runs in the server's event loop
and through its gate, so people and programs share the same limits. Stop, Clear and leaving the page
free the engine's slot.
"""

from __future__ import annotations

import asyncio
import hmac
import html
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

import llmquant
from llmquant.errors import LlmquantError
from llmquant_serve.api.app import UI_PATH
from llmquant_serve.chat.compare import CSS as COMPARE_CSS
from llmquant_serve.chat.compare import divergence, marked
from llmquant_serve.chat.conversation import chat_tab
from llmquant_serve.chat.events import UNLIMITED, UNQUEUED, WHOLE_LINE, notice, visitor
from llmquant_serve.chat.replies import Reply, reply
from llmquant_serve.chat.settings import sampling_of, settings_panel, with_system
from llmquant_serve.chat.transcript import CSS as CHAT_CSS
from llmquant_serve.chat.visitors import Runs, together
from llmquant_serve.service import Service


def mount(
    app: FastAPI, service: Service, keys: Sequence[str], reference: Service | None, folder: Path
) -> None:
    """Put the page at ``/ui``.

    Args:
        keys: API keys, any of which is the page's password; without any, it has none.
        reference: the original model for A/B; None leaves that tab out.
        folder: of the model, whose card may have a measured table.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")  # the oldest Gradio has no such argument

    def is_key(_: str, password: str) -> bool:
        matches = [hmac.compare_digest(password.encode(), key.encode()) for key in keys]
        return any(matches)

    async def build() -> None:
        gr.mount_gradio_app(
            app,
            build_page(service, reference, measured(folder)),
            path=UI_PATH,
            auth=is_key if keys else None,
            auth_message="Log in with any name; the password is an API key of this server.",
            footer_links=[],
            ssr_mode=False,
            css=COMPARE_CSS + CHAT_CSS,
        )

    # Where no event loop runs, Gradio opens four and leaves them open.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, build()).result()


def measured(folder: Path) -> str | None:
    """The table that ``llmquant eval --card`` wrote into the model card; None without one."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    _, start, rest = text.partition(llmquant.MEASURED_START)
    table, end, _ = rest.partition(llmquant.MEASURED_END)
    return table.strip() if start and end and table.strip() else None


def build_page(service: Service, reference: Service | None, table: str | None) -> gr.Blocks:
    """The page: chat, A/B if there is a reference, and ``table``, the measured one."""
    chats: Runs[Any] = Runs()
    comparisons: Runs[Any] = Runs()
    with gr.Blocks(
        title=f"{service.model} · llmquant", analytics_enabled=False, fill_height=True
    ) as page:
        gr.HTML(f"<h2>{html.escape(service.model)}</h2>")
        settings = settings_panel()
        with gr.Tabs():
            with gr.Tab("Chat"):
                chat_tab(service, settings, chats)
            if reference is not None:
                with gr.Tab("A/B"):
                    _compare_tab(service, reference, settings, comparisons)
            with gr.Tab("Measured"):
                gr.Markdown(
                    table
                    or "This model has not been measured. `llmquant eval --card` measures it and writes the table into its model card."
                )
        for runs in (chats, comparisons):
            page.unload(_stopper(runs))
    built: gr.Blocks = page
    return built


def _stopper(runs: Runs[Any]) -> Callable[[gr.Request], Coroutine[Any, Any, None]]:
    """What ends everything that a visitor has running."""

    async def stop_runs(request: gr.Request) -> None:
        runs.stop(visitor(request))

    return stop_runs


def _compare_tab(
    service: Service, reference: Service, settings: list[gr.components.Component], runs: Runs[Any]
) -> None:
    gr.Markdown(
        "Both models get the same prompt, settings and seed. Red: the first token that differs; amber: later ones. "
        "Hover over a token for its probability and its alternatives."
    )
    with gr.Row():
        box = gr.Textbox(
            show_label=False,
            placeholder="Type a prompt for both models",
            scale=6,
            min_width=WHOLE_LINE,
            elem_id="ab-box",
        )
        go = gr.Button("Compare", variant="primary", scale=1, min_width=90, elem_id="ab-go")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="ab-stop")
    panes: list[gr.components.Component] = []
    with gr.Row():
        for side, name in (("left", service.model), ("right", f"{reference.model} (original)")):
            with gr.Column(min_width=280):
                gr.HTML(f"<strong>{html.escape(name)}</strong>")
                panes += [gr.HTML(elem_id=f"ab-{side}"), gr.Markdown()]
    verdict = gr.Markdown("", elem_id="ab-verdict")
    outputs = [*panes, verdict]
    compare = _comparer(service, reference, runs)
    for event in (go.click, box.submit):
        event(compare, [box, *settings], outputs, **UNLIMITED)
    stop.click(_stopper(runs), **UNQUEUED)


def _comparer(
    service: Service, reference: Service, runs: Runs[Any]
) -> Callable[..., AsyncGenerator[tuple[str, str, str, str, str], None]]:
    """What streams both replies into the two panes, each with its status line, and the verdict."""

    async def compare(
        request: gr.Request, text: str | None, system: str | None, *numbers: float
    ) -> AsyncGenerator[tuple[str, str, str, str, str], None]:
        if not text or not text.strip():
            return
        turns = with_system(system, [{"role": "user", "content": text}])
        sampling = sampling_of(numbers, logprobs=5)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(32))  # one for both
        work = together([reply(model, turns, sampling) for model in (service, reference)])
        try:
            async with aclosing(runs.follow(visitor(request), work)) as growing:
                async for now in growing:
                    yield _sides(service, reference, [r or Reply() for r in now])
        except LlmquantError as e:
            raise notice(e) from e

    return compare


def _sides(
    service: Service, reference: Service, now: Sequence[Reply]
) -> tuple[str, str, str, str, str]:
    """Both replies so far, as the outputs of the A/B tab."""
    left, right = (r.pieces for r in now)
    first = divergence(left, right)
    if first is not None:
        verdict = f"The first difference is at token {first + 1}."
    else:
        verdict = "All tokens are the same." if all(r.finished for r in now) else "The same so far."
    return (
        marked(service.text.tokenizer, left, right),
        now[0].status,
        marked(reference.text.tokenizer, right, left),
        now[1].status,
        verdict,
    )
