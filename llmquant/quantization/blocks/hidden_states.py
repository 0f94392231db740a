"""Hidden states between blocks: in memory while they fit, in files that are mapped when read beyond
that, saved for a later run.

A *stream* is one tensor per calibration batch: what the quantized model's blocks deliver
(``hidden``) and, for methods that aim at the original model, what its own blocks deliver
(``reference``). Streams stay on the CPU; a batch goes to the device when it is asked for, or on a
GPU when the one before it was (:mod:`llmquant.quantization.blocks.transfers`).

A stream in a file is never rewritten: its successor goes to a new file, and the old one stays until
the journal of the run no longer names it. So the spilled streams *are* the saved state, and a crash
while one is written leaves the one before it whole. Tensors are stored contiguous and aligned as
torch aligns its own, so that what is computed from them does not depend on where they lay.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint.atomic import fsync_path
from llmquant.errors import CheckpointError
from llmquant.quantization.blocks.transfers import Transfers, behind, transfers_of

_ALIGN = 64  # bytes; torch's own allocations


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a tensor stands in a stream's file."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def torch_dtype(self) -> torch.dtype:
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True, slots=True)
class SavedStream:
    """A stream in a file: its name in the folder, size and sha256, and its tensors."""

    file: str
    nbytes: int
    sha256: str
    tensors: tuple[Placed, ...]


class Stream(Sequence[Tensor]):
    """One tensor per batch, on the device of ``transfers`` when it is asked for."""

    transfers: Transfers

    def replaced(self, tensors: Iterable[Tensor], store: StateStore) -> Stream:
        """The stream that holds ``tensors``; item ``i`` of this one is read no more once the
        ``i``-th of them is there."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.stored(index).to(self.transfers.device, non_blocking=True)

    def __iter__(self) -> Iterator[Tensor]:
        sent = (self.transfers.send(self.stored(i)) for i in range(len(self)))
        return self.transfers.paced(behind(sent))

    def stored(self, index: int) -> Tensor:
        raise NotImplementedError


class InMemory(Stream):
    """A list of tensors, replaced item by item so that no second set is held."""

    def __init__(self, tensors: Iterable[Tensor], transfers: Transfers) -> None:
        self.transfers = transfers
        self._tensors = list(behind(map(transfers.fetch, tensors)))

    def __len__(self) -> int:
        return len(self._tensors)

    def stored(self, index: int) -> Tensor:
        return self._tensors[index]

    def replaced(self, tensors: Iterable[Tensor], store: StateStore) -> Stream:
        fetch, before = self.transfers.fetch, self._tensors
        arrivals = (fetch(tensor, before[i]) for i, tensor in enumerate(tensors))
        for i, tensor in enumerate(behind(arrivals)):
            self._tensors[i] = tensor
        return self


class InFile(Stream):
    """Tensors of a file, each mapped (copy on write) for as long as it is held."""

    def __init__(self, folder: Path, saved: SavedStream, transfers: Transfers) -> None:
        self.transfers, self.saved = transfers, saved
        self.path = folder / saved.file

    def __len__(self) -> int:
        return len(self.saved.tensors)

    def stored(self, index: int) -> Tensor:
        placed = self.saved.tensors[index]
        if placed.nbytes == 0:
            return torch.empty(placed.shape, dtype=placed.torch_dtype)
        mapped = np.memmap(self.path, np.uint8, "c", placed.start, (placed.nbytes,))
        return torch.from_numpy(mapped).view(placed.torch_dtype).reshape(placed.shape)

    def replaced(self, tensors: Iterable[Tensor], store: StateStore) -> Stream:
        successor = store.scratch(tensors)
        store.drop(self)
        return successor


def write_stream(path: Path, tensors: Iterable[Tensor]) -> SavedStream:
    """Write a stream of contiguous tensors of the CPU to a new file, not yet durably.

    Raises:
        OSError: the disk refused.
    """
    placed: list[Placed] = []
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as file:
        for flat in tensors:
            placed.append(Placed(str(flat.dtype).removeprefix("torch."), tuple(flat.shape), end))
            nbytes = flat.numel() * flat.element_size()
            data: memoryview = (
                flat.reshape(-1).view(torch.uint8).numpy().data if nbytes else memoryview(b"")
            )
            for part in (data, memoryview(bytes(-nbytes % _ALIGN))):
                file.write(part)
                digest.update(part)
            end += nbytes + -nbytes % _ALIGN
    return SavedStream(path.name, end, digest.hexdigest(), tuple(placed))


def check_stream(folder: Path, saved: SavedStream) -> None:
    """Raises CheckpointError when a saved stream is not what the run before noted of it."""
    path = folder / saved.file
    if path.is_file() and path.stat().st_size == saved.nbytes:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == saved.sha256:
                return
    raise CheckpointError(
        f"{path} does not hold the hidden states that were saved there; start again with --restart"
    )


@dataclass(frozen=True, slots=True)
class Placement:
    """What there is memory for; it changes nothing that is computed.

    Attributes:
        spill: hidden states are kept in files.
        replays: what passes through a block leave for later ones is kept in memory
            (:mod:`llmquant.quantization.blocks.replay`).
    """

    spill: bool = False
    replays: bool = True


IN_MEMORY = Placement()


class StateStore:
    """The streams of a walk and the place for them.

    Args:
        device: where a batch goes when it is asked for.
        folder: for files; None: everything stays in memory and nothing is saved.
        placement: whether streams are kept in files, and what else is kept.
        saved: streams to continue with, by name.
    """

    def __init__(
        self,
        device: torch.device,
        folder: Path | None = None,
        *,
        placement: Placement = IN_MEMORY,
        saved: Mapping[str, SavedStream] | None = None,
    ) -> None:
        assert folder is not None or not placement.spill
        self.device, self.folder, self.placement = device, folder, placement
        self.transfers = transfers_of(device)
        self.calls: str | None = (
            None  # digest of what blocks are called with beside the states; None: not known yet
        )
        self.kept = dict(saved or {})
        self.streams: dict[str, Stream] = {
            name: self._opened(stream) for name, stream in self.kept.items()
        }
        self._number = 0

    def _opened(self, saved: SavedStream) -> Stream:
        assert self.folder is not None
        check_stream(self.folder, saved)
        stream = InFile(self.folder, saved, self.transfers)
        # Copies: the file may go before the tensors do.
        return (
            stream
            if self.placement.spill
            else InMemory((stream.stored(i).clone() for i in range(len(stream))), self.transfers)
        )

    def _new_path(self) -> Path:
        assert self.folder is not None
        path = self.folder / f"states-{self._number:06d}.bin"
        while path.exists():
            self._number += 1
            path = self.folder / f"states-{self._number:06d}.bin"
        return path

    def scratch(self, tensors: Iterable[Tensor]) -> Stream:
        """A stream without a name, to be dropped by who made it."""
        if not self.placement.spill:
            return InMemory(tensors, self.transfers)
        assert self.folder is not None
        here = behind(map(self.transfers.fetch, tensors))
        return InFile(self.folder, write_stream(self._new_path(), here), self.transfers)

    def name(self, name: str, stream: Stream) -> None:
        """Give a stream a name, under which it is saved; what had the name before is dropped."""
        if name in self.streams and self.streams[name] is not stream:
            self.drop(self.streams[name])
        self.streams[name] = stream

    def drop(self, stream: Stream) -> None:
        """Delete a stream's file, unless it is part of the saved state."""
        if isinstance(stream, InFile) and stream.saved.file not in {
            s.file for s in self.kept.values()
        }:
            stream.path.unlink(missing_ok=True)

    def save(self) -> dict[str, SavedStream]:
        """Bring every named stream durably to a file; what was saved before stays until
        :meth:`forget_all_but`.

        Raises:
            OSError: the disk refused.
        """
        assert self.folder is not None
        saved = {}
        for name, stream in self.streams.items():
            if isinstance(stream, InFile):
                saved[name] = stream.saved
            else:
                saved[name] = write_stream(
                    self._new_path(), (stream.stored(i) for i in range(len(stream)))
                )
            fsync_path(self.folder / saved[name].file)
        return saved

    def forget_all_but(self, saved: Mapping[str, SavedStream]) -> None:
        """Delete the files of what was saved before: the journal names ``saved`` now."""
        assert self.folder is not None
        before, self.kept = self.kept, dict(saved)
        current = {s.saved.file for s in self.streams.values() if isinstance(s, InFile)} | {
            s.file for s in saved.values()
        }
        for stream in before.values():
            if stream.file not in current:
                (self.folder / stream.file).unlink(missing_ok=True)
