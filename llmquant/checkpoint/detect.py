"""What a folder says of its quantization, wherever its tool has put it, and whether that can be
believed.

``quantization_config`` is the one door: config.json's key of that name, its older name
``compression_config``, the text part of a multimodal config, or the file beside config.json that
GPTQ and AWQ tools write (``quantize_config.json``, ``quant_config.json``), which counts only where
there are packed tensors for it to describe.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import CheckpointReader, read_json
from llmquant.errors import FormatError, QuantizationError, UsageError
from llmquant.formats import Format, Scheme
from llmquant.formats.zero_points import check_zero_convention, doubtful, refuse_shifted
from llmquant.weight import QuantizedWeight

_KEYS = ("quantization_config", "compression_config")
_SIDE_FILES = ("quantize_config.json", "quant_config.json")
_SAMPLE = 4  # modules whose zero-points are judged


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


def refuse_shifted_zeros(
    reader: CheckpointReader,
    layout: Format,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme],
    base: CheckpointReader | None = None,
) -> None:
    """Judge the zero-points of a few modules where their convention rests on a label that may lie.

    Args:
        base: the unquantized model, if it is at hand; otherwise magnitudes decide.

    Raises:
        FormatError: they are off by one; says how to correct the label.
    """
    names = doubtful(config, schemes)
    names = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
    if not names:
        return
    weights = {n: _read(reader, layout, n, schemes[n]) for n in names}
    originals = {
        n: base.read(f"{n}.weight") for n in names if base is not None and f"{n}.weight" in base
    }
    neighbours = (
        reader.read(n)
        for n, info in reader.tensors.items()
        if n.endswith(".weight")
        and len(info.shape) == 2
        and "embed" not in n
        and info.dtype != torch.int8
    )
    verdict = check_zero_convention(weights, originals, neighbours)
    try:
        refuse_shifted(verdict, _label(config))
    except FormatError as e:
        raise FormatError(f"{reader.path}: {e}") from e


def _label(config: Mapping[str, Any]) -> str:
    told = (
        f"{k}: {config[k]}"
        for k in ("checkpoint_format", "packing_format", "quant_method")
        if config.get(k)
    )
    return next(told)


def _read(reader: CheckpointReader, layout: Format, name: str, scheme: Scheme) -> QuantizedWeight:
    tensors = {
        s: reader.read(f"{name}.{s}") for s in layout.tensor_suffixes() if f"{name}.{s}" in reader
    }
    try:
        return layout.unpack(tensors, scheme)
    except (FormatError, QuantizationError) as e:
        raise FormatError(f"{reader.path}: {name}: {e}") from e
