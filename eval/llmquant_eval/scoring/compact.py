"""A reference's next-token distributions in few bytes: two forms, each a :class:`ReferenceWindow`
to compare with.

``full-16`` keeps the whole vocabulary in 2 bytes a token: log-probabilities are rounded to 65,535
even steps between the position's smallest (or 50 nats below its largest) and its largest, and
normalized again when read. A step is below ``8e-4`` nats whatever the model; what it leaves in a KL
is that step weighted by how far the two models differ, and has no sign. Code 0 is a probability of
exactly zero.

``top-K`` keeps the K most likely tokens in float32 and the mass of all others as one token, which
is exact about the head and blind inside the tail: its KL is a lower bound (the log-sum inequality),
and how low depends on the model.

Either way the true token's log-probability and the reference's first choice are kept exactly, in
float32, so perplexity, top-1 agreement and Δp are those of the logits. What the form costs the KL
is measured, not assumed: see :mod:`llmquant_eval.scoring.reference_cache`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import UsageError
from llmquant_eval.scoring.divergence import TokenDivergence, kl_of_logs
from llmquant_eval.scoring.perplexity import position_chunks

_STEPS = 65534
_DEEPEST = (
    50.0  # nats below the most likely token: a probability that no float32 sum could tell from 0
)
Arrays = Mapping[str, NDArray[np.generic]]


class Form(Protocol):
    """A way to keep log-probabilities. ``name`` identifies it in reports and cache keys."""

    @property
    def name(self) -> str: ...

    def bytes_per_position(self, vocabulary: int) -> int: ...

    def encode(self, logits: Tensor) -> dict[str, NDArray[np.generic]]:
        """Logits ``[positions, vocabulary]`` → arrays with ``positions`` rows each."""
        ...

    def window(self, arrays: Arrays, vocabulary: int) -> StoredWindow: ...


@dataclass(frozen=True, slots=True, eq=False)
class StoredWindow:
    """What both forms keep exactly: true token's log-probability and first choice, ``[positions]``.

    ``losses`` are the reference's own, in nats.
    """

    arrays: Arrays
    vocabulary: int

    @property
    def losses(self) -> NDArray[np.float64]:
        return -self.arrays["target"].astype(np.float64)

    def divergence(self, candidate: Tensor, targets: Tensor) -> TokenDivergence:
        """As :func:`llmquant_eval.scoring.divergence.token_divergence`, from the compact form."""
        found = TokenDivergence.empty(len(targets), candidate.device)
        for part in position_chunks(*candidate.shape):
            log_q = torch.log_softmax(candidate[part], dim=-1, dtype=torch.float32)
            own = _tensor(self.arrays["target"][part], candidate.device)
            target = targets[part].unsqueeze(1)
            found.delta_p[part] = log_q.gather(1, target).squeeze(1).exp() - own.exp()
            found.same_top[part] = _tensor(
                self.arrays["first"][part], candidate.device
            ) == candidate[part].argmax(-1)
            found.confidence[part] = _tensor(self.arrays["largest"][part], candidate.device).exp()
            found.kl[part] = self.kl(part, log_q)
        return found

    def kl(self, part: slice, log_q: Tensor) -> Tensor:
        """KL at positions ``part`` from the candidate's log-probabilities there."""
        raise NotImplementedError


def exact_arrays(logits: Tensor, targets: Tensor) -> dict[str, NDArray[np.generic]]:
    """The exact part of a window's form: ``target`` and ``largest`` float32, ``first`` int32,
    ``[positions]``."""
    target = np.empty(len(targets), dtype=np.float32)
    largest = np.empty_like(target)
    for part in position_chunks(*logits.shape):
        log_p = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        target[part] = log_p.gather(1, targets[part].unsqueeze(1)).squeeze(1).cpu().numpy()
        largest[part] = log_p.amax(dim=-1).cpu().numpy()
    first = logits.argmax(dim=-1).to(torch.int32).cpu().numpy()
    return {"target": target, "largest": largest, "first": first}


@dataclass(frozen=True, slots=True)
class Full16:
    """The whole vocabulary in 16-bit steps."""

    @property
    def name(self) -> str:
        return "full-16"

    def bytes_per_position(self, vocabulary: int) -> int:
        return 2 * vocabulary

    def encode(self, logits: Tensor) -> dict[str, NDArray[np.generic]]:
        positions, vocabulary = logits.shape
        codes = np.empty((positions, vocabulary), dtype=np.uint16)
        lowest, step = (np.empty(positions, dtype=np.float32) for _ in range(2))
        for part in position_chunks(positions, vocabulary):
            log_p = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
            top = log_p.amax(dim=-1)
            low = torch.maximum(
                log_p.masked_fill(log_p == -torch.inf, torch.inf).amin(dim=-1), top - _DEEPEST
            )
            size = ((top - low) / _STEPS).clamp_min_(torch.finfo(torch.float32).tiny)
            steps = (
                log_p.sub(low.unsqueeze(1))
                .div_(size.unsqueeze(1))
                .round_()
                .clamp_(0, _STEPS)
                .add_(1)
            )
            steps.masked_fill_(log_p == -torch.inf, 0)
            codes[part] = steps.to(torch.int32).cpu().numpy()
            lowest[part], step[part] = low.cpu().numpy(), size.cpu().numpy()
        return {"codes": codes, "lowest": lowest, "step": step}

    def window(self, arrays: Arrays, vocabulary: int) -> StoredWindow:
        return _FullWindow(arrays, vocabulary)


class _FullWindow(StoredWindow):
    def kl(self, part: slice, log_q: Tensor) -> Tensor:
        device = log_q.device
        codes = _tensor(self.arrays["codes"][part].astype(np.int32), device)
        lowest, step = (
            _tensor(self.arrays[name][part], device).unsqueeze(1) for name in ("lowest", "step")
        )
        log_p = (
            codes.sub(1)
            .to(torch.float32)
            .mul_(step)
            .add_(lowest)
            .masked_fill_(codes == 0, -torch.inf)
        )
        return kl_of_logs(torch.log_softmax(log_p, dim=-1), log_q)


@dataclass(frozen=True, slots=True)
class Top:
    """The ``k`` most likely tokens, and the mass of the rest."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"--cache-form top-{self.k} keeps nothing; give top-1 or more")

    @property
    def name(self) -> str:
        return f"top-{self.k}"

    def bytes_per_position(self, vocabulary: int) -> int:
        return 8 * min(self.k, vocabulary)

    def encode(self, logits: Tensor) -> dict[str, NDArray[np.generic]]:
        positions, vocabulary = logits.shape
        k = min(self.k, vocabulary)
        ids = np.empty((positions, k), dtype=np.int32)
        log_ps = np.empty((positions, k), dtype=np.float32)
        tail = np.empty(positions, dtype=np.float32)
        for part in position_chunks(positions, vocabulary):
            log_p = torch.log_softmax(logits[part], dim=-1, dtype=torch.float32)
            values, indices = log_p.topk(k, dim=-1)
            log_ps[part], ids[part] = values.cpu().numpy(), indices.cpu().numpy()
            tail[part] = _log_rest(log_p, indices).cpu().numpy()
        return {"ids": ids, "log_p": log_ps, "tail": tail}

    def window(self, arrays: Arrays, vocabulary: int) -> StoredWindow:
        return _TopWindow(arrays, vocabulary)


class _TopWindow(StoredWindow):
    def kl(self, part: slice, log_q: Tensor) -> Tensor:
        device = log_q.device
        ids = _tensor(self.arrays["ids"][part].astype(np.int64), device)
        log_p = _tensor(self.arrays["log_p"][part], device)
        tail = _tensor(self.arrays["tail"][part], device)
        log_p = torch.cat([log_p, tail.unsqueeze(1)], dim=1)
        return kl_of_logs(
            log_p, torch.cat([log_q.gather(1, ids), _log_rest(log_q, ids).unsqueeze(1)], dim=1)
        )


def _log_rest(log_p: Tensor, ids: Tensor) -> Tensor:
    """Log of the mass outside ``ids`` ``[positions, k]``; summed over the rest, since 1 minus the
    head would cancel."""
    return log_p.scatter(1, ids, -torch.inf).logsumexp(dim=-1)


def _tensor(array: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def parse_form(text: str) -> Form:
    """``full-16`` or ``top-K``.

    Raises:
        UsageError: another name.
    """
    if text == "full-16":
        return Full16()
    match = re.fullmatch(r"top-([0-9]+)", text)
    if match is None:
        raise UsageError(f"--cache-form {text} is not known; give full-16 or top-K")
    return Top(int(match.group(1)))
