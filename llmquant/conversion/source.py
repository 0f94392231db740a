"""The folder that a conversion reads: whoever made it, modules as :class:`QuantizedWeight`,
everything else as it is."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.gguf.header import is_gguf
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.manifest import MANIFEST, Manifest, check_weight_files, find_manifest
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.label import named_dtypes
from llmquant.errors import CheckpointError, LayoutError, ProofError, UsageError
from llmquant.formats.base import is_expert
from llmquant.formats.compressed_tensors.beyond import KV_CACHE, kv_cache
from llmquant.models.reading.engine_names import EngineNames, engine_names
from llmquant.models.reading.fit import fitted, placeless
from llmquant.models.reading.linears import linears_of
from llmquant.models.reading.matrices import as_kept
from llmquant.models.selection import PLACELESS, ROUTER, SHARED
from llmquant.records import ModuleRecord
from llmquant.runtime.devices import DTYPES
from llmquant.weight import QuantizedWeight, without_trivial_order

# The layouts that can say how keys and values are rounded.
_FAMILY = ("compressed-tensors", "int-quantized")


@dataclass(frozen=True)
class Source:
    """A quantized folder to convert.

    Attributes:
        packed: the folder.
        skipped: linears of the model that are not quantized → why.
        head: name of the output head, or None.
        manifest: the record of the run that made it, if llmquant did.
        names: what engines call its modules.
        notes: what people should know of the folder.
    """

    packed: PackedCheckpoint
    skipped: Mapping[str, str]
    head: str | None
    manifest: Manifest | None
    names: EngineNames
    notes: tuple[str, ...] = ()

    @property
    def reader(self) -> CheckpointReader:
        return self.packed.reader

    def weight(self, name: str) -> QuantizedWeight:
        """One quantized module, without a ``g_idx`` that says nothing.

        Raises:
            FormatError: tensors that are not this layout.
            ProofError: other numbers than the folder's manifest says.
        """
        weight = self.packed.weight(name)
        recorded = self.manifest.modules.get(name) if self.manifest else None
        if recorded is not None:
            _check_numbers(name, weight, recorded, self.reader.path)
        return without_trivial_order(weight)

    def as_kept(self, name: str, tensor: Tensor) -> Tensor:
        """An unquantized tensor, read or dequantized, as checkpoints of the model type keep it."""
        return as_kept(name, tensor, self.names.architecture)

    def shards(self) -> Iterator[list[str]]:
        """Tensor names file by file, sorted, so that the result does not depend on the order in a
        header."""
        for file in self.reader.files():
            yield sorted(n for n, info in self.reader.tensors.items() if info.file == file)


def open_source(model: str | os.PathLike[str], base: str | os.PathLike[str] | None) -> Source:
    """Open a quantized folder and judge its zero-points.

    Raises:
        UsageError: it is not quantized.
        FormatError: a layout or a config that llmquant cannot carry over, or zero-points whose
            label is wrong.
        CheckpointError: damaged, or its manifest speaks of other modules.
        ProofError: a weight file is not the one that its manifest records.
        ArchitectureError: no causal language model that transformers knows.
    """
    refuse_gguf(model)
    reader = CheckpointReader(resolve(model))
    config = quantization_of(reader)
    if config is None:
        raise UsageError(
            f"{reader.path} is not quantized, so there is nothing to convert; use llmquant quantize"
        )
    packed = PackedCheckpoint(reader, config)
    packed.require_modules()
    fit = fitted(packed, torch.bfloat16)
    assert fit.packed is not None  # it was given
    reader, packed = fit.reader, fit.packed
    packed.refuse_shifted_zeros(None if base is None else CheckpointReader(resolve(base)))
    schemes = packed.schemes
    manifest = find_manifest(reader.path)
    if manifest is not None and manifest.modules.keys() != schemes.keys():
        odd = sorted(manifest.modules.keys() ^ schemes.keys())
        raise CheckpointError(
            f"{reader.path}: {MANIFEST} and the tensors disagree on which modules are quantized: {odd[0]}"
        )
    refuse_changed(reader, manifest, packed)
    linears = linears_of(fit.model, placeless(fit))
    known = manifest.skipped if manifest else {}
    routers = dict.fromkeys(linears.routers, ROUTER)
    skipped = {**routers, **linears.left, **dict.fromkeys(linears.placeless, PLACELESS)}
    table = None if linears.embedding is None else linears.embedding[0]
    tied = dict.fromkeys(linears.shared if table in schemes else (), SHARED)
    skipped |= {
        n: tied.get(n) or known.get(n, "unquantized in the source")
        for n in linears.shapes
        if n not in schemes
    }
    return Source(packed, skipped, linears.head, manifest, engine_names(fit), fit.notes)


def refuse_changed(
    reader: CheckpointReader, manifest: Manifest | None, packed: PackedCheckpoint | None = None
) -> None:
    """Refuse weight files that are not those that the folder's manifest records, before hours of
    work.

    Args:
        packed: the folder's quantized modules, to name the one that differs.

    Raises:
        ProofError: naming it, or the file.
    """
    if manifest is None:
        return
    try:
        check_weight_files(reader, manifest)
    except ProofError:
        if packed is not None:
            for name, recorded in manifest.modules.items():
                _check_numbers(name, packed.weight(name), recorded, reader.path)
        raise


def _check_numbers(name: str, weight: QuantizedWeight, recorded: ModuleRecord, path: Path) -> None:
    if weight.digest() != recorded.digest:
        raise ProofError(
            f"{path}: {name} does not hold the numbers that {MANIFEST} records; fetch it again"
        )


def refuse_gguf(model: str | os.PathLike[str]) -> None:
    """Raises UsageError for a GGUF file, which is imported and not converted."""
    path = Path(model)
    if path.is_file() and is_gguf(path):
        raise UsageError(
            f"{path} is a GGUF file; llmquant import {shlex.quote(str(path))} -o DIR makes a folder of it, "
            "with --packed one that keeps Q4_0 and Q8_0 as they are"
        )


def model_dtype(reader: CheckpointReader) -> torch.dtype:
    """What the config calls the model's dtype, or else the commonest of its floating-point
    tensors."""
    for name in named_dtypes(reader.config):
        if name in DTYPES:
            return DTYPES[name]
    counts = Counter(i.dtype for i in reader.tensors.values() if i.dtype in DTYPES.values())
    return counts.most_common(1)[0][0] if counts else torch.bfloat16


def refuse_stacked(source: Source) -> None:
    """Raises UsageError for a model with experts whose unquantized checkpoints stack them."""
    row = source.names.architecture
    layout = None if row is None or row.experts is None else row.experts.stacked
    if layout is not None and any(map(is_expert, (*source.packed.schemes, *source.skipped))):
        raise UsageError(
            f"{source.reader.path}: unquantized checkpoints of its model type stack their experts in one tensor, which convert "
            "does not write; use the original model, or convert to another layout of packed weights"
        )


def refuse_beyond_weights(source: Source, target: str) -> None:
    """Refuse what the config says beside the weights and the target layout cannot say.

    Raises:
        LayoutError: naming it.
    """
    key = kv_cache(source.packed.config)
    if key is not None and not (key == KV_CACHE and target in _FAMILY):
        raise LayoutError(
            f"{source.reader.path}: the config's {key} changes what engines compute and cannot be converted to {target}"
        )
