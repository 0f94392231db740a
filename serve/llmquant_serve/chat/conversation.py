"""The page's chat: what a visitor asks, the reply as it grows, Stop, Regenerate, Clear and Export.

A message is in one of three places and never in none: in the box, on its way (``Asked``), or in the
conversation. It enters the conversation with the first words of its reply; refused, failed or
stopped before them, it is in the box again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from llmquant.errors import LlmquantError
from llmquant_serve.chat.events import UNLIMITED, UNQUEUED, notice, visitor
from llmquant_serve.chat.replies import reply
from llmquant_serve.chat.settings import EXAMPLES, sampling_of, with_system
from llmquant_serve.chat.transcript import transcript
from llmquant_serve.chat.visitors import Runs
from llmquant_serve.service import Service

_EXPORT = """(text) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
  link.download = "conversation.json"; link.click(); URL.revokeObjectURL(link.href);
}"""
_ON_THE_WAY_SECONDS = 0.3
Turn = dict[str, str]


def chat_tab(service: Service, settings: list[gr.components.Component]) -> Conversation:
    """The widgets of the tab, and what happens when they are used."""
    chat = gr.HTML(transcript([], service.model), elem_id="chat")
    turns, exported = gr.State([]), gr.Textbox(visible="hidden")
    with gr.Row(elem_id="examples", elem_classes="examples"):
        examples = [gr.Button(text, size="sm", min_width=120) for text in EXAMPLES]
    with gr.Row(elem_id="composer"):
        box = gr.Textbox(
            show_label=False,
            container=False,
            placeholder=f"Message {service.model}",
            scale=6,
            min_width=120,
            max_lines=8,
            elem_id="box",
            autofocus=True,
        )
        stop = gr.Button("Stop", variant="stop", scale=0, min_width=80, elem_id="stop")
        send = gr.Button("Send", variant="primary", scale=0, min_width=80, elem_id="send")
    with gr.Row(elem_id="below"):
        status = gr.HTML("", elem_id="status")
        regenerate = gr.Button("Regenerate", size="sm", scale=0, min_width=90, elem_id="regenerate")
        clear = gr.Button("Clear", size="sm", scale=0, min_width=60, elem_id="clear")
        export = gr.Button("Export", size="sm", scale=0, min_width=60, elem_id="export")
    talk = Conversation(service)
    for event, said, ready, ask in (
        (send.click, box, talk.make_way, talk.ask),
        (box.submit, box, talk.make_way, talk.ask),
        (regenerate.click, box, talk.stop_reply, talk.ask_again),
        *((example.click, example, talk.make_way, talk.ask_example) for example in examples),
    ):
        event(ready, [said], None, **UNQUEUED).then(
            ask, [said, turns], [box, chat, status], **UNQUEUED
        ).then(talk.answer, [turns, *settings], [box, chat, status, turns], **UNLIMITED)
    stop.click(talk.stop, [box, turns], [box, chat], **UNQUEUED)
    # Not by Gradio's queue: its page closes the queue's stream when a reply has ended, and may miss
    # what is sent in that moment. So ``cancels`` is not used either.
    emptied = [chat, status, turns]
    clear.click(talk.clear, [box], emptied, **UNQUEUED).then(
        talk.still_clear, None, emptied, **UNQUEUED
    )
    export.click(_exported, [turns, settings[0]], exported, **UNQUEUED).then(
        None, [exported], None, js=_EXPORT, api_visibility="private"
    )
    return talk


@dataclass
class Asked:
    """A conversation whose last message has no reply yet; ``taken`` by the run that answers it."""

    turns: list[Turn]
    taken: bool = False


@dataclass
class Conversation:
    """What the buttons do; ``turns`` are a visitor's conversation as the page keeps it."""

    service: Service
    runs: Runs[Any] = field(default_factory=Runs)
    asked: dict[str, Asked] = field(default_factory=dict)  # by visitor
    cleared: set[str] = field(default_factory=set)  # visitors who asked nothing since Clear

    async def make_way(self, request: gr.Request, text: str | None) -> None:
        """Stop the reply before this message; an empty box (a second click) stops nothing."""
        if text and text.strip():
            await self.stop_reply(request, text)

    async def stop_reply(self, request: gr.Request, _: str | None) -> None:
        """Stop the reply that is running, or about to be."""
        self.asked.pop(visitor(request), None)
        self.runs.stop(visitor(request))

    async def stop(
        self, request: gr.Request, text: str | None, turns: list[Turn]
    ) -> tuple[Any, Any]:
        """The same; a message without a single word of reply is in the box again."""
        asked = self.asked.get(visitor(request))
        await self.stop_reply(request, text)
        if asked is None:
            return gr.skip(), gr.skip()
        return text or _unsent(asked.turns, turns), self._transcript(turns)

    async def ask(
        self, request: gr.Request, text: str | None, turns: list[Turn]
    ) -> tuple[Any, Any, Any]:
        """The message of the box is on its way."""
        if not text or not text.strip():
            return gr.skip(), gr.skip(), gr.skip()
        asked = self._ask(request, [*turns, {"role": "user", "content": text}])
        return "", self._transcript(asked.turns, busy=True), ""

    async def ask_example(
        self, request: gr.Request, text: str | None, turns: list[Turn]
    ) -> tuple[Any, Any, Any]:
        """The same with an example; what is in the box stays there."""
        _, shown, status = await self.ask(request, text, turns)
        return gr.skip(), shown, status

    async def ask_again(
        self, request: gr.Request, _: str | None, turns: list[Turn]
    ) -> tuple[Any, str, Any]:
        """The last message of the conversation is on its way."""
        while turns and turns[-1]["role"] != "user":
            turns = turns[:-1]
        if turns:
            self._ask(request, turns)
        return gr.skip(), self._transcript(turns, busy=bool(turns)), ""

    async def clear(self, request: gr.Request, text: str | None) -> tuple[str, str, list[Turn]]:
        """No conversation, and no reply to it."""
        await self.stop_reply(request, text)
        self.cleared.add(visitor(request))
        return self._transcript([]), "", []

    async def still_clear(self, request: gr.Request) -> tuple[Any, Any, Any]:
        """The same once more, a moment later: the last words of the stopped reply were on their
        way to the page."""
        await asyncio.sleep(_ON_THE_WAY_SECONDS)
        if visitor(request) not in self.cleared:
            return gr.skip(), gr.skip(), gr.skip()
        return self._transcript([]), "", []

    async def leave(self, request: gr.Request) -> None:
        """A visitor has closed the page."""
        await self.stop_reply(request, None)
        self.cleared.discard(visitor(request))

    def _ask(self, request: gr.Request, turns: list[Turn]) -> Asked:
        """These turns are on their way."""
        self.cleared.discard(visitor(request))
        self.asked[visitor(request)] = asked = Asked(turns)
        return asked

    def _transcript(self, turns: list[Turn], *, busy: bool = False) -> str:
        return transcript(turns, self.service.model, busy=busy)

    async def answer(
        self, request: gr.Request, turns: list[Turn], system: str, *numbers: float
    ) -> AsyncGenerator[tuple[Any, Any, Any, Any], None]:
        """The reply into the chat and its status line, as it grows."""
        who = visitor(request)
        asked = self.asked.get(who)
        # Gradio empties the outputs of a generator that ends without giving anything.
        yield gr.skip(), gr.skip(), gr.skip(), gr.skip()
        if asked is None or asked.taken:
            return
        asked.taken = True
        longer, finished = asked.turns, True
        try:
            work = reply(self.service, with_system(system, asked.turns), sampling_of(numbers))
            async with aclosing(self.runs.follow(who, work)) as growing:
                async for now in growing:
                    if who in self.cleared:  # the reply was ready before
                        return
                    self._arrived(who, asked)
                    longer = [*asked.turns, {"role": "assistant", "content": now.text}]
                    finished = now.finished
                    shown = self._transcript(longer, busy=not finished)
                    yield gr.skip(), shown, now.status, longer
            if not finished and who not in self.cleared and who not in self.asked:  # stopped
                yield gr.skip(), self._transcript(longer), gr.skip(), gr.skip()
        except LlmquantError as e:
            yield _unsent(asked.turns, turns), self._transcript(turns), "", turns
            raise notice(e) from e
        finally:
            self._arrived(who, asked)

    def _arrived(self, who: str, asked: Asked) -> None:
        """A message is where it belongs and on its way no more."""
        if self.asked.get(who) is asked:
            del self.asked[who]


def _unsent(asked: list[Turn], turns: list[Turn]) -> Any:
    """What the box gets of a message that did not enter the conversation: itself, if it is new."""
    return asked[-1]["content"] if asked != turns[: len(asked)] else gr.skip()


def _exported(turns: list[Turn], system: str | None) -> str:
    """The conversation as JSON, as it was sent and received."""
    return json.dumps({"system": system or "", "messages": turns}, ensure_ascii=False, indent=2)
