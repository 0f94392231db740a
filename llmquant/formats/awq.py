"""AWQ GEMM: the 4-bit layout of AutoAWQ, packed along the *output* dimension in an order of its
own.

For a module ``X`` with weight ``[out, in]`` and ``G`` groups per row::

    X.qweight  int32 [in, out/8]   nibble i from the low end holds output row 8*w + ORDER[i]
    X.qzeros   int32 [G, out/8]    in the same order, z as it is
    X.scales   fp16  [G, out]

There is one scheme for the whole model and no ``g_idx``; modules can only be left out
(``modules_to_not_convert``, matched as *parts* of names). Symmetric weights are written with their
zero-points of 8 and ``zero_point: true``, which every reader takes; ``sym: true`` beside it
(AutoRound's key) says that they are all 8.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from llmquant import bitpack
from llmquant.activations import Activations
from llmquant.errors import FormatError, LayoutError
from llmquant.formats.base import HEADS, Plain, Scheme, exact, linears_only, require
from llmquant.formats.compressed_tensors.config_groups import ignore_list
from llmquant.formats.gptq_config import packed_modules
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(ORDER.index(i) for i in range(8))


class Awq(Plain):
    """The :class:`~llmquant.formats.base.Format` for ``quant_method: awq``, ``version: gemm``."""

    name = "awq"

    def tensor_suffixes(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales"})

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.activations != "none":
            return "it has no place for quantized activations"
        if scheme.spec.bits != BITS:
            return f"it holds {BITS} bits only, not {scheme.spec.bits}"
        if scheme.g_idx:
            return "it has no g_idx; quantize with --act-order static, or take format gptq"
        if shape[0] % 8:
            return f"the output size {shape[0]} is not a multiple of 8"
        return None

    def why_not_together(
        self, schemes: Mapping[str, Scheme], ignore: Collection[str] = ()
    ) -> str | None:
        if reason := linears_only(schemes):
            return reason
        kinds = sorted({str(s.spec) for s in schemes.values()})
        if len(kinds) > 1:
            return f"AWQ has one scheme for all modules, not {' and '.join(kinds)}; use compressed-tensors or gptq"
        for name in ignore:
            inside = next((m for m in schemes if name in m), None)
            if inside:
                return f"AWQ's readers skip every module whose name contains {name!r}, so {inside} cannot be quantized beside it"
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
        return {
            "qweight": bitpack.pack(_shuffled(weight.codes.T, ORDER), BITS),
            "qzeros": bitpack.pack(_shuffled(weight.zeros.T, ORDER), BITS),
            "scales": exact(weight.scales, torch.float16).T.contiguous(),
        }

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
        codes = _natural(tensors["qweight"], out_features)
        zeros = _zeros(tensors, spec, groups, out_features)
        return QuantizedWeight(codes, scales.T.to(torch.float32).contiguous(), zeros, spec)

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        require(shapes, "qweight", "scales")
        qweight, group_size = shapes["qweight"], scheme.spec.group_size
        if len(qweight) != 2:
            raise FormatError(f"qweight {list(qweight)} is not [in, out / 8]")
        if group_size is not None and qweight[0] % group_size:
            raise FormatError(
                f"qweight has {qweight[0]} columns, which group_size {group_size} does not divide"
            )
        return qweight[1] * 8, qweight[0]

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        reason = self.why_not_together(schemes, ignore)
        if reason:
            raise FormatError(reason)
        spec = next(iter(schemes.values())).spec
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": spec.bits,
            "group_size": -1 if spec.group_size is None else spec.group_size,
            "zero_point": True,
            "sym": spec.symmetric,
            "lm_head": any(head in schemes for head in HEADS),
            "modules_to_not_convert": ignore_list(_parts(ignore)),
        }

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
        """Goes by the tensors: AutoAWQ leaves ``modules_to_not_convert`` null though ``lm_head`` is
        unquantized."""
        version = str(config.get("version") or "gemm").lower()
        if version != "gemm":
            raise LayoutError(f"AWQ version {version!r} uses another packing; llmquant reads gemm")
        # AutoAWQ's first releases, and llm-awq, say w_bit and q_group_size.
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size"))
        if bits != BITS or not isinstance(group_size, int):
            raise LayoutError(
                f"AWQ with bits {bits!r} and group_size {group_size!r} is not one llmquant reads"
            )
        symmetric = bool(config.get("sym", not config.get("zero_point", True)))
        scheme = Scheme(QuantSpec(BITS, None if group_size == -1 else group_size, symmetric))
        modules = packed_modules(tensor_names)
        denied = sorted(set(config.get("modules_to_not_convert") or ()) & set(modules))
        if denied:
            raise FormatError(f"{denied[0]} has a qweight but modules_to_not_convert names it")
        return dict.fromkeys(modules, scheme)


def _shuffled(rows: Tensor, order: tuple[int, ...]) -> Tensor:
    """``[n, out]`` with every eight columns put in another order."""
    return (
        rows.reshape(rows.shape[0], -1, 8)[..., list(order)].reshape(rows.shape[0], -1).contiguous()
    )


def _natural(packed: Tensor, out_features: int) -> Tensor:
    """int32 ``[n, out/8]`` → uint8 ``[out, n]``."""
    return _shuffled(bitpack.unpack(packed, BITS, out_features), _INVERSE).T.contiguous()


def _zeros(
    tensors: Mapping[str, Tensor], spec: QuantSpec, groups: int, out_features: int
) -> Tensor:
    middle = torch.full((out_features, groups), spec.middle, dtype=torch.uint8)
    if "qzeros" not in tensors:
        if spec.symmetric:
            return middle
        raise FormatError("the config says zero_point but there are no qzeros")
    packed = tensors["qzeros"]
    if packed.ndim != 2 or packed.shape[0] != groups:
        raise FormatError(f"qzeros are {list(packed.shape)}, not [{groups}, {out_features // 8}]")
    zeros = _natural(packed, out_features)
    if spec.symmetric and not torch.equal(zeros, middle):
        raise FormatError(
            "the config says symmetric but not all zero-points are 8; if they are meant, set zero_point to true, sym to false"
        )
    return zeros


def _parts(ignore: Collection[str]) -> list[str]:
    """Names to leave alone, and of a regular expression for all of a module (``re:.*visual\\..*``)
    the module's; the layout goes by parts of names, which says the same."""
    whole = (re.fullmatch(r"re:\.\*(\w+)\\\.\.\*", name) for name in ignore)
    return [n for n in ignore if not n.startswith("re:")] + [m[1] for m in whole if m]
