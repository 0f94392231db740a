"""``/v1/completions``: pieces as OpenAI's text completions, streamed or whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from llmquant_serve.api.choices import pieces, usage
from llmquant_serve.api.logprobs import completion_logprobs, prompt_offsets
from llmquant_serve.api.plan import Choice, Plan
from llmquant_serve.api.responses import Completion, CompletionChoice, CompletionLogprobs
from llmquant_serve.generation.pieces import Piece
from llmquant_serve.service import Service


class CompletionWriter:
    """The answer to one planned request."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self._service, self._plan = service, plan
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.model,
        }
        self._generated: dict[int, int] = {}

    async def stream(self) -> AsyncGenerator[Completion, None]:
        """One part per piece, and the usage at the end if the request wants it."""
        begun: set[int] = set()
        async with aclosing(pieces(self._service, self._plan)) as arriving:
            async for choice, piece in arriving:
                self._generated[choice.index] = piece.generated
                part = self._part(choice, piece, first=choice.index not in begun)
                begun.add(choice.index)
                answer = Completion(**self._head, object="text_completion", choices=[part])
                yield (
                    answer.model_copy(update={"usage": None}) if self._plan.usage_chunk else answer
                )
        if self._plan.usage_chunk:
            yield Completion(
                **self._head,
                object="text_completion",
                choices=[],
                usage=usage(self._plan, self._generated),
            )

    async def whole(self) -> Completion:
        """The answer when all choices are complete."""
        parts: dict[int, list[CompletionChoice]] = {c.index: [] for c in self._plan.choices}
        async with aclosing(pieces(self._service, self._plan)) as arriving:
            async for choice, piece in arriving:
                self._generated[choice.index] = piece.generated
                parts[choice.index].append(self._part(choice, piece, first=not parts[choice.index]))
        return Completion(
            **self._head,
            object="text_completion",
            choices=[_joined(p) for p in parts.values()],
            usage=usage(self._plan, self._generated),
        )

    def _part(self, choice: Choice, piece: Piece, *, first: bool) -> CompletionChoice:
        plan, tokenizer = self._plan, self._service.text.tokenizer
        echo = plan.echoes[choice.index] if plan.echoes else ""
        tokens, offsets = list(piece.tokens), [len(echo) + o for o in piece.offsets]
        if piece.prompt is not None:
            echoed = prompt_offsets(tokenizer, choice.prompt, keep_special=plan.keep_special)
            tokens, offsets = [*piece.prompt, *tokens], [*echoed, *offsets]
        with_logprobs = choice.sampling.logprobs is not None
        extras: dict[str, list[int]] = {}
        if plan.show_ids:
            extras["token_ids"] = [t.id for t in piece.tokens]
            if first:
                extras["prompt_token_ids"] = choice.prompt
        return CompletionChoice(
            index=choice.index,
            text=(echo if first else "") + piece.text,
            finish_reason=piece.finish,
            stop_reason=piece.stop,
            logprobs=completion_logprobs(plan.names, tokens, offsets) if with_logprobs else None,
            **extras,
        )


def _joined(parts: list[CompletionChoice]) -> CompletionChoice:
    """One choice from its parts, which the last part ends."""
    last, logs = parts[-1], [p.logprobs for p in parts if p.logprobs is not None]
    changes: dict[str, object] = {"text": "".join(p.text for p in parts)}
    if logs:
        changes["logprobs"] = CompletionLogprobs(
            tokens=[x for p in logs for x in p.tokens],
            token_logprobs=[x for p in logs for x in p.token_logprobs],
            top_logprobs=[x for p in logs for x in p.top_logprobs],
            text_offset=[x for p in logs for x in p.text_offset],
        )
    if last.token_ids is not None:
        changes["token_ids"] = [i for p in parts for i in p.token_ids or ()]
        changes["prompt_token_ids"] = parts[0].prompt_token_ids
    return last.model_copy(update=changes)
