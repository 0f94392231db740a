"""Batcher: continuous batching of one transformers model, in a thread of its own. The only code
that touches the model.

Each iteration of the loop drops cancelled jobs, spends a budget of prompt tokens on those that
wait, and decodes one token for every row. A prompt is prefilled into a cache of its own; when it is
done, the sequence joins the :class:`RowCache`. While rows are being decoded, a prompt is prefilled
in chunks of ``PROMPT_CHUNK`` tokens between steps, so that a long one delays the others by a
fraction of a second and not by its whole length. With nothing to delay it is prefilled at once, as
``model.generate`` does it. A request alone is therefore computed operation by operation like
``model.generate``, and gives the same tokens.

In a batch the matrix products have other shapes and round differently. A greedy choice can then
differ, but only where the two best logits lie within that rounding. Measured against transformers'
own ContinuousBatchingManager: see docs/decisions.md.

What fails in the work of one job ends that job alone. A decoding step and a move of the cache are
the work of all rows, so their failure ends all of them. After such a failure, or one while a prompt
was read, one token is put through the model: only if that fails too is the engine dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from llmquant.errors import LlmquantError
from llmquant_serve.engines.base import Load, Step, Token
from llmquant_serve.engines.batching.row_cache import RowCache
from llmquant_serve.engines.batching.step_graph import Recorder, StepGraphs, given_up
from llmquant_serve.engines.isolation import isolated
from llmquant_serve.engines.jobs.job import Job
from llmquant_serve.engines.jobs.thread import JobThread
from llmquant_serve.engines.sampling import described_all

PROMPT_CHUNK = 256
PROMPT_AT_ONCE = 4096  # bounds the memory of one pass, and the delay until a cancellation
SCORED_CHUNK = 512  # where logits of every position are needed


class Rows(Protocol):
    """What the rows' sequences are kept in."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each."""

    def join(self, prefilled: Cache, length: int) -> None:
        """Take in a sequence as the last row."""

    def leave(self, row: int) -> None:
        """Forget a row; the last takes its place."""


class Batcher(JobThread):
    """The thread that runs the model, and its rows.

    Args:
        model: in eval mode; nothing else may use it from now on.
        max_rows: sequences decoded together.
        record: records steps, see :mod:`llmquant_serve.engines.batching.step_graph`; None: each is
            run anew.
    """

    def __init__(
        self, model: PreTrainedModel, max_rows: int, record: Recorder | None = None
    ) -> None:
        super().__init__("llmquant-batcher")
        self._model: Any = model
        self._max_rows = max_rows
        self._record = record
        self._prefilling: list[Job] = []
        self._rows: list[Job]
        self._cache: Rows
        self._graphs: StepGraphs | None
        self._clear()

    def _run(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.set_device(
                self._model.device
            )  # of the thread, for kernels of other compilers
        super()._run()

    def _load(self) -> Load:
        prefilling = list(self._prefilling)
        cached = sum(self._cache.lengths) + sum(job.prefilled for job in prefilling)
        return Load(len(self._rows) + len(prefilling), len(self._waiting), cached)

    def _running(self) -> list[Job]:
        return [*self._prefilling, *self._rows]

    def _free(self) -> int:
        return self._max_rows - sum(not job.cancelled for job in self._running())

    def _take(self, job: Job) -> None:
        job.cache = Cache(layer_class_to_replicate=DynamicLayer)
        self._prefilling.append(job)

    @torch.inference_mode()
    def _iterate(self) -> None:
        self._drop_cancelled()
        self._prefill()
        if self._rows:
            self._decode()

    def _drop_cancelled(self) -> None:
        self._prefilling = [job for job in self._prefilling if not job.cancelled]
        self._remove(row for row, job in enumerate(self._rows) if job.cancelled)

    def _prefill(self) -> None:
        """Spend one budget of prompt tokens, oldest job first."""
        budget = PROMPT_CHUNK if self._rows else PROMPT_AT_ONCE
        while self._prefilling and budget > 0:
            job = self._prefilling[0]
            try:
                with isolated("this request failed while reading its prompt"):
                    budget -= self._prefill_chunk(job, budget)
                    if job.prefilled < len(job.prompt):
                        continue
                    goes_on = self._begin(job)
            except LlmquantError as e:
                job.fail(e)
                self._check_model()
                goes_on = False
            self._prefilling.pop(0)
            if goes_on:
                self._join(job)
            job.cache = job.logits = None

    def _prefill_chunk(self, job: Job, budget: int) -> int:
        """Prefill a part of a prompt, and keep the logits at its end. Returns the number of
        tokens."""
        scored, begin = job.sampling.prompt_logprobs, job.prefilled
        size = min(self._chunk(job, budget), len(job.prompt) - begin)
        end = begin + size
        assert job.cache is not None
        logits = logits_of(
            self._model, job.prompt[begin:end], job.cache, begin, keep=1 if scored is None else 0
        )
        if scored is not None:
            following = list(job.prompt[begin + 1 : end + 1])
            job.scores += described_all(following, logits[: len(following)], scored)
        job.prefilled = end
        job.logits = logits[-1].float()
        return size

    def _chunk(self, job: Job, budget: int) -> int:
        """The most tokens of a prompt that one pass reads."""
        return budget if job.sampling.prompt_logprobs is None else min(budget, SCORED_CHUNK)

    def _begin(self, job: Job) -> bool:
        """Deliver the prompt's log-probabilities and the first token; returns whether more are
        wanted."""
        assert job.logits is not None
        if job.sampling.prompt_logprobs is not None:
            job.deliver(Step(prompt=(Token(job.prompt[0]), *job.scores)))
            job.scores = []
        if job.sampling.max_tokens == 0:
            job.deliver(Step(finish="length"))
            return False
        (best,), (largest,) = _largest(job.logits[None])
        return not job.advance(best, largest, job.logits)

    def _join(self, job: Job) -> None:
        """Make a prompt that was read a row; the cache of all rows may have to move for it."""
        assert job.cache is not None
        self._rows.append(job)
        try:
            with isolated("this request failed while one was added to the cache that it shares"):
                self._cache.join(job.cache, len(job.prompt))
        except LlmquantError as e:
            self._end_rows(e)

    def _decode(self) -> None:
        """One token for every row."""
        try:
            with isolated("this request failed while decoding together with all that were running"):
                logits = self._step()
        except LlmquantError as e:
            self._end_rows(e)
            return
        rows = list(zip(self._rows, *_largest(logits), logits, strict=True))
        self._remove([i for i, (job, *found) in enumerate(rows) if job.advance(*found)])

    def _end_rows(self, error: LlmquantError) -> None:
        """Fail all rows: what they share, the cache, may be half written."""
        for job in self._rows:
            job.fail(error)
        self._clear()
        self._check_model()

    def _step(self) -> Tensor:
        """Float32 logits ``[rows, vocab]`` after the newest token of every row."""
        assert isinstance(self._cache, RowCache)
        if self._graphs is not None:
            self._cache.before_step()
            logits = self._graphs.step([job.last for job in self._rows])
            self._cache.after_step()
            if self._graphs.failed:
                given_up(self._graphs.failed)
                self._graphs = self._record = None
            return logits
        return next_logits(self._model, [job.last for job in self._rows], self._cache)

    def _check_model(self) -> None:
        """Put one token through the model, after a failure. What this raises ends the engine."""
        self._model(input_ids=self._tensor([[0]]), use_cache=False)

    def _clear(self) -> None:
        """No rows, an empty cache, and no recorded steps over it."""
        self._rows = []
        self._cache = self._new_cache()
        self._graphs = None
        if self._record is not None and isinstance(self._cache, RowCache):
            self._graphs = StepGraphs(self._model, self._cache, self._record)

    def _new_cache(self) -> Rows:
        return RowCache(self._model.config.get_text_config().num_hidden_layers, self._max_rows)

    def _remove(self, rows: Iterable[int]) -> None:
        """Free rows; the last row takes the place of each."""
        for row in sorted(rows, reverse=True):
            self._cache.leave(row)
            self._rows[row] = self._rows[-1]
            self._rows.pop()

    def _tensor(self, ids: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, dtype=torch.long, device=self._model.device)


def logits_of(
    model: PreTrainedModel, ids: Sequence[int], cache: Cache, before: int, keep: int = 0
) -> Tensor:
    """Logits ``[tokens, vocab]`` of a sequence's tokens behind ``before`` others in its cache; of
    the last ``keep``, or of all."""
    total, device = before + len(ids), model.device
    out = model(
        input_ids=torch.tensor([ids], dtype=torch.long, device=device),
        attention_mask=torch.ones((1, total), dtype=torch.long, device=device),
        position_ids=torch.arange(before, total, device=device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=keep,
    )
    logits: Tensor = out.logits[0]
    return logits


def next_logits(model: PreTrainedModel, last: Sequence[int], rows: RowCache) -> Tensor:
    """Float32 logits ``[rows, vocab]`` after one more token of every row of a common cache."""
    device = model.device
    rows.before_step()
    out = model(
        input_ids=torch.tensor([[token] for token in last], dtype=torch.long, device=device),
        attention_mask=rows.mask(device),
        position_ids=torch.tensor([[n] for n in rows.lengths], dtype=torch.long, device=device),
        past_key_values=rows,
        use_cache=True,
    )
    rows.after_step()
    logits: Tensor = out.logits[:, -1].float()
    return logits


def _largest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Of every row of ``[rows, vocab]`` the token of the largest logit, and that logit; waits for a
    device once."""
    best = logits.argmax(-1, keepdim=True)
    both = torch.cat((best.double(), logits.gather(-1, best).double()), dim=1).tolist()
    return [int(token) for token, _ in both], [largest for _, largest in both]
