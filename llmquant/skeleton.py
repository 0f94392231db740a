"""The empty model: transformers' modules with every parameter on the meta device, from config.json alone.

Computed buffers (rotary tables) are real. No weight is read, no code from the folder is run, and transformers' own
quantizers are kept out: a ``quantization_config`` is removed from the config object before the model is built.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmquant.checkpoint import CheckpointReader
from llmquant.errors import ArchitectureError


def read_config(path: Path) -> PreTrainedConfig:
    """The folder's config as transformers understands it.

    Raises:
        ArchitectureError: an unknown model type or impossible values.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, OSError) as e:
        raise ArchitectureError(f"transformers cannot read {path / 'config.json'}: {str(e).splitlines()[0]}") from e
    return config


def empty_model(reader: CheckpointReader, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model that the folder's config describes, without weights.

    Raises:
        ArchitectureError: not a causal language model that transformers knows.
    """
    config = read_config(reader.path)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as e:
        raise ArchitectureError(f"{reader.path} is not a causal language model: {str(e).splitlines()[0]}") from e
    model.config._name_or_path = str(reader.path)
    model.eval()
    return model
