"""What a folder says of its quantization, wherever its tool has put it, held against its tensors.

``quantization_of`` is the one door. The label is config.json's ``quantization_config``, its older
name ``compression_config``, that of a multimodal config's text part, or the file beside config.json
that GPTQ and AWQ tools write (``quantize_config.json``, ``quant_config.json``), which counts only
where there are packed tensors for it to describe. An empty label says nothing. A label over plain
floating-point tensors (left over by a tool that dequantized) and packed tensors without a label are
refused here, for every command alike. Weights in FP8 or MXFP4 are no layout of codes: whoever can
read them as numbers does so before (:mod:`llmquant.checkpoint.sources.floats`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import CheckpointReader, TensorInfo, read_json
from llmquant.checkpoint.sources.floats import (
    as_floats,
    refuse_label,
    refuse_mixture,
    small_floats,
)
from llmquant.checkpoint.sources.label import labels, without_label
from llmquant.checkpoint.weights.files import CHOSEN, SINGLE
from llmquant.errors import CheckpointError, FormatError, UsageError

_SIDE_FILES = ("quantize_config.json", "quant_config.json")
# The last parts of names that only quantized modules have.
_PARTS = frozenset(
    {
        *("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv"),
        *("weight_zero_point", "weight_g_idx", "SCB", "absmax", "quant_map", "W_q"),
    }
)
_BYTES = (torch.int8, torch.uint8)


def unquantized(model: str | os.PathLike[str]) -> CheckpointReader:
    """A folder's or hub model's checkpoint; raises UsageError if it is quantized."""
    reader = as_floats(CheckpointReader(resolve(model)))
    config = quantization_of(reader)
    if config is not None:
        raise UsageError(
            f"{reader.path} is already quantized ({config.get('quant_method')}); give the original FP16 or BF16 model"
        )
    return reader


def quantization_of(reader: CheckpointReader) -> dict[str, Any] | None:
    """The folder's quantization, with ``quant_method`` filled in, or None for an unquantized model.

    Raises:
        UsageError: it is in FP8 or MXFP4, and was not read as numbers.
        FormatError: something that is no mapping, or a label that says more than what the weights
            are.
        CheckpointError: a side file that is no JSON; packed tensors without a label or a label
            without packed tensors; an unquantized model in a file that transformers does not look
            for.
    """
    kind = small_floats(reader)
    if kind is not None:
        refuse_mixture(reader)
        raise UsageError(
            f"{reader.path} has {kind.upper()} weights, which are numbers with scales and no layout to convert; llmquant "
            "quantize reads them as a model to quantize"
        )
    label = quantization_config(reader)
    if label is not None:
        refuse_label(reader, label)
    if label is not None and any(_packed(n, i, True) for n, i in reader.tensors.items()):
        return label
    if label is not None and not _says_nothing(label):
        raise CheckpointError(
            f"{reader.path}: config.json announces {label['quant_method']} weights but no tensor is packed; "
            "if the weights are unquantized, remove quantization_config from config.json"
        )
    packed = next((n for n, i in reader.tensors.items() if _packed(n, i, False)), None)
    if packed is not None:
        raise CheckpointError(
            f"{reader.path} has tensors of a quantization ({packed}) and no quantization_config that says which; "
            "take config.json from where the weights came from"
        )
    if reader.unnamed:
        file = reader.files()[0].name
        raise CheckpointError(
            f"{reader.path} has its weights in {file}, which transformers does not read; rename it to {SINGLE}"
        )
    return None


def _says_nothing(label: Mapping[str, Any]) -> bool:
    """Whether a label announces no weights: compressed-tensors' without groups, as for a KV cache
    alone."""
    return label["quant_method"] == "compressed-tensors" and not label.get("config_groups")


def _packed(name: str, info: TensorInfo, labelled: bool) -> bool:
    """Whether a tensor is part of a quantized module; where a label announces some, any bytes
    are."""
    if name.rpartition(".")[2] in _PARTS or ".quant_state." in name:
        return True
    return info.dtype in _BYTES and (labelled or name.endswith(".weight"))


def quantization_config(reader: CheckpointReader) -> dict[str, Any] | None:
    """The label alone, whatever the tensors say.

    Raises:
        FormatError: something that is no mapping.
        CheckpointError: a side file that is no JSON.
    """
    check_label(reader.path / "config.json", reader.config)
    for _, found in labels(reader.config):
        return _with_method(found, reader.path / "config.json")
    if any(n.endswith(".qweight") for n in reader.tensors):
        for name in _SIDE_FILES:
            if (reader.path / name).is_file():
                return _with_method(read_json(reader.path / name), reader.path / name)
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as that of an unquantized model with weight files of the usual names, in the same
    order."""
    return {k: v for k, v in without_label(config).items() if k != CHOSEN}


def check_label(file: Path, config: Mapping[str, Any]) -> None:
    """Raises FormatError where a config's quantization is no mapping."""
    for key, found in labels(config):
        if not isinstance(found, dict):
            raise FormatError(f"{file}: {key} is {found!r:.60}, not a mapping")


def _with_method(label: dict[str, Any], file: Path) -> dict[str, Any]:
    method = label.get("quant_method") or _method(label, file)
    if not isinstance(method, str):
        raise FormatError(f"{file}: quant_method is {method!r:.60}, not a name")
    return {**label, "quant_method": method}


def _method(config: Mapping[str, Any], file: Path) -> str:
    """Tools older than ``quant_method`` are told apart by the keys that only they write."""
    if "config_groups" in config:
        return "compressed-tensors"
    if "zero_point" in config or "q_group_size" in config:
        return "awq"
    if "desc_act" in config:
        return "gptq"
    raise FormatError(
        f"{file}: a quantization config without quant_method (its keys: {', '.join(sorted(config))}) cannot be read"
    )
