"""A family of model folders, written by hand where tools would not write them so, and what
transformers reads in each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLE, TOKENIZER, save
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from llmquant.checkpoint.reader import INDEX, SINGLE

Tensors = dict[str, Tensor]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# Tensors beside the codes stay what they are, so that they can be compared.
RTN = ("--method", "rtn", "--group-size", "16", "--store-dtype", "source")
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj"


def links_to(folder: Path, made: Path) -> Path:
    """A folder whose files are links to another's."""
    made.mkdir()
    for path in folder.iterdir():
        (made / path.name).symlink_to(path)
    return made


def put(folder: Path, tensors: Mapping[str, Tensor], name: str = SINGLE) -> None:
    """One weight file."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.contiguous().clone() for n, t in tensors.items()}, folder / name, {"format": "pt"}
    )


def index(folder: Path, weight_map: Mapping[str, str]) -> None:
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)})
    (folder / INDEX).write_text(text, encoding="utf-8")


def halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {n: tensors[n] for n in first}, {n: tensors[n] for n in second}


def shards(folder: Path, tensors: Tensors, names: tuple[str, str] = SHARDS) -> dict[str, str]:
    """Two shards and their index, in place of the single file; returns the weight map."""
    (folder / SINGLE).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    for name, part in zip(names, halves(tensors), strict=True):
        put(folder, part, name)
        weight_map |= dict.fromkeys(part, name)
    index(folder, weight_map)
    return weight_map


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **changes}), encoding="utf-8")


def other(tensors: Mapping[str, Tensor]) -> Tensors:
    """Other numbers under the same names."""
    return {n: t * 3 + 1 for n, t in tensors.items()}


def unprefixed(tensors: Mapping[str, Tensor], prefix: str = "model.") -> Tensors:
    return {n.removeprefix(prefix): t for n, t in tensors.items()}


Edit = Callable[[Path, Tensors], object]


@dataclass(frozen=True)
class Case:
    """A folder.

    Attributes:
        name: of the case.
        edit: writes it over a plain one, whose tensors it gets.
        reads: whether transformers reads it.
        kind, config: of the plain one.
        says: words of our note on it, or of our refusal.
        tokenizer: whether it has one.
    """

    name: str
    edit: Edit
    reads: bool = True
    kind: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    tokenizer: bool = False


def write_case(case: Case, folder: Path) -> Path:
    save(case.kind, folder, **case.config)
    for name in TOKENIZER if case.tokenizer else ():
        shutil.copyfile(EXAMPLE / name, folder / name)
    tensors = load_file(folder / SINGLE)
    case.edit(folder, tensors)
    return folder


def with_more(**more: Tensor) -> Edit:
    """Further tensors; ``__`` stands for a dot."""
    return lambda f, t: put(f, {**t, **{n.replace("__", "."): v for n, v in more.items()}})


def without(*names: str) -> Edit:
    return lambda f, t: put(f, {n: v for n, v in t.items() if n not in names})


def move(folder: Path, name: str) -> None:
    shutil.move(folder / SINGLE, folder / name)


def twice(first: bool, same: bool) -> Edit:
    """A tensor in both shards; the index names the first or the second."""

    def edit(folder: Path, tensors: Tensors) -> None:
        weight_map = shards(folder, tensors)
        a, b = halves(tensors)
        name = next(iter(a))
        put(folder, {**b, name: a[name] if same else a[name] * 2}, SHARDS[1])
        index(folder, {**weight_map, name: SHARDS[0 if first else 1]})

    return edit


@contextmanager
def quiet() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def as_transformers_reads(folder: Path) -> Tensors | None:
    """The state of transformers' model; None where it refuses, or would make numbers up."""
    with quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError):
            return None
    made_up = info["missing_keys"] or info["mismatched_keys"] or info["error_msgs"]
    return None if made_up else {n: t.detach() for n, t in model.state_dict().items()}


__all__ = ["EXAMPLE", "INDEX", "SINGLE"]
