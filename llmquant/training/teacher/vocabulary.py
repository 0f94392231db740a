"""Whether two models speak of the same tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmquant.drift.observation import tokenizer_fingerprint
from llmquant.errors import UsageError
from llmquant.models.from_folder import load_tokenizer, read_config


def same_vocabulary(start: Path, teacher: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """The size of both models' vocabularies.

    Raises:
        UsageError: they differ, or their tokenizers do.
    """
    sizes = [int(read_config(p).get_text_config().vocab_size) for p in (start, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"the reference {teacher} has {sizes[1]:,} tokens and {start} {sizes[0]:,}: their logits cannot be compared; "
            "give the model that it was quantized from"
        )
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(teacher)):
        raise UsageError(
            f"the reference {teacher} has another tokenizer than {start}: the same token means another text; "
            "give the model that it was quantized from"
        )
    return sizes[0]
