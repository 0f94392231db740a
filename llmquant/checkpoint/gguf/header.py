"""The header of a GGUF file: metadata and where every tensor is, of one file or all its shards.

The ``gguf`` package's own reader makes a Python object of every token: a minute for a vocabulary of
150,000, where this takes a second. transformers' newer reader does not know every type. So the
header, which is short, is read here; what types are and mean (``GGMLQuantizationType``, block
sizes, dequantization) is the package's (:mod:`.cursor`).

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

from llmquant.checkpoint.gguf.cursor import MAGIC, Cursor, GgufTensor, package
from llmquant.checkpoint.weights.headers import stranger
from llmquant.errors import CheckpointError, UnfitModelError, UsageError

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
# What general.type or the architecture says of files that hold no language model.
_OTHER_KINDS = {
    "mmproj": "the vision or audio part of a multimodal model (mmproj), not a language model",
    "clip": "the vision or audio part of a multimodal model (mmproj), not a language model",
    "adapter": "a LoRA adapter, not a whole model",
    "imatrix": "an importance matrix, not a model",
}


@dataclass(frozen=True, slots=True)
class GgufFile:
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


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with path.open("rb") as f:
        return f.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file and of its other shards.

    Raises:
        UsageError: no such file, or the ``gguf`` package is not installed.
        UnfitModelError: no GGUF file, or one without a language model.
        CheckpointError: damaged, cut short, or a shard is missing.
        LayoutError: a type of tensor that cannot be read.
    """
    package()
    files = shards_of(path)
    metadata, tensors = _read_shard(files, 0)
    count = metadata.get("split.count") or 1
    if count != len(files):
        raise CheckpointError(
            f"{files[0]} is one of {count} shards, but its name does not say which; name them …-00001-of-{count:05d}.gguf"
        )
    for i, file in enumerate(files[1:], 1):
        repeated = tensors.keys() & (more := _read_shard(files, i)[1]).keys()
        if repeated:
            raise CheckpointError(f"{file}: {min(repeated)} is in an earlier shard too")
        tensors |= more
    announced = metadata.get("split.tensors.count")
    if announced is not None and announced != len(tensors):
        raise CheckpointError(
            f"{path}: the shards have {len(tensors)} tensors and announce {announced}; fetch them again"
        )
    model = GgufFile(path, files, metadata, tensors)
    _refuse_other_kinds(model)
    return model


def _refuse_other_kinds(model: GgufFile) -> None:
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


def shards_of(path: Path) -> tuple[Path, ...]:
    """The file, or all shards of the model it is one of, in order.

    Raises:
        UsageError: no such file.
        CheckpointError: a shard is missing.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give a GGUF file")
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


def _read_shard(
    files: tuple[Path, ...], number: int
) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Read one of the files; raises CheckpointError for another shard than its name says."""
    metadata, tensors = _read_file(files[number])
    own = metadata.get("split.no", number)
    if own != number and len(files) > 1:
        raise CheckpointError(
            f"{files[number]} is shard {own + 1} of its model, and its name says {number + 1}; rename or fetch the shards again"
        )
    return metadata, tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    size = path.stat().st_size
    with path.open("rb") as f:
        if f.read(len(MAGIC)) != MAGIC:
            strange = stranger(path, but=(MAGIC,))
            raise UnfitModelError(
                f"{path} is not a GGUF file{f': it is {strange}' if strange else ''}"
            )
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            try:
                return Cursor(path, mapped, size).read()
            except (struct.error, IndexError, OverflowError, MemoryError) as e:
                raise CheckpointError(
                    f"{path} is cut short: its header does not end within {size:,} bytes; fetch it again"
                ) from e
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{path} is damaged: a text in its header is no UTF-8") from e
