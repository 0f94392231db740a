"""Writing model folders: they appear whole or not at all.

``CheckpointWriter`` builds the folder beside its destination and renames it into place when it is
whole: every file is fsynced, shards are written as they fill, and the index and config come last.
An interrupted run leaves a hidden ``.NAME.partial`` folder that no loader takes for a model. With
``mark`` and ``restore`` a later process continues it: a mark is what became durable since the mark
before, and all marks together say which bytes of which files count.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.atomic import (
    check_destination,
    disk,
    fsync_path,
    lock_folder,
    partial_of,
    put_in_place,
    remove,
    utf8,
)
from llmquant.checkpoint.companions.files import companions
from llmquant.checkpoint.reader import INDEX, SINGLE, sha256_file
from llmquant.checkpoint.shards import FinishedShard, Mark, ShardWriter, Stored, side_of
from llmquant.errors import CheckpointError, ProofError


class CheckpointWriter:
    """An output folder that appears whole or not at all.

    Use as a context manager: leaving it normally renames the folder into place, leaving it by an
        exception removes
    what was written.

    Args:
        path: destination; must not exist, or be an empty folder, unless ``overwrite``.
        max_shard_size: bytes after which a shard is written out.
        keep: begin with what an earlier process left (see :meth:`restore`), and leave it when an
            exception ends this one. May be changed at any time.

    Raises:
        UsageError: the destination exists and is not empty, or another process is writing it.
        CheckpointError: the disk refused (full, read-only).
        ProofError: when a file is not what was to be written, on publishing it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_shard_size: int = 5_000_000_000,
        overwrite: bool = False,
        keep: bool = False,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        self.max_shard_size = max_shard_size
        self.overwrite = overwrite
        self.keep = keep
        check_destination(self.path, overwrite)
        self.partial = partial_of(self.path)
        self._lock: int | None = None
        self._shard: ShardWriter | None = None
        self._shard_of: dict[str, int] = {}
        self._finished: list[FinishedShard] = []
        self._meant: dict[str, str] = {}
        self._made = [p for p in self.path.parents if not p.exists()]
        self._unmarked: list[tuple[str, int, str, tuple[int, ...]]] = []
        self._marked = 0  # finished shards that a mark names
        self._needed: int | None = None  # the shard whose side file the last mark counts on
        self._retired: list[Path] = []
        self.total_bytes = 0

    def __enter__(self) -> CheckpointWriter:
        # An interrupt may come at any moment up to the return: whoever asked for the folder is not
        # there yet to remove it.
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self._leave_nothing)
                self._lock = lock_folder(self.partial)
                if not self.keep:
                    self.clear()
                undo.pop_all()
                return self
        except OSError as e:
            raise CheckpointError(
                f"cannot write to the parent folder of {self.path}: {e.strerror or e}; choose another -o"
            ) from e

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.discard()
            if not self.keep:
                self._leave_nothing()
        if self._lock is not None:
            os.close(self._lock)

    def clear(self, but: Sequence[Path] = ()) -> None:
        """Remove everything in the unfinished folder, or all but some of it."""
        for path in self.partial.iterdir():
            if path in but:
                continue
            if path.is_dir() and not path.is_symlink():
                remove(path)
            else:
                path.unlink()

    def _leave_nothing(self) -> None:
        """Remove what was written, and the parent folders that were made for it; nothing that
        another process holds."""
        if self._lock is not None:
            remove(self.partial)
        for folder in (self.partial, *self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def mark(self) -> Mark:
        """Make everything written so far durable, and say what that is; see :meth:`restore` and
        :meth:`marked`.

        Raises:
            DiskError: the disk refused.
        """
        with self._disk():
            if self._shard is not None:
                self._shard.sync()
            fsync_path(self.partial)
        return Mark(tuple(self._unmarked), tuple(self._finished[self._marked :]))

    def marked(self) -> None:
        """The last mark is durable too: what only the one before it counted on may go."""
        self._unmarked, self._marked = [], len(self._finished)
        self._needed = len(self._finished) if self._shard is not None else None
        for path in self._retired:
            path.unlink(missing_ok=True)
        self._retired = []

    def restore(self, marks: Sequence[Mark]) -> None:
        """Continue behind the last of the marks that an earlier process made; what it wrote later
        is removed.

        Raises:
            CheckpointError: files that the marks count on are gone or have another size.
        """
        self._finished = [shard for mark in marks for shard in mark.finished]
        current: dict[str, Stored] = {}
        for name, shard, dtype, shape in (entry for mark in marks for entry in mark.tensors):
            stored = Stored(getattr(torch, dtype), tuple(shape))
            self._shard_of[name] = shard
            self.total_bytes += stored.nbytes
            if shard == len(self._finished):
                current[name] = stored
        kept = [self._kept_shard(i) for i in range(len(self._finished))]
        if current:
            path = self._path(len(self._finished))
            need, side = sum(s.nbytes for s in current.values()), side_of(path)
            if not side.is_file() or side.stat().st_size < need:
                raise CheckpointError(
                    f"{side} is not what the interrupted run left there; start again with --restart"
                )
            with self._disk():
                self._shard = ShardWriter(path, current)
            kept.append(side)
        with self._disk():
            self.clear(but=kept)
        self.marked()

    def _kept_shard(self, index: int) -> Path:
        """A whole shard of an earlier process, under its first name or, once all were whole, its
        final one."""
        for path in (self._path(index), self.partial / self._final_name(index)):
            if path.is_file() and path.stat().st_size == self._finished[index].nbytes:
                return path
        raise CheckpointError(
            f"{self._path(index)} is not what the interrupted run left there; start again with --restart"
        )

    def _path(self, shard: int) -> Path:
        return self.partial / f"shard-{shard:05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor's bytes; begins another shard when this one is full."""
        self.add_together({name: tensor})

    def add_together(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors that stay in one shard, such as those of one packed module."""
        twice = [n for n in tensors if n in self._shard_of]
        if twice:
            raise CheckpointError(f"tensor {twice[0]} was written twice")
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        with self._disk():
            if (
                self._shard is not None
                and self._shard.nbytes
                and self._shard.nbytes + nbytes > self.max_shard_size
            ):
                self._finish_shard()
            for name, tensor in tensors.items():
                if self._shard is None:
                    self._shard = ShardWriter(self._path(len(self._finished)))
                self._shard.add(name, tensor)
                self._shard_of[name] = len(self._finished)
                dtype = str(tensor.dtype).removeprefix("torch.")
                self._unmarked.append((name, len(self._finished), dtype, tuple(tensor.shape)))
        self.total_bytes += nbytes

    def next_shard(self) -> None:
        """End the current shard here, full or not; does nothing when it is empty."""
        with self._disk():
            if self._shard is not None:
                self._finish_shard()

    def _finish_shard(self) -> None:
        assert self._shard is not None
        self._shard.keep_side = self._needed == len(self._finished)
        if self._shard.keep_side:
            self._retired.append(self._shard.side)
        head = self._shard.finish()
        size = self._shard.path.stat().st_size
        self._finished.append(FinishedShard(size, len(head), hashlib.sha256(head).hexdigest()))
        self._shard = None

    def _disk(self) -> contextlib.AbstractContextManager[None]:
        return disk(self.partial)

    def finish_weights(self) -> None:
        """Write the last shard, give the shards their final names and write the index."""
        if self._shard is None and not self._finished:
            raise CheckpointError("nothing was written: the model has no tensors")
        with self._disk():
            if self._shard is not None:
                self._finish_shard()
            names = [self._final_name(i) for i in range(len(self._finished))]
            for i, name in enumerate(names):
                if self._path(i).exists():  # else an earlier process gave it its name
                    self._path(i).rename(self.partial / name)
            if len(names) > 1:
                weight_map = {t: names[i] for t, i in sorted(self._shard_of.items())}
                index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
                self.write_text(INDEX, json.dumps(index, indent=2) + "\n")

    def _final_name(self, shard: int) -> str:
        count = len(self._finished)
        return SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"

    def write_text(self, name: str, text: str) -> None:
        data = utf8(text)
        with self._disk():
            (self.partial / name).write_bytes(data)
            fsync_path(self.partial / name)
        self._meant[name] = hashlib.sha256(data).hexdigest()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy_side_files(self, source: Path, also: Collection[str] = ()) -> list[str]:
        """Carry along everything beside the weights (``companions``), and files of other names
        where they are; returns the names copied."""
        names = [*companions(source).carried, *(n for n in also if (source / n).is_file())]
        for name in names:
            target = self.partial / name
            with self._disk():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, target)
                fsync_path(target)
                fsync_path(target.parent)
                self._meant[name] = sha256_file(source / name)
        return names

    def publish(self) -> None:
        """Compare every file beside the tensors with what was meant to be in it, then rename the
        folder into place.

        The tensors are the caller's to compare: only it knows what they stand for.
        """
        with self._disk():
            for name, meant in self._meant.items():
                if sha256_file(self.partial / name) != meant:
                    raise ProofError(
                        f"{self.partial / name} is not what was written to it; check the disk for errors"
                    )
            for i, shard in enumerate(self._finished):
                with (self.partial / self._final_name(i)).open("rb") as f:
                    if hashlib.sha256(f.read(shard.head_bytes)).hexdigest() != shard.head_sha256:
                        raise ProofError(
                            f"{f.name} does not begin with the header that was written; check the disk for errors"
                        )
            fsync_path(self.partial)
            put_in_place(self.partial, self.path)
