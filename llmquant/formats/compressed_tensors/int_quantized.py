"""compressed-tensors ``int-quantized``: W8A8. int8 weights per row; the input is rounded to int8
per token as it arrives.

For a module ``X`` with weight ``[out, in]``::

    X.weight        int8 [out, in]     the code less 128
    X.weight_scale  model dtype [out, 1]

No zero-points and no shape. Activations need nothing stored: an engine takes ``max |x| / 127`` of
each token as its scale. That part is an approximation of the *run*, not of the weights, so it lives
in the scheme (``activations: int8-dynamic``) and not in the :class:`QuantizedWeight`, whose
dequantized numbers are exact here as everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant.activations import Activations
from llmquant.errors import FormatError, LayoutError
from llmquant.formats.base import HEADS, Plain, Scheme, exact, require
from llmquant.formats.compressed_tensors.config_groups import (
    group_of,
    groups_of,
    ignore_list,
    ignored,
)
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

FORMAT = "int-quantized"
_SPEC = QuantSpec(8, None, True)


class IntQuantized(Plain):
    """The :class:`~llmquant.formats.base.Format` for ``quant_method: compressed-tensors``,
    ``format: int-quantized``."""

    name = FORMAT
    activations: Activations = "int8-dynamic"

    def tensor_suffixes(self) -> frozenset[str]:
        return frozenset({"weight", "weight_scale"})

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.spec != _SPEC or scheme.g_idx:
            return f"it holds {_SPEC} without g_idx (bits 8, group size -1), not {scheme.spec}"
        if scheme.activations != self.activations:
            return "engines quantize the activations of such weights to int8; for 8-bit weights alone use compressed-tensors"
        return None

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "int8-dynamic"
    ) -> dict[str, Tensor]:
        reason = self.why_not(
            Scheme(weight.spec, weight.g_idx is not None, self.activations), weight.shape
        )
        if reason:
            raise LayoutError(reason)
        signed = weight.codes.to(torch.int16).sub_(_SPEC.middle).to(torch.int8)
        return {
            "weight": signed.contiguous(),
            "weight_scale": exact(weight.scales, dtype).contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        out_features, _ = self.shape_of({n: tuple(t.shape) for n, t in tensors.items()}, scheme)
        weight, scales = tensors["weight"], tensors["weight_scale"]
        if weight.dtype != torch.int8:
            raise FormatError(f"weight is {weight.dtype}, but the config says int8")
        if list(scales.shape) != [out_features, 1]:
            raise FormatError(
                f"weight_scale is {list(scales.shape)}, not one scale per row [{out_features}, 1]"
            )
        codes = weight.to(torch.int16).add_(_SPEC.middle).to(torch.uint8)
        zeros = torch.full((out_features, 1), _SPEC.middle, dtype=torch.uint8)
        return QuantizedWeight(codes, scales.to(torch.float32), zeros, _SPEC)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        require(shapes, "weight", "weight_scale")
        if len(shapes["weight"]) != 2:
            raise FormatError(f"weight is {list(shapes['weight'])}, not [out, in]")
        return shapes["weight"][0], shapes["weight"][1]

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "format": FORMAT,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": config_group(["Linear", *(n for n in schemes if n in HEADS)])
            },
            "ignore": ignore_list(ignore),
            "kv_cache_scheme": None,
        }

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        names = frozenset(tensor_names)
        groups = groups_of(config)
        found: dict[str, Scheme] = {}
        for module in sorted(
            n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale")
        ):
            if f"{module}.weight" not in names:
                continue  # packed weights: another layout's
            if ignored(config.get("ignore") or (), module):
                raise FormatError(
                    f"{module} has a weight_scale but the config's ignore list names it"
                )
            _check(group_of(module, groups), module)
            found[module] = Scheme(_SPEC, activations="int8-dynamic")
        return found


def config_group(targets: list[str]) -> dict[str, Any]:
    """One entry of ``config_groups``."""
    whole = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return {
        "targets": targets,
        "weights": {**whole, "strategy": "channel", "actorder": None, "dynamic": False},
        "input_activations": {**whole, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": FORMAT,
    }


def _check(group: Mapping[str, Any], module: str) -> None:
    """Refuse everything that is not 8-bit symmetric per row beside dynamic int8 activations per
    token."""
    for part, strategy, dynamic in (
        ("weights", "channel", False),
        ("input_activations", "token", True),
    ):
        args = group.get(part) or {}
        stated = {k: args.get(k) for k in ("num_bits", "type", "symmetric", "strategy")}
        wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": strategy}
        if stated != wanted or bool(args.get("dynamic")) != dynamic:
            kind = "dynamic" if dynamic else "static"
            raise LayoutError(
                f"{module}: {part} are {dict(args) or 'not quantized'}; llmquant reads {kind} {wanted}"
            )
