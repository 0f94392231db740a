"""What vLLM's completion API is sent and what it returns, as our own types.

One request is one sequence, as token ids. Log-probabilities come by token id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmquant_serve.engines.base import EngineError, RefusedError, Sampling, Step, Token

_QUOTED = 500  # characters of vLLM's own error message


def request_body(prompt: Sequence[int], s: Sampling) -> dict[str, Any]:
    """The body of a completion request to vLLM, for one sequence."""
    body: dict[str, Any] = {
        "prompt": list(prompt),
        "max_tokens": max(1, s.max_tokens),
        "min_tokens": s.min_tokens,
        "temperature": 0.0 if s.greedy else s.temperature,
        "top_p": s.top_p or 1e-9,
        "top_k": s.top_k,
        "min_p": s.min_p,
        "frequency_penalty": s.frequency_penalty,
        "presence_penalty": s.presence_penalty,
        "repetition_penalty": s.repetition_penalty,
        "ignore_eos": s.ignore_eos,
        "stop_token_ids": list(s.stop_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "skip_special_tokens": False,
    }
    if s.seed is not None:
        body["seed"] = s.seed
    if s.logprobs is not None:
        body["logprobs"] = s.logprobs
    if s.prompt_logprobs is not None:
        body["prompt_logprobs"] = s.prompt_logprobs
    if s.logit_bias:
        body["logit_bias"] = {str(k): v for k, v in s.logit_bias.items()}
    if s.grammar is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(s.grammar)},
        }
    return body


def scored_steps(answer: Mapping[str, Any], prompt: Sequence[int], s: Sampling) -> list[Step]:
    """The steps of an answer that is not streamed, the prompt's log-probabilities first."""
    choice = answer["choices"][0]
    scored = [Token(prompt[0])]
    for token, entries in zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True):
        logprobs = {int(i): float(entry["logprob"]) for i, entry in entries.items()}
        ranked = sorted(logprobs.items(), key=lambda pair: -pair[1])
        scored.append(Token(token, logprobs[token], tuple(ranked[: s.prompt_logprobs])))
    if s.max_tokens == 0:
        return [Step(prompt=tuple(scored)), Step(finish="length")]
    return [
        Step(prompt=tuple(scored)),
        Step(tokens(choice), finish_reason(choice["finish_reason"])),
    ]


def tokens(choice: Mapping[str, Any]) -> tuple[Token, ...]:
    """The tokens of a choice, with their log-probabilities if it has them."""
    ids = choice.get("token_ids") or []
    logprobs = choice.get("logprobs")
    if not logprobs:
        return tuple(map(Token, ids))
    return tuple(
        Token(i, p, _ranked(top, i))
        for i, p, top in zip(ids, logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    )


def _ranked(top: Mapping[str, float] | None, chosen: int) -> tuple[tuple[int, float], ...]:
    """Alternatives, best first; among equals the chosen token is the first."""
    pairs = [(int(name.removeprefix("token_id:")), p) for name, p in (top or {}).items()]
    return tuple(sorted(pairs, key=lambda pair: (-pair[1], pair[0] != chosen)))


def finish_reason(reason: str | None) -> Any:
    """vLLM's finish reason as ours.

    Raises:
        EngineError: it has one that we do not have: an abort, an error.
    """
    if reason in (None, "stop", "length"):
        return reason
    raise EngineError(f"vLLM ended the request early, with finish reason {reason!r}")


def check_status(status: int, text: str) -> None:
    """Raise for an answer other than 200.

    Raises:
        RefusedError: vLLM says that the request is wrong.
        EngineError: vLLM failed.
    """
    if status in (400, 422):
        raise RefusedError(f"vLLM refuses the request: {text[:_QUOTED]}")
    if status != 200:
        raise EngineError(f"vLLM answered {status}: {text[:_QUOTED]}")
