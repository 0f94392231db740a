"""Pieces: an engine's steps as text. One :func:`write` per choice; the layers above only make JSON
of pieces.

A piece carries the text that became certain and the tokens it came from. Tokens whose text is still
held back (half a character, perhaps a stop string) come with the piece that settles them, so that
text and log-probabilities of a streamed answer add up to those of the whole answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from llmquant_serve.engines.base import Engine, Finish, Sampling, Token
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.generation.detokenize import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice.

    Attributes:
        tokens: those that the text came from.
        offsets: where each token's text begins in the choice's text.
        finish: why the choice ended; None while it continues.
        stop: the stop string that ended it.
        prompt: log-probabilities of the prompt, once, before any text.
        generated: tokens generated so far.
    """

    text: str = ""
    tokens: tuple[Token, ...] = ()
    offsets: tuple[int, ...] = ()
    finish: Finish | None = None
    stop: str | None = None
    prompt: tuple[Token, ...] | None = None
    generated: int = 0


async def write(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    stops: Sequence[str] = (),
    *,
    keep_special: bool = False,
) -> AsyncGenerator[Piece, None]:
    """Generate, and yield text as it becomes certain; the last piece has ``finish``. A stop string
    ends the text once there are more than ``sampling.min_tokens`` tokens, as in vLLM.

    Raises:
        EngineError: the engine failed.
    """
    text, stop = Detokenizer(tokenizer, prompt, keep_special=keep_special), StopStrings(stops)
    pending: list[Token] = []
    offsets: list[int] = []
    length = generated = 0
    async with aclosing(engine.generate(prompt, sampling)) as steps:
        async for step in steps:
            if step.prompt is not None:
                yield Piece(prompt=step.prompt)
            certain = ""
            with isolated("this request failed while turning its tokens into text"):
                for token in step.tokens:
                    generated += 1
                    pending.append(token)
                    offsets.append(length)
                    new = text.add(token.id)
                    length += len(new)
                    certain += stop.add(new, ends=generated > sampling.min_tokens)
                    if stop.matched is not None:
                        break
                if step.finish is not None and stop.matched is None:
                    certain += stop.add(text.rest(), ends=generated > sampling.min_tokens)
                    certain += stop.rest() if stop.matched is None else ""
            finish: Finish | None = "stop" if stop.matched is not None else step.finish
            if certain or finish is not None:
                yield Piece(
                    certain,
                    tuple(pending),
                    tuple(offsets),
                    finish,
                    stop.matched,
                    generated=generated,
                )
                pending, offsets = [], []
            if finish is not None:
                return
