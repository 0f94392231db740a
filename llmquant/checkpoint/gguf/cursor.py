"""The bytes of one GGUF file: its header from front to back, and tensors by their places in it."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmquant.checkpoint.gguf.types import refuse_types
from llmquant.errors import CheckpointError, LayoutError, UsageError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
_FLOAT, _STRING, _ARRAY = 6, 8, 9
_MOST_DIMENSIONS = 8
_DEFAULT_ALIGNMENT = 32


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
        with np.errstate(invalid="ignore"):  # whoever asks looks for what is not finite
            found: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.kind])
        return found.reshape(self.shape if part is None else self.shape[1:])


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


class Cursor:
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
            if key in metadata:
                raise CheckpointError(
                    f"{self.path} is damaged: it says {key} twice; fetch it again"
                )
            metadata[key] = self.value(self.take("I")[0])
        refuse_types(self.path, metadata)
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
            if (
                inner == _ARRAY
            ):  # llama.cpp has none, and a damaged file may have thousands inside another
                raise CheckpointError(
                    f"{self.path} is damaged: a list of lists in its metadata; fetch it again"
                )
            if count > self.size:  # every element has a length of its own
                raise IndexError(count)
            return [self.value(inner) for _ in range(count)]
        if kind not in _FORMATS:
            raise CheckpointError(
                f"{self.path} is damaged: metadata of type {kind}; fetch it again"
            )
        return _decimal(kind, self.take(_FORMATS[kind])[0])

    def tensors(self, count: int, alignment: int | None) -> dict[str, GgufTensor]:
        listed = []
        for _ in range(count):
            name, (dimensions,) = self.string(), self.take("I")
            if not 0 < dimensions <= _MOST_DIMENSIONS:
                raise CheckpointError(
                    f"{self.path} is damaged: {name} has {dimensions} dimensions; fetch it again"
                )
            shape = tuple(reversed(self.take(f"{dimensions}Q")))
            listed.append((name, shape, *self.take("IQ")))
        step = alignment or _DEFAULT_ALIGNMENT
        begin = -(-self.at // step) * step
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in listed:
            if name in found:
                raise CheckpointError(f"{self.path} is damaged: it lists {name} twice")
            found[name] = self.tensor(name, shape, kind, begin + offset)
        self.refuse_places(list(found.values()), begin, step)
        return found

    def refuse_places(self, tensors: list[GgufTensor], begin: int, step: int) -> None:
        """Raises CheckpointError where tensors share bytes, or one does not begin at a multiple of
        the alignment: a damaged offset gives other numbers, and no size tells of it."""
        end, before = begin, "the header"
        for tensor in sorted(tensors, key=lambda t: t.start):
            if tensor.start < end or (tensor.start - begin) % step:
                raise CheckpointError(
                    f"{self.path} is damaged: {tensor.name} begins at byte {tensor.start:,}, and {before} ends at {end:,}; "
                    "fetch it again"
                )
            end, before = tensor.start + tensor.nbytes, tensor.name

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
