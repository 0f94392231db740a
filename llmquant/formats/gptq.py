"""GPTQ: the layout of AutoGPTQ, GPTQModel and AutoRound, in both of its zero-point conventions.

For a module ``X`` with weight ``[out, in]``, ``b`` bits and ``G`` groups per row, everything
transposed::

    X.qweight  int32 [in*b/32, out]   bit stream along the inputs, first value lowest
    X.qzeros   int32 [G, out*b/32]    the same along the output dimension; z - 1 (v1) or z (v2)
    X.scales   fp16  [G, out]
    X.g_idx    int32 [in]             group of each column; always written, as readers ask for it

``checkpoint_format: gptq`` (v1) stores ``z - 1``, which cannot say ``z = 0``. The tools that try
subtract one from the whole 32-bit word, so a field of 0 borrows from its neighbour, and a reader
that adds one field by field gets both wrong. Adding to the whole word gives every z back; at 3
bits, where fields cross words, GPTQModel adds by fields modulo 8. We read both so, and refuse to
*write* a zero of 0 in v1, because other readers would misread it; what is quantized for v1 gets a
grid without it (``lowest_zero``). ``gptq_v2`` has no such hole and is the better home of asymmetric
weights: GPTQModel 7.6 refuses asymmetric v1 files of any maker but itself.

In a symmetric file z is ``2**(b-1)`` by definition and engines do not look at ``qzeros``: we accept
either convention's bytes there, and nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant import bitpack
from llmquant.activations import Activations
from llmquant.errors import FormatError, LayoutError
from llmquant.formats import gptq_config
from llmquant.formats.base import Plain, Scheme, exact, linears_only, require
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


class Gptq(Plain):
    """The :class:`~llmquant.formats.base.Format` for ``quant_method: gptq``.

    Args:
        v2: store zero-points as they are (``checkpoint_format: gptq_v2``) instead of less one.
    """

    def __init__(self, *, v2: bool) -> None:
        self.v2 = v2
        self.name = "gptq_v2" if v2 else "gptq"
        self.lowest_zero = 0 if v2 else 1

    def tensor_suffixes(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        out_features, in_features = shape
        bits = scheme.spec.bits
        if scheme.activations != "none":
            return "it has no place for quantized activations"
        if scheme.g_idx and scheme.spec.group_size is None:
            return "a g_idx has no meaning with one group per row"
        for what, size in (("input", in_features), ("output", out_features)):
            if size * bits % 32:
                return f"the {what} size {size} at {bits} bits does not fill whole 32-bit words"
        return None

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        """Scales are fp16 whatever the model's ``dtype``: that is what the format's readers
        expect."""
        reason = self.why_not(
            Scheme(weight.spec, weight.g_idx is not None, activations), weight.shape
        )
        if reason:
            raise LayoutError(reason)
        bits = weight.spec.bits
        return {
            "qweight": bitpack.pack(weight.codes, bits).T.contiguous(),
            "qzeros": bitpack.pack(self._stored(weight.zeros).T.contiguous(), bits),
            "scales": exact(weight.scales, torch.float16).T.contiguous(),
            "g_idx": weight.column_groups().to(torch.int32),
        }

    def _stored(self, zeros: Tensor) -> Tensor:
        if self.v2:
            return zeros
        if bool((zeros == 0).any()):
            raise FormatError(
                f"{int((zeros == 0).sum())} of {zeros.numel()} zero-points are 0, which GPTQ v1 (it stores z - 1) cannot "
                "hold without being misread elsewhere; use format gptq_v2"
            )
        return zeros - 1

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        spec = scheme.spec
        out_features, in_features = self.shape_of(
            {n: tuple(t.shape) for n, t in tensors.items()}, scheme
        )
        scales, groups = tensors["scales"], spec.groups(in_features)
        if list(scales.shape) != [groups, out_features] or not scales.is_floating_point():
            raise FormatError(
                f"qweight {list(tensors['qweight'].shape)} of {spec} needs scales [{groups}, {out_features}], "
                f"but they are {scales.dtype} {list(scales.shape)}"
            )
        codes = bitpack.unpack(tensors["qweight"].T.contiguous(), spec.bits, in_features)
        return QuantizedWeight(
            codes,
            scales.T.to(torch.float32).contiguous(),
            self._zeros(tensors, spec, groups, out_features),
            spec,
            _column_groups(tensors.get("g_idx"), scheme, in_features),
        )

    def _zeros(
        self, tensors: Mapping[str, Tensor], spec: QuantSpec, groups: int, out_features: int
    ) -> Tensor:
        """uint8 ``[out, G]``."""
        middle = torch.full((out_features, groups), spec.middle, dtype=torch.uint8)
        if "qzeros" not in tensors:
            if spec.symmetric:
                return middle
            raise FormatError("the config says asymmetric but there are no qzeros")
        packed = tensors["qzeros"]
        if packed.ndim != 2 or packed.shape[0] != groups:
            raise FormatError(f"qzeros are {list(packed.shape)}, not [{groups}, ..]")
        fields = bitpack.unpack(packed, spec.bits, out_features)
        if spec.symmetric:
            if not any(bool((fields == z).all()) for z in (spec.middle, spec.middle - 1)):
                raise FormatError(
                    f"the config says symmetric but the zero-points are not all {spec.middle} (nor that less one); "
                    "if they are meant, set sym to false"
                )
            return middle
        if not self.v2:
            fields = _plus_one(packed, fields, spec.bits, out_features)
        return fields.T.contiguous()

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        require(shapes, "qweight", "scales")
        bits, qweight = scheme.spec.bits, shapes["qweight"]
        if len(qweight) != 2 or qweight[0] * 32 % bits:
            raise FormatError(f"qweight {list(qweight)} is not [in * {bits} / 32, out]")
        in_features = qweight[0] * 32 // bits
        if scheme.spec.group_size is not None and in_features % scheme.spec.group_size:
            raise FormatError(
                f"qweight has {in_features} columns, which group_size {scheme.spec.group_size} does not divide"
            )
        return qweight[1], in_features

    def why_not_together(
        self, schemes: Mapping[str, Scheme], ignore: Collection[str] = ()
    ) -> str | None:
        return linears_only(schemes)  # any mix of those goes into `dynamic`

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        return gptq_config.build(schemes, ignore, self.name)

    def side_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        return {"quantize_config.json": gptq_config.dumps(config)}

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        return gptq_config.parse(config, tensor_names)


def _plus_one(packed: Tensor, fields: Tensor, bits: int, count: int) -> Tensor:
    """v1 → z, uint8 ``[G, out]``: see the top of this file for why by words where fields do not
    cross them."""
    if bits == 3:
        return (fields + 1) & 7
    ones = sum(1 << shift for shift in range(0, 32, bits))  # below 2**31 for 2, 4 and 8 bits
    return bitpack.unpack(packed + ones, bits, count)


def _column_groups(g_idx: Tensor | None, scheme: Scheme, in_features: int) -> Tensor | None:
    """The stored ``g_idx`` if it says more than column // group_size."""
    if g_idx is None:
        return None
    if list(g_idx.shape) != [in_features]:
        raise FormatError(f"g_idx is {list(g_idx.shape)}, not [{in_features}]")
    stored = g_idx.to(torch.int32)
    if torch.equal(
        stored, torch.arange(in_features, dtype=torch.int32) // scheme.spec.width(in_features)
    ):
        return None
    if not scheme.g_idx:
        raise FormatError(
            "g_idx puts columns out of their natural groups but the config says desc_act: false, under which engines "
            "silently compute other numbers; if g_idx is right, set desc_act to true"
        )
    return stored
