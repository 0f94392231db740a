"""Engine: token ids in; token ids, log-probabilities and a finish reason out. It knows no HTTP, no
text and no chat template.

``why_not`` is called before ``generate``, so that what an engine cannot do is refused by name and
never ignored. ``generate`` is an async generator: it yields a :class:`Step` whenever there is
something new, the last one has ``finish`` set, and closing it early (``aclose``) frees the engine's
slot before its next step. A consumer that reads slowly delays nobody: steps wait for it in a queue
that never holds more than its ``max_tokens``.

Log-probabilities are those of the model itself, before temperature, penalties, bias and filters.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmquant import context_length, end_tokens
from llmquant.errors import LlmquantError

Finish = Literal["stop", "length"]
GREEDY_BELOW = 1e-5  # temperatures; logits divided by less leave the range of float32
_DEFAULT_CONTEXT = 4096  # of a model whose config names no number of positions


class EngineError(LlmquantError):
    """The engine failed during a request, or cannot be reached."""


class RefusedError(EngineError):
    """The engine refused a request that ``why_not`` had let pass."""


class StoppedError(EngineError):
    """The engine has stopped, or stopped before the request was complete."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A parameter that an engine cannot honour, and why."""

    parameter: str
    reason: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen and when to end.

    Attributes:
        max_tokens: at least 1, unless the prompt alone is scored (``prompt_logprobs``), where 0
            generates nothing.
        temperature: below ``GREEDY_BELOW`` is greedy; some clients send their smallest float as 0.
        top_k: 0 keeps all.
        seed: of this request alone; None draws one.
        logprobs: how many alternatives to report for each chosen token; None reports no
            log-probabilities.
        prompt_logprobs: the same for the tokens of the prompt.
        entropy: with log-probabilities, report entropies too, where the engine knows them.
        frequency_penalty, presence_penalty: subtracted per occurrence, or once, for tokens
            generated so far.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or
            output.
        logit_bias: added to logits, by token id.
        stop_ids: tokens that end the text, in addition to the model's own end tokens.
        ignore_eos: the model's own end tokens end nothing.
        grammar: a JSON schema (or ``{"type": "object"}``) that the text must follow.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    entropy: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Mapping[str, Any] | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken instead of a drawn one."""
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Token:
    """A token id. If log-probabilities were requested: its own in nats, and the most likely
    alternatives as ``(id, logprob)``, best first; ``entropy`` is that of the distribution which it
    was taken from, in nats."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What is new since the last step. ``prompt`` comes once, before any token: one entry per
    prompt token, the first without a log-probability."""

    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the layers above must know of the model.

    Attributes:
        context: positions that prompt and output share.
        vocab: number of logits; token ids are below it.
        eos: the model's own end tokens.
    """

    context: int
    vocab: int
    eos: frozenset[int]

    @classmethod
    def of(
        cls, config: Any, generation_config: Any, context: int | None, tokenizer: Any = None
    ) -> ModelInfo:
        """From transformers' configs, and the tokenizer for the end tokens that only it knows.

        Args:
            context: an upper limit on the positions; None leaves the model's own.
        """
        limits = [n for n in (context_length(config), context) if n is not None]
        return cls(
            min(limits, default=_DEFAULT_CONTEXT),
            config.get_text_config().vocab_size,
            end_tokens(config, generation_config, tokenizer),
        )


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine takes requests now, and if not, why.

    Attributes:
        dead: it will not take any again; the process must be restarted.
    """

    ok: bool
    detail: str = ""
    restarts: int = 0
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in the batch, requests that wait for a place in it, and tokens in the KV cache."""

    running: int = 0
    waiting: int = 0
    cached_tokens: int = 0


class Engine(Protocol):
    """What generates tokens, in this process or another."""

    name: str
    info: ModelInfo

    def why_not(self, sampling: Sampling) -> Refusal | None:
        """The parameter that this engine cannot honour; None if it can honour all."""

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Step, None]:
        """Yield steps until one has ``finish``.

        Raises:
            RefusedError: the engine does not take the request.
            StoppedError: the engine has stopped.
            EngineError: the engine failed.
        """

    def health(self) -> Health: ...

    def load(self) -> Load: ...

    async def start(self) -> None:
        """Begin to take requests; an engine in another process may need time after this."""

    async def close(self) -> None:
        """Stop; running requests fail."""
