"""Everything under ``quant_method: compressed-tensors``: one config may hold several byte layouts,
a group each.

``pack-quantized`` (:mod:`.compressed_tensors`) for weights alone and ``int-quantized``
(:mod:`.int_quantized`) for W8A8 can stand side by side; then the config's top-level ``format`` is
``mixed-precision`` and every group names its own. A module's tensors tell which it is: the first
has ``weight_packed``, the second ``weight`` and ``weight_scale``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.activations import Activations
from llmquant.errors import LayoutError
from llmquant.formats.base import Plain, Scheme
from llmquant.formats.compressed_tensors.beyond import refuse_computing
from llmquant.formats.compressed_tensors.config_groups import experts_apart, groups_of
from llmquant.formats.compressed_tensors.int_quantized import IntQuantized, config_group
from llmquant.formats.compressed_tensors.pack_quantized import CompressedTensors
from llmquant.weight import QuantizedWeight

_READABLE = ("pack-quantized", "int-quantized")


class CompressedFamily(Plain):
    """``pack-quantized`` for modules without, ``int-quantized`` for modules with quantized
    activations."""

    name = "compressed-tensors"

    def __init__(self) -> None:
        self.packed = CompressedTensors()
        self.int8 = IntQuantized()

    def tensor_suffixes(self) -> frozenset[str]:
        return self.packed.tensor_suffixes() | self.int8.tensor_suffixes()

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return self._for(scheme.activations).why_not(scheme, shape)

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        return self._for(activations).pack(weight, dtype)

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        return self._for(scheme.activations).unpack(tensors, scheme)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        return self._for(scheme.activations).shape_of(shapes, scheme)

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        int8 = {n: s for n, s in schemes.items() if s.activations == "int8-dynamic"}
        packed = {n: s for n, s in schemes.items() if n not in int8}
        if not int8 or not packed:
            config = self._for("int8-dynamic" if int8 else "none").config(schemes, ignore)
            return {**config, "config_groups": experts_apart(config["config_groups"])}
        config = self.packed.config(packed, ignore)
        groups = list(config["config_groups"].values())
        if len(groups) == 1:
            groups[0] = {
                **groups[0],
                "targets": sorted(packed),
            }  # "Linear" would claim the other layout's modules too
        groups.append(config_group(sorted(int8)))
        return {
            **config,
            "format": "mixed-precision",
            "config_groups": experts_apart({f"group_{i}": g for i, g in enumerate(groups)}),
        }

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        stated = {
            str(g.get("format") or config.get("format") or "pack-quantized")
            for g in groups_of(config)
        }
        others = sorted(stated.difference(_READABLE))
        if others:
            readable = ", ".join(_READABLE)
            raise LayoutError(
                f"compressed-tensors format {others[0]!r} is not one llmquant reads; it reads {readable}"
            )
        refuse_computing(config)
        found = self.packed.schemes(config, tensor_names)
        if "int-quantized" in stated:
            found |= self.int8.schemes(config, tensor_names)
        return found

    def _for(self, activations: Activations) -> CompressedTensors | IntQuantized:
        return self.packed if activations == "none" else self.int8
