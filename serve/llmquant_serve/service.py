"""Service: what the API and the chat share: engine, tokenizer, limits, gate and metrics.

The gate counts sequences from the moment a request is accepted until its answer has been sent or
its client has disconnected. So it bounds all three: the queue, the batch, and the answers that slow
clients are still reading. What comes beyond it gets a 429 with ``Retry-After``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from llmquant_serve.drift.recorder import Recorder
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
        stall_seconds: a client that reads nothing for so long is disconnected.
        drain_seconds: how long a shutdown waits for running answers.
        keep_alive_seconds: a stream that has nothing to send for so long sends a comment; 0 never.
    """

    max_streams: int = 8
    max_queue: int = 64
    max_prompt: int | None = None
    max_output: int | None = None
    max_body: int = 4 * 2**20
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    keep_alive_seconds: float = 10.0


class Gate:
    """Admits at most ``limit`` sequences at a time.

    Attributes:
        open: sequences that are admitted now.
    """

    def __init__(self, limit: int, streams: int) -> None:
        self.limit, self.open = limit, 0
        self._streams = streams
        self._mean_seconds = 1.0  # that a request takes: a running mean

    def check(self, count: int, parameter: str) -> None:
        """Refuse a request that could never enter.

        Raises:
            ApiError: 400, it has more sequences than the gate admits.
        """
        if count > self.limit:
            raise bad_request(
                f"a request of {count} sequences is too large: this server takes {self.limit} at a time; "
                "send fewer prompts or a smaller n",
                parameter,
            )

    @contextmanager
    def enter(self, count: int) -> Iterator[None]:
        """Admit ``count`` sequences for as long as the context lasts.

        Raises:
            ApiError: 429, the gate is full.
        """
        if self.open + count > self.limit:
            wait = max(1, math.ceil(self._mean_seconds * self.open / self._streams / 2))
            raise ApiError(
                429,
                f"the server is full: {self.open} sequences are running or waiting; try again in {wait} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(min(wait, 60))},
            )
        self.open += count
        start = time.monotonic()
        try:
            yield
        finally:
            self.open -= count
            self._mean_seconds += 0.1 * (time.monotonic() - start - self._mean_seconds)


@dataclass(slots=True)
class Service:
    """One served model.

    Attributes:
        model: its name in the API.
        created: when the server started, in seconds since 1970.
        computing: dtype, device, threads and kernels of the engine, as a line; empty where another
            process computes.
        drift: observes answers and compares them with a profile.
        stopping: a shutdown has waited long enough and cuts off what still runs.
    """

    engine: Engine
    text: TextModel
    model: str
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    computing: str = ""
    drift: Recorder | None = None
    stopping: bool = False
    gate: Gate = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits.max_streams + self.limits.max_queue, self.limits.max_streams)

    def check_model(self, name: str | None) -> None:
        """Accept this model's name, or none.

        Raises:
            ApiError: 404, it is another model's name.
        """
        if name is not None and name != self.model:
            raise ApiError(
                404, f"the model {name!r} does not exist here; this server has {self.model!r}",
                parameter="model", code="model_not_found",
            )  # fmt: skip

    def max_new_tokens(
        self,
        prompt: int,
        requested: int | None,
        default: int | None,
        parameter: str,
        place: str,
    ) -> int:
        """Tokens that may be generated after a prompt of ``prompt`` tokens.

        Args:
            requested: the client's own limit; None takes ``default``, or all that the context
                leaves.
            parameter: the request's parameter that holds ``requested``.
            place: the request's parameter that holds the prompt.

        Raises:
            ApiError: 400, prompt, output, or both together are too long.
        """
        context = self.engine.info.context
        longest = min(context - 1, self.limits.max_prompt or context)
        if prompt > longest:
            raise bad_request(
                f"the prompt has {prompt} tokens; this server takes at most {longest} (context {context})",
                place,
                "context_length_exceeded",
            )
        most = min(context - prompt, self.limits.max_output or context)
        if requested is None:
            return most if default is None else min(default, most)
        if requested > most:
            raise bad_request(
                f"{parameter} is {requested}; after a prompt of {prompt} tokens at most {most} can be generated "
                f"(context {context}, output limit {self.limits.max_output or context})",
                parameter,
                "context_length_exceeded",
            )
        return requested
