"""One pass over the windows that scores a reference and any number of candidates.

For each batch the reference runs once, its logits stay for the batch, and every candidate's are compared with them
while they exist; nothing of vocabulary size outlives the batch. Models are anything callable as
``model(input_ids=[batch, tokens], use_cache=False).logits``: what llmquant.load or transformers returns.

Windows of one batch are equally long, so there is no padding and no mask, and the batch size changes nothing beyond
the rounding of a GEMM of another height. Memory at the peak: the models, and for reference and one candidate
``batch · window · vocabulary`` logits in the model's dtype, besides float32 chunks of fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant_eval.divergence import Divergence, token_divergence
from llmquant_eval.perplexity import Perplexity, check_finite, token_nll
from llmquant_eval.protocols import Window
from llmquant_eval.statistics import Floats

# Tokens fed at a time when no batch size is given: enough rows for an efficient GEMM, one window of the usual length.
TOKENS_PER_BATCH = 2048

Advance = Callable[[int, int], None]
"""Called with (windows done, windows in all) after each batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scored; ``divergence`` is None for the reference and where there is none."""

    perplexity: Perplexity
    divergence: Divergence | None


class _Columns:
    """Per-token values of one model, ``[windows, predictions]`` in float64, filled row by row."""

    def __init__(self, windows: int, predictions: int, compared: bool) -> None:
        self.losses: Floats = np.empty((windows, predictions))
        shape = (windows, predictions)
        self.compared = (np.empty(shape), np.empty(shape), np.empty(shape)) if compared else None

    def add(self, row: int, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """Score window ``row``; logits ``[predictions, vocabulary]``, the reference's likewise."""
        self.losses[row] = token_nll(logits, targets).cpu().numpy()
        if self.compared is not None and reference is not None:
            found = token_divergence(reference, logits, targets)
            for column, values in zip(self.compared, (found.kl, found.same_top, found.delta_p), strict=True):
                column[row] = values.cpu().numpy()

    def scores(self, label: str) -> Scores:
        divergence = None if self.compared is None else Divergence(*self.compared, label=label)
        return Scores(Perplexity(self.losses, label), divergence)


def _batches(windows: Sequence[Window], size: int) -> Iterator[tuple[int, Sequence[Window]]]:
    for start in range(0, len(windows), size):
        yield start, windows[start : start + size]


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


def score(
    models: Mapping[str, Any],
    ids: Tensor,
    windows: Sequence[Window],
    *,
    reference: str | None = None,
    batch_size: int | None = None,
    advance: Advance | None = None,
) -> dict[str, Scores]:
    """Score every model on the same windows.

    Args:
        models: label → model, in evaluation mode; the reference among them.
        ids: int64 ``[tokens]``, the stream that the windows cut.
        windows: equally long, at least one.
        reference: label of the model that the others are compared with, or None for perplexity alone.
        batch_size: windows fed at a time; None takes about :data:`TOKENS_PER_BATCH` tokens.
        advance: progress callback.

    Raises:
        UsageError: a batch size below 1, or models with vocabularies of different sizes.
        QuantizationError: a model's losses are NaN or infinite.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} feeds nothing; give 1 or more")
    length = windows[0].end - windows[0].begin
    size = batch_size or max(1, TOKENS_PER_BATCH // length)
    predictions = windows[0].end - windows[0].scored
    columns = {m: _Columns(len(windows), predictions, reference is not None and m != reference) for m in models}
    order = sorted(models, key=lambda m: m != reference)  # the reference first; the sort keeps the rest as given
    with torch.inference_mode():
        for start, batch in _batches(windows, size):
            rows = torch.stack([ids[w.begin : w.end] for w in batch])
            base: Tensor | None = None
            for label in order:
                logits = _logits(models[label], rows)
                if label == reference:
                    base = logits
                if base is not None and base.shape != logits.shape:
                    raise UsageError(
                        f"{label} has a vocabulary of {logits.shape[-1]} and {reference} of {base.shape[-1]}; "
                        "a divergence needs the same one"
                    )
                _add_batch(columns[label], start, batch, rows, logits, base)
                check_finite(columns[label].losses[start : start + len(batch)], label, start)
            if advance is not None:
                advance(start + len(batch), len(windows))
    return {label: columns[label].scores(label) for label in models}


def _add_batch(
    columns: _Columns, start: int, batch: Sequence[Window], rows: Tensor, logits: Tensor, base: Tensor | None
) -> None:
    """Row by row, because a row's scored logits are a view and the whole batch's would be a copy."""
    base = None if base is None else base.to(logits.device)
    for i, window in enumerate(batch):
        scored = slice(window.scored - window.begin - 1, window.end - window.begin - 1)
        targets = rows[i, window.scored - window.begin :].to(logits.device)
        columns.add(start + i, logits[i, scored], targets, None if base is None else base[i, scored])
