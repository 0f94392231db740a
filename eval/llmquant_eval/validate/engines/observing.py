"""Log-probabilities and entropies of the tokens that are being generated, for a drift profile.

As the model has them: generation puts its processors before the temperature. One step's
log-probabilities are held until the token that was chosen from them is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmquant import observe_request
from llmquant_eval.validate.answers import Answer

if TYPE_CHECKING:
    from torch import Tensor


class Observer:
    """A logits processor of one ``generate`` that changes nothing."""

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._logprobs: list[list[float]] = []  # by step, then by row
        self._entropies: list[list[float]] = []

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        if self._last is not None:
            self._chosen(ids[:, -1])
        self._last = logits.float().log_softmax(-1)
        # A token that is impossible counts nothing: 0 times minus infinity is no number.
        shares = self._last.exp() * self._last.clamp(min=-1e4)
        self._entropies.append((-shares.sum(-1)).tolist())
        return logits

    def _chosen(self, tokens: Tensor) -> None:
        assert self._last is not None
        self._logprobs.append(self._last.gather(1, tokens[:, None])[:, 0].tolist())

    def observed(
        self, prompts: Sequence[list[int]], news: Sequence[list[int]], answers: Sequence[Answer]
    ) -> list[Answer]:
        """The answers with what was observed of them; ``news`` are all tokens after the prompts."""
        import torch

        assert self._last is not None
        self._chosen(torch.tensor([new[-1] for new in news], device=self._last.device))
        found = []
        for row, (prompt, new, answer) in enumerate(zip(prompts, news, answers, strict=True)):
            length = answer.tokens or 0
            seen = observe_request(
                prompt,
                new[:length],
                answer.text,
                ended=answer.ended,
                logprobs=[step[row] for step in self._logprobs[:length]],
                entropies=[step[row] for step in self._entropies[:length]],
            )
            found.append(answer.model_copy(update={"observed": seen}))
        return found
