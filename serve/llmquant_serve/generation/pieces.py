"""Pieces: an engine's steps as text. One :func:`write` per choice; what is above only dresses
pieces as JSON.

A piece carries the text that became certain and the tokens it came from. Tokens whose text is still
held back (half a character, perhaps a stop string) travel with the piece that settles them, so that
text and log-probabilities of a streamed answer add up to those of the answer in one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmquant_serve.engines.base import Engine, Finish, Sampling, Token
from llmquant_serve.generation.detokenize import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice.

    Attributes:
        offsets: where each token's text begins in the choice's text (echoed prompt included).
        prompt: log-probabilities of the prompt, once, before any text.
        made: tokens generated so far.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    offsets: tuple[int, ...] = ()
    finish: Finish | None = None
    stop: str | None = None
    prompt: tuple[Token, ...] | None = None
    made: int = 0


async def write(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    keep_special: bool = False,
) -> AsyncGenerator[Piece, None]:
    """Generate and give out text as it becomes certain; the last piece has ``finish``.

    Raises:
        EngineError: the engine failed.
    """
    text, stop = Detokenizer(tokenizer, prompt, keep_special=keep_special), StopStrings(stops)
    pending: list[Token] = []
    offsets: list[int] = []
    length = made = 0
    async with aclosing(engine.generate(prompt, sampling)) as steps:
        async for step in steps:
            if step.prompt is not None:
                yield Piece(prompt=step.prompt)
            passed = ""
            for token in step.tokens:
                made += 1
                pending.append(token)
                offsets.append(length)
                new = text.add(token.id)
                length += len(new)
                passed += stop.add(new)
                if stop.found is not None:
                    break
            if step.finish is not None and stop.found is None:
                passed += stop.add(text.rest())
                passed += stop.rest() if stop.found is None else ""
            finish: Finish | None = "stop" if stop.found is not None else step.finish
            if passed or finish is not None:
                yield Piece(passed, tuple(pending), tuple(offsets), finish, stop.found, made=made)
                pending, offsets = [], []
            if finish is not None:
                return
