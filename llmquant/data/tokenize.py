"""Texts and chats to token ids, with each special token once.

A plain text is tokenized as the tokenizer does by default, so a BOS stands where it puts one. A
chat is written by the tokenizer's chat template, which places the special tokens itself, and is
then tokenized without adding any: the BOS is never doubled.

Rows are tokenized in batches of a few megabytes; a single row cannot be divided without changing
its tokens, and costs the tokenizer about 180 bytes of memory a character. A corpus of 100 MB
belongs in ``jsonl:``, not in one ``file:``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmquant.data.sources import Documents, is_empty
from llmquant.data.template import NotRenderedError, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids: TypeAlias = NDArray[np.int64]
_BATCH_CHARS = (
    1 << 22
)  # text given to the tokenizer at once: bounds its memory, and fills its threads


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Ids ``[tokens]`` of one text, tokenized once as the tokenizer does by default, however long
    it is."""
    # verbose=False: a text longer than the model's context is the point here, not a reason to warn.
    return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)


def tokenize(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    dropped: Counter[str],
    *,
    specials: bool = True,
    incomplete: Counter[str] | None = None,
) -> Iterator[Ids]:
    """Token ids of every row that has any, in order; the others are added to ``dropped`` by reason.

    ``specials=False`` leaves out what the tokenizer adds around a plain text. ``incomplete`` counts
    the chats of which a template leaves out a part.

    Raises:
        SourceError: a chat, and the tokenizer has no chat template.
    """
    batch: list[tuple[str, bool]] = []
    size = 0
    for row in documents.rows:
        if is_empty(row):
            dropped["empty"] += 1
            continue
        try:
            text = (
                row
                if isinstance(row, str)
                else render(row, tokenizer, documents.source, incomplete)
            )
        except NotRenderedError as e:
            dropped[str(e)] += 1
            continue
        batch.append((text, specials and isinstance(row, str)))
        size += len(text)
        if size >= _BATCH_CHARS:
            yield from _encode(batch, tokenizer, dropped)
            batch, size = [], 0
    yield from _encode(batch, tokenizer, dropped)


def _encode(
    batch: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, dropped: Counter[str]
) -> Iterator[Ids]:
    """Tokenize texts, each with or without special tokens, keeping their order."""
    encoded: dict[int, list[int]] = {}
    for specials in (False, True):
        places = [i for i, (_, wanted) in enumerate(batch) if wanted is specials]
        if places:
            # verbose=False: texts longer than the model's context are the point here, not a reason
            # to warn.
            out = tokenizer(
                [batch[i][0] for i in places], add_special_tokens=specials, verbose=False
            )
            encoded |= dict(zip(places, out["input_ids"], strict=True))
    for i in range(len(batch)):
        if encoded[i]:
            yield np.asarray(encoded[i], dtype=np.int64)
        else:
            dropped["no tokens"] += 1
