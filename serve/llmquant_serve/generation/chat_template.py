"""ChatTemplate: a conversation as the text that the model was trained on. What a client sent either
reaches the model or is refused.

Templates run in transformers' sandboxed jinja; nothing from the model folder is executed as Python.
They differ in what they read: some know no ``developer``, some read only lists of parts, some skip
a system message without a word. So a conversation is rendered once with a mark of random digits at
the end of every text. A message whose mark is missing is tried as a list of parts; if its mark is
still missing, the request is refused by name. Digits survive what templates do to a text on
purpose: trimming, escaping, cutting off the reasoning of earlier answers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llmquant_serve.generation.errors import TextError

Turn = Mapping[str, str]

# What jinja code of a stranger can raise in the sandbox: its own errors, and those of the Python
# operations that it is made of.
_FAULTS = (
    TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RuntimeError,
    MemoryError,
)  # fmt: skip
_NAMES_DEVELOPER = re.compile(r"""(["'])developer\1""")


class ChatTemplate:
    """The template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def render(self, turns: Sequence[Turn], *, generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            turns: each with ``role`` and ``content``; some with ``name``.

        Raises:
            TextError: the model has no template, it refuses the conversation, or it leaves out a
                message.
        """
        if not self._tokenizer.chat_template:
            raise TextError("this model has no chat template; use /v1/completions", "messages")
        turns = self._in_known_roles(turns)
        parts = self._read_as_parts(turns, generation_prompt=generation_prompt)
        return self._apply(turns, parts, generation_prompt=generation_prompt)

    def _in_known_roles(self, turns: Sequence[Turn]) -> list[Turn]:
        """``developer`` is OpenAI's newer word for ``system``; most templates know only that."""
        template = self._tokenizer.chat_template
        sources = template.values() if isinstance(template, dict) else [template]
        if any(_NAMES_DEVELOPER.search(str(source)) for source in sources):
            return list(turns)
        return [t | {"role": "system"} if t["role"] == "developer" else t for t in map(dict, turns)]

    def _read_as_parts(self, turns: Sequence[Turn], *, generation_prompt: bool) -> Collection[int]:
        """The turns whose content the template reads only as a list of parts.

        Raises:
            TextError: the template refuses the conversation, or leaves out a message either way.
        """
        everyone = range(len(turns))
        try:
            lost = self._left_out(turns, (), generation_prompt=generation_prompt)
        except TextError as refusal:  # such a template may take a text for a list, and fail
            try:
                lost = self._left_out(turns, everyone, generation_prompt=generation_prompt)
            except TextError:
                raise refusal from None
            parts: Collection[int] = everyone
        else:
            parts = lost
            if lost:
                lost = self._left_out(turns, parts, generation_prompt=generation_prompt)
        if lost:
            turn = turns[lost[0]]
            raise TextError(
                f"the model's chat template leaves out message {lost[0]} (role {turn['role']!r}), so the model "
                "would never see it; send it in another role or place",
                f"messages.{lost[0]}.content",
            )
        return parts

    def _left_out(
        self, turns: Sequence[Turn], parts: Collection[int], *, generation_prompt: bool
    ) -> list[int]:
        """The turns whose text does not reach the prompt."""
        marks = [f"{secrets.randbits(80):025d}" if t["content"].strip() else "" for t in turns]
        marked = [
            dict(t) | {"content": t["content"] + mark} for t, mark in zip(turns, marks, strict=True)
        ]
        text = self._apply(marked, parts, generation_prompt=generation_prompt)
        return [i for i, mark in enumerate(marks) if mark not in text]

    def _apply(
        self, turns: Sequence[Turn], parts: Collection[int], *, generation_prompt: bool
    ) -> str:
        formed: list[Any] = [
            dict(t) | {"content": [{"type": "text", "text": t["content"]}]} if i in parts else t
            for i, t in enumerate(turns)
        ]
        try:
            text = self._tokenizer.apply_chat_template(
                formed, add_generation_prompt=generation_prompt, tokenize=False
            )
        except _FAULTS as e:
            said = str(e) if isinstance(e, TemplateError) else f"{type(e).__name__}: {e}"
            raise TextError(
                f"the model's chat template refuses this conversation: {said}", "messages"
            ) from e
        return str(text)
