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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.answers import QUOTED, choice_of, read_scores
from llmquant_eval.models.kept_answers import KeptAnswers, PromptScores, key_of
from llmquant_eval.models.retrying import FIRST_PATIENCE, PATIENCE, Retrying
from llmquant_eval.models.server import RefusedError, Server

PARALLEL = 8  # prompts under way at a time: the server batches them

Answer = TypeVar("Answer", PromptScores, str)


def is_url(source: str) -> bool:
    """Whether a model is a server rather than a folder or hub name."""
    return source.startswith(("http://", "https://"))


def _silent(_: str) -> None:
    """The default: nothing is told."""


@dataclass(frozen=True, slots=True)
class Contact:
    """How a server is dealt with: ``patience`` in seconds (None: the defaults of
    :mod:`llmquant_eval.models.retrying`), the folder that keeps its answers (None: nowhere), and
    who is told what happens."""

    patience: float | None = None
    keep: Path | None = None
    tell: Callable[[str], None] = _silent


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
        found = self._find(name)
        self._retrying.patience = PATIENCE if contact.patience is None else contact.patience
        self._retrying.reconnected = False
        self.model = str(found["id"])
        length = found.get("max_model_len")
        self.context = int(length) if isinstance(length, int) else None
        self.kept = KeptAnswers(contact.keep, f"{self.url}#{self.model}")
        self._tell, self._lock = contact.tell, threading.Lock()
        self._sample: tuple[Sequence[int], PromptScores] | None = None
        self._trusted = self.kept.found == 0  # the kept answers are of the model served now
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
        key = key_of(ids)
        kept = self.kept.scores(key)
        scores = None if kept is None else self._trust(kept, lambda: self._score(ids))
        if scores is None:
            scores = self._score(ids)
        self._sample = self._sample or (ids, scores)
        self._check_model()
        if scores is not kept:
            self.kept.add_scores(key, scores)
        return scores

    def _trust(self, kept: Answer, ask: Callable[[], Answer]) -> Answer:
        """``kept`` if the server would say so still; the first of a run is asked again."""
        with self._lock:
            if self._trusted:
                return kept
            answer = ask()
            same = kept == answer or (
                isinstance(kept, PromptScores)
                and isinstance(answer, PromptScores)
                and kept.agrees(answer)
            )
            self._trusted = True
            if same:
                self._tell(
                    f"{self.url}: resumes; {self.kept.found:,} answers of an earlier run are kept"
                )
                return kept
            self._tell(
                f"{self.url}: answers otherwise than in an earlier run, whose answers are not used"
            )
            self.kept.discard()
            return answer

    def _check_model(self) -> None:
        """After a lost connection: does what answers now score the run's first prompt as before?"""
        with self._lock:
            if not self._retrying.reconnected or self._sample is None:
                return
            ids, before = self._sample
            now = self._score(ids)
            if not now.agrees(before):
                self.kept.discard()
                raise LlmquantError(
                    f"{self.url} came back with another model: it scores a prompt otherwise than before. "
                    "What it answered is not used; run the command again"
                )
            self._retrying.reconnected = False

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
        raise LlmquantError(
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
        with ThreadPoolExecutor(PARALLEL) as pool:
            try:
                yield from pool.map(self.score, prompts[1:])
            except BaseException:
                self._retrying.stop()  # the others would each wait for as long
                pool.shutdown(cancel_futures=True)
                self._retrying.resume()
                raise

    def scored(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many of these prompts have been answered."""
        return sum(self.kept.scores(key_of(ids)) is not None for ids in prompts)

    def complete(
        self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float
    ) -> str:
        """The text that the server writes after a prompt, or wrote in an earlier run."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "stop": list(stop)}
        key = key_of(prompt, **options)
        kept = self.kept.text(key) if temperature == 0.0 else None
        text = (
            self._complete(prompt, options)
            if kept is None
            else self._trust(kept, lambda: self._complete(prompt, options))
        )
        if text is not kept:
            self.kept.add_text(key, text)
        return text

    def _complete(self, prompt: Sequence[int], options: Mapping[str, object]) -> str:
        body = {"model": self.model, "prompt": list(prompt)} | dict(options)
        answer = self._server.request("/completions", body)
        text = choice_of(answer).get("text")
        if not isinstance(text, str):
            raise LlmquantError(
                f"{self.url}/completions answered without a text: {json.dumps(answer)[:QUOTED]}"
            )
        return text
