"""From what a user writes for MODEL to a folder: a local path first, otherwise a Hugging Face hub
name. A GGUF file stands for the folder that it is imported into, in the user's cache
(:mod:`llmquant.checkpoint.gguf.cached`).

Of a repository its list of files is read first, then the index of its weights, and then the weights
that transformers would load and everything beside them that a new folder takes along
(:mod:`llmquant.checkpoint.companions.files`): no second copy of the weights, no pickle. Python
files are fetched as text, like the others, and never run.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmquant.checkpoint.atomic import refuse_bytes
from llmquant.checkpoint.companions.files import sort_files
from llmquant.checkpoint.gguf.header import is_gguf
from llmquant.checkpoint.weights.files import weight_names
from llmquant.checkpoint.weights.json_files import lost, read_json
from llmquant.errors import CheckpointError, UnfitModelError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_ADDRESS = re.compile(r"(?:https?://)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)")
# What a folder's quantization is read from, and its record.
_RECORDS = ("quantize_config.json", "quant_config.json", "manifest.json", "recipe.yaml")


def resolve(model: str | os.PathLike[str]) -> Path:
    """The folder of a model given by path or by hub name, ``org/name`` or ``org/name@revision``;
    of a GGUF file the folder it is imported into.

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
            refuse_bytes(path)
            return path
        is_file = path.is_file()
    except (RuntimeError, OSError) as e:  # a ~ that is nobody's home; a name longer than any file's
        raise UsageError(f"{name} is neither a folder nor a hub name like org/model: {e}") from e
    if is_file and is_gguf(path):
        from llmquant.checkpoint.gguf.cached import cached_folder  # it costs transformers

        return cached_folder(path)
    if is_file:
        raise UsageError(f"{name} is a file; give the model folder that holds it")
    if (gone := lost(path)) is not None:
        raise UsageError(gone)
    if path.suffix.lower() == ".gguf":
        raise UsageError(f"{name} is not there; give a GGUF file, a model folder or a hub name")
    if not _NAME.fullmatch(name):
        address = _ADDRESS.match(name)
        way_out = f"; give {address[1]}" if address else ""
        raise UsageError(f"{name} is neither a folder nor a hub name like org/model{way_out}")
    return _download(name)


def wanted_files(
    name: str, files: Sequence[str], read: Callable[[str], Mapping[str, Any]]
) -> list[str]:
    """What is fetched of a repository.

    Args:
        name: the repository, for messages.
        files: all its files.
        read: fetches and reads one of its JSON files.

    Raises:
        CheckpointError: no safetensors weights that transformers would load, or an index that names
            shards which are not there.
    """
    beside = ["config.json", "README.md", *_RECORDS]
    wanted = {*(n for n in beside if n in files), *sort_files(files).carried}
    if "config.json" not in files:
        return sorted(wanted)  # no model: the reader says so
    here = [n for n in files if "/" not in n]
    try:
        weights = weight_names(
            name, read("config.json"), here, exists=set(files).__contains__, read_index=read
        )
    except UnfitModelError as e:
        raise UnfitModelError(
            f"{e}; llmquant reads safetensors only: look for another branch (NAME@refs/pr/1) or repository of the model"
        ) from e
    return sorted({*wanted, *weights.files, *filter(None, [weights.index])})


def _download(name: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The client's transport errors derive from its HTTP library's base, from which its own error
    # derives too.
    failures: tuple[type[BaseException], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
    repo, _, revision = name.partition("@")
    at = revision or None

    def read(file: str) -> Mapping[str, Any]:
        return read_json(Path(hf_hub_download(repo, file, revision=at)))

    try:
        try:
            files = HfApi().list_repo_files(repo, revision=at)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except failures as unreachable:
            try:  # what was fetched before is as good
                return Path(snapshot_download(repo, revision=at, local_files_only=True))
            except LocalEntryNotFoundError:
                if isinstance(unreachable, HfHubHTTPError):
                    raise unreachable from None  # the hub was there, and says why
                raise
        wanted = wanted_files(name, files, read)
        return Path(
            snapshot_download(repo, revision=at, allow_patterns=[glob.escape(n) for n in wanted])
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
