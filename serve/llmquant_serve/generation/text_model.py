"""TextModel: the text side of a served model. It turns text and chat turns into token ids and back,
and refuses what the model cannot be given.

Chat templates run in transformers' sandboxed jinja; nothing from the model folder is ever executed
as Python.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from llmquant import load_tokenizer
from llmquant_serve.generation.detokenize import decode
from llmquant_serve.generation.errors import TextError
from llmquant_serve.generation.messages import Message


class TextModel:
    """A model's tokenizer and chat template.

    Args:
        path: the model folder.
        vocab: number of logits; token ids are below it.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """

    def __init__(self, path: str | os.PathLike[str], vocab: int) -> None:
        self.tokenizer = load_tokenizer(path)
        self.vocab = vocab

    async def encode(self, text: str, parameter: str, *, special: bool = True) -> list[int]:
        """Ids of plain text. Runs off the event loop, because a long text takes its time.

        Raises:
            TextError: the text is not Unicode or has no tokens.
        """
        _check_text(text, parameter)
        ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)
        return self.checked(ids, parameter)

    async def encode_chat(
        self, messages: Sequence[Message | Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation through the chat template.

        Raises:
            TextError: the model has no template, or the template refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise TextError("this model has no chat template; use /v1/completions", "messages")
        turns = [_turn(m) if isinstance(m, Message) else dict(m) for m in messages]
        for i, turn in enumerate(turns):
            _check_text(turn["content"], f"messages.{i}.content")
        try:
            text = await asyncio.to_thread(
                self.tokenizer.apply_chat_template,
                turns,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (TemplateError, ValueError, TypeError) as e:
            raise TextError(
                f"the model's chat template refuses this conversation: {e}", "messages"
            ) from e
        return await self.encode(str(text), "messages", special=False)

    def checked(self, ids: Sequence[int], parameter: str) -> list[int]:
        """The same ids.

        Raises:
            TextError: there are none, or the model does not know one of them.
        """
        if not ids:
            raise TextError("the prompt has no tokens", parameter)
        for token in (max(ids), min(ids)):
            if not 0 <= token < self.vocab:
                raise TextError(
                    f"token id {token} is not in the vocabulary, which goes from 0 to {self.vocab - 1}",
                    parameter,
                )
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return decode(self.tokenizer, ids, keep_special=True)


def _turn(message: Message) -> dict[str, str]:
    """What a chat template gets: the parts of a message joined, its name only where it has one."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    turn = {"role": message.role, "content": text}
    return turn if message.name is None else turn | {"name": message.name}


def _check_text(text: str, parameter: str) -> None:
    """JSON can carry half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TextError(
            f"the text is not valid Unicode: {e.reason} at position {e.start}", parameter
        ) from e
