"""Byte layouts by name. ``for_config`` finds the one that a checkpoint's ``quantization_config``
announces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.activations import Activations
from llmquant.errors import LayoutError, UsageError
from llmquant.formats.autoround import AutoRound
from llmquant.formats.awq import Awq
from llmquant.formats.base import Format, Scheme
from llmquant.formats.compressed_tensors.family import CompressedFamily
from llmquant.formats.compressed_tensors.int_quantized import IntQuantized
from llmquant.formats.gptq import Gptq
from llmquant.formats.gptq_config import checkpoint_format

_WRITABLE: tuple[Format, ...] = (
    CompressedFamily(),
    IntQuantized(),
    Gptq(v2=False),
    Gptq(v2=True),
    Awq(),
)
FORMATS: dict[str, Format] = {f.name: f for f in _WRITABLE}

_READS = ("compressed-tensors", "gptq", "awq", "auto-round")


def layout_of(name: str) -> Format:
    """The format of that name; raises UsageError, naming those that there are."""
    if name not in FORMATS:
        raise UsageError(f"format {name!r} does not exist; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def for_config(quantization_config: Mapping[str, Any]) -> Format:
    """The format announced by a ``quantization_config``.

    Raises:
        FormatError: for a ``quant_method`` or variant of it that llmquant does not read.
    """
    method = quantization_config.get("quant_method")
    match method:
        case "compressed-tensors" | "awq":
            return FORMATS[method]
        case "gptq":
            # A label that is neither is refused by schemes(), which knows why.
            return FORMATS[
                "gptq_v2" if checkpoint_format(quantization_config) == "gptq_v2" else "gptq"
            ]
        case "auto-round" | "auto_round" | "intel/auto-round":
            return AutoRound(quantization_config.get("packing_format"))
    raise LayoutError(
        f"quant_method {method!r} is not one llmquant reads; it reads {', '.join(_READS)}"
    )


__all__ = ["FORMATS", "Activations", "Format", "Scheme", "for_config", "layout_of"]
