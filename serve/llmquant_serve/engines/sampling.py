"""From a row of logits to a token. Every request has its own generator, so its choices do not
depend on its neighbours.

The order is that of vLLM and transformers: bias, penalties, end tokens held back, temperature,
top-k, top-p, min-p, draw. A draw inverts the cumulative distribution at one uniform number, so a
request consumes exactly one number per token. Reported log-probabilities are taken before all of
it. A temperature below 1e-5 takes the first of the largest logits, as ``model.generate`` does. The
largest logit is subtracted before the temperature divides, so that no temperature overflows.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from llmquant_serve.engines.base import EngineError, Sampling, Token

# Rows of prompt logits at a time: with a vocabulary of 128k, a row in float32 is half a megabyte.
_ROWS = 64


class Chooser:
    """The state of one request's sampling."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], eos: frozenset[int]) -> None:
        self.sampling = sampling
        self.generator = torch.Generator()
        self.generator.manual_seed(
            secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
        )
        self._counts: Counter[int] = Counter()  # of generated tokens
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self._end_tokens = tuple(eos | set(sampling.stop_ids))
        self._generated = 0

    @property
    def greedy(self) -> bool:
        """Whether the next token is that of the largest logit, with nothing to change before."""
        s = self.sampling
        changed = (
            s.logit_bias or s.frequency_penalty or s.presence_penalty or s.repetition_penalty != 1.0
        )
        return s.greedy and not changed and self._generated >= s.min_tokens

    def update(self, token: int) -> None:
        """Count a token that was chosen."""
        self._generated += 1
        self._counts[token] += 1
        if self.sampling.repetition_penalty != 1.0:
            self._seen.add(token)

    def choose(self, logits: Tensor) -> int:
        """The next token, from float32 logits ``[vocab]``, which are not changed.

        Raises:
            EngineError: bias, penalties and end tokens held back leave no token to choose.
        """
        s = self.sampling
        logits = self._adjusted(logits)
        best = int(logits.argmax())
        if not math.isfinite(float(logits[best])):
            raise EngineError(
                "no token can be chosen: with the request's min_tokens, stop_token_ids, logit_bias "
                f"and penalties the best logit is {float(logits[best])}"
            )
        if s.greedy:
            return best
        return self._draw(_filtered((logits - logits[best]) / s.temperature, s))

    def _adjusted(self, logits: Tensor) -> Tensor:
        """Logits with bias and penalties, end tokens held back before ``min_tokens``."""
        s = self.sampling
        logits = logits.clone()
        if s.logit_bias:
            logits[list(s.logit_bias)] += torch.tensor(
                list(s.logit_bias.values()), device=logits.device
            )
        if self._seen:
            seen = torch.tensor(sorted(self._seen), device=logits.device)
            old = logits[seen]
            logits[seen] = torch.where(
                old > 0, old / s.repetition_penalty, old * s.repetition_penalty
            )
        if self._counts and (s.frequency_penalty or s.presence_penalty):
            tokens = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(
                list(self._counts.values()), dtype=torch.float32, device=logits.device
            )
            logits[tokens] -= s.frequency_penalty * counts + s.presence_penalty
        if self._generated < s.min_tokens:
            held = [t for t in self._end_tokens if t < logits.numel()]  # a config may name others
            logits[held] = -torch.inf
        return logits

    def _draw(self, logits: Tensor) -> int:
        """Draw a token with the probability that softmax gives it."""
        cumulative = torch.softmax(logits.double().cpu(), -1).cumsum(-1)
        point = torch.rand((), dtype=torch.float64, generator=self.generator) * cumulative[-1]
        drawn = int(torch.searchsorted(cumulative, point, right=True))
        # Rounding can put the point past the last token that has a probability.
        return min(drawn, int(torch.nonzero(logits.cpu() > -torch.inf)[-1]))


def _filtered(logits: Tensor, s: Sampling) -> Tensor:
    """Logits with -inf for what top-k, top-p and min-p leave out; the most likely token always
    stays."""
    if s.top_k and s.top_k < logits.numel():
        kept = torch.full_like(logits, -torch.inf)
        values, indices = logits.topk(s.top_k)
        logits = kept.scatter(0, indices, values)
    if s.top_p < 1.0:
        values, indices = logits.sort(descending=True, stable=True)
        before = torch.softmax(values, -1).cumsum(-1) - torch.softmax(values, -1)
        values[1:][before[1:] >= s.top_p] = -torch.inf
        logits = torch.empty_like(logits).scatter(0, indices, values)
    if s.min_p > 0.0:
        p = torch.softmax(logits, -1)
        logits = logits.masked_fill(p < s.min_p * p.max(), -torch.inf)
    return logits


def described(
    token: int, logits: Tensor, alternatives: int | None, *, entropy: bool = False
) -> Token:
    """A token with its log-probability and ``alternatives`` most likely ones, from float32 logits
    ``[vocab]``; with the entropy if it is wanted."""
    if alternatives is None:
        return Token(token)
    logprobs = torch.log_softmax(logits, -1)
    values, ids = logprobs.topk(min(alternatives, logprobs.numel()))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    own = float(logprobs[token])
    return Token(token, own, top, _entropy(logprobs) if entropy else None)


def _entropy(logprobs: Tensor) -> float:
    """In nats; overwrites the log-probabilities, since a copy of them takes longer than this."""
    # A token that is impossible counts nothing: 0 times minus infinity is no number.
    logprobs.clamp_(min=-1e4)
    return -float(torch.dot(logprobs.exp(), logprobs))


def described_all(tokens: Sequence[int], logits: Tensor, alternatives: int) -> list[Token]:
    """The same for consecutive tokens and the logits ``[n, vocab]`` (any float dtype) that predict
    them."""
    result: list[Token] = []
    for start in range(0, len(tokens), _ROWS):
        ids = torch.tensor(tokens[start : start + _ROWS], device=logits.device)
        logprobs = torch.log_softmax(logits[start : start + _ROWS].float(), -1)
        own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
        values, top = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
        rows = zip(ids.tolist(), own, top.tolist(), values.tolist(), strict=True)
        result += [Token(i, p, tuple(zip(t, v, strict=True))) for i, p, t, v in rows]
    return result
