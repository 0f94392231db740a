"""A GGUF file written as an ordinary model folder: what ``llmquant import`` does.

Tensor by tensor: one is dequantized, put in the folder's order, rounded to the folder's dtype and
written, before the next is read. Then the folder is read back and every tensor compared with what
was to be written, and it gets its name.

The numbers are those of the file. They were rounded once, so a model that is quantized again starts
from weights that lie near another 4-bit lattice (or whatever the file's types have), and not from
those that were trained; the card says so.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmquant.checkpoint.atomic import check_destination, refuse_held
from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.gguf.config import config_of, generation_config, stored_config
from llmquant.checkpoint.gguf.header import GgufFile, read_gguf
from llmquant.checkpoint.gguf.names import Placed, places
from llmquant.checkpoint.gguf.running import refuse_idle
from llmquant.checkpoint.gguf.tokens.tokenizer import save_tokenizer
from llmquant.checkpoint.gguf.tokens.vocabulary import vocabulary_of
from llmquant.checkpoint.reader import CheckpointReader, sha256_tensor
from llmquant.checkpoint.weights.proof import prove_weights
from llmquant.checkpoint.weights.rounded import rounding
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import CheckpointError, LayoutError, UsageError
from llmquant.runtime.devices import AUTO, ChosenDtype, parse_dtype

OnProgress = Callable[[str, int, int], None]
FLOATS = frozenset({"F32", "F16", "BF16"})


def _nothing(phase: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class FolderOptions:
    """How to import.

    Attributes:
        dtype: of the folder's tensors; ``auto`` is bfloat16 where the file has bfloat16 matrices,
            float32 where all of them are float32, else float16.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per file.
    """

    dtype: str | None = AUTO
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What came out.

    Attributes:
        scheme: of linears that were kept packed; None where none was.
        rounding: which of the file's numbers the dtype does not hold, if any.
        types: GGUF type → how many tensors of the file have it.
        notes: what people should know.
    """

    path: Path
    model_type: str
    dtype: str
    scheme: str | None
    types: Mapping[str, int]
    tensors: int
    parameters: int
    source_bytes: int
    bytes_written: int
    notes: tuple[str, ...]
    rounding: str | None = None


@dataclass(frozen=True, slots=True)
class GgufSource:
    """A file, understood: everything that can be refused has been.

    Attributes:
        config: transformers' config object.
        architectures: the name of transformers' class.
    """

    file: GgufFile
    placed: Placed
    config: Any
    architectures: tuple[str, ...]
    notes: tuple[str, ...]


def open_gguf(path: str | os.PathLike[str]) -> GgufSource:
    """Read a file's header and bring it together with transformers' model.

    Raises:
        UsageError, CheckpointError, LayoutError: see the modules of this folder.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    file = read_gguf(Path(path))
    stated = config_of(file)
    vocabulary_of(file)
    try:
        config = AutoConfig.for_model(**stated.config)
        with init_empty_weights(include_buffers=False):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except CONFUSED as e:
        raise LayoutError(
            f"{file.path}: its metadata makes no {stated.model_type} model: {first_line(e)}"
        ) from e
    placed = places(file, empty)
    refuse_idle(file.path, empty)
    return GgufSource(file, placed, config, (type(empty).__name__,), stated.notes)


def write_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: FolderOptions | None = None,
    on_progress: OnProgress = _nothing,
) -> ImportResult:
    """Write a GGUF file as a model folder.

    Args:
        source: the file, or any of its shards.
        output: folder to make; appears whole, after its proof, or not at all.
        on_progress: called with ``writing`` or ``proving``, tensors done, and all of them.

    Raises:
        UsageError: no such file, a destination that exists, a dtype that is none or too small.
        LayoutError: an architecture, type or scaling that is not imported.
        CheckpointError: a damaged or incomplete file.
        ProofError: what was written is not what was read.
    """
    options = options or FolderOptions()
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    opened = open_gguf(source)
    refuse_held(destination, f"the model {opened.file.path}", opened.file.files)
    dtype = parse_dtype(options.dtype, auto=ChosenDtype(_own_dtype(opened.file))).dtype
    with CheckpointWriter(
        destination, max_shard_size=options.max_shard_size, overwrite=options.overwrite
    ) as writer:
        written = write_weights(opened, dtype, writer, on_progress)
        writer.finish_weights()
        notes = write_beside(opened, dtype, writer)
        writer.write_text("README.md", card(opened, written.rounding))
        prove_weights(CheckpointReader(writer.partial), written.digests, on_progress)
        writer.publish()
    notes = (*opened.notes, *notes)
    return import_result(opened, Path(output), dtype, writer, notes, written.rounding)


def import_result(
    opened: GgufSource,
    path: Path,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    notes: tuple[str, ...],
    rounding: str | None,
    scheme: str | None = None,
) -> ImportResult:
    """The result of a run that wrote a folder."""
    return ImportResult(
        path=path,
        model_type=opened.placed.model_type,
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
        types=dict(Counter(t.kind for t in opened.file.tensors.values())),
        tensors=len(opened.file.tensors),
        parameters=sum(len(p.names) * int(np.prod(p.shape)) for p in opened.placed.places),
        source_bytes=sum(f.stat().st_size for f in opened.file.files),
        bytes_written=writer.total_bytes,
        notes=notes,
        rounding=rounding,
    )


def _own_dtype(file: GgufFile) -> torch.dtype:
    kinds = {t.kind for t in file.tensors.values() if len(t.shape) > 1}
    if "BF16" in kinds:
        return torch.bfloat16
    return torch.float32 if kinds == {"F32"} else torch.float16


@dataclass(frozen=True, slots=True)
class Written:
    """What was written of a file: tensor → its sha256, and which numbers the dtype rounded."""

    digests: Mapping[str, str]
    rounding: str | None


def write_weights(
    opened: GgufSource,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    on_progress: OnProgress,
    but: frozenset[str] = frozenset(),
) -> Written:
    """Write every tensor but some.

    Raises:
        UsageError: a number that is infinite in the dtype.
        CheckpointError: one that is not finite in the file.
    """
    digests: dict[str, str] = {}
    rounded = numbers = 0
    for done, place in enumerate(opened.placed.places):
        on_progress("writing", done, len(opened.placed.places))
        if place.tensor.name in but:
            continue
        for name, values in opened.placed.read(place):
            exact = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
            tensor = _rounded(opened, name, exact, dtype)
            digests[name] = sha256_tensor(tensor)
            rounded += int((tensor.float() != exact).sum())
            numbers += exact.numel()
            writer.add(name, tensor)
    return Written(digests, rounding(rounded, numbers, dtype))


def _rounded(opened: GgufSource, name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = exact.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        if not bool(torch.isfinite(exact).all()):
            raise damaged(opened.file.path, name)
        wider = "float32" if dtype == torch.bfloat16 else "bfloat16"
        raise UsageError(
            f"{opened.file.path}: {name} has numbers up to {float(exact.abs().max()):g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; llmquant import {shlex.quote(str(opened.file.path))} "
            f"--dtype {wider} -o DIR makes a folder of it, which is then the MODEL"
        )
    return tensor


def damaged(path: str | os.PathLike[str], name: str) -> CheckpointError:
    """The error of a tensor with numbers that no file should have."""
    return CheckpointError(
        f"{path} is damaged: {name} holds numbers that are not finite; fetch it again"
    )


def write_beside(
    opened: GgufSource,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    quantization: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """config.json, generation_config.json and the tokenizer's files; returns notes."""
    config = stored_config(opened.config)
    config |= {"architectures": list(opened.architectures)}
    config |= {"dtype": str(dtype).removeprefix("torch.")}
    config |= {"quantization_config": dict(quantization)} if quantization else {}
    writer.write_json("config.json", config)
    writer.write_json("generation_config.json", generation_config(opened.file))
    with tempfile.TemporaryDirectory() as folder:
        notes = save_tokenizer(opened.file, opened.config, Path(folder))
        writer.copy_side_files(Path(folder))
    return notes


def card(opened: GgufSource, rounded: str | None) -> str:
    """README.md: where the numbers come from, which were rounded, and the file's licence."""
    import yaml

    said = opened.file.metadata
    head = front_matter(opened)
    front = f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n" if head else ""
    counts = Counter(t.kind for t in opened.file.tensors.values() if len(t.shape) > 1)
    types = ", ".join(f"{n} {kind}" for kind, n in counts.most_common())
    name = said.get("general.name") or opened.file.path.stem
    text = f"# {name}\n\nImported from `{opened.file.path.name}` with llmquant; its matrices are {types}.\n"
    text += f"\n{rounded}; `llmquant import --dtype float32` holds all.\n" if rounded else ""
    if counts.keys() - FLOATS:
        text += (
            "\nThese weights were quantized before. They lie near the file's own lattice of a few bits, so what a further\n"
            "quantization costs is measured against them, and not against the model that was trained.\n"
        )
    return front + text


def front_matter(opened: GgufSource) -> dict[str, Any]:
    """What a card says for machines, as far as the file says it."""
    said = opened.file.metadata
    head = {"license": said.get("general.license"), "language": said.get("general.languages")}
    return {k: v for k, v in head.items() if v}
