"""TextModel: the tokenizer's side of a served model: text and chat turns to ids and back, with
limits.

Chat templates run in transformers' sandboxed jinja; nothing from the model folder is ever executed
as Python.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmquant.errors import CheckpointError
from llmquant_serve.errors import bad
from llmquant_serve.generation.detokenize import decode
from llmquant_serve.generation.messages import Message


class TextModel:
    """See the module text.

    Attributes:
        vocab: ids are below it.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """

    def __init__(self, path: str | os.PathLike[str], vocab: int) -> None:
        self.tokenizer = read_tokenizer(path)
        self.vocab = vocab

    async def encode(self, text: str, parameter: str, *, special: bool = True) -> list[int]:
        """Ids of plain text; off the event loop, because a long one takes its time."""
        _check_text(text, parameter)
        ids = await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=special)
        return self.checked(ids, parameter)

    async def encode_chat(
        self, messages: Sequence[Message | Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation through the chat template.

        Raises:
            ApiError: the model has no template, or the template refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise bad("this model has no chat template; use /v1/completions", "messages")
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
            raise bad(
                f"the model's chat template refuses this conversation: {e}", "messages"
            ) from e
        return await self.encode(str(text), "messages", special=False)

    def checked(self, ids: Sequence[int], parameter: str) -> list[int]:
        """The same ids, if there are any and the model knows them all."""
        if not ids:
            raise bad("the prompt has no tokens", parameter)
        if (odd := max(ids)) >= self.vocab or min(ids) < 0:
            raise bad(f"token id {odd} is not below the vocabulary's {self.vocab}", parameter)
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids, keep_special=True)


def read_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A folder's tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as e:
        raise CheckpointError(
            f"the tokenizer of {path} cannot be read: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from e
    return tokenizer


def _turn(message: Message) -> dict[str, str]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    turn = {"role": message.role, "content": text}
    return turn if message.name is None else turn | {"name": message.name}


def _check_text(text: str, parameter: str) -> None:
    """JSON can carry half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise bad(
            f"the text has a character that is none: {e.reason} at position {e.start}", parameter
        ) from e
