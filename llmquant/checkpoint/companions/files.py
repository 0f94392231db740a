"""The files of a model folder beside its weights: which of them go along into a new folder, and why
the others stay behind.

Everything that is not weights goes along: tokenizers of every kind, chat templates, processors,
licences, and Python files too. Those are copied as text and never run; they go along because
``auto_map`` in the configs, which are copied as they are, points to them. A subfolder goes along
whole if nothing in it is weights (``additional_chat_templates/``), or not at all (``original/``,
``checkpoint-500/``, ``onnx/``). What a new folder gets anew (config.json, README.md, records of
other runs) is not taken from the old one. The same rule says what is fetched from the hub
(:mod:`llmquant.checkpoint.hub`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

# Weights, in whatever form, and archives, which may hold some.
WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".msgpack.index.json",
    ".onnx",
    ".onnx_data",
    ".onnx.data",
    ".tflite",
    ".ot",
    ".npy",
    ".npz",
    ".mlmodel",
    ".nemo",
    ".llamafile",
    ".engine",
    ".parquet",
    ".arrow",
    ".tar",
    ".gz",
    ".tgz",
    ".zip",
    ".7z",
)
# What describes the weights as they are stored, and stays true only where they stay the same.
DESCRIBING = (
    "config.json",
    "README.md",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quant_cfg.json",
)
# Written anew for every folder, or a record of another one.
_ANEW = frozenset({*DESCRIBING, "manifest.json", "recipe.yaml"})
# Beside a whole model these make transformers load an adapter, whose weights are not carried.
_ADAPTER = frozenset({"adapter_config.json", "adapter_model.json"})
_LARGEST = 1 << 30
_READER_NAMES = (".safetensors", ".safetensors.index.json")
SHOWN = 6


@dataclass(slots=True)
class Companions:
    """Names relative to the folder, with forward slashes, sorted.

    Attributes:
        carried: what goes along.
        left: what stays behind → why.
    """

    carried: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, or lists files that do."""
    return name.lower().endswith(WEIGHTS)


def sort_files(names: Iterable[str], sizes: dict[str, int] | None = None) -> Companions:
    """What of a folder's files (relative names) goes along. Its weights are not named at all where
    they lie in the folder itself; hidden files and Python's caches neither."""
    every = sorted(n for n in names if not _hidden(PurePosixPath(n)))
    heavy = {n.split("/")[0] for n in every if "/" in n and is_weights(n)}
    found = Companions()
    for name in every:
        top = name.split("/")[0]
        if "/" in name and top in heavy:
            found.left[f"{top}/"] = "holds weights"
        elif is_weights(name) or name in _ANEW:
            continue
        elif name in _ADAPTER:
            found.left[name] = "belongs to an adapter"
        elif (sizes or {}).get(name, 0) > _LARGEST:
            found.left[name] = "is larger than 1 GiB"
        else:
            found.carried.append(name)
    return found


def companions(folder: Path, read: Iterable[Path] = ()) -> Companions:
    """What of a model folder goes along.

    Args:
        folder: on this machine.
        read: its weight files that are read; any other is named as left behind, except safetensors
            files, which the reader names itself.
    """
    sizes: dict[str, int] = {}
    strange: dict[str, str] = {}

    def unreadable(error: OSError) -> None:
        strange[f"{Path(error.filename).relative_to(folder).as_posix()}/"] = "cannot be read"

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = [f for f in folders if not _hidden(PurePosixPath(f))]
        for name in (*files, *folders):
            path = Path(parent) / name
            reason = _strange(path, name in folders)
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
            elif reason and not _hidden(PurePosixPath(name)):
                strange[path.relative_to(folder).as_posix()] = reason
    found = sort_files(sizes, sizes)
    found.left |= {n: why for n, why in strange.items() if n not in _ANEW}
    known = {path.name for path in read}
    for name in sorted(
        n for n in sizes if "/" not in n and is_weights(n) and not _hidden(PurePosixPath(n))
    ):
        if known and name not in known and not name.endswith(_READER_NAMES):
            found.left[name] = "other weights"
    found.left = dict(sorted(found.left.items()))
    return found


def files_read(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """All of a model folder that is read or goes along, with its weights; some may not be
    there."""
    beside = (*_ANEW, *companions(folder).carried)
    return [*weights, *folder.glob("*.index.json"), *(folder / name for name in beside)]


def _strange(path: Path, is_folder: bool) -> str | None:
    """Why something in a folder cannot go along: neither a file nor a folder of its own."""
    if is_folder:
        return "a link to a folder" if path.is_symlink() else None
    if path.is_file():
        return None
    return "a link to nothing" if path.is_symlink() else "no file"


def left_behind(found: Companions) -> list[str]:
    """Sentences on what stays behind: one a reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in found.left.items():
        reasons.setdefault(reason, []).append(name)
    return [
        f"left behind in the model folder ({reason}): {', '.join(names[:SHOWN])}"
        + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for reason, names in reasons.items()
    ]


def _hidden(name: PurePosixPath) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts) or (
        name.suffix == ".pyc"
    )
