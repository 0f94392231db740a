"""Reading model folders: safetensors only, lazily.

``CheckpointReader`` knows names, shapes and dtypes from the headers and reads a tensor when it is
asked for, so a 16 GB folder costs nothing to open. Pickle files are refused: unpickling runs code.
Its counterpart is :class:`llmquant.checkpoint.writer.CheckpointWriter`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmquant.errors import CheckpointError, UnfitModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Everything beside the weights that a served model needs; copied when present.
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
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UnfitModelError(
            f"{path} is missing; is {path.parent} a Hugging Face model folder?"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value


def _header(path: Path) -> dict[str, TensorInfo]:
    """Parse one shard's header and check it against the file, without reading weights."""
    try:
        with safe_open(path, framework="pt"):
            # the library's own reading refuses every header that is malformed or does not cover the
            # file exactly
            pass
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length))
    except (SafetensorError, OSError, struct.error, ValueError) as e:
        raise CheckpointError(
            f"{path} is truncated, damaged or not safetensors: {e}; fetch it again"
        ) from e
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, which llmquant does not read"
            )
        infos[name] = TensorInfo(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), stop - start)
    return infos


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and bool(name) and name == Path(name).name


class CheckpointReader:
    """Lazy tensors by name over one or many safetensors shards.

    Args:
        path: a model folder.

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
        self.config = read_json(self.path / "config.json")
        self.tensors: dict[str, TensorInfo] = {}
        for shard in self._shards():
            infos = _header(shard)
            twice = sorted(self.tensors.keys() & infos.keys())
            if twice:
                raise CheckpointError(
                    f"{shard}: tensor {twice[0]} is also in {self.tensors[twice[0]].file.name}"
                )
            self.tensors.update(infos)
        absent = sorted(self._weight_map().keys() - self.tensors.keys())
        if absent:
            raise CheckpointError(
                f"{self.path / INDEX} names {absent[0]}, which is in no shard; fetch the folder again"
            )
        if not self.tensors:
            raise CheckpointError(f"{self.path} has weight files without a single tensor")

    def _weight_map(self) -> dict[str, str]:
        """Tensor name → shard, from the index; empty without one."""
        index = self.path / INDEX
        if not index.is_file():
            return {}
        weight_map = read_json(index).get("weight_map")
        if (
            not isinstance(weight_map, dict)
            or not weight_map
            or not all(_is_file_name(n) for n in weight_map.values())
        ):
            raise CheckpointError(
                f"{index} holds no weight_map from tensor names to files of this folder"
            )
        return weight_map

    def _shards(self) -> list[Path]:
        names = sorted(set(self._weight_map().values()))
        missing = [n for n in names if not (self.path / n).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path / INDEX} names shards that are not there: {', '.join(missing)}"
            )
        if names:
            return [self.path / n for n in names]
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        others = sorted(self.path.glob("*.safetensors"))
        if len(others) == 1:
            return others
        if others:
            raise CheckpointError(
                f"{self.path} has {len(others)} safetensors files but no {INDEX}; fetch the index too"
            )
        pickles = [p.name for pattern in _PICKLES for p in sorted(self.path.glob(pattern))]
        if pickles:
            raise UnfitModelError(
                f"{self.path} holds only pickle files ({', '.join(pickles[:3])}), which can run code when loaded; "
                "convert the model to safetensors first"
            )
        raise UnfitModelError(f"{self.path} has no safetensors weights")

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
                tensor: Tensor = f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{info.file}: tensor {name} cannot be read: {e}") from e
        return tensor

    def files(self) -> list[Path]:
        """Shards in name order."""
        return sorted({info.file for info in self.tensors.values()})

    def digest(self) -> str:
        """sha256 over config.json and every shard: the identity of the weights."""
        h = hashlib.sha256()
        for path in [self.path / "config.json", *self.files()]:
            h.update(f"{path.name}:{sha256_file(path)}\n".encode())
        return h.hexdigest()
