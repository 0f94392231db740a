"""A running OpenAI-compatible server, generating there.

Conversations go to ``/chat/completions`` as they are in the data, plain prompts with ``--raw`` to
``/completions``. Log-probabilities need the model's tokenizer, because they are asked for by token
ids (see :mod:`llmquant_eval.models.endpoint`). Every prompt is a unit of its own.

An address may serve another model by the time a run resumes, so the first prompt is asked alone,
and once more before answers of an earlier run are used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.answers import choice_of
from llmquant_eval.models.endpoint import PARALLEL
from llmquant_eval.models.resolve import ServedModel
from llmquant_eval.models.server import RefusedError
from llmquant_eval.validate.answers import Answer, Measured, Scored, Task, Unit
from llmquant_eval.validate.engines.engine import ONE_ITEM, Generation, TaskError
from llmquant_eval.validate.engines.prompts import Prompts

_SAME = 0.01
"""Nats that a sum of log-probabilities may differ by when one model is asked twice."""


class ServedEngine:
    """See :class:`llmquant_eval.validate.engines.engine.Engine`.

    Args:
        tokenizer: folder or hub name of the tokenizer that the server's model was made with; None:
            no log-probabilities.
    """

    together = ONE_ITEM
    observes: str | None = None
    original = False  # a server does not say

    def __init__(self, served: ServedModel, generation: Generation, tokenizer: str | None) -> None:
        import llmquant

        self.label, self._endpoint, self._generation = served.label, served.endpoint, generation
        self._prompts = None
        if tokenizer is not None:
            loaded = llmquant.load_tokenizer(tokenizer)
            self._prompts = Prompts(loaded, generation.raw, tokenizer)
        self.scores = self._prompts is not None
        self.thinks = self._prompts is not None and self._prompts.thinks
        self._limit = "max_tokens"

    def identity(self) -> Mapping[str, object]:
        return {
            "server": f"{self._endpoint.url}#{self._endpoint.model}",
            "generation": asdict(self._generation),
        }

    def computing(self) -> Mapping[str, str]:
        return {}

    def check(self, tasks: Sequence[Task], where: Callable[[Task], str]) -> list[str]:
        for task in tasks:
            example = task.example
            if self._generation.raw and (len(example.messages) > 1 or not example.plain):
                raise UsageError(
                    f"{where(task)}: --raw is given, so messages, system and tools cannot be used; "
                    "give `prompt` as a text"
                )
            try:
                if self._prompts is not None and task.continuations:
                    self._prompts.pairs(task)
            except UsageError as e:
                raise UsageError(f"{where(task)}: {e}") from e
        return []

    def same(self, unit: Unit, before: Sequence[Measured]) -> bool:
        if self._generation.temperature > 0:
            return True  # drawn anew each time
        try:
            (now,) = self._measured(unit)
        except TaskError as e:
            if isinstance(e.why, RefusedError):  # it has less context than before, for example
                return False
            raise
        (then,) = before
        texts = [None if m.answer is None else m.answer.text for m in (now, then)]
        apart = [abs(a.logprob - b.logprob) for a, b in zip(now.scored, then.scored, strict=True)]
        return texts[0] == texts[1] and max(apart, default=0.0) <= _SAME

    def measure(self, units: Sequence[Unit]) -> Iterator[tuple[int, list[Measured]]]:
        if not units:
            return
        yield 0, self._measured(units[0])  # settles how it is asked before there is a crowd
        pool = ThreadPoolExecutor(PARALLEL)
        asked: dict[Future[list[Measured]], int] = {
            pool.submit(self._measured, unit): place for place, unit in enumerate(units) if place
        }
        try:
            for future in as_completed(list(asked)):
                place = asked.pop(future)
                yield place, future.result()
        except TaskError:
            with self._endpoint.waits_stopped():
                pool.shutdown(cancel_futures=True)
            for future, place in asked.items():  # what was under way is done by now
                if not future.cancelled() and future.exception() is None:
                    yield place, future.result()
            raise
        finally:
            with self._endpoint.waits_stopped():
                pool.shutdown(cancel_futures=True)

    def _measured(self, unit: Unit) -> list[Measured]:
        (task,) = unit
        try:
            answer = self._generated(task) if task.generate else None
            return [Measured(answer=answer, scored=tuple(self._scored(task)))]
        except LlmquantError as e:
            raise TaskError(task, e) from e

    def _generated(self, task: Task) -> Answer:
        options: dict[str, object] = {"temperature": self._generation.temperature}
        if self._generation.temperature > 0:
            options["seed"] = self._generation.seed
        if self._generation.raw:
            prompt = str(task.example.messages[0]["content"])
            return _of_completion(self._ask("/completions", {"prompt": prompt} | options))
        messages = [dict(m) for m in task.example.messages]
        tools = {"tools": list(task.example.tools)} if task.example.tools else {}
        return _of_chat(self._ask("/chat/completions", {"messages": messages} | tools | options))

    def _ask(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """The answer; newer models of OpenAI's refuse ``max_tokens`` by name."""
        try:
            limit = {self._limit: self._generation.max_tokens}
            answer = self._endpoint.ask(path, dict(body) | limit)
        except RefusedError as e:
            if self._limit == "max_tokens" and "max_completion_tokens" in str(e):
                self._limit = "max_completion_tokens"
                return self._ask(path, body)
            raise
        # A character that the limit cut in half can be kept by no file.
        whole: dict[str, Any] = json.loads(
            json.dumps(answer, ensure_ascii=False).encode(errors="replace")
        )
        return whole

    def _scored(self, task: Task) -> Iterator[Scored]:
        if self._prompts is None:
            return
        for n, ids in self._prompts.pairs(task):
            values = self._endpoint.score(ids).logprobs[n - 1 :]
            if not math.isfinite(total := sum(values)):
                raise LlmquantError(
                    "the server gives a text of the data the probability 0, so it has no log-probability; "
                    "choose other metrics with --metric"
                )
            yield Scored(logprob=total, tokens=len(values))


def _of_completion(answer: Mapping[str, Any]) -> Answer:
    choice = choice_of(answer)
    return Answer(text=_text(choice.get("text")), **_ending(answer, choice))


def _of_chat(answer: Mapping[str, Any]) -> Answer:
    choice = choice_of(answer)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise LlmquantError("the server answered without a message; is it a chat model?")
    calls = message.get("tool_calls") or ()
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    return Answer(
        text=_text(message.get("content")),
        thoughts=_text(thoughts) if thoughts else None,
        calls=tuple(call for call in calls if isinstance(call, dict)),
        **_ending(answer, choice),
    )


def _ending(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> dict[str, Any]:
    usage = answer.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return {
        "tokens": tokens if isinstance(tokens, int) else None,
        "ended": choice.get("finish_reason") not in ("length", None),
    }


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LlmquantError(f"the server answered a text that is none: {str(value)[:80]}")
    return value
