"""Service: what the routes share: the engine, the tokenizer, the limits, the gate and the metrics.

The gate counts sequences from the moment a request is accepted until its answer has been sent or
its client has gone, so that it bounds queue, batch and answers that are still being read by slow
clients, all three. Beyond it: 429 with ``Retry-After``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmquant_serve.engines.base import Engine
from llmquant_serve.errors import ApiError, bad_request
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server.

    Attributes:
        max_streams: sequences in the batch.
        max_queue: sequences that may wait or be read by slow clients, beyond the batch.
        max_prompt: tokens of a prompt; None is the context.
        max_output: tokens of an answer; None is the context.
        max_body: bytes of a request.
        stall_seconds: a client that takes nothing for so long is dropped.
        drain_seconds: how long a shutdown waits for running answers.
    """

    max_streams: int = 8
    max_queue: int = 64
    max_prompt: int | None = None
    max_output: int | None = None
    max_body: int = 4 * 2**20
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0


class Gate:
    """At most ``limit`` sequences at a time; see the module text."""

    def __init__(self, limit: int, streams: int) -> None:
        self.limit, self.open = limit, 0
        self._streams = streams
        self._seconds = 1.0  # of a request, a running mean

    def check(self, count: int, parameter: str) -> None:
        """Refuse what could never enter."""
        if count > self.limit:
            raise bad_request(
                f"{count} sequences in one request are more than the {self.limit} this server takes",
                parameter,
            )

    @contextmanager
    def enter(self, count: int) -> Iterator[None]:
        """Hold ``count`` places; freed on leaving, whatever happened.

        Raises:
            ApiError: 429, there are not so many.
        """
        if self.open + count > self.limit:
            wait = max(1, math.ceil(self._seconds * self.open / self._streams / 2))
            raise ApiError(
                429,
                f"{self.open} sequences are being served or wait already; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(min(wait, 60))},
            )
        self.open += count
        began = time.monotonic()
        try:
            yield
        finally:
            self.open -= count
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)


@dataclass(slots=True)
class Service:
    """See the module text.

    Attributes:
        model: the name clients use.
        computing: dtype, device, threads and kernels of the engine, as a line; empty where another
            process computes.
    """

    engine: Engine
    text: TextModel
    model: str
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    computing: str = ""
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits.max_streams + self.limits.max_queue, self.limits.max_streams)

    def check_model(self, name: str | None) -> None:
        """404 for another model's name; none means the one there is."""
        if name is not None and name != self.model:
            raise ApiError(
                404, f"the model {name!r} does not exist here; this server has {self.model!r}",
                parameter="model", code="model_not_found",
            )  # fmt: skip

    def room(self, prompt: int, asked: int | None, default: int | None, parameter: str) -> int:
        """Tokens that may be generated after a prompt of ``prompt`` tokens.

        Raises:
            ApiError: prompt, output, or both together are too long.
        """
        context = self.engine.info.context
        longest = min(context - 1, self.limits.max_prompt or context)
        if prompt > longest:
            raise bad_request(
                f"the prompt has {prompt} tokens, this server takes {longest} of the model's {context}",
                "messages" if parameter != "max_tokens" else None,
                "context_length_exceeded",
            )
        most = min(context - prompt, self.limits.max_output or context)
        if asked is None:
            return most if default is None else min(default, most)
        if asked > most:
            raise bad_request(
                f"{parameter} is {asked}; after {prompt} tokens of prompt at most {most} can be generated "
                f"(context {context}, output limit {self.limits.max_output or context})",
                parameter,
                "context_length_exceeded",
            )
        return asked
