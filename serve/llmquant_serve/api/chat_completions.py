"""``/v1/chat/completions``: pieces as OpenAI's chat completions, streamed or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llmquant_serve.api.choices import pieces, usage
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
)
from llmquant_serve.engines.base import Token
from llmquant_serve.generation.pieces import Piece
from llmquant_serve.service import Service


class ChatWriter:
    """The answer to one planned request."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self._service, self._plan = service, plan
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model,
        }
        self._generated: dict[int, int] = {}

    async def stream(self) -> AsyncGenerator[ChatChunk, None]:
        """The role, one chunk per piece, the finish reason in a chunk of its own, and the usage if
        the request wants it."""
        for choice in self._plan.choices:
            yield self._chunk([_role_choice(choice)])
        async with aclosing(pieces(self._service, self._plan)) as arriving:
            async for choice, piece in arriving:
                self._generated[choice.index] = piece.generated
                if piece.text or piece.tokens:
                    yield self._chunk([self._content_choice(choice, piece)])
                if piece.finish is not None:
                    yield self._chunk([_finish_choice(choice, piece)])
        if self._plan.usage_chunk:
            yield ChatChunk(
                **self._head,
                object="chat.completion.chunk",
                choices=[],
                usage=usage(self._plan, self._generated),
            )

    async def whole(self) -> ChatCompletion:
        """The answer when all choices are complete."""
        received: dict[int, list[Piece]] = {c.index: [] for c in self._plan.choices}
        async with aclosing(pieces(self._service, self._plan)) as arriving:
            async for choice, piece in arriving:
                self._generated[choice.index] = piece.generated
                received[choice.index].append(piece)
        choices = [self._message(choice, received[choice.index]) for choice in self._plan.choices]
        extras = {"prompt_token_ids": self._plan.choices[0].prompt} if self._plan.show_ids else {}
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=choices,
            usage=usage(self._plan, self._generated),
            **extras,
        )

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        chunk = ChatChunk(**self._head, object="chat.completion.chunk", choices=choices)
        return chunk.model_copy(update={"usage": None}) if self._plan.usage_chunk else chunk

    def _logprobs(self, choice: Choice, tokens: list[Token]) -> ChatLogprobs | None:
        return (
            None
            if choice.sampling.logprobs is None
            else chat_logprobs(self._service.text.tokenizer, self._plan.names, tokens)
        )

    def _content_choice(self, choice: Choice, piece: Piece) -> ChunkChoice:
        tokens = list(piece.tokens)
        extras = {"token_ids": [t.id for t in tokens]} if self._plan.show_ids else {}
        return ChunkChoice(
            index=choice.index,
            delta=Delta(content=piece.text),
            logprobs=self._logprobs(choice, tokens),
            finish_reason=None,
            **extras,
        )

    def _message(self, choice: Choice, received: list[Piece]) -> ChatChoice:
        tokens = [t for piece in received for t in piece.tokens]
        last = received[-1]
        assert last.finish is not None
        extras = {"token_ids": [t.id for t in tokens]} if self._plan.show_ids else {}
        return ChatChoice(
            index=choice.index,
            message=ChatMessage(
                role="assistant", content="".join(p.text for p in received), refusal=None
            ),
            logprobs=self._logprobs(choice, tokens),
            finish_reason=last.finish,
            stop_reason=last.stop,
            **extras,
        )


def _role_choice(choice: Choice) -> ChunkChoice:
    return ChunkChoice(
        index=choice.index,
        delta=Delta(role="assistant", content=""),
        logprobs=None,
        finish_reason=None,
    )


def _finish_choice(choice: Choice, piece: Piece) -> ChunkChoice:
    return ChunkChoice(
        index=choice.index,
        delta=Delta(),
        logprobs=None,
        finish_reason=piece.finish,
        stop_reason=piece.stop,
    )
