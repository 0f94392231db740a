"""The header of a GGUF file: metadata and where every tensor is, of one file or all its shards.

The ``gguf`` package's own reader makes a Python object of every token: a minute for a vocabulary of
150,000, where this takes a second. transformers' newer reader does not know every type. So the
header, which is short, is read here; what types are and mean (``GGMLQuantizationType``, block
sizes, dequantization) is the package's.

Layout (ggml's docs/gguf.md), little-endian::

    "GGUF"  version u32  tensors u64  pairs u64
    pair:   key string, type u32, value          string: length u64, UTF-8
    tensor: name string, dimensions u32, sizes u64 (fastest first), type u32, offset u64
    padding to general.alignment, then the tensors' bytes
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmquant.checkpoint.weights.headers import stranger
from llmquant.errors import CheckpointError, LayoutError, UnfitModelError, UsageError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
_FLOAT, _STRING, _ARRAY = 6, 8, 9
_MOST_DIMENSIONS = 8
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_DEFAULT_ALIGNMENT = 32
# What general.type or the architecture says of files that hold no language model.
_OTHER_KINDS = {
    "mmproj": "the vision or audio part of a multimodal model (mmproj), not a language model",
    "clip": "the vision or audio part of a multimodal model (mmproj), not a language model",
    "adapter": "a LoRA adapter, not a whole model",
    "imatrix": "an importance matrix, not a model",
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place.

    Attributes:
        shape: in torch's order, slowest first.
        kind: the type's name: ``Q4_K``.
        start, nbytes: of its bytes in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    file: Path
    start: int
    nbytes: int

    def data(self) -> np.ndarray:
        """The stored bytes, mapped: uint8 ``[..., bytes of a row]``."""
        raw = np.memmap(self.file, dtype=np.uint8, mode="r", offset=self.start, shape=self.nbytes)
        return raw.reshape(*self.shape[:-1], -1)

    def values(self, part: int | None = None) -> np.ndarray:
        """float32 of the tensor's shape, by the ``gguf`` package's own code.

        Args:
            part: an index of the first dimension, of which alone the values are wanted.
        """
        gguf = package()
        data = self.data() if part is None else self.data()[part]
        found: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.kind])
        return found.reshape(self.shape if part is None else self.shape[1:])


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A file, or the shards of one model.

    Attributes:
        path: as it was given.
        files: the shards in order; the first has the metadata.
        metadata: key → value; floats are the shortest decimals that mean the stored float32.
        tensors: name → place, in the order of the files.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_architecture(self) -> dict[str, Any]:
        """The metadata under the architecture's name, without it: ``block_count`` → 30."""
        prefix = f"{self.architecture}."
        return {k.removeprefix(prefix): v for k, v in self.metadata.items() if k.startswith(prefix)}


def package() -> Any:
    """The ``gguf`` package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError as e:
        raise UsageError("GGUF needs the gguf package: pip install gguf") from e
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufModel:
    """Read the header of a file and of its other shards.

    Raises:
        UsageError: no such file, or the ``gguf`` package is not installed.
        UnfitModelError: no GGUF file, or one without a language model.
        CheckpointError: damaged, cut short, or a shard is missing.
        LayoutError: a type of tensor that cannot be read.
    """
    package()
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give a GGUF file")
    files = _shards(path)
    metadata, tensors = _read_file(files[0])
    count = int(metadata.get("split.count") or 1)
    if count != len(files):
        raise CheckpointError(
            f"{files[0]} is one of {count} shards, but its name does not say which; name them …-00001-of-{count:05d}.gguf"
        )
    for file in files[1:]:
        repeated = tensors.keys() & (more := _read_file(file)[1]).keys()
        if repeated:
            raise CheckpointError(f"{file}: {min(repeated)} is in an earlier shard too")
        tensors |= more
    announced = metadata.get("split.tensors.count")
    if announced is not None and announced != len(tensors):
        raise CheckpointError(
            f"{path}: the shards have {len(tensors)} tensors and announce {announced}; fetch them again"
        )
    model = GgufModel(path, files, metadata, tensors)
    _refuse_other_kinds(model)
    return model


def _refuse_other_kinds(model: GgufModel) -> None:
    if not model.metadata.get("general.architecture"):
        raise CheckpointError(
            f"{model.path} does not say its architecture (general.architecture); fetch a newer conversion of the model"
        )
    for key in ("general.type", "general.architecture"):
        other = _OTHER_KINDS.get(str(model.metadata.get(key)))
        if other:
            raise UnfitModelError(f"{model.path} is {other}; give the file of the language model")
    if not model.tensors:
        raise UnfitModelError(f"{model.path} is a vocabulary without weights; give the whole model")


def _shards(path: Path) -> tuple[Path, ...]:
    named = _SHARD.fullmatch(path.name)
    if named is None:
        return (path,)
    count = int(named["count"])
    files = [
        path.with_name(f"{named['stem']}-{i:05d}-of-{named['count']}{path.suffix}")
        for i in range(1, count + 1)
    ]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} shards, and {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} not beside it; fetch all of them"
        )
    return tuple(files)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    size = path.stat().st_size
    with path.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            strange = stranger(path, but=(MAGIC,))
            raise UnfitModelError(f"{path} is not a GGUF file{f': it is {strange}' if strange else ''}")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return _Cursor(path, mapped, size).read()
            except (struct.error, IndexError, OverflowError, MemoryError) as e:
                raise CheckpointError(
                    f"{path} is cut short: its header does not end within {size:,} bytes; fetch it again"
                ) from e
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{path} is damaged: a text in its header is no UTF-8") from e


class _Cursor:
    """Reads a header from front to back."""

    def __init__(self, path: Path, mapped: mmap.mmap, size: int) -> None:
        self.path, self.mapped, self.size, self.at = path, mapped, size, len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        (version,) = self.take("I")
        if version not in _VERSIONS:
            big = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "big-endian" if big else f"version {version}"
            raise LayoutError(
                f"{self.path} is a {what} GGUF file; little-endian files of versions 2 and 3 are read"
            )
        tensors, pairs = self.take("QQ")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self.string()
            metadata[key] = self.value(self.take("I")[0])
        return metadata, self.tensors(tensors, metadata.get("general.alignment"))

    def take(self, fields: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{fields}", self.mapped, self.at)
        self.at += struct.calcsize(f"<{fields}")
        return found

    def string(self) -> str:
        (length,) = self.take("Q")
        if self.at + length > self.size:
            raise IndexError(length)
        raw = self.mapped[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.take("IQ")
            if inner in _FORMATS:
                return [_decimal(inner, v) for v in self.take(f"{count}{_FORMATS[inner]}")]
            if count > self.size:  # every element has a length of its own
                raise IndexError(count)
            return [self.value(inner) for _ in range(count)]
        if kind not in _FORMATS:
            raise CheckpointError(f"{self.path} is damaged: metadata of type {kind}; fetch it again")
        return _decimal(kind, self.take(_FORMATS[kind])[0])

    def tensors(self, count: int, alignment: object) -> dict[str, GgufTensor]:
        listed = []
        for _ in range(count):
            name, (dimensions,) = self.string(), self.take("I")
            if not 0 < dimensions <= _MOST_DIMENSIONS:
                raise CheckpointError(
                    f"{self.path} is damaged: {name} has {dimensions} dimensions; fetch it again"
                )
            shape = tuple(reversed(self.take(f"{dimensions}Q")))
            listed.append((name, shape, *self.take("IQ")))
        step = alignment if isinstance(alignment, int) and alignment > 0 else _DEFAULT_ALIGNMENT
        begin = -(-self.at // step) * step
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in listed:
            if name in found:
                raise CheckpointError(f"{self.path} is damaged: it lists {name} twice")
            found[name] = self.tensor(name, shape, kind, begin + offset)
        return found

    def tensor(self, name: str, shape: tuple[int, ...], number: int, start: int) -> GgufTensor:
        gguf = package()
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError as e:
            raise LayoutError(
                f"{self.path}: {name} has type {number}, which the installed gguf package does not know; "
                "pip install --upgrade gguf, or take a file of another type"
            ) from e
        if kind.name not in readable_kinds():
            raise LayoutError(
                f"{self.path}: {name} is {kind.name}, which is no type of weights that can be read; "
                "take a file of another type"
            )
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        elements = int(np.prod(np.array(shape, dtype=object)))
        if shape[-1] % per_block or not elements:
            raise CheckpointError(
                f"{self.path} is damaged: {name} {list(shape)} is no whole number of {kind.name} blocks"
            )
        nbytes = elements // per_block * size
        if start + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} is cut short: {name} ends at byte {start + nbytes:,}, and there are {self.size:,}; "
                "fetch it again"
            )
        return GgufTensor(name, shape, kind.name, self.path, start, nbytes)


def readable_kinds() -> frozenset[str]:
    """Names of the types that the ``gguf`` package dequantizes."""
    from gguf import quants

    # The package has no public list of them.
    return frozenset({"F32", "F16", *(kind.name for kind in quants._type_traits)})


def _decimal(kind: int, value: Any) -> Any:
    """A float32 as the shortest decimal that is stored so: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if kind == _FLOAT else value
