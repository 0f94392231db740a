"""One pass over the windows that scores a reference and any number of candidates.

For each batch the reference runs once, its logits stay for the batch, and every candidate's are
compared with them while they exist; nothing of vocabulary size outlives the batch. A reference
cached on disk takes the place of the live one window by window. Models are anything callable as
``model(input_ids=[batch, tokens], use_cache=False).logits``: what llmquant.load or transformers
returns.

Memory at the peak: the models, and for reference and one candidate ``batch · window · vocabulary``
logits in the model's dtype, besides float32 chunks of fixed size.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmquant.errors import UsageError
from llmquant_eval.models.kept_work import KeptWork
from llmquant_eval.report.statistics import Floats
from llmquant_eval.scoring.batches import (
    Batch,
    batches,
    bytes_per_row,
    logits_of,
    switch_of,
    targets_of,
)
from llmquant_eval.scoring.divergence import Divergence, LiveWindow, ReferenceWindow
from llmquant_eval.scoring.perplexity import Perplexity, check_finite, token_nll
from llmquant_eval.scoring.token_stream import TokenStream
from llmquant_eval.scoring.window_layout import WindowLayout

if TYPE_CHECKING:
    from llmquant_eval.scoring.reference_cache import CachedReference, CacheWriter

Advance = Callable[[int, int], None]
"""Called with (windows done, windows in all) after each batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one model scored. ``divergence`` is None for the reference and where there is none;
    ``cache_errors`` are compact minus exact KL ``[positions]`` where the reference was a cached
    one, kept in ``cache_form``."""

    perplexity: Perplexity
    divergence: Divergence | None = None
    cache_errors: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    cache_form: str | None = None


class _Columns:
    """Per-token values of one model, flat in float64, filled window by window."""

    def __init__(self, layout: WindowLayout, compared: bool) -> None:
        self.layout, self.slices = layout, layout.slices()
        self.losses: Floats = np.empty(layout.tokens)
        n = layout.tokens
        self.compared = (np.empty(n), np.empty(n), np.empty(n), np.empty(n)) if compared else None
        self.cache_errors: list[NDArray[np.float64]] = []

    def add(
        self, window: int, logits: Tensor, targets: Tensor, reference: ReferenceWindow | None
    ) -> None:
        """Score window number ``window``; logits ``[predictions, vocabulary]`` in the stream's
        order."""
        where = self.slices[window]
        self.losses[where] = token_nll(logits, targets).cpu().numpy()
        if self.compared is not None and reference is not None:
            divergence = reference.divergence(logits, targets)
            values = (divergence.kl, divergence.same_top, divergence.delta_p, divergence.confidence)
            for column, value in zip(self.compared, values, strict=True):
                column[where] = value.cpu().numpy()

    def written(self, numbers: Sequence[int]) -> list[list[str]]:
        """The values of a batch just added, as text: of each window its columns in base64."""
        errors = self.cache_errors[-len(numbers) :] if self.cache_errors else []
        columns = (self.losses, *(self.compared or ()))
        arrays = [[column[self.slices[i]] for column in columns] for i in numbers]
        for window, error in zip(arrays, errors, strict=False):
            window.append(error)
        return [[b64encode(a.tobytes()).decode() for a in window] for window in arrays]

    def restore(self, numbers: Sequence[int], written: Sequence[Sequence[str]]) -> None:
        """Take back what :meth:`written` gave."""
        columns = (self.losses, *(self.compared or ()))
        for i, window in zip(numbers, written, strict=True):
            arrays = [np.frombuffer(b64decode(text)) for text in window]
            for column, array in zip(columns, arrays, strict=False):
                column[self.slices[i]] = array
            self.cache_errors += arrays[len(columns) :]

    def scores(self, label: str, cache_form: str | None) -> Scores:
        divergence = (
            None
            if self.compared is None
            else Divergence(*self.compared, layout=self.layout, label=label)
        )
        errors = np.concatenate(self.cache_errors) if self.cache_errors else np.empty(0)
        return Scores(Perplexity(self.losses, self.layout, label), divergence, errors, cache_form)


def score_models(
    models: Mapping[str, Any],
    stream: TokenStream,
    *,
    reference: str | None = None,
    cached: CachedReference | None = None,
    batch_size: int | None = None,
    advance: Advance | None = None,
    kept: KeptWork | None = None,
) -> dict[str, Scores]:
    """Score every model on the same windows.

    Args:
        models: label → model, in evaluation mode; the reference among them unless it is ``cached``.
            At least one.
        reference: label of the model that the others are compared with, or None for perplexity
            alone.
        cached: the reference from disk.
        batch_size: windows fed at a time.
        advance: progress callback.
        kept: where each batch's values are kept, and where those of an unfinished run of the same
            models are found.

    Raises:
        UsageError: a batch size below 1, or models with vocabularies of different sizes.
        QuantizationError: a model's losses are NaN or infinite.
        CheckpointError: the cache is damaged.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"--batch-size {batch_size} is too small; give 1 or more")
    layout = stream.layout
    compared = reference is not None or cached is not None
    columns = {m: _Columns(layout, compared and m != reference) for m in models}
    order = sorted(
        models, key=lambda m: m != reference
    )  # the reference first; the sort keeps the rest as given
    logit_bytes = max(map(bytes_per_row, models.values()))
    done = 0
    with torch.inference_mode():
        for batch in batches(stream, batch_size, logit_bytes, switch_of(*models.values())):
            what = ("windows", order, stream.protocol.perplexity_id, list(batch.numbers))
            found = None if kept is None else kept.get(*what)
            if found is None:
                _score_batch(models, order, columns, stream, batch, reference, cached)
                if kept is not None:
                    kept.add({m: columns[m].written(batch.numbers) for m in order}, *what)
            else:
                for label in order:
                    columns[label].restore(batch.numbers, found[label])
            done += len(batch.numbers)
            if advance is not None:
                advance(done, len(stream.windows))
    return {
        label: columns[label].scores(label, None if cached is None else cached.form)
        for label in models
    }


def _score_batch(
    models: Mapping[str, Any],
    order: Sequence[str],
    columns: Mapping[str, _Columns],
    stream: TokenStream,
    batch: Batch,
    reference: str | None,
    cached: CachedReference | None,
) -> None:
    base: list[ReferenceWindow] | None = (
        [cached.window(i) for i in batch.numbers] if cached is not None else None
    )
    for label in order:
        rows = logits_of(models[label], batch)
        if label == reference:
            base = [LiveWindow(row) for row in rows]
        if base is not None and base[0].vocabulary != rows[0].shape[-1]:
            raise UsageError(
                f"{label} has a vocabulary of {rows[0].shape[-1]} and {reference or 'the reference'} of "
                f"{base[0].vocabulary}; KL needs the same vocabulary; evaluate {label} without --reference"
            )
        own = columns[label]
        for i, (number, window, logits) in enumerate(
            zip(batch.numbers, batch.windows, rows, strict=True)
        ):
            targets = targets_of(stream, window, logits.device)
            own.add(number, logits, targets, None if base is None else base[i])
            if cached is not None:
                own.cache_errors.append(cached.errors(number, logits, targets))
        check_finite(
            np.concatenate([own.losses[own.slices[i]] for i in batch.numbers]), label, batch.numbers
        )


def record_reference(
    model: Any,
    stream: TokenStream,
    writer: CacheWriter,
    batch_size: int | None,
    advance: Advance | None,
    label: str,
) -> None:
    """Run the reference alone over the windows and give its distributions to a cache.

    Raises:
        QuantizationError: its logits are NaN or infinite.
    """
    done = 0
    with torch.inference_mode():
        for batch in batches(stream, batch_size, bytes_per_row(model), switch_of(model)):
            missing = [i for i in batch.numbers if i not in writer.there]
            for number, window, logits in zip(
                batch.numbers,
                batch.windows,
                logits_of(model, batch) if missing else (),
                strict=bool(missing),
            ):
                if number not in missing:
                    continue
                targets = targets_of(stream, window, logits.device)
                check_finite(
                    token_nll(logits, targets).cpu().numpy().astype(np.float64), label, [number]
                )
                writer.add(number, logits, targets)
            done += len(batch.numbers)
            if advance is not None:
                advance(done, len(stream.windows))


def cached_scores(cached: CachedReference, stream: TokenStream, label: str) -> Scores:
    """The reference's own scores from its cache; it is not run."""
    losses = np.concatenate([cached.window(i).losses for i in range(len(stream.windows))])
    return Scores(Perplexity(losses, stream.layout, label))
