"""The folder of a GGUF file that is given where a folder is taken: imported once into the user's
cache, and found there the next time.

The cache is ``$XDG_CACHE_HOME/llmquant/gguf``, else ``~/.cache/llmquant/gguf``. A file counts as
the same while path, size and time of change of all its shards are. ``llmquant import`` writes a
folder where one wants it; whatever is in the cache may be deleted.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from llmquant.checkpoint.gguf.folder import write_folder
from llmquant.checkpoint.gguf.header import shards_of
from llmquant.runtime.host import user_cache

log = logging.getLogger(__name__)
_IMPORTER = 2  # changes where the same file gives another folder


def cached_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        what :func:`llmquant.checkpoint.gguf.folder.write_folder` raises.
    """
    shards = shards_of(path)
    seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in shards]
    key = hashlib.sha256(repr((_IMPORTER, seen)).encode()).hexdigest()[:12]
    folder = user_cache("gguf") / key / shards[0].resolve().stem
    if not (folder / "config.json").is_file():
        log.warning("importing %s into %s; later commands find it there", path, folder)
        write_folder(path, folder)
    return folder
