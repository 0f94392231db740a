"""TurnBatcher: one token for each sequence in turn, for models whose layers keep more than keys and
values.

Keys and values of several sequences fit side by side into one cache; the states of linear
attention, Mamba and short convolutions, and indices over tokens, do not, as transformers keeps
them. So each sequence keeps the cache in which its prompt was read. A prompt is read in one pass,
as ``model.generate`` reads it: some models (Jamba, in transformers 5.23) forget their state where
several tokens follow one.

Models with "longrope" (Phi-3's 128k) take turns as well, where the context reaches beyond the
length that they were first trained on. Behind that length transformers turns *all* positions of a
pass by other frequencies, so short and long sequences fit into no common pass, and the keys of a
sequence that crosses it are no longer those of its frequencies. They are computed anew then, as
``model.generate`` does for Phi-3.

Whether a model can do without is tried before it is trusted, as some take a token's position from
the cache that is common to all rows (TrOCR).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from llmquant_serve.engines.batching.batcher import Batcher, logits_of, next_logits
from llmquant_serve.engines.batching.row_cache import RowCache
from llmquant_serve.engines.jobs.job import Job

_TRIED = (6, 2)  # tokens of a prompt, and one by one behind it
_BESIDE = (6, 3)  # tokens of two sequences side by side
# In shares of the largest logit: more than a few activations that are rounded to the other of two
# integers make of it, and far less than a wrong position or mask does.
_OTHER = 2**-5
_FAILS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class OwnCaches:
    """Each row's cache; what :class:`~llmquant_serve.engines.batching.row_cache.RowCache` is for
    rows together."""

    def __init__(self) -> None:
        self.caches: list[Cache] = []
        self.lengths: list[int] = []

    def join(self, prefilled: Cache, length: int) -> None:
        """Take over the cache of a sequence of ``length`` tokens, as the last row."""
        self.caches.append(prefilled)
        self.lengths.append(length)

    def leave(self, row: int) -> None:
        """Forget a row; the last row takes its place (and its number)."""
        for kept in (self.caches, self.lengths):
            kept[row] = kept[-1]  # type: ignore[assignment]
            kept.pop()


class TurnBatcher(Batcher):
    """A :class:`Batcher` whose rows are decoded in turn.

    Args:
        switch: tokens behind which all of a sequence's keys become others; None: never.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int, switch: int | None = None) -> None:
        super().__init__(model, max_rows)
        self._switch = switch

    def _take(self, job: Job) -> None:
        job.cache = DynamicCache(config=self._model.config)
        self._prefilling.append(job)

    def _chunk(self, job: Job, budget: int) -> int:
        return len(job.prompt)

    def _new_cache(self) -> OwnCaches:
        return OwnCaches()

    def _step(self) -> Tensor:
        own = self._cache
        assert isinstance(own, OwnCaches)
        logits = []
        for row, (job, length) in enumerate(zip(self._rows, own.lengths, strict=True)):
            ids, before = [job.last], length
            if length == self._switch:
                ids, before = [*job.prompt, *job.answer], 0
                own.caches[row] = DynamicCache(config=self._model.config)
            logits.append(logits_of(self._model, ids, own.caches[row], before, keep=1)[-1])
        own.lengths = [n + 1 for n in own.lengths]
        return torch.stack(logits).float()


@torch.inference_mode()
def apart(model: PreTrainedModel) -> str | None:
    """Why sequences of several lengths cannot be decoded side by side; None where they can.

    A token is put through the model behind each of two sequences, once side by side and once alone.
    """
    text = model.config.get_text_config()
    ids = [i % text.vocab_size for i in range(1, max(_BESIDE) + 2)]
    try:
        alone = torch.stack(
            [
                logits_of(model, ids[: n + 1], Cache(layer_class_to_replicate=DynamicLayer), 0)[-1]
                for n in _BESIDE
            ]
        )
        rows = RowCache(text.num_hidden_layers, len(_BESIDE))
        for n in _BESIDE:
            prefilled = Cache(layer_class_to_replicate=DynamicLayer)
            logits_of(model, ids[:n], prefilled, 0)
            rows.join(prefilled, n)
        beside = next_logits(model, [ids[n] for n in _BESIDE], rows)
    except _FAILS as e:
        return f"transformers fails with a cache of several ({str(e).splitlines()[0]})"
    if not float((beside - alone).abs().max()) <= _OTHER * float(alone.abs().max()):
        return "side by side it computes something else than of each sequence alone"
    return None


@torch.inference_mode()
def carries(model: PreTrainedModel) -> str | None:
    """Why a model's states cannot be carried from token to token; None where they can.

    A few tokens are put through it, once together and once as a sequence is served, with another
    sequence between: some models keep states outside of their caches. The two may differ
    by the root of the dtype's rounding, in shares of the largest logit.
    """
    layers = DynamicCache(config=model.config).layers
    if not any(isinstance(layer, DynamicLayer) for layer in layers):
        return "it has no layer of keys and values"
    prompt, more = _TRIED
    ids = [i % model.config.get_text_config().vocab_size for i in range(1, prompt + more + 1)]
    try:
        together = logits_of(model, ids, DynamicCache(config=model.config), 0)
        cache = DynamicCache(config=model.config)
        parts = [logits_of(model, ids[:prompt], cache, 0)]
        logits_of(model, ids[::-1], DynamicCache(config=model.config), 0)
        parts += [logits_of(model, ids[n : n + 1], cache, n) for n in range(prompt, prompt + more)]
    except _FAILS as e:
        return f"transformers fails with a cache of them: {str(e).splitlines()[0]}"
    difference = float((torch.cat(parts) - together).abs().max())
    close = torch.finfo(together.dtype).eps ** 0.5
    if not difference <= close * float(together.abs().max()):
        return "token by token, between those of another sequence, it computes something else than of all tokens together"
    return None
