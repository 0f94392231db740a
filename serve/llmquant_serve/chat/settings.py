"""The settings of the chat page, and what they mean for a reply."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from llmquant_serve.engines.base import Sampling

# What a visitor may ask with one click: things that people know the answer of, short and long.
EXAMPLES = (
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "Explain gravity to a child in three sentences.",
    "Write a short poem about the sea.",
)


def settings_panel() -> list[gr.components.Component]:
    """System prompt and sampling parameters, folded away."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        system = gr.Textbox("", label="System prompt", lines=3, elem_id="system")
        temperature = gr.Slider(
            0.0, 2.0, 0.7, step=0.05, label="Temperature (0: greedy)", elem_id="temperature"
        )
        top_p = gr.Slider(0.0, 1.0, 0.95, step=0.01, label="Top-p")
        top_k = gr.Number(0, label="Top-k (0: all)", precision=0, minimum=0)
        max_tokens = gr.Number(
            256, label="Longest reply (tokens)", precision=0, minimum=1, elem_id="max-tokens"
        )
        seed = gr.Number(-1, label="Seed (-1: a new one each time)", precision=0, minimum=-1)
    return [system, temperature, top_p, top_k, max_tokens, seed]


def sampling_of(numbers: Sequence[float], logprobs: int | None = None) -> Sampling:
    """From the sliders and boxes, in the order of :func:`settings_panel`."""
    temperature, top_p, top_k, max_tokens, seed = numbers
    return Sampling(
        max_tokens=max(1, int(max_tokens or 1)),
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=int(top_k or 0),
        seed=None if seed is None or seed < 0 else int(seed),
        logprobs=logprobs,
    )


def with_system(system: str | None, turns: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """What the chat template gets: the system prompt first if there is one."""
    # None: a box that was never shown, since the settings are folded away.
    return [*([{"role": "system", "content": system}] if system and system.strip() else []), *turns]
