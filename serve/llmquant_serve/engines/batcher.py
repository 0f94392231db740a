"""Batcher: continuous batching of one transformers model, in a thread of its own. The only code
that touches the model.

Each turn of the loop drops cancelled jobs, spends a budget of prompt tokens on those that wait, and
decodes one token for every row that is ready. A prompt is read into a cache of its own; when it is
done, the sequence joins the :class:`RowCache`. While rows are being decoded a prompt is read in
chunks of ``PROMPT_CHUNK`` tokens between steps, so that a long one delays the others by a fraction
of a second and not by its whole length; with nothing to delay it is read at once, which is what
``model.generate`` does. A request alone is therefore computed operation by operation like
``model.generate``, and gives the same tokens.

In company the matrix products have other shapes and round differently; a greedy choice can then
differ, and only where the two best logits lie within that rounding. Measured against transformers'
own ContinuousBatchingManager: see docs/decisions.md.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from llmquant_serve.engines.base import EngineError, Finish, Load, Sampling, Step, Token
from llmquant_serve.engines.row_cache import RowCache
from llmquant_serve.engines.sampling import Chooser, described, described_all

PROMPT_CHUNK = 256
PROMPT_AT_ONCE = 4096  # bounds the memory of one pass, and how long a cancelled prompt can go on
SCORED_CHUNK = 512  # where logits of every position are wanted
Deliver = Callable[[Step | EngineError], None]


@dataclass(eq=False)
class Job:
    """One request inside the engine. ``cancelled`` may be set from any thread."""

    prompt: Sequence[int]
    sampling: Sampling
    deliver: Deliver
    chooser: Chooser
    cancelled: bool = False
    made: int = 0
    last: int = 0
    read: int = 0
    cache: Cache | None = None
    scores: list[Token] = field(default_factory=list)


class Batcher:
    """See the module text.

    Args:
        model: in eval mode; this object owns it from now on.
        eos: the model's end tokens.
        max_rows: sequences decoded together.
    """

    def __init__(self, model: PreTrainedModel, eos: frozenset[int], max_rows: int) -> None:
        self._model: Any = model
        self._eos = eos
        self._max_rows = max_rows
        self._cache = RowCache(model.config.get_text_config().num_hidden_layers, max_rows)
        self._waiting: deque[Job] = deque()
        self._reading: list[Job] = []
        self._rows: list[Job] = []
        self._wake = threading.Condition()
        self._closing = False
        self.failure: str | None = None
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="llmquant-batcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; any thread.

        Raises:
            EngineError: the engine has stopped.
        """
        with self._wake:
            if self.failure or self._closing:
                raise EngineError(self.failure or "the engine is shutting down")
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Give the job's place back before the next step; any thread."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def load(self) -> Load:
        reading = list(self._reading)
        held = sum(self._cache.lengths) + sum(j.read for j in reading)
        return Load(len(self._rows) + len(reading), len(self._waiting), held)

    def close(self) -> None:
        """Stop after the current step and fail whatever is left; returns when the thread has
        ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._turn()
        except Exception as e:  # noqa: BLE001 - the thread's last handler: whatever it was must reach the waiting requests
            self.failure = f"the engine stopped: {type(e).__name__}: {e}"
        with self._wake:
            self._closing = True
            left = [*self._waiting, *self._reading, *self._rows]
            self._waiting.clear()
        self._reading, self._rows = [], []
        for job in left:
            job.deliver(EngineError(self.failure or "the engine is shutting down"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._closing or self._waiting or self._reading or self._rows):
                self._wake.wait()
            return not self._closing

    def _turn(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._read_prompts()
        if self._rows:
            self._decode()

    def _drop_cancelled(self) -> None:
        with self._wake:
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._reading = [job for job in self._reading if not job.cancelled]
        self._leave(row for row, job in enumerate(self._rows) if job.cancelled)

    def _admit(self) -> None:
        with self._wake:
            while self._waiting and len(self._rows) + len(self._reading) < self._max_rows:
                job = self._waiting.popleft()
                job.cache = Cache(layer_class_to_replicate=DynamicLayer)
                self._reading.append(job)

    def _read_prompts(self) -> None:
        """Spend one budget of prompt tokens, oldest job first."""
        budget = PROMPT_CHUNK if self._rows else PROMPT_AT_ONCE
        while self._reading and budget > 0:
            job = self._reading[0]
            budget -= self._read_chunk(job, budget)
            if job.read == len(job.prompt):
                self._reading.pop(0)

    def _read_chunk(self, job: Job, budget: int) -> int:
        """Run some of a prompt; at its end choose the first token and join the rows. Returns the
        tokens read."""
        scored = job.sampling.prompt_logprobs
        size = min(budget, len(job.prompt) - job.read, budget if scored is None else SCORED_CHUNK)
        ids = self._tensor([job.prompt[job.read : job.read + size]])
        seen = torch.ones((1, job.read + size), dtype=torch.long, device=ids.device)
        positions = torch.arange(job.read, job.read + size, device=ids.device)[None]
        out = self._model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            past_key_values=job.cache,
            use_cache=True,
            logits_to_keep=1 if scored is None else 0,
        )
        logits: Tensor = out.logits[0]
        if scored is not None:
            following = list(job.prompt[job.read + 1 : job.read + size + 1])
            job.scores += described_all(following, logits[: len(following)], scored)
        job.read += size
        if job.read == len(job.prompt):
            self._begin(job, logits[-1].float())
        return size

    def _begin(self, job: Job, logits: Tensor) -> None:
        if job.sampling.prompt_logprobs is not None:
            job.deliver(Step(prompt=(Token(job.prompt[0]), *job.scores)))
            job.scores = []
        if job.sampling.max_tokens == 0:
            job.deliver(Step(finish="length"))
        elif not self._take(
            job, int(logits.argmax()) if job.chooser.plain else job.chooser.choose(logits), logits
        ):
            assert job.cache is not None
            self._cache.join(job.cache, len(job.prompt))
            self._rows.append(job)
        job.cache = None

    def _decode(self) -> None:
        """One token for every row."""
        self.steps += 1
        self._cache.before_step()
        ids = self._tensor([[job.last] for job in self._rows])
        positions = self._tensor([[n] for n in self._cache.lengths])
        out = self._model(
            input_ids=ids, attention_mask=self._cache.mask(ids.device), position_ids=positions,
            past_key_values=self._cache, use_cache=True,
        )  # fmt: skip
        self._cache.after_step()
        logits: Tensor = out.logits[:, -1].float()
        best = logits.argmax(-1).tolist()
        done = []
        for row, job in enumerate(self._rows):
            token = best[row] if job.chooser.plain else job.chooser.choose(logits[row])
            if self._take(job, token, logits[row]):
                done.append(row)
        self._leave(done)

    def _take(self, job: Job, token: int, logits: Tensor) -> bool:
        """Give a job its next token; returns whether it is the last."""
        s = job.sampling
        job.made += 1
        job.last = token
        job.chooser.took(token)
        finish: Finish | None = None
        if token in s.stop_ids or (token in self._eos and not s.ignore_eos):
            finish = "stop"
        elif job.made >= s.max_tokens:
            finish = "length"
        job.deliver(Step((described(token, logits, s.logprobs),), finish))
        return finish is not None

    def _leave(self, rows: Iterable[int]) -> None:
        for row in sorted(rows, reverse=True):
            self._cache.leave(row)
            self._rows[row] = self._rows[-1]
            self._rows.pop()

    def _tensor(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._model.device)
