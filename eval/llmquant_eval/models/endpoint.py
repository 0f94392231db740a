"""A running OpenAI-compatible server as a model: ``http://HOST:PORT/v1#MODEL``.

What is needed of it are the log-probabilities of a *prompt*, given as token ids so that no
tokenizer stands between. Two dialects have them: vLLM's ``prompt_logprobs``, which names the ids it
scored and is asked for first, and the older ``echo`` with ``logprobs``, whose alternatives are
named by id where the server can, since two tokens may have one text. A server that gives neither
is refused with its own words. One token is generated and thrown away with every prompt, because not
every server takes zero; a prompt must therefore be shorter than the context.

A server shows a few log-probabilities of 10^5, so it has perplexity and tasks but no KL. Standard
library only; a key is taken from ``OPENAI_API_KEY``, as every client of this protocol does.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from llmquant.errors import LlmquantError, UsageError

TIMEOUT_SECONDS = 600.0
PARALLEL = 8  # prompts under way at a time: the server batches them
_LOWEST = -9999.0  # JSON has no infinity; servers write this for a probability of zero
_QUOTED = 300


def is_url(source: str) -> bool:
    """Whether a model is a server rather than a folder or hub name."""
    return source.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of one prompt of P tokens: log-probability of tokens 1 … P-1 in nats, and whether each was
    the most likely one."""

    logprobs: list[float]
    greedy: list[bool]


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

    def __init__(self, source: str) -> None:
        url, _, name = source.partition("#")
        _check_address(url, source)
        self.url = url.rstrip("/")
        listed = self._request("/models", None).get("data")
        if not isinstance(listed, list) or not all(
            isinstance(m, dict) and "id" in m for m in listed
        ):
            raise LlmquantError(
                f"{self.url}/models does not list models; give the address up to and with /v1"
            )
        matching = [m for m in listed if m["id"] == name or (not name and len(listed) == 1)]
        if not matching:
            names = ", ".join(str(m["id"]) for m in listed) or "none"
            raise UsageError(
                f"{self.url} has no model {name!r}; it serves: {names}. Write {self.url}#MODEL"
            )
        self.model = str(matching[0]["id"])
        length = matching[0].get("max_model_len")
        self.context = int(length) if isinstance(length, int) else None
        self._dialects: list[Mapping[str, object]] = [
            {"prompt_logprobs": 1},
            {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True},
            {"echo": True, "logprobs": 1},
        ]

    def score(self, ids: Sequence[int]) -> PromptScores:
        """Score a prompt.

        Raises:
            LlmquantError: the server failed, gives no prompt log-probabilities, or scored other
                tokens.
        """
        base = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0}
        refusals = []
        for dialect in list(self._dialects):
            try:
                answer = self._request("/completions", base | dict(dialect))
            except _RefusedError as e:
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
            f"({'; '.join(refusals)}). Serve the model with one that does, vLLM for example, or evaluate its folder"
        )

    def _read(self, answer: Mapping[str, Any], ids: Sequence[int]) -> PromptScores | None:
        try:
            return _read(answer, ids)
        except (TypeError, KeyError, AttributeError, ValueError) as e:
            raise LlmquantError(
                f"{self.url}/completions answered log-probabilities in a form that is not known "
                f"({type(e).__name__}: {e}): {json.dumps(answer)[:_QUOTED]}"
            ) from e

    def score_all(self, prompts: Sequence[Sequence[int]]) -> Iterator[PromptScores]:
        """Score prompts, several at a time, in order."""
        if not prompts:
            return
        yield self.score(prompts[0])  # settles the dialect before there is a crowd
        with ThreadPoolExecutor(PARALLEL) as pool:
            yield from pool.map(self.score, prompts[1:])

    def complete(
        self, prompt: Sequence[int], max_tokens: int, stop: Sequence[str], temperature: float
    ) -> str:
        """The text that the server writes after a prompt."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "stop": list(stop)}
        answer = self._request(
            "/completions", {"model": self.model, "prompt": list(prompt)} | options
        )
        text = _choice(answer).get("text")
        if not isinstance(text, str):
            raise LlmquantError(
                f"{self.url}/completions answered without a text: {json.dumps(answer)[:_QUOTED]}"
            )
        return text

    def _request(self, path: str, body: Mapping[str, object] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as e:
            said = e.read().decode(errors="replace")[:_QUOTED]
            kind = _RefusedError if e.code in (400, 422) else LlmquantError
            raise kind(f"{self.url}{path} answered {e.code}: {said}") from e
        except (OSError, http.client.HTTPException) as e:  # a cut answer is no OSError
            raise LlmquantError(
                f"{self.url} cannot be reached: {getattr(e, 'reason', e)}; is the server running?"
            ) from e
        except ValueError as e:
            raise LlmquantError(f"{self.url}{path} did not answer JSON: {e}") from e
        if not isinstance(answer, dict):
            raise LlmquantError(
                f"{self.url}{path} answered {json.dumps(answer)[:_QUOTED]}, not an object"
            )
        return answer


def _check_address(url: str, source: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, half an IPv6 address
        valid = False
    if not valid:
        raise UsageError(f"{source} is not a server's address; write http://HOST:PORT/v1#MODEL")


class _RefusedError(LlmquantError):
    """The server does not take a request as it was written (400, 422)."""


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise LlmquantError(f"the server answered without choices: {json.dumps(answer)[:_QUOTED]}")
    return choices[0]


def _read(answer: Mapping[str, Any], ids: Sequence[int]) -> PromptScores | None:
    """Prompt scores in either dialect, or None where the answer has none."""
    choice = _choice(answer)
    by_id = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    if by_id:
        return _by_id(by_id, ids)
    logprobs = choice.get("logprobs")
    echoed = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(logprobs, dict) or not isinstance(echoed, list) or len(echoed) < len(ids):
        return None
    if any(value is None for value in echoed[1 : len(ids)]):
        return None
    values = [_nats(value) for value in echoed[1 : len(ids)]]
    tops = (logprobs.get("top_logprobs") or [None] * len(ids))[1 : len(ids)]
    best = [max(map(_nats, top.values())) if top else math.nan for top in tops]
    return PromptScores(values, [value >= top for value, top in zip(values, best, strict=True)])


def _by_id(
    entries: Sequence[Mapping[str, Mapping[str, Any]] | None], ids: Sequence[int]
) -> PromptScores:
    """vLLM's form: per token a mapping from ids to log-probabilities, the prompt's own among
    them."""
    if len(entries) != len(ids):
        raise LlmquantError(
            f"the server scored {len(entries)} tokens of a prompt of {len(ids)}; its tokenizer differs"
        )
    values, greedy = [], []
    for position, (entry, token) in enumerate(zip(entries, ids, strict=True)):
        if position == 0:
            continue
        own = (entry or {}).get(str(token))
        if entry is None or own is None:
            raise LlmquantError(
                f"the server's scores of a prompt lack its token {token} at position {position}"
            )
        values.append(_nats(own["logprob"]))
        greedy.append(values[-1] >= max(_nats(other["logprob"]) for other in entry.values()))
    return PromptScores(values, greedy)


def _nats(value: float) -> float:
    return -math.inf if value <= _LOWEST else float(value)
