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
from collections import deque
from collections.abc import Callable, Iterable, Iterator
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


def refuse_held(path: Path, what: str, files: Iterable[Path]) -> None:
    """Refuse a destination whose replacement would take away what is read.

    Args:
        path: a folder that is replaced, or a file that is written over.
        what: is read, for the message.
        files: all of it; those that are not there do not count. Links are followed, and every
            step of their way counts.

    Raises:
        UsageError: one of them is the file, or lies in the folder or leads through it.
    """
    there = [f.absolute() for f in files if os.path.exists(f)]  # noqa: PTH110 - never an error
    if path.is_file():
        if any(map(path.samefile, there)):
            raise UsageError(
                f"{path} belongs to {what}, which would be overwritten; choose another name"
            )
        return
    for place in (path, partial_of(path), _retired_of(path)):
        if not place.is_dir() or (place == path and not (path / "config.json").is_file()):
            continue
        found = _held(place, there)
        if found is None:
            continue
        direct = any(map(place.samefile, found.parents))
        held = what if direct or place.samefile(found) else f"{what} ({found} leads into it)"
        raise UsageError(
            f"-o {path} holds {held}, which --overwrite would delete; choose another folder"
            if place == path
            else f"-o {path} would delete {place}, which holds {held}; choose another folder"
        )


def _held(folder: Path, files: Iterable[Path]) -> Path | None:
    """The first of absolute paths that leads to or through a folder."""
    passed: dict[Path, Path] = {}
    for file in files:
        for step in _steps(file):
            for place in (step, *step.parents):
                passed.setdefault(place, file)
    return next((file for place, file in passed.items() if folder.samefile(place)), None)


def _steps(path: Path) -> Iterator[Path]:
    """Where an absolute path leads: every link that it takes, every folder that it leaves again,
    and at last what it is."""
    left = deque(path.parts)
    at = Path(left.popleft())
    while left:
        part = left.popleft()
        if part == "..":
            yield at
            at = at.parent
            continue
        at = at / part
        if at.is_symlink():
            yield at
            left.extendleft(reversed(at.readlink().parts))
            at = at.parent
    yield at


def put_in_place(whole: Path, path: Path) -> None:
    """Rename a finished folder to its destination, replacing what stands there.

    Raises:
        OSError: the rename failed; what stood there stands there again.
    """
    retired = _retired_of(path)
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


def lock_folder(folder: Path, on_wait: Callable[[], None] | None = None) -> int:
    """Make a folder if need be and lock it; the lock ends when the descriptor that is returned is
    closed or its process dies.

    Args:
        on_wait: called before another process that holds it is waited for; without it nothing is
            waited for.

    Raises:
        UsageError: another process holds it, and ``on_wait`` is None.
        OSError: the folder cannot be made or locked.
    """
    while True:
        if folder.is_symlink():
            folder.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        # Who held it until now may have removed or renamed it meanwhile.
        with contextlib.ExitStack() as opened, contextlib.suppress(FileNotFoundError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                if on_wait is None:
                    raise UsageError(
                        f"another llmquant process is writing to {folder}; wait for it, or choose another -o"
                    ) from e
                on_wait()
                fcntl.flock(fd, fcntl.LOCK_EX)
            if folder.stat().st_ino == os.fstat(fd).st_ino:
                opened.pop_all()
                return fd


def partial_of(path: Path) -> Path:
    """Where a folder is built before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def _retired_of(path: Path) -> Path:
    """Where what stood at a destination is until its successor has its name."""
    return path.with_name(f".{path.name}.replaced")
