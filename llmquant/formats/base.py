"""The Format contract: numbers to named tensors and back, plus the config that announces them.

A format is pure. It sees one :class:`QuantizedWeight` at a time and never a file, an algorithm or a kernel. Tensor names
are relative to the module (``weight_packed``, not ``model.layers.0.self_attn.q_proj.weight_packed``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a config must say of one quantized module: its grid, and whether a non-trivial ``g_idx`` is stored."""

    spec: QuantSpec
    g_idx: bool = False


class Format(Protocol):
    """One byte layout."""

    name: str

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight ``[out, in]`` of this scheme cannot be stored, or None."""

    def pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors to store, by name relative to the module. ``dtype`` is the model's (for scales).

        Raises:
            FormatError: when a number would not survive.
        """

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Exact inverse of :meth:`pack`.

        Raises:
            FormatError: on a shape, dtype or value that cannot be this layout.
        """

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        """``quantization_config`` for modules (full name → scheme) and the linears left alone."""

    def schemes(self, config: Mapping[str, Any], tensor_names: Collection[str]) -> dict[str, Scheme]:
        """Module name → scheme for every quantized module among ``tensor_names`` (full names).

        Raises:
            FormatError: when the config and the tensors contradict each other.
        """

    def tensor_suffixes(self) -> frozenset[str]:
        """Every tensor name :meth:`pack` may give."""

    def shape_of(self, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> tuple[int, int]:
        """``(out, in)`` from the tensors' shapes alone.

        Raises:
            FormatError: a tensor of the layout is missing.
        """
