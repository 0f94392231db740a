"""From a text to one stream of token ids, and the guard that two models read the same stream.

The text is tokenized once, whole, as the tokenizer does by default: at most one BOS, at the very
start. Perplexities and divergences of models that cut the text differently cannot be compared token
by token, so a tokenizer that gives other ids is refused rather than averaged over.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from llmquant.errors import SourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex sha256 over the vocabulary (token → id, added tokens included), whatever file it came
    from."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


def encode(tokenizer: Any, text: str, source: str, *, specials: bool = True) -> Tensor:
    """int64 ``[tokens]``: the whole text tokenized once, with the tokenizer's default special
    tokens or with none.

    Raises:
        SourceError: the text is empty or only white space.
    """
    import torch

    if not text.strip():
        raise SourceError(f"{source} has no text in it; give a source with some")
    # verbose=False: the stream is longer than the model's context on purpose; windows are cut from
    # it.
    options = {} if specials else {"add_special_tokens": False}
    ids: Tensor = torch.tensor(
        tokenizer(text, verbose=False, **options)["input_ids"], dtype=torch.int64
    )
    return ids


def check_same_tokens(expected: Tensor, got: Tensor, first: str, second: str) -> None:
    """Refuse to compare two models whose tokenizers cut the text differently.

    Raises:
        UsageError: naming both models and the first position that differs.
    """
    import torch

    if torch.equal(expected, got):
        return
    shared = min(len(expected), len(got))
    differs = (expected[:shared] != got[:shared]).nonzero()
    where = int(differs[0]) if len(differs) else shared
    raise UsageError(
        f"{second} does not tokenize the text as {first} does: {len(got)} tokens against {len(expected)}, "
        f"first different at position {where}; evaluate models of different tokenizers in separate runs"
    )
