"""How far the student is from the teacher, at every position.

The teacher's distribution is kept as its ``k`` most probable tokens and one bin for all others. The
Kullback-Leibler divergence over these ``k + 1`` outcomes::

    KL = sum_i p_i * (log p_i - log q_i) + p_rest * (log p_rest - log q_rest)

where the rest is summed over its own logits, as exact where it is small as where it is large. It
is never more than that over the whole vocabulary (data processing), and equals it where ``k`` is
all of it. At a temperature T both are softmax(logits / T), and the loss is times T², so that its
gradient keeps its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Targets:
    """What the teacher says of positions: ``ids`` int64 ``[n, k]`` and their log-probabilities
    ``[n, k]``, that of all other tokens together ``[n]`` (-inf where there are none), and its last
    hidden states ``[n, width]`` or None."""

    ids: Tensor
    logprobs: Tensor
    rest: Tensor
    hidden: Tensor | None = None


def make_targets(logits: Tensor, k: int, temperature: float, hidden: Tensor | None) -> Targets:
    """Of logits ``[n, vocabulary]``, in float32; ``k`` 0 or more than all is the whole
    vocabulary."""
    logits = logits.to(torch.float32) / temperature
    total = logits.logsumexp(-1)
    if k == 0 or k >= logits.shape[-1]:
        ids = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
        rest = torch.full_like(total, float("-inf"))
        return Targets(ids, logits - total.unsqueeze(-1), rest, hidden)
    values, ids = logits.topk(k, dim=-1)
    rest = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - total
    return Targets(ids, values - total.unsqueeze(-1), rest, hidden)


def divergence(targets: Targets, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) in nats at every position, ``[n]``, for logits ``[n, vocabulary]``."""
    logits = logits.to(torch.float32)
    logits = logits if temperature == 1 else logits / temperature
    if targets.ids.shape[-1] == logits.shape[-1]:
        q = logits - logits.logsumexp(-1, keepdim=True)
        return (targets.logprobs.exp() * (targets.logprobs - q)).sum(-1) * temperature**2
    head = logits.gather(-1, targets.ids)
    others = logits.scatter(-1, targets.ids, float("-inf")).logsumexp(-1)
    total = torch.logaddexp(head.logsumexp(-1), others)
    q = head - total.unsqueeze(-1)
    kl = (targets.logprobs.exp() * (targets.logprobs - q)).sum(-1)
    p_rest = targets.rest.exp()
    kl = kl + torch.where(p_rest > 0, p_rest * (targets.rest - (others - total)), 0.0)
    return kl * temperature**2


def hidden_error(targets: Targets, hidden: Tensor) -> Tensor:
    """Squared distance of the last hidden states over the teacher's square, ``[n]``."""
    assert targets.hidden is not None
    wanted = targets.hidden.to(torch.float32)
    distance = (hidden.to(torch.float32) - wanted).square().mean(-1)
    return distance / wanted.square().mean(-1).clamp(min=1e-12)


def next_token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Negative log-likelihood of the tokens that follow, ``[n]``."""
    return torch.nn.functional.cross_entropy(logits.to(torch.float32), following, reduction="none")
