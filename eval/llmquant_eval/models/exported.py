"""An ONNX export that answers prompts as a server does, for what is written for those."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import llmquant
from llmquant_eval.models.kept_answers import PromptScores


class ExportedAnswers:
    """Scores and greedy continuations of an export.

    Args:
        model: the export, loaded.
        tokenizer: to know where a stop text stands, and for its end token.

    Attributes:
        context: tokens that prompt and answer may have together, or None where its config does not
            say.
    """

    def __init__(self, model: llmquant.OnnxModel, tokenizer: Any) -> None:
        self._worker, self._tokenizer = model.worker, tokenizer
        config = model.config
        self.context = llmquant.context_length(config)
        given = llmquant.read_generation_config(self._worker.path)
        self._ends = llmquant.end_tokens(config, given, tokenizer)

    def score_all(self, prompts: Sequence[Sequence[int]]) -> Iterator[PromptScores]:
        """Score prompts, in order."""
        for ids in prompts:
            logits = torch.log_softmax(self._worker.logits(ids)[:-1], -1)
            following = torch.tensor(list(ids[1:]))
            own = logits.gather(1, following[:, None])[:, 0]
            yield PromptScores(own.tolist(), (logits.argmax(-1) == following).tolist())

    def complete(
        self, ids: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float
    ) -> str:
        """The text after a prompt, up to a stop text or an end token; drawn where there is a
        temperature."""
        sequence = self._worker.open(len(ids) + max_tokens)
        written: list[int] = []
        text = ""
        try:
            feed: Sequence[int] = ids
            while len(written) < max_tokens:
                logits = self._worker.append(sequence, feed)
                token = _next(logits, temperature)
                if token in self._ends:
                    break
                written.append(token)
                feed = [token]
                text = self._tokenizer.decode(written)
                if any(mark in text for mark in stop):
                    break
        finally:
            self._worker.forget(sequence)
        return text


def _next(logits: torch.Tensor, temperature: float) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
