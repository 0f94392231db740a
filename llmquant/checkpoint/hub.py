"""From what a user writes for MODEL to a folder: a local path first, otherwise a Hugging Face hub
name.

Only safetensors, JSON, tokenizer and template files are fetched: no pickle, no Python code.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmquant.errors import CheckpointError, UnfitModelError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "LICENSE*", "NOTICE")


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder of a model given by path or by hub name, ``org/name`` or ``org/name@revision``.

    Raises:
        UsageError: neither a folder nor a possible hub name.
        CheckpointError: the hub does not have it, or cannot be reached and the cache does not hold
            it.
    """
    name = os.fspath(model)
    if not name:
        raise UsageError(
            "'' is neither a folder nor a hub name like org/model; was a variable empty?"
        )
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        is_file = path.is_file()
    except (RuntimeError, OSError) as e:  # a ~ that is nobody's home; a name longer than any file's
        raise UsageError(f"{name} is neither a folder nor a hub name like org/model: {e}") from e
    if is_file:
        raise UsageError(f"{name} is a file; give the model folder that holds it")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name} is neither a folder nor a hub name like org/model")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # The client's transport errors derive from its HTTP library's base, from which its own error
    # derives too.
    failures: tuple[type[BaseException], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    repo, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repo, revision=revision or None, allow_patterns=list(_WANTED))
        )
    except RepositoryNotFoundError as e:
        raise UnfitModelError(
            f"{name} is neither a local folder nor a model on the hub (or it is private: log in with `hf auth login`)"
        ) from e
    except LocalEntryNotFoundError as e:
        raise UnfitModelError(
            f"{name} is no folder here, not in the local cache, and the hub cannot be reached; "
            "check the spelling and the network, or give a folder"
        ) from e
    except failures as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{name} cannot be fetched from the hub: {first}") from e
