"""The A/B tab: one prompt, answered by the served model and by the original, one after the other,
so that neither slows the other and their speeds can be compared; then each scores the other's
answer.
"""

from __future__ import annotations

import html
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr

from llmquant.errors import LlmquantError
from llmquant_serve.chat.compare import agreement, marked, verdict
from llmquant_serve.chat.events import UNLIMITED, UNQUEUED, notice, stopper, visitor
from llmquant_serve.chat.replies import Reply, reply, scored
from llmquant_serve.chat.settings import EXAMPLES, sampling_of, with_system
from llmquant_serve.chat.visitors import Runs
from llmquant_serve.engines.base import Sampling, Token
from llmquant_serve.service import Service

_TOP = 5  # alternatives of each token
_INTRODUCTION = (
    "Both models answer the same prompt, one after the other, with the same settings. "
    "Then each scores the other's answer."
)
_KEY = (
    '<div class="key"><span><mark class="first">red</mark> the first token that differs</span>'
    '<span><mark class="differs">amber</mark> here the other model would say another token</span>'
    '<span class="pointer">hover for probabilities</span></div>'
)


@dataclass(frozen=True, slots=True)
class Models:
    """The two that are compared.

    Attributes:
        comparable: a token id means the same to both.
    """

    ours: Service
    original: Service
    comparable: bool

    @classmethod
    def of(cls, ours: Service, original: Service) -> Models:
        """With a look at their vocabularies."""
        one, other = (s.text.tokenizer.get_vocab() for s in (ours, original))
        return cls(ours, original, bool(one == other))


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers so far, the served model's first.

    Attributes:
        scores: the tokens of each with the other model's log-probabilities.
        doing: what happens now; empty when all is done.
    """

    replies: tuple[Reply, Reply] = (Reply(), Reply())
    scores: tuple[Sequence[Token] | None, Sequence[Token] | None] = (None, None)
    doing: str = ""


async def pair(
    models: Models, turns: Sequence[dict[str, str]], sampling: Sampling
) -> AsyncGenerator[Pair, None]:
    """Both answers to a conversation as they grow, and what each model makes of the other's.

    Raises:
        LlmquantError: as :func:`~llmquant_serve.chat.replies.reply`.
    """
    ours, original = models.ours, models.original
    now = Pair(doing=f"{ours.model} is answering")
    yield now
    async with aclosing(reply(ours, turns, sampling)) as growing:
        async for answer in growing:
            now = replace(now, replies=(answer, now.replies[1]))
            yield now
    now = replace(now, doing="The original is answering")
    yield now
    async with aclosing(reply(original, turns, sampling)) as growing:
        async for answer in growing:
            now = replace(now, replies=(now.replies[0], answer))
            yield now
    if models.comparable:
        yield replace(now, doing="Each model is scoring the other's answer")
        first, second = now.replies
        now = replace(
            now,
            scores=(await _scored(original, first), await _scored(ours, second)),
        )
    yield replace(now, doing="")


async def _scored(other: Service, answer: Reply) -> Sequence[Token] | None:
    return await scored(other, answer.prompt, [t.id for t in answer.ids], _TOP)


def compare_tab(
    service: Service, reference: Service, settings: list[gr.components.Component], runs: Runs[Any]
) -> None:
    """The widgets of the tab, and what happens when they are used."""
    with gr.Column(elem_id="ab"):
        gr.HTML(f'<p class="hint">{_INTRODUCTION}</p>')
        with gr.Row(elem_id="ab-composer"):
            box = gr.Textbox(
                show_label=False,
                container=False,
                placeholder="A prompt for both models",
                scale=6,
                min_width=120,
                elem_id="ab-box",
            )
            go = gr.Button("Compare", variant="primary", scale=0, min_width=100, elem_id="ab-go")
            stop = gr.Button("Stop", variant="stop", scale=0, min_width=80, elem_id="ab-stop")
        greedy = gr.Checkbox(
            True,
            label="Greedy: always the most likely token, so that chance makes no difference",
            container=False,
            elem_id="ab-greedy",
        )
        with gr.Row(elem_id="ab-examples", elem_classes="examples"):
            examples = [gr.Button(text, size="sm", min_width=120) for text in EXAMPLES]
        summary = gr.HTML("", elem_id="ab-verdict")
        with gr.Row(elem_id="ab-panes"):
            panes = [gr.HTML("", elem_id=f"ab-{side}", min_width=280) for side in ("left", "right")]
    compare = _comparer(Models.of(service, reference), runs)
    outputs = [*panes, summary]
    for event in (go.click, box.submit):
        event(compare, [box, greedy, *settings], outputs, **UNLIMITED)
    for example in examples:
        example.click(partial(str, example.value), None, box, **UNQUEUED).then(
            compare, [example, greedy, *settings], outputs, **UNLIMITED
        )
    stop.click(stopper(runs), **UNQUEUED)


def _comparer(
    models: Models, runs: Runs[Any]
) -> Callable[..., AsyncGenerator[tuple[Any, Any, Any], None]]:
    """What streams both answers into their panes and what they say into the summary."""

    async def compare(
        request: gr.Request, text: str | None, greedy: bool, system: str | None, *numbers: float
    ) -> AsyncGenerator[tuple[Any, Any, Any], None]:
        if not text or not text.strip():
            yield gr.skip(), gr.skip(), gr.skip()  # a generator without values empties the panes
            return
        turns = with_system(system, [{"role": "user", "content": text}])
        who, now = visitor(request), Pair()
        try:
            sampling = _sampling(numbers, greedy=greedy)
            async with aclosing(runs.follow(who, pair(models, turns, sampling))) as growing:
                async for now in growing:
                    yield _shown(models, now)
            if now.doing and not runs.running(who):  # stopped, and nothing else has begun
                yield _shown(models, replace(now, doing=""))
        except LlmquantError as e:
            yield _shown(models, replace(now, doing=""))
            raise notice(e) from e

    return compare


def _sampling(numbers: Sequence[float | None], *, greedy: bool) -> Sampling:
    """How both models choose; raises UsageError for a setting that cannot be."""
    sampling = sampling_of(numbers, logprobs=_TOP)
    if greedy:
        return replace(sampling, temperature=0.0)
    return replace(
        sampling, seed=secrets.randbits(32) if sampling.seed is None else sampling.seed
    )  # one for both


def _shown(models: Models, now: Pair) -> tuple[str, str, str]:
    """Two answers as the outputs of the tab: the panes and the summary."""
    ours, original = models.ours, models.original
    left, right = now.replies
    return (
        _pane(ours.model, left, marked(ours.text.tokenizer, left, right, now.scores[0])),
        _pane(
            f"{original.model} (original)",
            right,
            marked(original.text.tokenizer, right, left, now.scores[1]),
        ),
        _summary(models, now),
    )


def _pane(name: str, answer: Reply, text: str) -> str:
    status = answer.status if answer.pieces else ""
    return f'<div class="pane"><h3>{html.escape(name)}</h3>{text}<footer>{status}</footer></div>'


def _summary(models: Models, now: Pair) -> str:
    """What happens now, or what came out."""
    left, right = now.replies
    if now.doing:
        return f'<div class="doing" aria-busy="true">{html.escape(now.doing)}…</div>'
    if not (left.pieces and right.pieces):
        return ""
    if not models.comparable:
        return '<p class="verdict">The two models have different vocabularies, so their tokens cannot be compared.</p>'
    found = None if now.scores[1] is None else agreement(right.ids, now.scores[1])
    return verdict(models.ours.text.tokenizer, left, right, found) + _KEY
