"""Job: one request inside an engine, from its prompt to its last token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers.cache_utils import Cache

from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import EngineError, Finish, Sampling, Step, Token
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.engines.sampling import Chooser, described

Deliver = Callable[[Step | EngineError], None]


@dataclass(eq=False)
class Job:
    """One request inside the engine.

    Attributes:
        deliver: hands a step, or the error that ends the request, to the one who waits for it.
        eos: the model's end tokens.
        cancelled: may be set from any thread.
        answer: the tokens that were generated so far.
        prefilled: tokens of the prompt that are in a cache.
        cache: of the prompt, until the sequence joins the rows.
        scores: log-probabilities of the prompt so far.
        logits: after the last token that is prefilled, float32 ``[vocab]``.
    """

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Deliver
    eos: frozenset[int]
    chooser: Chooser = field(init=False)
    cancelled: bool = False
    answer: list[int] = field(default_factory=list)
    prefilled: int = 0
    cache: Cache | None = None
    scores: list[Token] = field(default_factory=list)
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        self.chooser = Chooser(self.sampling, self.prompt, self.eos)

    @property
    def generated(self) -> int:
        """How many tokens the answer has so far."""
        return len(self.answer)

    @property
    def last(self) -> int:
        """The newest token."""
        return self.answer[-1]

    def advance(self, best: int, largest: float, logits: Tensor) -> bool:
        """Choose, append and deliver the next token; returns whether the job has ended: by its last
        token, or because this failed.

        Args:
            best: the token of the largest of ``logits``, float32 ``[vocab]``.
            largest: that logit.
        """
        try:
            with isolated("this request failed while choosing a token"):
                if not math.isfinite(largest):
                    raise EngineError(
                        f"the model computed the logit {largest} after "
                        f"{len(self.prompt) + self.generated} tokens; another --dtype may avoid that, "
                        "and if none does, its weights are damaged: fetch or make them again"
                    )
                token = best if self.chooser.greedy else self.chooser.choose(logits)
                return self._append(token, logits)
        except LlmquantError as e:
            self.fail(e)
            return True

    def fail(self, error: LlmquantError) -> None:
        """End by an error of its own; one object per job, since raising it fills it in."""
        self.deliver(EngineError(str(error)))

    def _append(self, token: int, logits: Tensor) -> bool:
        """Append a token and deliver it; returns whether it is the last."""
        s = self.sampling
        self.answer.append(token)
        self.chooser.update(token)
        finish: Finish | None = None
        if token in s.stop_ids or (token in self.eos and not s.ignore_eos):
            finish = "stop"
        elif self.generated >= s.max_tokens:
            finish = "length"
        self.deliver(Step((described(token, logits, s.logprobs, entropy=s.entropy),), finish))
        return finish is not None
