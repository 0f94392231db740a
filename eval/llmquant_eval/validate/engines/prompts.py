"""Prompts as token ids: through the model's chat template, or as plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmquant.errors import SourceError, UsageError
from llmquant_eval.validate.answers import Task


class Prompts:
    """How a tokenizer writes prompts.

    Args:
        raw: continue the text, do not use the chat template.
        source: the model, for errors.
    """

    def __init__(self, tokenizer: Any, raw: bool, source: str) -> None:
        self._tokenizer, self._source = tokenizer, source
        self._chat = bool(tokenizer.chat_template) and not raw
        self._raw = raw

    @property
    def thinks(self) -> bool:
        """Whether the chat template knows ``</think>``."""
        return self._chat and "</think>" in json.dumps(self._tokenizer.chat_template)

    def text(self, task: Task, left_out: Counter[str] | None = None) -> str:
        """The prompt, special tokens of the template included.

        Raises:
            UsageError: the model has no template for a conversation, or it refuses this one.
        """
        from llmquant import NotAChatError, NotRenderedError, parse_chat, render_chat

        example = task.example
        if not self._chat:
            if not example.plain or len(example.messages) > 1 or example.tools:
                why = "--raw is given" if self._raw else f"{self._source} has no chat template"
                raise UsageError(
                    f"{why}, so messages, system and tools cannot be used; give `prompt` as a text"
                )
            return str(example.messages[0]["content"])
        try:
            chat = parse_chat(example.messages, list(example.tools) or None)
            return render_chat(
                chat, self._tokenizer, self._source, left_out, generation_prompt=True
            )
        except (NotRenderedError, NotAChatError, SourceError) as e:
            raise UsageError(f"the model's chat template cannot write this prompt: {e}") from e

    def remarks(self, tasks: Sequence[Task]) -> list[str]:
        """What the template leaves out of these prompts, in sentences."""
        left_out: Counter[str] = Counter()
        for task in tasks:
            self.text(task, left_out)
        return [f"{what}: {count:,}" for what, count in left_out.items()]

    def opens(self, task: Task) -> bool:
        """Whether the prompt ends in an open ``<think>``."""
        return "<think>" in self.text(task).rpartition("</think>")[2] if self.thinks else False

    def ids(self, task: Task) -> list[int]:
        """Raises UsageError for a prompt of no tokens, too."""
        ids = self._encode(self.text(task))
        if not ids:
            raise UsageError("the tokenizer makes no token of the prompt")
        return ids

    def pairs(self, task: Task) -> list[tuple[int, list[int]]]:
        """For each continuation: tokens of the prompt, and the ids of both.

        Tokenized as one text, as lm-eval does; where a token would span both, apart. A plain prompt
        and its continuation are words with a space between.

        Raises:
            UsageError: the prompt or a continuation has no tokens.
        """
        prompt, before = self.text(task), self.ids(task)
        return [self._pair(prompt, before, text) for text in task.continuations]

    def _pair(self, prompt: str, before: Sequence[int], text: str) -> tuple[int, list[int]]:
        if not self._chat and not prompt[-1:].isspace() and not text[:1].isspace():
            text = f" {text}"
        whole = self._encode(prompt + text)
        if whole[: len(before)] != list(before) or len(whole) == len(before):
            after = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if not after:  # its log-probability would be 0, better than that of any text
                raise UsageError(
                    f"the tokenizer makes no token of the answer or choice {text.strip()[:80]!r}"
                )
            whole = [*before, *after]
        return len(before), whole

    def _encode(self, text: str) -> list[int]:
        # A template has written the special tokens already. verbose=False: a prompt that is too
        # long is refused with words of ours.
        encoded = self._tokenizer(text, add_special_tokens=not self._chat, verbose=False)
        return list(encoded["input_ids"])
