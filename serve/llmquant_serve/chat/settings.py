"""The settings of the chat page, and what they mean for a reply."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from llmquant.errors import UsageError
from llmquant_serve.chat.opening import Opening
from llmquant_serve.engines.base import Sampling

# What a visitor may ask with one click: things that people know the answer of, short and long.
EXAMPLES = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain gravity to a child in three sentences.",
    "Write a short poem about the sea.",
)

_NO_LIMIT = 2**31 - 1  # tokens of a reply; the context is shorter


def settings_panel(opening: Opening) -> list[gr.components.Component]:
    """System prompt and sampling parameters, folded away. The boxes have no bounds: Gradio would
    answer a number beyond them by a bare "Error", and the message would be lost."""
    first = opening.sampling
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox(opening.system, label="System prompt", lines=3, elem_id="system")
        temperature = gr.Slider(
            0.0,
            2.0,
            first.temperature,
            step=0.05,
            label="Temperature (0: greedy)",
            elem_id="temperature",
        )
        top_p = gr.Slider(0.0, 1.0, first.top_p, step=0.01, label="Top-p", elem_id="top-p")
        top_k = gr.Number(first.top_k, label="Top-k (0: all)", precision=0)
        max_tokens = gr.Number(
            first.max_tokens,
            label="Longest reply (tokens; empty: what fits)",
            precision=0,
            elem_id="max-tokens",
        )
        seed = gr.Number(
            -1 if first.seed is None else first.seed,
            label="Seed (-1: a new one each time)",
            precision=0,
            elem_id="seed",
        )
    return [system, temperature, top_p, top_k, max_tokens, seed]


def sampling_of(numbers: Sequence[float | None], logprobs: int | None = None) -> Sampling:
    """From the sliders and boxes, in the order of :func:`settings_panel`.

    Raises:
        UsageError: a number is too small.
    """
    temperature, top_p, top_k, max_tokens, seed = numbers
    bounds = (("Top-k", top_k, 0), ("Longest reply", max_tokens, 1), ("Seed", seed, -1))
    for name, number, least in bounds:
        if number is not None and number < least:
            raise UsageError(
                f"{name} is {number:.0f} in the settings; it must be at least {least}, or empty"
            )
    return Sampling(
        max_tokens=_NO_LIMIT if max_tokens is None else int(max_tokens),
        temperature=float(temperature or 0.0),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=int(top_k or 0),
        seed=None if seed is None or seed < 0 else int(seed),
        logprobs=logprobs,
    )


def with_system(system: str | None, turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """What the chat template gets: the system prompt first if there is one."""
    # None: a box that was never shown, since the settings are folded away.
    return [*([{"role": "system", "content": system}] if system and system.strip() else []), *turns]
