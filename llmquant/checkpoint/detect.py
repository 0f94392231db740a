"""What a folder says of its quantization, wherever its tool has put it.

``quantization_config`` is the one door: config.json's key of that name, its older name
``compression_config``, the text part of a multimodal config, or the file beside config.json that
GPTQ and AWQ tools write (``quantize_config.json``, ``quant_config.json``), which counts only where
there are packed tensors for it to describe.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import CheckpointReader, read_json
from llmquant.errors import FormatError, UsageError

_KEYS = ("quantization_config", "compression_config")
_SIDE_FILES = ("quantize_config.json", "quant_config.json")


def unquantized(model: str | os.PathLike[str]) -> CheckpointReader:
    """A folder's or hub model's checkpoint; raises UsageError if it is quantized."""
    reader = CheckpointReader(resolve(model))
    config = quantization_config(reader)
    if config is not None:
        raise UsageError(
            f"{reader.path} is already quantized ({config.get('quant_method')}); give the original FP16 or BF16 model"
        )
    return reader


def quantization_config(reader: CheckpointReader) -> dict[str, Any] | None:
    """The folder's quantization, with ``quant_method`` filled in, or None for an unquantized model.

    Raises:
        FormatError: something that is no mapping.
        CheckpointError: a side file that is no JSON.
    """
    text = reader.config.get("text_config")
    for place in (reader.config, text if isinstance(text, dict) else {}):
        for key in _KEYS:
            found = place.get(key)
            if found:
                if not isinstance(found, dict):
                    raise FormatError(
                        f"{reader.path / 'config.json'}: {key} is {type(found).__name__}, not a mapping"
                    )
                return (
                    found if "quant_method" in found else {**found, "quant_method": _method(found)}
                )
    if any(n.endswith(".qweight") for n in reader.tensors):
        for name in _SIDE_FILES:
            if (reader.path / name).is_file():
                found = read_json(reader.path / name)
                return {**found, "quant_method": found.get("quant_method") or _method(found)}
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as that of an unquantized model, in the same order."""
    plain = {k: v for k, v in config.items() if k not in _KEYS}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {k: v for k, v in plain["text_config"].items() if k not in _KEYS}
    return plain


def _method(config: Mapping[str, Any]) -> str:
    """Tools older than ``quant_method`` are told apart by the keys that only they write."""
    if "config_groups" in config:
        return "compressed-tensors"
    if "zero_point" in config or "q_group_size" in config:
        return "awq"
    if "desc_act" in config:
        return "gptq"
    raise FormatError(
        f"a quantization config without quant_method (its keys: {', '.join(sorted(config))}) cannot be read"
    )
