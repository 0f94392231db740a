"""Which files of a folder hold its weights: transformers' answer, in transformers' order.

A file that ``transformers_weights`` in config.json names, else ``model.safetensors``, else the
shards of ``model.safetensors.index.json``. Whatever else is there is left over from something else
(older shards beside a new single file, an index whose shards are gone) and does not count; it is
named in a note. Shards are read in the order of their names, and where two hold a tensor of one
name the later one's counts, whatever the index says: so does ``from_pretrained``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmquant.checkpoint.weights.json_files import read_json
from llmquant.errors import CheckpointError, UnfitModelError
from llmquant.runtime.finite import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHOSEN = "transformers_weights"  # config.json's key for a file of another name
_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What holds the weights.

    Attributes:
        files: in reading order.
        weight_map: tensor → file, as the index says; empty without an index.
        unnamed: the only file is one that transformers does not look for.
        notes: what lies beside them and is not read.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str] = field(default_factory=dict)
    unnamed: bool = False
    notes: tuple[str, ...] = ()


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files to read.

    Raises:
        CheckpointError: there are none, only pickles or an adapter, or an index that makes no
            sense.
    """
    chosen = config.get(CHOSEN)
    name = chosen if isinstance(chosen, str) else _usual(folder)
    if name is None:
        return WeightFiles((_only(folder),), unnamed=True)
    if not _inside(name):
        raise CheckpointError(
            f"{folder / 'config.json'}: {CHOSEN} is {name!r}, which is no file of this folder"
        )
    path = folder / name
    if not path.is_file():
        raise CheckpointError(
            f"{folder / 'config.json'}: {CHOSEN} names {name}, which is not there"
        )
    if not name.endswith(".index.json"):
        return WeightFiles((path,), notes=_beside(folder, {path}))
    weight_map = _weight_map(path)
    shards = [folder / n for n in sorted(set(weight_map.values()))]
    missing = [str(p.relative_to(folder)) for p in shards if not p.is_file()]
    if missing:
        raise CheckpointError(
            f"{path} names shards that are not there: {some(missing)}; fetch them too"
        )
    return WeightFiles(tuple(shards), weight_map, notes=_beside(folder, {path, *shards}))


def _usual(folder: Path) -> str | None:
    return next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), None)


def _inside(name: object) -> bool:
    """Whether a relative path stays in the folder."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(map(_inside, weight_map.values()))
    ):
        raise CheckpointError(
            f"{index} holds no weight_map from tensor names to files of this folder"
        )
    return weight_map


def _only(folder: Path) -> Path:
    """The one safetensors file of a folder that has none of the usual names."""
    found = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    pickles = [p.name for pattern in _PICKLES for p in sorted(folder.glob(pattern))]
    if (folder / _ADAPTER).is_file() and all(p.name.startswith("adapter_model") for p in found):
        raise UnfitModelError(_adapter(folder))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} has {len(found)} safetensors files but no {INDEX}; fetch the index too"
        )
    if pickles:
        raise UnfitModelError(
            f"{folder} holds only pickle files ({', '.join(pickles[:3])}), which can run code when loaded; "
            "convert the model to safetensors first"
        )
    raise UnfitModelError(f"{folder} has no safetensors weights")


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for a folder with an adapter and no model."""
    if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise UnfitModelError(_adapter(folder))


def _adapter(folder: Path) -> str:
    return (
        f"{folder} holds an adapter (LoRA), not a model; merge it into its base model first "
        "(peft: merge_and_unload, then save_pretrained)"
    )


def _beside(folder: Path, read: set[Path]) -> tuple[str, ...]:
    there = {*folder.glob("*.safetensors"), folder / INDEX}
    left = sorted(p.name for p in there - read if p.is_file())
    if not left:
        return ()
    source = min(p.name for p in read if p.parent == folder) if len(read) == 1 else INDEX
    return (f"weights are read from {source}, as transformers does; not read: {some(left)}",)
