"""From what a user writes for MODEL to a folder: a local path first, otherwise a Hugging Face hub
name.

Of a repository its list of files is read first, then the index of its weights, and then the weights
that transformers would load and everything beside them that a new folder takes along
(:mod:`llmquant.checkpoint.companions.files`): no second copy of the weights, no pickle. Python
files are fetched as text, like the others, and never run.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from llmquant.checkpoint.companions.files import is_weights, sort_files
from llmquant.checkpoint.reader import INDEX, SINGLE, read_json
from llmquant.errors import CheckpointError, UnfitModelError, UsageError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
# Weights of something else than the model in the folder itself: of an adapter, of Mistral's own
# layout, of a variant in another precision.
_OTHER = re.compile(r"adapter_model|consolidated|\.(fp16|fp32|bf16|int8|int4|fp8)\.")
# What a folder's quantization is read from, and its record.
_RECORDS = ("quantize_config.json", "quant_config.json", "manifest.json", "recipe.yaml")


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


def wanted_files(
    name: str, files: Sequence[str], shards_of: Callable[[str], Iterable[str]]
) -> list[str]:
    """What is fetched of a repository.

    Args:
        name: the repository, for messages.
        files: all its files.
        shards_of: reads an index and gives the weight files that it names.

    Raises:
        CheckpointError: no safetensors weights that transformers would load, or an index that names
            shards which are not there.
    """
    there = set(files)
    beside = ["config.json", "README.md", *sort_files(files).carried]
    weights = _weights(name, there, shards_of)
    return sorted({*(n for n in (*beside, *_RECORDS) if n in there), *weights})


def _weights(
    name: str, there: set[str], shards_of: Callable[[str], Iterable[str]]
) -> Iterable[str]:
    """In transformers' order: one file, or else the shards of the index."""
    if SINGLE in there:
        return [SINGLE]
    if INDEX in there:
        shards = sorted(set(shards_of(INDEX)))
        missing = [s for s in shards if s not in there]
        if missing:
            raise CheckpointError(
                f"{name}: {INDEX} names shards that are not there: {', '.join(missing[:3])}"
            )
        return [INDEX, *shards]
    alone = [
        n for n in there if n.endswith(".safetensors") and "/" not in n and not _OTHER.search(n)
    ]
    if len(alone) == 1:
        return alone
    others = sorted(n for n in there if "/" not in n and is_weights(n))
    if "config.json" in there:
        raise CheckpointError(
            f"{name} has no {SINGLE} and no {INDEX} on the hub"
            + (f", only {', '.join(others[:3])}" if others else "")
            + "; llmquant reads safetensors only: look for another branch (NAME@refs/pr/1) or repository of the model"
        )
    return []


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

    def shards_of(index: str) -> list[str]:
        found = read_json(Path(hf_hub_download(repo, index, revision=at))).get("weight_map")
        return [s for s in found.values() if isinstance(s, str)] if isinstance(found, dict) else []

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
        wanted = wanted_files(name, files, shards_of)
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
