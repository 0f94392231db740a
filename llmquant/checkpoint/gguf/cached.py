"""The folder of a GGUF file that is given where a folder is taken: imported once into the user's
cache, and found there the next time.

The cache is ``$XDG_CACHE_HOME/llmquant/gguf``, else ``~/.cache/llmquant/gguf``. A file counts as
the same while path, size and time of change of all its shards are. One process imports it, and
others wait. Whatever is in the cache may be deleted: a folder that has not all of the files that
were written counts as none. ``llmquant import`` writes a folder where one wants it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from llmquant.checkpoint.atomic import disk, lock_folder, remove
from llmquant.checkpoint.gguf.folder import write_folder
from llmquant.checkpoint.gguf.header import shards_of
from llmquant.errors import CheckpointError, DiskError
from llmquant.runtime.host import user_cache

log = logging.getLogger(__name__)
_IMPORTER = 5  # changes where the same file gives another folder


def cached_folder(path: Path) -> Path:
    """The folder, made if it is not there or not whole.

    Raises:
        what :func:`llmquant.checkpoint.gguf.folder.write_folder` raises.
        CheckpointError: nothing can be written into the cache.
    """
    shards = shards_of(path)
    seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in shards]
    key = hashlib.sha256(repr((_IMPORTER, seen)).encode()).hexdigest()[:12]
    folder = user_cache("gguf") / key / shards[0].resolve().stem
    if _whole(folder):
        return folder
    with _alone(path, folder.parent):
        if not _whole(folder):  # another process may have made it meanwhile
            log.warning("importing %s into %s; later commands find it there", path, folder)
            remove(folder)
            write_folder(path, folder)
            with disk(folder.parent):
                _list_of(folder).write_text(json.dumps(_sizes(folder)), encoding="utf-8")
    return folder


def _list_of(folder: Path) -> Path:
    """The file beside a folder that says what was written into it."""
    return folder.with_name(f"{folder.name}.files.json")


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _whole(folder: Path) -> bool:
    """Whether a folder has all that was written into it."""
    try:
        written = json.loads(_list_of(folder).read_text(encoding="utf-8"))
        return (
            isinstance(written, dict)
            and bool(written)
            and written.items() <= _sizes(folder).items()
        )
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _alone(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock on the file's place in the cache; a place that stays empty is removed."""

    def wait() -> None:
        log.warning("another llmquant process is importing %s; waiting for it", path)

    try:
        lock = lock_folder(folder, wait)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as e:
        raise _unwritable(path, folder, e.strerror or str(e)) from e
    try:
        if not writable:
            raise _unwritable(path, folder, "no permission")
        yield
    except DiskError as e:
        if e.full:
            raise
        raise _unwritable(path, folder, str(e).partition(";")[0]) from e
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(lock)


def _unwritable(path: Path, folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be imported into the cache, {folder}: {why}; name another folder for caches "
        f"with XDG_CACHE_HOME, or run llmquant import {shlex.quote(str(path))} -o DIR and give DIR"
    )
