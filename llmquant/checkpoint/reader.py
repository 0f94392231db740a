"""Reading model folders: safetensors only, lazily.

``CheckpointReader`` knows names, shapes and dtypes from the headers and reads a tensor when it is
asked for, so a 16 GB folder costs nothing to open. Pickle files are refused, since unpickling runs
code (:mod:`llmquant.conversion.pickles` turns them into safetensors).
Its counterpart is :class:`llmquant.checkpoint.writer.CheckpointWriter`.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmquant.checkpoint.weights.files import INDEX, SINGLE, refuse_adapter, weight_files
from llmquant.checkpoint.weights.headers import TensorInfo, read_header
from llmquant.checkpoint.weights.json_files import read_json
from llmquant.errors import CheckpointError, UnfitModelError
from llmquant.runtime.finite import some

# Files beside the weights that transformers or engines read.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_tensor(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's dtype, shape and bytes."""
    h = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        h.update(flat.view(torch.uint8).numpy().data)
    return h.hexdigest()


class CheckpointReader:
    """Lazy tensors by name over one or many safetensors shards.

    Args:
        path: a model folder.

    Attributes:
        config: config.json.
        tensors: name → what its header says. Of a tensor that several shards hold, the last one's.
        weight_map: tensor → file as the index says; empty without one.
        unnamed: the weights are in a file that transformers does not look for.
        notes: what was found and left aside, for people.

    Raises:
        CheckpointError: no folder, no config.json, no safetensors, only pickle files, a damaged
            shard or index.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise UnfitModelError(
                f"{self.path} is not a folder; give a local model folder or a hub name like org/model"
            )
        refuse_adapter(self.path)
        self.config = read_json(self.path / "config.json")
        found = weight_files(self.path, self.config)
        self.weight_map, self.unnamed = found.weight_map, found.unnamed
        self.tensors: dict[str, TensorInfo] = {}
        repeated: set[str] = set()
        for file in found.files:
            infos = read_header(file)
            repeated |= self.tensors.keys() & infos.keys()
            self.tensors.update(infos)
        if not self.tensors:
            raise CheckpointError(f"{self.path} has weight files without a single tensor")
        self.notes = (*found.notes, *self._of_index(repeated))

    def _of_index(self, repeated: set[str]) -> list[str]:
        """Where index and shards do not say the same."""
        notes = []
        if repeated:
            notes.append(
                f"{some(sorted(repeated))}: in more than one shard; the last shard's numbers count, as in transformers"
            )
        absent = sorted(self.weight_map.keys() - self.tensors.keys())
        if absent:
            notes.append(f"the index names {some(absent)}, in no shard")
        return notes

    def renamed(self, names: Mapping[str, str]) -> CheckpointReader:
        """The same tensors, some of them under other names; no two may get one name."""
        other = copy.copy(self)
        other.tensors = {names.get(name, name): info for name, info in self.tensors.items()}
        assert len(other.tensors) == len(self.tensors)
        return other

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError as e:
            raise CheckpointError(f"{self.path}: no tensor named {name}") from e

    def read(self, name: str) -> Tensor:
        """Read one tensor (memory-mapped; pages are loaded as they are touched).

        Raises:
            CheckpointError: no such tensor, or a damaged file.
        """
        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as f:
                tensor: Tensor = f.get_tensor(info.stored)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {e}") from e
        return tensor

    def read_part(self, name: str, index: int) -> Tensor:
        """One entry along a tensor's first dimension; pages of the others are not loaded.

        Raises:
            what :meth:`read` raises.
        """
        return self.read(name)[index]

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor, mapped from its file, which is opened once.

        Raises:
            CheckpointError: a damaged file.
        """
        found: dict[str, Tensor] = {}
        for file in self.files():
            try:
                with safe_open(file, framework="pt") as f:
                    found |= {
                        n: f.get_tensor(i.stored) for n, i in self.tensors.items() if i.file == file
                    }
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{file} cannot be read: {e}") from e
        return found

    def files(self) -> list[Path]:
        """Shards in name order."""
        return sorted({info.file for info in self.tensors.values()})

    def digest(self) -> str:
        """sha256 over config.json and every shard: the identity of the weights."""
        h = hashlib.sha256()
        for path in [self.path / "config.json", *self.files()]:
            h.update(f"{path.name}:{sha256_file(path)}\n".encode())
        return h.hexdigest()


class ReaderView(CheckpointReader):
    """A checkpoint of which some tensors are read otherwise than they are stored.

    Args:
        inner: the reader beneath; the view starts with all that it knows.
    """

    def __init__(self, inner: CheckpointReader) -> None:
        vars(self).update(vars(inner))
        self.inner = inner

    def read(self, name: str) -> Tensor:
        return self.inner.read(name)

    def read_all(self) -> dict[str, Tensor]:
        return {name: self.read(name) for name in self.tensors}


__all__ = [
    "INDEX",
    "SIDE_FILES",
    "SINGLE",
    "CheckpointReader",
    "ReaderView",
    "TensorInfo",
    "read_json",
    "sha256_file",
    "sha256_tensor",
]
