"""What a server answers to a prompt, read: its log-probabilities in either dialect.

``prompt_logprobs`` is vLLM's form and names ids. ``echo`` with ``logprobs`` names tokens by their
text, which several tokens may share, unless the server heeds ``return_tokens_as_token_ids``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmquant.errors import LlmquantError
from llmquant_eval.models.kept_answers import PromptScores

QUOTED = 300
"""Characters of an answer that a message quotes."""
_LOWEST = -9999.0  # JSON has no infinity; servers write this for a probability of zero


def choice_of(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise LlmquantError(f"the server answered without choices: {json.dumps(answer)[:QUOTED]}")
    return choices[0]


def read_scores(answer: Mapping[str, Any], ids: Sequence[int]) -> PromptScores | None:
    """Prompt scores in either dialect, or None where the answer has none."""
    choice = choice_of(answer)
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
