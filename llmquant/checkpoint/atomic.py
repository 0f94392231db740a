"""Where a result goes: refused before any work if it cannot be right, and put in place by a rename
when it is whole.

A destination that exists is left untouched until its successor is complete; if the last rename
fails, the old one comes back. The folder in which it is built is locked for as long as its process
lives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llmquant.errors import CheckpointError, DiskError, UsageError


def refuse_bytes(path: Path) -> None:
    """Raises UsageError for a path that is no UTF-8."""
    try:
        os.fsencode(path).decode()
    except UnicodeError as e:
        raise UsageError(
            f"the path {path} is not UTF-8, and the safetensors library takes no other; rename it"
        ) from e


def utf8(text: str) -> bytes:
    """A text as UTF-8. A path in it may have come from the shell as bytes that the locale does not
    have, and Python has those as half characters."""
    try:
        raw = text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        raw = text.encode(errors="replace")
    return raw.decode(errors="replace").encode()


def check_destination(path: Path, overwrite: bool) -> None:
    """Refuse a destination that holds something or cannot be made.

    Raises:
        UsageError: it exists and is not an empty folder (and, with ``overwrite``, is not a model
            folder either), a file stands in its way, or its path is no UTF-8.
        CheckpointError: nothing may be written there.
    """
    refuse_bytes(path)
    try:
        _check_folder(path, overwrite)
        ancestor = next(p for p in path.parents if p.exists())
    except OSError as e:
        raise UsageError(f"{path} cannot be a folder: {e.strerror or e}") from e
    if not ancestor.is_dir():
        raise UsageError(f"{ancestor} is a file, so {path} cannot be made; choose another -o")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"no permission to write in {ancestor}; choose another -o, or change its permissions"
        )


def _check_folder(path: Path, overwrite: bool) -> None:
    if path.is_symlink() and not path.exists():
        raise UsageError(f"{path} is a broken link; remove it, or choose another -o")
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file; choose a folder that does not exist yet")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            f"{path} already exists and is not empty; choose another -o, or pass --overwrite"
        )
    if not (path / "config.json").is_file():
        raise UsageError(
            f"{path} is not a model folder, so --overwrite will not delete it; choose another -o"
        )


def refuse_source(path: Path, source: Path) -> None:
    """Refuse a destination that is the source, or a folder that holds it: replacing it would delete
    what is read.

    Raises:
        UsageError: it is.
    """
    destination, original = path.resolve(), source.resolve()
    if destination == original:
        raise UsageError(f"-o {path} is the model itself; choose another folder")
    if destination in original.parents and (path / "config.json").is_file():
        raise UsageError(
            f"-o {path} holds the model {source}, which --overwrite would delete; choose another folder"
        )


def put_in_place(whole: Path, path: Path) -> None:
    """Rename a finished folder to its destination, replacing what stands there.

    Raises:
        OSError: the rename failed; what stood there stands there again.
    """
    retired = path.with_name(f".{path.name}.replaced")
    if path.exists():
        remove(retired)
        path.rename(retired)
    try:
        whole.rename(path)
    except OSError:
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise
    fsync_path(path.parent)
    remove(retired)


def remove(path: Path) -> None:
    """Delete a folder or a link to one, if it is there and as far as the disk lets us."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses while ``folder`` is written into a DiskError."""
    try:
        yield
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = (
            "free some space and run again" if full else "choose another -o, or look after the disk"
        )
        raise DiskError(f"writing to {folder} failed: {e.strerror or e}; {hint}", full=full) from e


def lock_folder(folder: Path) -> int:
    """Make a folder if need be and lock it; the lock ends when the descriptor that is returned is
    closed or its process dies.

    Raises:
        UsageError: another process holds it.
        OSError: the folder cannot be made or locked.
    """
    while True:
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UsageError(
                    f"another llmquant process is writing to {folder}; wait for it, or choose another -o"
                ) from e
            # Who held it until now may have removed or renamed it meanwhile.
            if folder.exists() and folder.stat().st_ino == os.fstat(fd).st_ino:
                opened.pop_all()
                return fd


def partial_of(path: Path) -> Path:
    """Where a folder is built before it gets its name."""
    return path.with_name(f".{path.name}.partial")
