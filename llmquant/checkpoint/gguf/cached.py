"""The folder of a GGUF file that is given where a folder is taken: imported once into the user's
cache, and found there the next time.

The cache is ``$XDG_CACHE_HOME/llmquant/gguf``, else ``~/.cache/llmquant/gguf``. A file counts as
the same while path, size and time of change of all its shards are. ``llmquant import`` writes a
folder where one wants it; whatever is in the cache may be deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from llmquant.checkpoint.gguf.folder import write_folder
from llmquant.checkpoint.gguf.header import read_gguf

log = logging.getLogger(__name__)
_IMPORTER = 1  # changes where the same file gives another folder


def cached_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        what :func:`llmquant.checkpoint.gguf.folder.write_folder` raises.
    """
    model = read_gguf(path)
    first = model.files[0].resolve()
    seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in model.files]
    key = hashlib.sha256(repr((_IMPORTER, seen)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "llmquant" / "gguf" / key / first.stem
    if not (folder / "config.json").is_file():
        log.warning("importing %s into %s; later commands find it there", path, folder)
        write_folder(path, folder)
    return folder
