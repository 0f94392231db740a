"""TextModel: the text side of a served model. It turns text and chat turns into token ids and back,
and refuses what the model cannot be given.

Nothing from the model folder is ever executed as Python.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llmquant import load_tokenizer
from llmquant_serve.generation.chat_template import ChatTemplate
from llmquant_serve.generation.detokenize import decode
from llmquant_serve.generation.errors import TextError
from llmquant_serve.generation.messages import Message
from llmquant_serve.generation.token_names import TokenNames


class TextModel:
    """A model's tokenizer and chat template.

    Args:
        path: the model folder.
        vocab: number of logits; token ids are below it.

    Attributes:
        names: a distinct name of each token.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """

    def __init__(self, path: str | os.PathLike[str], vocab: int) -> None:
        self.tokenizer = load_tokenizer(path)
        self.vocab = vocab
        self.names = TokenNames(self.tokenizer, vocab)
        self._template = ChatTemplate(self.tokenizer)

    async def encode(self, text: str, parameter: str, *, special: bool = True) -> list[int]:
        """Ids of plain text. Runs off the event loop, because a long text takes its time.

        Raises:
            TextError: the text is not Unicode or has no tokens.
        """
        check_text(text, parameter)
        # verbose: transformers warns of a text longer than the context; the server refuses it.
        ids = await asyncio.to_thread(
            self.tokenizer.encode, text, add_special_tokens=special, verbose=False
        )
        return self.checked(ids, parameter)

    async def encode_chat(
        self, messages: Sequence[Message | Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> list[int]:
        """Ids of a conversation through the chat template.

        Raises:
            TextError: the model has no template, or the template refuses the conversation or leaves
                out a message.
        """
        turns = [_turn(m) if isinstance(m, Message) else dict(m) for m in messages]
        for i, turn in enumerate(turns):
            check_text(turn["content"], f"messages.{i}.content")
        text = await asyncio.to_thread(
            self._template.render, turns, generation_prompt=generation_prompt
        )
        return await self.encode(text, "messages", special=False)

    async def name_tokens(self) -> None:
        """Make ``names`` ready, off the event loop; instant after the first time."""
        await asyncio.to_thread(self.names.__getitem__, 0)

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


def check_text(text: str, parameter: str) -> None:
    """Accept what can be tokenized. JSON can carry half of a surrogate pair, which is no character,
    and a terminal any bytes.

    Raises:
        TextError: the text has something that is no character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise TextError(
            f"{parameter} is not valid Unicode: {e.reason} at position {e.start}", parameter
        ) from e
