"""PackedCheckpoint: the one way to read a quantized folder.

Which layout it has, which modules are packed and how, their shapes and sizes from headers, their
numbers. Loading, inspection, conversion and every proof stand on it. What else lies in the folder
(norms, embeddings, whatever is not quantized) is ``others``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import CheckpointError, FormatError, QuantizationError, UnfitModelError
from llmquant.formats import Format, Scheme, for_config
from llmquant.formats.zero_points import check_zero_convention, doubtful, refuse_shifted
from llmquant.weight import QuantizedWeight

_SAMPLE = 4  # modules whose zero-points are judged
_LABELS = ("checkpoint_format", "packing_format", "quant_method")


class PackedCheckpoint:
    """A quantized folder.

    Args:
        reader: of the folder.
        config: its quantization config, if another than the one that the folder has.
        schemes: packed module → scheme, if known; the config is not asked then.

    Attributes:
        layout: how its modules are packed.
        schemes: packed module (full name) → scheme, as the config announces it.

    Raises:
        CheckpointError: the folder is not quantized.
        FormatError: a layout that llmquant does not read, or a config and tensors that contradict
            each other.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        config: Mapping[str, Any] | None = None,
        schemes: Mapping[str, Scheme] | None = None,
    ) -> None:
        config = config or quantization_of(reader)
        if config is None:
            raise UnfitModelError(f"{reader.path} is not quantized: it has no quantization config")
        self.reader, self.config = reader, config
        try:
            self.layout: Format = for_config(config)
            self.schemes: dict[str, Scheme] = (
                self.layout.schemes(config, reader.tensors.keys())
                if schemes is None
                else dict(schemes)
            )
        except FormatError as e:
            raise e.at(str(reader.path)) from e

    def renamed(self, names: Mapping[str, str]) -> PackedCheckpoint:
        """The same folder with some tensors under other names, those of whole modules among
        them."""
        schemes = {}
        for module, scheme in self.schemes.items():
            suffix, stored = next(iter(self.tensors[module].items()))
            schemes[names.get(stored, stored).removesuffix(f".{suffix}")] = scheme
        return PackedCheckpoint(self.reader.renamed(names), self.config, schemes)

    def seen_as(self, reader: CheckpointReader) -> PackedCheckpoint:
        """The same modules in another view of the folder."""
        return PackedCheckpoint(reader, self.config, self.schemes)

    def require_modules(self) -> None:
        """Raises CheckpointError if the config announces packed modules and there are none."""
        if not self.schemes:
            raise CheckpointError(
                f"{self.reader.path}: config.json announces {self.layout.name} weights but no tensor is packed"
            )

    @cached_property
    def tensors(self) -> dict[str, dict[str, str]]:
        """Packed module → {name relative to it: full tensor name}."""
        found: dict[str, dict[str, str]] = {name: {} for name in self.schemes}
        for tensor in self.reader.tensors:
            module = self.module_of(tensor)
            if module is not None:
                found[module][tensor.removeprefix(f"{module}.")] = tensor
        return found

    @cached_property
    def others(self) -> list[str]:
        """Tensors that are part of no packed module."""
        return [name for name in self.reader.tensors if self.module_of(name) is None]

    def module_of(self, tensor: str) -> str | None:
        """The packed module that a stored tensor is part of."""
        module, _, suffix = tensor.rpartition(".")
        packed = module in self.schemes and suffix in self.layout.tensor_suffixes()
        return module if packed else None

    def shape(self, name: str) -> tuple[int, int]:
        """``(out, in)`` of a packed module, from headers. Where one scale holds for a row they tell
        the width only to the next full word; then the shape that the layout notes is read.

        Raises:
            FormatError: a tensor of the layout is missing.
        """
        scheme = self.schemes[name]
        shapes = {s: self.reader.info(full).shape for s, full in self.tensors[name].items()}
        try:
            out_features, in_features = self.layout.shape_of(shapes, scheme)
        except FormatError as e:
            raise type(e)(f"{self.reader.path}: {name}: {e}") from e
        if scheme.spec.group_size is None and {"weight_shape", "weight_packed"} <= shapes.keys():
            noted = self.reader.read(self.tensors[name]["weight_shape"]).reshape(-1).tolist()
            spare = -(-32 // scheme.spec.bits)  # codes that a last word may have to spare, and one
            if len(noted) == 2 and 0 <= in_features - noted[1] < spare and noted[1] > 0:
                in_features = int(noted[1])
        return out_features, in_features

    def nbytes(self, name: str) -> int:
        """Of a packed module's tensors, without the two numbers that only repeat its shape."""
        suffixes = self.tensors[name].items()
        return sum(self.reader.info(full).nbytes for s, full in suffixes if s != "weight_shape")

    def weight(self, name: str) -> QuantizedWeight:
        """The numbers of a packed module.

        Raises:
            FormatError: tensors that are not of this layout.
        """
        return self.unpack(name, {s: self.reader.read(t) for s, t in self.tensors[name].items()})

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The numbers of a packed module whose tensors somebody else has read.

        Raises:
            FormatError: tensors that are not of this layout.
        """
        try:
            return self.layout.unpack(tensors, self.schemes[name])
        except (FormatError, QuantizationError) as e:
            raise FormatError(f"{self.reader.path}: {name}: {e}") from e

    def refuse_shifted_zeros(self, base: CheckpointReader | None = None) -> None:
        """Judge the zero-points of a few modules where their convention rests on a label that may
        lie.

        Args:
            base: the unquantized model, if it is at hand; otherwise magnitudes decide.

        Raises:
            FormatError: they are off by one; says how to correct the label.
        """
        names = doubtful(self.config, self.schemes)
        names = names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]
        if not names:
            return
        weights = {n: self.weight(n) for n in names}
        originals = {
            n: base.read(f"{n}.weight") for n in names if base is not None and f"{n}.weight" in base
        }
        neighbours = (
            self.reader.read(n)
            for n, info in self.reader.tensors.items()
            if n.endswith(".weight")
            and len(info.shape) == 2
            and "embed" not in n
            and info.dtype != torch.int8
        )
        verdict = check_zero_convention(weights, originals, neighbours)
        label = next(f"{k}: {self.config[k]}" for k in _LABELS if self.config.get(k))
        try:
            refuse_shifted(verdict, label)
        except FormatError as e:
            raise type(e)(f"{self.reader.path}: {e}") from e
