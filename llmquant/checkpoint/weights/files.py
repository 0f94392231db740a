"""Which files of a folder hold its weights: transformers' answer, in transformers' order.

A file that ``transformers_weights`` in config.json names, else ``model.safetensors``, else the
shards of ``model.safetensors.index.json``. Whatever else is there is left over from something else
(older shards beside a new single file, an index whose shards are gone) and does not count; it is
named in a note. Shards are read in the order of their names, and where two hold a tensor of one
name the later one's counts, whatever the index says: so does ``from_pretrained``.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from llmquant.checkpoint.weights.json_files import lost, read_json
from llmquant.errors import CheckpointError, UnfitModelError, UsageError
from llmquant.runtime.finite import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHOSEN = "transformers_weights"  # config.json's key for a file of another name
_ADAPTER = "adapter_config.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")  # in transformers' order
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Weights of something else than the model in the folder itself: of an adapter, of Mistral's own
# layout, of a variant in another precision.
_VARIANT = re.compile(r"\.(fp16|fp32|bf16|int8|int4|fp8)\.")
_OTHER = re.compile(rf"adapter_model|consolidated|{_VARIANT.pattern}")


@dataclass(frozen=True, slots=True)
class WeightNames:
    """What holds the weights, by name relative to the folder.

    Attributes:
        files: in reading order.
        index: the index that names them, if one does.
        weight_map: tensor → file, as the index says; empty without one.
        unnamed: the only file is one that transformers does not look for.
    """

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    unnamed: bool = False


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The same in a folder of this machine.

    Attributes:
        files: in reading order.
        weight_map, unnamed: see :class:`WeightNames`.
        notes: what is beside them and is not read.
    """

    files: tuple[Path, ...]
    weight_map: Mapping[str, str]
    unnamed: bool
    notes: tuple[str, ...]


def weight_files(folder: Path, config: Mapping[str, Any]) -> WeightFiles:
    """The files to read.

    Raises:
        what :func:`weight_names` raises.
    """
    here = [path.name for path in folder.iterdir() if path.is_file()]
    try:
        names = weight_names(
            str(folder),
            config,
            here,
            exists=lambda name: (folder / name).is_file(),
            read_index=lambda name: read_json(folder / name),
            local=True,
        )
    except CheckpointError as e:
        links = filter(None, map(lost, sorted(folder.iterdir())))
        named = next((link for link in links if ".safetensors" in link), None)
        if named is None:
            raise
        raise CheckpointError(named) from e
    files = tuple(folder / name for name in names.files)
    return WeightFiles(files, names.weight_map, names.unnamed, _beside(here, names))


def weight_names(
    where: str,
    config: Mapping[str, Any],
    here: Collection[str],
    *,
    exists: Callable[[str], bool],
    read_index: Callable[[str], Mapping[str, Any]],
    local: bool = False,
) -> WeightNames:
    """Which files transformers would load, of a folder or of a repository on the hub.

    Args:
        where: it is, for messages.
        config: its config.json.
        here: names of the files in the folder itself.
        exists: whether there is a file of this relative name, in a subfolder too.
        read_index: reads an index.
        local: files can be renamed there.

    Raises:
        CheckpointError: there are none, only pickles or an adapter, or an index that makes no
            sense.
    """
    chosen = config.get(CHOSEN)
    usual = next((name for name in (SINGLE, INDEX) if name in here), None)
    name = chosen if isinstance(chosen, str) else usual
    if name is None:
        return WeightNames((_only(where, here, local=local),), unnamed=True)
    if not _inside(name):
        raise CheckpointError(
            f"{where}/config.json: {CHOSEN} is {name!r}, which is no file of this folder"
        )
    if not exists(name):
        raise CheckpointError(f"{where}/config.json: {CHOSEN} names {name}, which is not there")
    if not name.endswith(".index.json"):
        return WeightNames((name,))
    weight_map = _weight_map(f"{where}/{name}", read_index(name), exists)
    return WeightNames(_in_order(weight_map), name, weight_map)


def _weight_map(
    index: str, said: Mapping[str, Any], exists: Callable[[str], bool]
) -> dict[str, str]:
    """Tensor → file, as an index says.

    Raises:
        CheckpointError: it names no files, or some that are not there.
    """
    weight_map = said.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(map(_inside, weight_map.values()))
    ):
        raise CheckpointError(
            f"{index} holds no weight_map from tensor names to files of this folder"
        )
    missing = [shard for shard in _in_order(weight_map) if not exists(shard)]
    if missing:
        raise CheckpointError(
            f"{index} names shards that are not there: {some(missing)}; fetch them too"
        )
    return weight_map


def _in_order(weight_map: Mapping[str, str]) -> tuple[str, ...]:
    """The files of an index in reading order."""
    return tuple(sorted(set(weight_map.values())))


def pickle_files(folder: Path) -> tuple[Path, ...]:
    """The pickles that transformers would read of a folder without safetensors, in reading order.

    Raises:
        UsageError: it has safetensors.
        UnfitModelError: it has no such pickles.
        CheckpointError: an index that makes no sense.
    """
    here = {path.name for path in folder.iterdir() if path.is_file()}
    usual = next((name for name in (SINGLE, INDEX) if name in here), None)
    if usual is not None:
        raise UsageError(
            f"{folder} has safetensors weights ({usual}), so there is nothing to import; give the folder itself as MODEL"
        )
    name = next((name for name in _PICKLED if name in here), None)
    if name is None:
        raise UnfitModelError(
            f"{folder} has neither {_PICKLED[0]} nor {_PICKLED[1]}, which transformers would look for, so there is "
            "nothing to import; of a GGUF file give the file itself"
        )
    if name == _PICKLED[0]:
        return (folder / name,)
    weight_map = _weight_map(
        f"{folder}/{name}", read_json(folder / name), lambda shard: (folder / shard).is_file()
    )
    return tuple(folder / shard for shard in _in_order(weight_map))


def pickle_index(folder: Path) -> tuple[Path, ...]:
    """The index that names :func:`pickle_files`, where one does."""
    single, index = (folder / name for name in _PICKLED)
    return () if single.is_file() else (index,)


def _inside(name: object) -> bool:
    """Whether a relative path stays in the folder."""
    if not isinstance(name, str) or not name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def _only(where: str, here: Collection[str], *, local: bool) -> str:
    """The one safetensors file of a folder that has none of the usual names."""
    there = sorted(name for name in here if name.endswith(".safetensors"))
    alone = [name for name in there if not _OTHER.search(name)]
    if _ADAPTER in here and not alone:
        raise UnfitModelError(_adapter(where))
    if len(alone) == 1:
        return alone[0]
    if alone:
        raise CheckpointError(
            f"{where} has {len(alone)} safetensors files but no {INDEX}; fetch the index too"
        )
    if there:
        way_out = f"; rename it to {SINGLE}" if local and _VARIANT.search(there[0]) else ""
        raise UnfitModelError(
            f"{where} has no {SINGLE} and no {INDEX}, only {some(there)}, which transformers does "
            f"not load{way_out if len(there) == 1 else ''}"
        )
    pickles = sorted(name for name in here if name.endswith(_PICKLES))
    if pickles:
        usual = any(name in here for name in _PICKLED)
        raise UnfitModelError(_only_pickles(where, pickles, usual=usual, local=local))
    if any(name.endswith(".onnx") for name in here):
        raise UnfitModelError(
            f"{where} holds an ONNX graph and no safetensors weights; llmquant eval, chat and serve run "
            "what llmquant export --to onnx wrote"
        )
    raise UnfitModelError(f"{where} has no safetensors weights")


def _only_pickles(where: str, pickles: list[str], *, usual: bool, local: bool) -> str:
    """The refusal of pickles, with the way to safetensors.

    Args:
        usual: transformers would look for some of them.
    """
    found = f"{where} holds only pickle files ({some(pickles)})"
    if not usual:
        return (
            f"{found}, which can run code when loaded; none of them is {_PICKLED[0]}, which transformers would look "
            "for; take a safetensors version of the model"
        )
    if not local:
        repo, _, revision = where.partition("@")
        at = f" --revision {revision}" if revision else ""
        return (
            f"{found}, which can run code when loaded; of a folder that has them (hf download {repo}{at} --local-dir "
            "DIR) llmquant import writes safetensors, and runs no code in them"
        )
    path = where if Path(where).name not in ("", "..") else os.path.abspath(where)
    path = f"./{path}" if path.startswith("-") else path  # no option
    return (
        f"{found}, which can run code when loaded; this writes safetensors of the same tensors, and runs no code in them: "
        f"llmquant import {shlex.quote(path)} -o {shlex.quote(f'{path}-safetensors')}"
    )


def refuse_adapter(folder: Path) -> None:
    """Raises CheckpointError for a folder with an adapter and no model."""
    if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
        raise UnfitModelError(_adapter(str(folder)))


def _adapter(where: str) -> str:
    return (
        f"{where} holds an adapter (LoRA), not a model; merge it into its base model first "
        "(peft: merge_and_unload, then save_pretrained)"
    )


def _beside(here: Collection[str], names: WeightNames) -> tuple[str, ...]:
    """What looks like the model's weights and is not read."""
    left = sorted(
        name
        for name in here
        if (name.endswith(".safetensors") or name == INDEX)
        and name not in (*names.files, names.index)
    )
    source = names.index or names.files[0]
    return (
        (f"weights are read from {source}, as transformers does; not read: {some(left)}",)
        if left
        else ()
    )
