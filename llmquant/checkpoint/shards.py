"""One safetensors file, written tensor by tensor in bounded memory.

The format wants its header, with every size, in front, and the usual writer therefore takes all
tensors at once. Here each tensor's bytes go to a side file as it comes; when the shard is full the
header is known, is written, and the bytes are copied behind it by the kernel (no tensor comes back
into memory). The result is byte for byte what ``safetensors.torch.save_file`` writes for the same
tensors: larger dtypes first, then by name, which keeps every tensor aligned.

The side file is also what a run that was killed continues: it is cut where the journal says that
everything was durable.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.weights.headers import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# safetensors' own order of types, largest alignment first.
_RANK = {
    name: i
    for i, name in enumerate(
        (
            *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
            *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
        )
    )
}
_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A shard that is whole: its size, and length and sha256 of its header."""

    nbytes: int
    head_bytes: int
    head_sha256: str


@dataclass(frozen=True, slots=True)
class Mark:
    """What a writer made durable since its last mark.

    Attributes:
        tensors: name, shard, dtype and shape of each tensor, in the order in which they were
            written.
        finished: shards that became whole.
    """

    tensors: tuple[tuple[str, int, str, tuple[int, ...]], ...]
    finished: tuple[FinishedShard, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a shard: dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def order(tensors: Mapping[str, Stored]) -> list[str]:
    """Names in the order in which their bytes stand in the file."""
    return sorted(tensors, key=lambda n: (_RANK[DTYPE_NAMES[tensors[n].dtype]], n))


def header(tensors: Mapping[str, Stored]) -> bytes:
    """The file's head: length, JSON, padding to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for name in order(tensors):
        tensor = tensors[name]
        offsets = [offset, offset + tensor.nbytes]
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        offset = offsets[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """Collects tensors in ``path`` + ``.data`` and turns them into the safetensors file ``path``.

    Raises (all methods):
        OSError: the disk refused.
    """

    def __init__(self, path: Path, known: Mapping[str, Stored] | None = None) -> None:
        """``known``: the tensors that the side file already holds, in its order; what stands behind
        them is cut off."""
        self.path = path
        self.side = side_of(path)
        self.keep_side = False  # after finish(), for whoever may still have to come back to it
        self._tensors: dict[str, Stored] = {}
        self._starts: dict[str, int] = {}
        self.nbytes = 0
        for name, stored in (known or {}).items():
            self._tensors[name], self._starts[name] = stored, self.nbytes
            self.nbytes += stored.nbytes
        self._file = self.side.open("wb" if known is None else "r+b")
        self._file.truncate(self.nbytes)
        self._file.seek(self.nbytes)

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor's bytes."""
        flat = tensor.detach().cpu().contiguous()
        stored = Stored(flat.dtype, tuple(flat.shape))
        self._tensors[name], self._starts[name] = stored, self.nbytes
        if stored.nbytes:
            self._file.write(flat.reshape(-1).view(torch.uint8).numpy().data)
        self.nbytes += stored.nbytes

    def sync(self) -> None:
        """Bring every tensor so far durably to the side file."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> bytes:
        """Write the safetensors file, durably, and remove the side file (unless ``keep_side``);
        returns the file's head."""
        self._file.close()
        head = header(self._tensors)
        with self.side.open("rb") as source, self.path.open("wb") as target:
            target.write(head)
            target.flush()
            for name in order(self._tensors):
                _copy_range(
                    source.fileno(), target.fileno(), self._starts[name], self._tensors[name].nbytes
                )
            os.fsync(target.fileno())
        if not self.keep_side:
            self.side.unlink()
        return head

    def discard(self) -> None:
        """Close without a result; the caller removes or continues what lies there."""
        with contextlib.suppress(
            OSError
        ):  # a full disk refuses what is still buffered a second time
            self._file.close()


def side_of(path: Path) -> Path:
    """Where the tensors of a shard in work are collected."""
    return path.with_name(f"{path.name}.data")


def _copy_range(source: int, target: int, start: int, count: int) -> None:
    """Copy ``count`` bytes from ``start`` of one descriptor to the end of another, inside the
    kernel."""
    while count:
        copied = os.sendfile(target, source, start, count)
        if copied == 0:
            raise OSError("the side file of a shard is shorter than what was written to it")
        start, count = start + copied, count - copied
