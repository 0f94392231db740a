"""What is read of a model folder apart from its weights: config, generation config and tokenizer.

Local files only, and no code from the folder is ever run.
"""

from __future__ import annotations

import os
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmquant.errors import CheckpointError


def read_config(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"the config of {path} cannot be read: {e}") from e
    return config


def read_generation_config(path: str | os.PathLike[str]) -> GenerationConfig | None:
    """The generation config of a folder; None where it has none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not (Path(path) / "generation_config.json").is_file():
        return None
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(
            Path(path), local_files_only=True
        )
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"the generation config of {path} cannot be read: {e}") from e
    return config


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            Path(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError) as e:
        raise CheckpointError(
            f"the tokenizer of {path} cannot be read: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from e
    return tokenizer
