"""``/v1/chat/completions``: pieces as OpenAI's chat completions, streamed or in one."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llmquant_serve.api.choices import pieces
from llmquant_serve.api.logprobs import chat_logprobs
from llmquant_serve.api.plan import Choice, Plan
from llmquant_serve.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    Usage,
)
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.pieces import Piece
from llmquant_serve.service import Service


class ChatWriter:
    """The answers to one planned request."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self._service, self._plan = service, plan
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model,
        }
        self._made: dict[int, int] = {}

    async def stream(self) -> AsyncGenerator[ChatChunk, None]:
        """The role, one chunk per piece, the finish reason in a chunk of its own, the usage where
        asked for."""
        for choice in self._plan.choices:
            yield self._chunk([_opening(choice)])
        async with aclosing(pieces(self._service, self._plan)) as found:
            async for choice, piece in found:
                self._made[choice.index] = piece.made
                if piece.text or piece.tokens:
                    yield self._chunk([self._spoken(choice, piece)])
                if piece.finish is not None:
                    yield self._chunk([_closing(choice, piece)])
        if self._plan.usage_chunk:
            yield ChatChunk(
                **self._head, object="chat.completion.chunk", choices=[], usage=self.usage()
            )

    async def whole(self) -> ChatCompletion:
        """Everything at once."""
        heard: dict[int, list[Piece]] = {c.index: [] for c in self._plan.choices}
        async with aclosing(pieces(self._service, self._plan)) as found:
            async for choice, piece in found:
                self._made[choice.index] = piece.made
                heard[choice.index].append(piece)
        choices = [self._message(choice, heard[choice.index]) for choice in self._plan.choices]
        extras = {"prompt_token_ids": self._plan.choices[0].prompt} if self._plan.show_ids else {}
        return ChatCompletion(
            **self._head, object="chat.completion", choices=choices, usage=self.usage(), **extras
        )

    def usage(self) -> Usage:
        made = sum(self._made.values())
        return Usage(
            prompt_tokens=self._plan.prompt_tokens,
            completion_tokens=made,
            total_tokens=self._plan.prompt_tokens + made,
        )

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", choices=choices)
        return chunk.model_copy(update={"usage": None}) if self._plan.usage_chunk else chunk

    def _logprobs(self, choice: Choice, tokens: list[Token]) -> ChatLogprobs | None:
        return (
            None
            if choice.sampling.logprobs is None
            else chat_logprobs(self._service.text.tokenizer, tokens)
        )

    def _spoken(self, choice: Choice, piece: Piece) -> ChunkChoice:
        tokens = list(piece.tokens)
        extras = {"token_ids": [t.id for t in tokens]} if self._plan.show_ids else {}
        return ChunkChoice(
            index=choice.index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs(choice, tokens),
            finish_reason=None,
            **extras,
        )

    def _message(self, choice: Choice, heard: list[Piece]) -> ChatChoice:
        tokens = [t for piece in heard for t in piece.tokens]
        last = heard[-1]
        assert last.finish is not None
        extras = {"token_ids": [t.id for t in tokens]} if self._plan.show_ids else {}
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(
                role="assistant", content="".join(p.text for p in heard), refusal=None
            ),
            logprobs=self._logprobs(choice, tokens),
            finish_reason=last.finish,
            stop_reason=last.stop,
            **extras,
        )


def _opening(choice: Choice) -> ChunkChoice:
    return ChunkChoice(
        index=choice.index,
        delta=Delta(role="assistant", content=""),
        logprobs=None,
        finish_reason=None,
    )


def _closing(choice: Choice, piece: Piece) -> ChunkChoice:
    return ChunkChoice(
        index=choice.index,
        delta=Delta(),
        logprobs=None,
        finish_reason=piece.finish,
        stop_reason=piece.stop,
    )
