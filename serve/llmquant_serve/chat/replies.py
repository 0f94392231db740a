"""Replies for people: what the terminal chat and the chat page share. They pass the same gate as
the API."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from llmquant_serve.api.choices import pieces
from llmquant_serve.api.plan import Choice, Plan
from llmquant_serve.engines.base import Sampling, Token
from llmquant_serve.errors import ApiError
from llmquant_serve.generation.pieces import Piece
from llmquant_serve.service import Service

Turn = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply so far.

    Attributes:
        pieces: in the order they came; their texts add up to ``text``.
        prompt: the ids that it answers.
        tokens: generated so far.
        seconds: since the request.
    """

    text: str = ""
    pieces: tuple[Piece, ...] = ()
    prompt: tuple[int, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False

    @property
    def ids(self) -> list[Token]:
        """The tokens of the reply, with what came along with them."""
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def speed(self) -> float:
        """Tokens per second since the request."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def status(self) -> str:
        """How long the reply is and how fast it comes, as one line for people."""
        cut = self.finished and bool(self.pieces) and self.pieces[-1].finish == "length"
        line = (
            f"{len(self.prompt)} prompt tokens · {self.tokens} tokens · {self.speed:.1f} tokens/s"
        )
        return f"{line} · cut at the length limit" if cut else line


async def reply(
    service: Service, turns: Sequence[Turn], sampling: Sampling
) -> AsyncGenerator[Reply, None]:
    """The reply to a conversation, longer with each item. ``sampling.max_tokens`` is lowered to
    what the context leaves.

    Raises:
        TextError: the model has no chat template, or it refuses the conversation.
        ApiError: the conversation is too long, the server is full, or the engine is not ready.
        EngineError: the engine failed.
    """
    health = service.engine.health()
    if not health.ok:
        raise ApiError(503, f"the engine is not ready: {health.detail}")
    prompt = await service.text.encode_chat(turns)
    most = service.max_new_tokens(len(prompt), None, sampling.max_tokens, "max_tokens", "messages")
    plan = Plan(
        choices=[Choice(0, prompt, replace(sampling, max_tokens=most))],
        stops=(),
        prompt_tokens=len(prompt),
        stream=True,
        usage_chunk=False,
        keep_special=False,
        show_ids=False,
        names=service.text.names,
    )
    start, now = time.monotonic(), Reply(prompt=tuple(prompt))
    with service.gate.enter(1):
        async with aclosing(pieces(service, plan)) as parts:
            async for _, piece in parts:
                now = replace(
                    now,
                    text=now.text + piece.text,
                    pieces=(*now.pieces, piece),
                    tokens=piece.generated,
                    seconds=time.monotonic() - start,
                    finished=piece.finish is not None,
                )
                yield now


async def scored(
    service: Service, prompt: Sequence[int], answer: Sequence[int], logprobs: int
) -> tuple[Token, ...] | None:
    """``answer`` after ``prompt`` with this model's log-probabilities; None where its engine cannot
    give them or its context is too short.

    Raises:
        ApiError: the server is full.
        EngineError: the engine failed.
    """
    sampling = Sampling(max_tokens=0, prompt_logprobs=logprobs)
    whole = [*prompt, *answer]
    if len(whole) >= service.engine.info.context or service.engine.why_not(sampling) is not None:
        return None
    with service.gate.enter(1):
        async with aclosing(service.engine.generate(whole, sampling)) as steps:
            async for step in steps:
                if step.prompt is not None:
                    return step.prompt[len(prompt) :]
    return None
