"""AutoRound's ``quant_method: auto-round``: GPTQ or AWQ bytes under a third name. Read only.

``packing_format`` says which::

    auto_round:auto_gptq (or :gptq, or nothing)   GPTQ v1, zeros less one
    auto_round, auto_round:gptqmodel              GPTQ v2, zeros as they are
    auto_round:auto_awq (or :awq)                 AWQ GEMM

It never stores a ``g_idx`` order. Exceptions stand in ``extra_config``: exact module names, or
regular expressions that are searched for, each overriding ``bits``, ``group_size`` or ``sym``; 16
bits means unquantized.

The label can lie: release 0.15.1 without calibration ("model-free") writes zeros less one under
``auto_round``. Bytes cannot show it, magnitudes can: :mod:`llmquant.formats.zero_points`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.activations import Activations
from llmquant.errors import FormatError, LayoutError
from llmquant.formats.awq import Awq
from llmquant.formats.base import Plain, Scheme
from llmquant.formats.gptq import Gptq
from llmquant.formats.gptq_config import packed_modules, spec_of
from llmquant.weight import QuantizedWeight

_V1 = ("auto_round:auto_gptq", "auto_round:gptq", "auto")
_V2 = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_REGEX = frozenset("*+?^$()[]{}|\\")


class AutoRound(Plain):
    """The layout that a config's ``packing_format`` names.

    Raises:
        FormatError: a ``packing_format`` that llmquant does not read.
    """

    def __init__(self, packing_format: str | None) -> None:
        label = packing_format or _V1[0]
        if label not in (*_V1, *_V2, *_AWQ):
            raise LayoutError(
                f"packing_format {label!r} is not one llmquant reads; it reads {', '.join((*_V1, *_V2, *_AWQ))}"
            )
        self.inner: Gptq | Awq = Awq() if label in _AWQ else Gptq(v2=label in _V2)
        self.name = f"auto-round ({self.inner.name})"

    def tensor_suffixes(self) -> frozenset[str]:
        return self.inner.tensor_suffixes()

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return f"auto-round is AutoRound's own label; write {self.inner.name}"

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        raise FormatError(f"auto-round is AutoRound's own label; write {self.inner.name}")

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        raise FormatError(f"auto-round is AutoRound's own label; write {self.inner.name}")

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        return self.inner.unpack(tensors, scheme)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        return self.inner.shape_of(shapes, scheme)

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        if config.get("act_bits", 16) not in (None, 16, 32):
            raise LayoutError(
                f"activations of {config['act_bits']} bits under auto-round are not something llmquant reads"
            )
        found: dict[str, Scheme] = {}
        for module in packed_modules(tensor_names):
            merged = {**config, **_extra(config.get("extra_config") or {}, module)}
            if isinstance(merged.get("bits"), int) and merged["bits"] >= 16:
                raise FormatError(
                    f"{module} has a qweight but the config's extra_config leaves it at {merged['bits']} bits"
                )
            found[module] = Scheme(spec_of(merged, module))
        return found


def _extra(extra_config: Mapping[str, Mapping[str, Any]], module: str) -> Mapping[str, Any]:
    if module in extra_config:
        return extra_config[module]
    for pattern, change in extra_config.items():
        if not _REGEX.isdisjoint(pattern):
            try:
                hit = re.search(pattern, module)
            except re.error as e:
                raise FormatError(
                    f"extra_config has {pattern!r}, which is no regular expression: {e}"
                ) from e
            if hit:
                return change
    return {}
