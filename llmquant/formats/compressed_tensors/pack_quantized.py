"""compressed-tensors ``pack-quantized``: the default export, native to vLLM and transformers.

For a module ``X`` with weight ``[out, in]``, ``b`` bits and ``G`` groups per row::

    X.weight_packed      int32 [out, ceil(in*b/32)]   dense bit stream along the input dimension
    X.weight_scale       model dtype [out, G]
    X.weight_shape       int64 [2]
    X.weight_zero_point  int32 [ceil(out*b/32), G]    asymmetric only; along the outputs
    X.weight_g_idx       int32 [in]                   non-trivial order (actorder "group")

Stored values are the signed code plus ``2**(b-1)``, which is the waist's unsigned code, so packing
moves bits and does no arithmetic. The library of the same name is the oracle in the tests; nothing
of it is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant import bitpack
from llmquant.activations import Activations
from llmquant.errors import FormatError, LayoutError, SpecError
from llmquant.formats.base import HEADS, Plain, Scheme, exact, is_embedding, require
from llmquant.formats.compressed_tensors.config_groups import (
    group_of,
    groups_of,
    ignore_list,
    ignored,
)
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

_PACKED = "weight_packed"
_FORMAT = "pack-quantized"


class CompressedTensors(Plain):
    """The :class:`~llmquant.formats.base.Format` for ``quant_method: compressed-tensors``,
    ``pack-quantized``."""

    name = "compressed-tensors"

    def tensor_suffixes(self) -> frozenset[str]:
        return frozenset(
            {_PACKED, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        )

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.activations != "none":
            return "packed weights with quantized activations use the int-quantized format"
        if scheme.g_idx and scheme.spec.group_size is None:
            return "a g_idx has no meaning with one group per row"
        return None

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        bits = weight.spec.bits
        tensors = {
            _PACKED: bitpack.pack(weight.codes, bits),
            "weight_scale": exact(weight.scales, dtype).contiguous(),
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if not weight.spec.symmetric:
            tensors["weight_zero_point"] = bitpack.pack(
                weight.zeros.T.contiguous(), bits
            ).T.contiguous()
        if weight.g_idx is not None:
            tensors["weight_g_idx"] = weight.g_idx.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        spec = scheme.spec
        require(tensors, _PACKED, "weight_scale", "weight_shape")
        shape = tensors["weight_shape"].reshape(-1).tolist()
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"weight_shape holds {shape}, not [out, in]")
        out_features, in_features = map(int, shape)
        packed, scales = tensors[_PACKED], tensors["weight_scale"]
        if spec.group_size is not None and in_features % spec.group_size:
            raise FormatError(
                f"group_size {spec.group_size} does not divide the {in_features} columns of weight_shape"
            )
        groups = spec.groups(in_features)
        if (
            packed.ndim != 2
            or packed.shape[0] != out_features
            or list(scales.shape) != [out_features, groups]
        ):
            raise FormatError(
                f"weight_shape says {shape} with {groups} groups a row, but {_PACKED} is {list(packed.shape)} "
                f"and weight_scale {list(scales.shape)}"
            )
        codes = _unpack(packed, spec.bits, in_features)
        g_idx = tensors.get("weight_g_idx")
        return QuantizedWeight(
            codes,
            scales.to(torch.float32),
            self._zeros(tensors, spec, out_features, groups),
            spec,
            None if g_idx is None or not scheme.g_idx else g_idx.to(torch.int32),
        )

    def _zeros(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, out_features: int, groups: int
    ) -> Tensor:
        packed = tensors.get("weight_zero_point")
        middle = torch.full((out_features, groups), spec.middle, dtype=torch.uint8)
        if packed is None:
            if spec.symmetric:
                return middle
            raise FormatError("the config says asymmetric but there is no weight_zero_point")
        if spec.symmetric and not packed.any():  # zeros of signed codes that nobody packed
            return middle
        if packed.ndim != 2 or packed.shape[1] != groups:
            raise FormatError(f"weight_zero_point is {list(packed.shape)}, not [.., {groups}]")
        zeros = _unpack(packed.T.contiguous(), spec.bits, out_features).T.contiguous()
        if spec.symmetric and not torch.equal(zeros, middle):
            raise FormatError(
                "the config says symmetric but its weight_zero_point is not zero throughout; if it is meant, "
                "set symmetric to false"
            )
        return zeros

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        require(shapes, _PACKED, "weight_scale")
        for name in (_PACKED, "weight_scale"):
            if len(shapes[name]) != 2:
                raise FormatError(f"{name} is {list(shapes[name])}, not a matrix")
        out_features, n_words = shapes[_PACKED]
        group_size = scheme.spec.group_size
        # The scales pin the width exactly; per row, the words do for every width that fills them.
        in_features = (
            n_words * 32 // scheme.spec.bits
            if group_size is None
            else shapes["weight_scale"][1] * group_size
        )
        return out_features, in_features

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        members: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            members.setdefault(scheme, []).append(module)
        # Embeddings are always named; the linears are, where they differ.
        uniform = sum(not all(map(is_embedding, m)) for m in members.values()) == 1
        groups = {
            f"group_{i}": {
                "targets": _targets(modules) if uniform else modules,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
                "format": _FORMAT,
            }
            for i, (scheme, modules) in enumerate(members.items())
        }
        return {
            "quant_method": "compressed-tensors",
            "format": _FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore_list(ignore),
            "kv_cache_scheme": None,
        }

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        suffix = f".{_PACKED}"
        names = frozenset(tensor_names)
        modules = sorted(n.removesuffix(suffix) for n in names if n.endswith(suffix))
        groups, ignore = groups_of(config), config.get("ignore") or ()
        found: dict[str, Scheme] = {}
        for module in modules:
            if ignored(ignore, module):
                raise FormatError(
                    f"{module} has packed weights but the config's ignore list names it"
                )
            found[module] = _parse(
                group_of(module, groups), module, f"{module}.weight_g_idx" in names
            )
        return found


def _targets(modules: list[str]) -> list[str]:
    """Of a group that has all linears, or none. vLLM's head is not a Linear, and no embedding is:
    quantized ones must be named."""
    named = [m for m in modules if m in HEADS or is_embedding(m)]
    return named if all(map(is_embedding, modules)) else ["Linear", *named]


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Codes of a row, dense or, where the width says so, in the padded layout of compressed-tensors
    up to 0.17."""
    if packed.shape[-1] != bitpack.words(count, bits) and packed.shape[-1] == math.ceil(
        count / (32 // bits)
    ):
        return bitpack.unpack_padded(packed, bits, count)
    return bitpack.unpack(packed, bits, count)


def _weights(scheme: Scheme) -> dict[str, Any]:
    spec = scheme.spec
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "actorder": "group" if scheme.g_idx else None,
        "dynamic": False,
    }


def _parse(group: Mapping[str, Any], module: str, has_g_idx: bool) -> Scheme:
    args = group.get("weights") or {}
    if group.get("input_activations"):
        raise LayoutError(f"{module}: packed weights with quantized activations are not supported")
    strategy, bits = args.get("strategy"), args.get("num_bits")
    if (
        args.get("type", "int") != "int"
        or strategy not in ("group", "channel")
        or not isinstance(bits, int)
    ):
        raise LayoutError(
            f"{module}: cannot read weights of type {args.get('type')}, strategy {strategy}, {bits} bits"
        )
    group_size = None if strategy == "channel" else args.get("group_size")
    if strategy == "group" and not isinstance(group_size, int):
        raise FormatError(
            f"{module}: the config says strategy group with group_size {group_size!r}"
        )
    by_group = args.get("actorder") in ("group", "dynamic")
    if by_group and not has_g_idx:
        raise FormatError(
            f"{module}: the config says actorder {args['actorder']} but there is no weight_g_idx"
        )
    try:
        spec = QuantSpec(bits, group_size, bool(args.get("symmetric", True)))
    except SpecError as e:
        raise FormatError(f"{module}: {e}") from e
    return Scheme(spec, g_idx=has_g_idx)
