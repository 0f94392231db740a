"""The Format contract: numbers to named tensors and back, plus the config that announces them.

A format is pure. It sees one :class:`QuantizedWeight` at a time and never a file, an algorithm or a
kernel. Tensor names are relative to the module (``weight_packed``, not
``model.layers.0.self_attn.q_proj.weight_packed``).

What a layout cannot hold is refused three times, as early as it can be known: ``why_not`` looks at
one module's scheme and shape, ``why_not_together`` at all modules and their names, ``pack`` at the
numbers themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.activations import Activations
from llmquant.errors import FormatError
from llmquant.spec import QuantSpec
from llmquant.weight import FP16_EXACT, QuantizedWeight

# What checkpoints call the output head. In vLLM it is no Linear, so configs that say which of those
# are quantized must name it.
HEADS = ("lm_head", "embed_out")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
# What they call token embeddings, which are no Linear either.
_EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "embeddings", "word_embeddings", "wte"})


def is_embedding(module: str) -> bool:
    """Whether a module, by its full name, is the token embeddings."""
    return module.rpartition(".")[2] in _EMBEDDINGS


def is_expert(module: str) -> bool:
    """Whether a module, by its full name, is part of an expert."""
    return EXPERT.search(module) is not None


def linears_only(modules: Collection[str]) -> str | None:
    """What a layout answers whose readers look for packed weights in linears alone; None where
    these are all linears."""
    name = next(filter(is_embedding, modules), None)
    if name is None:
        return None
    return f"its readers look for packed linears only, and {name} is an embedding; use compressed-tensors"


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a config must say of one quantized module.

    Attributes:
        spec: its grid.
        g_idx: whether a non-trivial ``g_idx`` is stored (GPTQ's ``desc_act``, compressed-tensors'
            actorder ``group``).
        activations: what an engine does to the module's input: nothing, or int8 per token with a
            scale found as it runs.
    """

    spec: QuantSpec
    g_idx: bool = False
    activations: Activations = "none"

    def __str__(self) -> str:
        return str(self.spec) if self.activations == "none" else f"{self.spec} A8 dynamic"


class Format(Protocol):
    """One byte layout.

    Attributes:
        name: what a user writes to ask for it.
        activations: what engines do to the inputs of modules stored this way; goes into their
            :class:`Scheme`.
        lowest_zero: the smallest zero-point that asymmetric weights may have.
    """

    name: str
    activations: Activations
    lowest_zero: int

    def why_not(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight ``[out, in]`` of this scheme cannot be stored, or None."""

    def why_not_together(
        self, schemes: Mapping[str, Scheme], ignore: Collection[str] = ()
    ) -> str | None:
        """Why these modules (full name → scheme) cannot stand in one config, ``ignore`` left
        unquantized, or None."""

    def pack(
        self, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations = "none"
    ) -> dict[str, Tensor]:
        """Tensors to store, by name relative to the module. ``dtype`` is the model's (for scales).

        ``activations`` chooses among a layout's tensors where it has several; others do without it.

        Raises:
            FormatError: when a number would not survive.
        """

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
        """Exact inverse of :meth:`pack`.

        Raises:
            FormatError: on a shape, dtype or value that cannot be this layout.
        """

    def config(self, schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
        """``quantization_config`` for modules (full name → scheme) and the linears left alone.

        Raises:
            FormatError: for what :meth:`why_not_together` refuses.
        """

    def side_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Files beside config.json that this layout's readers expect: name → text."""

    def schemes(
        self, config: Mapping[str, Any], tensor_names: Collection[str]
    ) -> dict[str, Scheme]:
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


class Plain:
    """What most layouts answer to the optional questions: any mix is fine, no further files,
    activations untouched, every zero-point held."""

    activations: Activations = "none"
    lowest_zero: int = 0

    def why_not_together(
        self, schemes: Mapping[str, Scheme], ignore: Collection[str] = ()
    ) -> str | None:
        return None

    def side_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        return {}


def exact(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales in the dtype they are stored in.

    Raises:
        FormatError: for a scale that ``dtype`` would round: engines would then not use the
            evaluated numbers.
    """
    stored = scales.to(dtype)
    wrong = stored.to(torch.float32) != scales
    if bool(wrong.any()):
        first, name = float(scales[wrong][0]), str(dtype).removeprefix("torch.")
        sizes = scales[wrong].abs()
        if float(sizes.max()) < FP16_EXACT or float(sizes.min()) > torch.finfo(dtype).max:
            remedy = (
                f"weights of this size need scales wider than {name}: use --format compressed-tensors with a "
                "bfloat16 model, or leave the linear as it is (--ignore)"
            )
        else:
            remedy = "quantize with portable scales"
        raise FormatError(
            f"{int(wrong.sum())} of {scales.numel()} scales are not exact in {name} "
            f"(the first is {first!r}), so engines would not use the evaluated numbers; {remedy}"
        )
    return stored


def require(tensors: Collection[str], *names: str) -> None:
    """Raises FormatError naming the tensors of a module that are missing."""
    missing = [n for n in names if n not in tensors]
    if missing:
        raise FormatError(
            f"{', '.join(missing)} missing beside {', '.join(sorted(tensors)) or 'nothing'}"
        )
