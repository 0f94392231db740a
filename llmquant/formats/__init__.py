"""Byte layouts by name. ``for_config`` finds the one that a checkpoint's ``quantization_config`` announces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.errors import FormatError
from llmquant.formats.base import Format, Scheme
from llmquant.formats.compressed_tensors import CompressedTensors

FORMATS: dict[str, Format] = {f.name: f for f in (CompressedTensors(),)}

_BY_QUANT_METHOD = {"compressed-tensors": "compressed-tensors"}


def for_config(quantization_config: Mapping[str, Any]) -> Format:
    """The format announced by a ``quantization_config``.

    Raises:
        FormatError: for a ``quant_method`` that llmquant does not read.
    """
    method = quantization_config.get("quant_method")
    if method not in _BY_QUANT_METHOD:
        raise FormatError(
            f"quant_method {method!r} is not one llmquant reads; it reads {', '.join(sorted(_BY_QUANT_METHOD))}"
        )
    return FORMATS[_BY_QUANT_METHOD[method]]


__all__ = ["FORMATS", "Format", "Scheme", "for_config"]
