"""The empty model: transformers' modules with every parameter on the meta device, from config.json
alone.

Computed buffers (rotary tables) are real. No weight is read, no code from the folder is run, and
transformers' own quantizers are kept out: a ``quantization_config`` is removed from the config
object before the model is built.

A config or tokenizer file that makes no sense fails somewhere inside transformers, with whatever
exception the first computation on it happens to raise: ``CONFUSED`` lists what was met, and here
they become errors that name the file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, CheckpointError
from llmquant.models.names import as_in_checkpoint

CONFUSED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing or only a key."""
    said = " ".join(line.strip() for line in str(error).splitlines()[:2]) or "no reason given"
    return (
        said
        if isinstance(error, (OSError, StrictDataclassError, ValueError))
        else f"{said} ({type(error).__name__})"
    )


def read_config(path: Path) -> PreTrainedConfig:
    """The folder's config as transformers understands it.

    Raises:
        ArchitectureError: an unknown model type or impossible values.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except CONFUSED as e:
        raise ArchitectureError(
            f"transformers cannot read {path / 'config.json'}: {first_line(e)}"
        ) from e
    return config


def empty_model(reader: CheckpointReader, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model that the folder's config describes, without weights, its modules
    named as in the folder.

    Raises:
        ArchitectureError: not a causal language model that transformers knows.
    """
    config = read_config(reader.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A reader may have untied the head from the embeddings that the folder's own config ties it to.
    config.tie_word_embeddings = reader.config.get(
        "tie_word_embeddings", config.tie_word_embeddings
    )
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except CONFUSED as e:
        raise ArchitectureError(
            f"{reader.path} is not a causal language model that can be built: {first_line(e)}"
        ) from e
    model.config._name_or_path = str(reader.path)
    as_in_checkpoint(model, str(reader.config.get("model_type")))
    model.eval()
    return model


def read_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.

    Raises:
        CheckpointError: none, or one that cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except Exception as e:
        # The tokenizers library raises bare Exception for a file that is JSON but no tokenizer.
        if type(e) is not Exception and not isinstance(e, CONFUSED):
            raise
        raise CheckpointError(
            f"{path} has no tokenizer that transformers can read: {first_line(e)}"
        ) from e
    return tokenizer
