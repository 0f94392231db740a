"""The windows of a text in batches, as models are fed them.

Windows are fed longest first, so that those of a batch are nearly equally long; what is missing is
padded on the right, where a causal model cannot see it; and where a long window would change the
positions of short ones (:func:`llmquant.longrope_switch`), they share no batch. The batch size
therefore changes nothing beyond the rounding of a GEMM of another height.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import llmquant
from llmquant_eval.scoring.protocols import TokenWindow
from llmquant_eval.scoring.token_stream import TokenStream

# Tokens fed at a time when no batch size is given. Packed linears dequantize their weight at every
# call: with 4096 rows that makes an evaluation 1.15 to 1.26 times as long as the dense model's
# (bench/results/eval_cost.json).
TOKENS_PER_BATCH = 4096
# Logits of one model and batch stay below this, whatever the vocabulary; one window is fed in any
# case.
LOGIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Windows by number, and their tokens to feed, int64 ``[windows, longest fed]``, padded with 0
    on the right."""

    numbers: Sequence[int]
    windows: Sequence[TokenWindow]
    fed: Tensor


def batches(
    stream: TokenStream, batch_size: int | None, logit_bytes: int, switch: int | None = None
) -> Iterator[Batch]:
    """All windows, longest first; none of more than ``switch`` tokens beside one of fewer.

    ``batch_size`` None takes :data:`TOKENS_PER_BATCH` tokens, fewer where ``logit_bytes`` per token
    are many.
    """
    order = sorted(range(len(stream.windows)), key=lambda i: -stream.windows[i].fed)
    tokens = min(TOKENS_PER_BATCH, LOGIT_BYTES // logit_bytes)
    start = 0
    while start < len(order):
        longest = stream.windows[order[start]].fed
        # + 1: the protocols' lengths count the target that is not fed, and 4096 tokens are meant to
        # be 8 windows of 512.
        size = batch_size or max(1, tokens // (longest + 1))
        numbers = order[start : start + size]
        if switch is not None and longest > switch:
            numbers = [i for i in numbers if stream.windows[i].fed > switch]
        windows = [stream.windows[i] for i in numbers]
        fed = torch.zeros(len(windows), longest, dtype=torch.int64)
        for row, window in zip(fed, windows, strict=True):
            row[: window.fed] = stream.ids[window.begin : window.end - 1]
        yield Batch(numbers, windows, fed)
        start += len(numbers)


def switch_of(*models: Any) -> int | None:
    """The fewest tokens behind which one of the models turns all positions of a pass."""
    configs = (c for model in models if (c := getattr(model, "config", None)) is not None)
    switches = map(llmquant.longrope_switch, configs)
    return min((s for s in switches if s is not None), default=None)


def logits_of(model: Any, batch: Batch) -> list[Tensor]:
    """Per window of the batch, the logits ``[predictions, vocabulary]`` that its scored tokens are
    predicted by."""
    logits: Tensor = model(input_ids=batch.fed.to(model.device), use_cache=False).logits
    return [
        row[w.fed - w.predictions : w.fed] for row, w in zip(logits, batch.windows, strict=True)
    ]


def targets_of(stream: TokenStream, window: TokenWindow, device: torch.device) -> Tensor:
    """int64 ``[predictions]``: the tokens of a window that are scored."""
    return stream.ids[window.scored : window.end].to(device)


def bytes_per_row(model: Any) -> int:
    """Bytes of the logits of one token, as the model's config has them; what limits a batch."""
    config = getattr(model, "config", None)
    vocabulary = 1 if config is None else int(config.get_text_config().vocab_size)
    itemsize: int = getattr(model, "dtype", torch.float32).itemsize
    return vocabulary * itemsize
