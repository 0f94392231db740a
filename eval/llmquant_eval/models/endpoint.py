"""A running OpenAI-compatible server as a model: ``http://HOST:PORT/v1#MODEL``.

What is needed of it are the log-probabilities of a *prompt*, given as token ids so that no
tokenizer stands between. Two dialects have them: vLLM's ``prompt_logprobs``, which names the ids it
scored and is asked for first, and the older ``echo`` with ``logprobs``, whose alternatives are
named by id where the server can, since two tokens may have one text. A server that gives neither
is refused with its own words. One token is generated and thrown away with every prompt, because not
every server takes zero; a prompt must therefore be shorter than the context.

A server shows a few log-probabilities of 10^5, so it has perplexity and tasks but no KL.

A server that is busy or gone is asked again (:mod:`llmquant_eval.models.retrying`), and what it
answered is kept until the evaluation is done (:mod:`llmquant_eval.models.kept_answers`).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.answers import QUOTED, choice_of, read_scores
from llmquant_eval.models.kept_answers import Answer, KeptAnswers, Prompt, PromptScores, agree
from llmquant_eval.models.retrying import FIRST_PATIENCE, PATIENCE, Retrying
from llmquant_eval.models.server import RefusedError, Server

PARALLEL = 8  # prompts under way at a time: the server batches them


def is_url(source: str) -> bool:
    """Whether a model is a server rather than a folder or hub name."""
    return source.startswith(("http://", "https://"))


def tell_nobody(_: str) -> None:
    """The default: what happens is not told."""


@dataclass(frozen=True, slots=True)
class Contact:
    """How a server is dealt with: ``patience`` in seconds (None: the defaults of
    :mod:`llmquant_eval.models.retrying`), the folder that keeps its answers (None: nowhere), and
    who is told what happens."""

    patience: float | None = None
    keep: Path | None = None
    tell: Callable[[str], None] = tell_nobody


class Endpoint:
    """One model of one server. Constructing it asks the server which models it has.

    Attributes:
        model: the name the server knows it by.
        context: tokens that prompt and answer may have together, or None where the server does not
            say.

    Raises:
        UsageError: not a URL, or no such model there.
        LlmquantError: the server cannot be reached, or answers something else than a list of
            models.
    """

    def __init__(self, source: str, contact: Contact | None = None) -> None:
        contact = contact or Contact()
        url, _, name = source.partition("#")
        first = FIRST_PATIENCE if contact.patience is None else contact.patience
        self._retrying = Retrying(first, contact.tell)
        self._server = Server(url, source, self._retrying)
        self.url = self._server.url
        served = self._find(name)
        self._retrying.patience = PATIENCE if contact.patience is None else contact.patience
        self._retrying.reconnected = False
        self.model = str(served["id"])
        length = served.get("max_model_len")
        self.context = int(length) if isinstance(length, int) else None
        self.kept = KeptAnswers(contact.keep, f"{self.url}#{self.model}")
        self._tell, self._checking = contact.tell, threading.Lock()
        self._asking = threading.Semaphore(PARALLEL)
        self._resuming = len(self.kept) > 0
        self._replaced = False  # it came back with another model
        self._dialects: list[Mapping[str, object]] = [
            {"prompt_logprobs": 1},
            {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
            {"echo": True, "logprobs": 1},
        ]

    def _find(self, name: str) -> Mapping[str, Any]:
        listed = self._server.request("/models", None).get("data")
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and "id" in m for m in listed
        ):
            raise LlmquantError(
                f"{self.url}/models does not list models; give the address up to and with /v1"
            )
        matching: list[dict[str, Any]] = [
            m for m in listed if m["id"] == name or (not name and len(listed) == 1)
        ]
        if not matching:
            names = ", ".join(str(m["id"]) for m in listed) or "none"
            raise UsageError(
                f"{self.url} has no model {name!r}; it serves: {names}. Write {self.url}#MODEL"
            )
        return matching[0]

    def score(self, ids: Sequence[int]) -> PromptScores:
        """Score a prompt, or take what an earlier run was answered.

        Raises:
            LlmquantError: the server failed, gives no prompt log-probabilities, or scored other
                tokens; or it came back with another model.
        """
        self._check_model()
        scores = self.kept.scores(ids)
        if scores is None:
            with self._asking:
                scores = self._score(ids)
            self._keep(Prompt(ids), scores)
        return scores

    def _check_model(self) -> None:
        """Does what answers now answer the first kept prompt as before? Asked before answers of an
        earlier run are used, and after a lost connection."""
        with self._checking:
            self._check()

    def _keep(self, prompt: Prompt, answer: Answer) -> None:
        """Check the model and keep its answer, with nothing in between: what another thread then
        discards is all of it."""
        with self._checking:
            self._check()
            self.kept.add(prompt, answer)

    def _check(self) -> None:
        if self.kept.first is None:  # no answer yet that could differ
            self._resuming = self._retrying.reconnected = False
        resuming = self._resuming
        if not self._replaced and (resuming or self._retrying.reconnected):
            same = self._answers_as_before()
            self._resuming = self._retrying.reconnected = False
            if not same:
                self.kept.discard()
            if resuming:
                self._tell(
                    f"{self.url}: resumes; {len(self.kept):,} answers of an earlier run are kept"
                    if same
                    else f"{self.url}: answers otherwise than in an earlier run, whose answers are not used"
                )
            self._replaced = not same and not resuming
        if self._replaced:
            raise LlmquantError(
                f"{self.url} came back with another model: it answers a prompt otherwise than before. "
                "What it answered is not used; run the command again"
            )

    def _answers_as_before(self) -> bool:
        assert self.kept.first is not None  # asked by the caller
        prompt, before = self.kept.first
        with ExitStack() as alone:  # in company it would be rounded otherwise
            for _ in range(PARALLEL):
                alone.enter_context(self._asking)
            try:
                now = self._score(prompt.ids) if prompt.options is None else self._complete(prompt)
            except RefusedError:  # it has less context than before, for example
                return False
        return agree(before, now)

    def _score(self, ids: Sequence[int]) -> PromptScores:
        base = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        refusals = []
        for dialect in list(self._dialects):
            try:
                answer = self._server.request("/completions", base | dict(dialect))
            except RefusedError as e:
                refusals.append(str(e))
                continue
            scores = self._read(answer, ids)
            if scores is not None:
                self._dialects = [dialect]  # the others need not be tried again
                return scores
            refusals.append(
                f"the answer to {next(iter(dialect))} has no log-probabilities of the prompt"
            )
        raise RefusedError(
            f"{self.url} does not give log-probabilities of a prompt, which perplexity and tasks are made of "
            f"({'; '.join(dict.fromkeys(refusals))}). Serve the model with one that does, vLLM for example, or evaluate its folder"
        )

    def _read(self, answer: Mapping[str, Any], ids: Sequence[int]) -> PromptScores | None:
        try:
            return read_scores(answer, ids)
        except (TypeError, KeyError, AttributeError, ValueError) as e:
            raise LlmquantError(
                f"{self.url}/completions answered log-probabilities in a form that is not known "
                f"({type(e).__name__}: {e}): {json.dumps(answer)[:QUOTED]}"
            ) from e

    def score_all(self, prompts: Sequence[Sequence[int]]) -> Iterator[PromptScores]:
        """Score prompts, several at a time, in order."""
        if not prompts:
            return
        yield self.score(prompts[0])  # settles the dialect before there is a crowd
        pool = ThreadPoolExecutor(PARALLEL)
        try:
            yield from pool.map(self.score, prompts[1:])
        finally:
            with self._retrying.stopped():  # after a failure the others would each wait for as long
                pool.shutdown(cancel_futures=True)

    def scored(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many of these prompts have been answered."""
        return sum(self.kept.scores(ids) is not None for ids in prompts)

    def complete(
        self, ids: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float
    ) -> str:
        """The text that the server writes after a prompt, or wrote in an earlier run."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "stop": list(stop)}
        prompt = Prompt(ids, options)
        if temperature != 0.0:  # drawn: there is no one answer to keep
            return self._complete(prompt)
        self._check_model()
        text = self.kept.text(prompt)
        if text is None:
            text = self._complete(prompt)
            self._keep(prompt, text)
        return text

    def ask(self, path: str, body: Mapping[str, object]) -> dict[str, Any]:
        """What ``path`` answers to ``body``, with the model's name in it; nothing is kept.

        Raises:
            RefusedError: the server does not take it as it is.
            LlmquantError: the server failed.
        """
        with self._asking:
            return self._server.request(path, {"model": self.model} | dict(body))

    @contextmanager
    def waits_stopped(self) -> Iterator[None]:
        """Inside, requests that wait for a busy server fail at once."""
        with self._retrying.stopped():
            yield

    def _complete(self, prompt: Prompt) -> str:
        body = {"model": self.model, "prompt": list(prompt.ids)} | dict(prompt.options or {})
        answer = self._server.request("/completions", body)
        text = choice_of(answer).get("text")
        if not isinstance(text, str):
            raise LlmquantError(
                f"{self.url}/completions answered without a text: {json.dumps(answer)[:QUOTED]}"
            )
        return text
