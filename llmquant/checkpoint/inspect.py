"""inspect: what a model folder holds, from its headers alone; no weight is read and no model is
built."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    fallback_notes,
    find_manifest,
    read_manifest,
)
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, read_json
from llmquant.checkpoint.sources.floats import as_floats, small_floats
from llmquant.checkpoint.weights.exported import DATA, MODEL, is_onnx
from llmquant.errors import UnfitModelError
from llmquant.formats.base import HEADS, is_embedding
from llmquant.formats.engines import cautions, refusals
from llmquant.formats.rules import Beside
from llmquant.records import GroupSizeRecord

# What models call a table of positions whose name has no "embed" in it.
_POSITIONS = frozenset({"wpe"})


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """One quantized linear, or the token embeddings."""

    name: str
    scheme: str
    shape: tuple[int, int]
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Inspection:
    """A folder's facts.

    Attributes:
        path: the folder.
        model_type: from config.json.
        format: layout name, ``fp8`` or ``mxfp4`` for weights in small floats, or None for an
            unquantized model.
        scheme: for people, most frequent first ("W4 g128 sym"), or the dtype of an unquantized
            model.
        bytes_on_disk: of all weight files.
        parameters: number of weights, packed ones counted by what they stand for.
        linears: quantized linears plus unquantized two-dimensional ``.weight`` tensors other than
            embeddings.
        quantized: quantized linears.
        coverage: share of the parameters that is quantized.
        bits_per_weight: average over quantized modules with scales and zero-points, None if there
            are none.
        weights_sha256: over config.json and the weight files.
        recipe_sha256: of the recipe that made it, if it has a manifest.
        modules: the quantized linears, and the token embeddings where they are quantized.
        engines: serving engine → why it refuses the folder; an empty tuple where it takes it.
        fallbacks: which linears the run that made it rounded to nearest for want of calibration
            tokens, and why.
        regrouped: of the run that made it: linears with another group size than the recipe wanted.
        cautions: serving engine → why its answers are not the evaluated ones though it takes the
            folder.
    """

    path: Path
    model_type: str
    format: str | None
    scheme: str
    bytes_on_disk: int
    parameters: int
    linears: int
    quantized: int
    coverage: float
    bits_per_weight: float | None
    weights_sha256: str
    recipe_sha256: str | None
    modules: tuple[ModuleInfo, ...]
    engines: Mapping[str, tuple[str, ...]]
    fallbacks: tuple[str, ...] = ()
    cautions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    regrouped: tuple[GroupSizeRecord, ...] = ()

    @property
    def embeddings(self) -> str | None:
        """The scheme of the token embeddings, where they are quantized."""
        return next((m.scheme for m in self.modules if is_embedding(m.name)), None)


def inspect(model: str | os.PathLike[str]) -> Inspection:
    """Describe a model folder or hub name.

    Raises:
        CheckpointError: not a model folder, or damaged.
        FormatError: quantized in a layout that llmquant does not read.
    """
    path = resolve(model)
    return _exported(path) if is_onnx(path) else _stored(CheckpointReader(path))


def _stored(reader: CheckpointReader) -> Inspection:
    """A folder of weights, from their headers."""
    layout, stored = small_floats(reader), reader.tensors
    packed = None
    if layout is None and quantization_of(reader) is not None:
        packed = PackedCheckpoint(reader)
        layout, stored = packed.layout.name, {name: reader.info(name) for name in packed.others}
    schemes = {} if packed is None else packed.schemes
    modules = () if packed is None else tuple(_modules(packed))
    # Weights in small floats are counted as what they mean, and named by what they are.
    others = stored if packed is not None else as_floats(reader).tensors
    beside = Beside.of(reader.config, others)
    quantized = sum(math.prod(m.shape) for m in modules)
    dense_linears = [n for n, i in others.items() if len(i.shape) == 2 and _of_linear(n)]
    dense = sum(math.prod(i.shape) for i in others.values())
    dtypes = Counter(str(i.dtype).removeprefix("torch.") for i in stored.values())
    kinds = Counter(m.scheme for m in modules)
    linears = sum(not is_embedding(m.name) for m in modules)
    manifest = find_manifest(reader.path)
    return Inspection(
        path=reader.path,
        model_type=str(reader.config.get("model_type", "unknown")),
        format=layout,
        scheme=", ".join(k for k, _ in (kinds or dtypes).most_common()),
        bytes_on_disk=sum(f.stat().st_size for f in reader.files()),
        parameters=quantized + dense,
        linears=linears + len(dense_linears),
        quantized=linears,
        coverage=quantized / (quantized + dense),
        bits_per_weight=sum(m.nbytes for m in modules) * 8 / quantized if quantized else None,
        weights_sha256=reader.digest(),
        recipe_sha256=manifest.recipe_sha256 if manifest else None,
        modules=modules,
        engines={} if packed is None else refusals(packed.layout.name, schemes, beside),
        fallbacks=_fallbacks(manifest),
        cautions={} if packed is None else cautions(packed.layout.name, schemes),
        regrouped=manifest.regrouped if manifest else (),
    )


def _of_linear(tensor: str) -> bool:
    """Whether a matrix of this name is a linear's, and no table of tokens or positions."""
    module, _, suffix = tensor.rpartition(".")
    last = module.rpartition(".")[2]
    table = is_embedding(module) or last in _POSITIONS or "embed" in module
    return suffix == "weight" and (last in HEADS or not table)


def _modules(packed: PackedCheckpoint) -> Iterator[ModuleInfo]:
    for name, scheme in packed.schemes.items():
        yield ModuleInfo(name, str(scheme), packed.shape(name), packed.nbytes(name))


def _fallbacks(manifest: Manifest | None) -> tuple[str, ...]:
    modules = manifest.modules if manifest else {}
    return tuple(fallback_notes({name: module.fallback for name, module in modules.items()}))


def _exported(path: Path) -> Inspection:
    """An ONNX export, from its record.

    Raises:
        UnfitModelError: it has none.
    """
    manifest = read_manifest(path)
    record = manifest.onnx
    if record is None:
        raise UnfitModelError(f"{path}: {MANIFEST} is not the record of an ONNX export")
    hashes = "".join(manifest.files[n] for n in ("config.json", MODEL, DATA))
    kept = [n for n, node in record.nodes.items() if node not in record.requantized]
    floats = record.weights in ("fp16", "fp32")
    level = "" if record.accuracy_level is None else f", accuracy level {record.accuracy_level}"
    return Inspection(
        path=path,
        model_type=str(read_json(path / "config.json").get("model_type", "unknown")),
        format="onnx",
        scheme=f"{record.scheme}, ONNX {record.provider}{level}",
        bytes_on_disk=sum((path / n).stat().st_size for n in (MODEL, DATA)),
        parameters=record.parameters,
        linears=len(record.nodes),
        quantized=0 if floats else len(record.nodes) if record.weights == "int8" else len(kept),
        coverage=record.quantized / record.parameters,
        bits_per_weight=manifest.bits_per_weight,
        weights_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        recipe_sha256=manifest.recipe_sha256,
        modules=(),
        engines={},
    )
