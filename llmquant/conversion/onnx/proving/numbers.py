"""What a folder holds, as the proof asks for it: of a packed folder its codes, of a float one its
weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.onnx.options import INT8, KEPT
from llmquant.conversion.onnx.proving.places import Places
from llmquant.conversion.onnx.proving.proof import Numbers
from llmquant.conversion.onnx.source import Plan
from llmquant.conversion.run import ConvertOptions, convert
from llmquant.conversion.source import Source
from llmquant.models.reading.fit import fitted, placeless
from llmquant.models.reading.linears import linears_of

Reads = dict[str, Callable[[], Tensor]]


def packed_numbers_of(source: Source, chosen: Plan, dtype: torch.dtype, head: str) -> Numbers:
    """Of a packed folder whose codes go into the graph.

    Args:
        head: what is to become of a float head.
    """
    reader, names = source.reader, source.packed.others
    floats = _floats(reader, names)
    for name in chosen.floats:
        floats[f"{name}.weight"] = partial(_dequantized, source, name)
    own_head = (
        source.head if source.head is not None and f"{source.head}.weight" in floats else None
    )
    linears = {}
    if own_head is not None:
        linears[own_head] = floats.pop(f"{own_head}.weight")
    rows = {name: source.packed.shape(name)[0] for name in chosen.packed}
    rows |= {name: read().shape[0] for name, read in linears.items()}
    kept = source.head if source.head in rows else None
    places = Places.of(rows, kept, reader.config)
    packed = {name: partial(source.weight, name) for name in chosen.packed}
    asked = frozenset(linears if head != KEPT else ())
    return Numbers(packed, linears, floats, places, dtype, asked)


def float_source(reader: CheckpointReader, source: Source | None, temporary: Path) -> Path:
    """The float folder that the builder reads: the model's own, or a float32 one of a packed
    folder's numbers, which must not exist yet."""
    if source is None:
        return reader.path
    convert(reader.path, "dense", temporary, ConvertOptions(dtype="float32"))
    return temporary


def float_numbers(folder: Path, dtype: torch.dtype, kind: str, head: str) -> Numbers:
    """Of a float folder.

    Raises:
        CheckpointError, ArchitectureError: it cannot be read.
    """
    fit = fitted(CheckpointReader(folder))
    found = linears_of(fit.model, placeless(fit))
    floats = _floats(fit.reader, fit.reader.tensors)
    linears = {
        name: floats.pop(f"{name}.weight") for name in found.shapes if f"{name}.weight" in floats
    }
    tied = found.head is None or found.head not in linears
    places = Places.of(
        {name: found.shapes[name][0] for name in linears},
        None if tied else found.head,
        fit.reader.config,
    )
    rounded = set(linears) if kind == INT8 else set()
    if head == KEPT and found.head is not None:
        rounded.discard(found.head)
    return Numbers({}, linears, floats, places, dtype, frozenset(rounded))


def integer_numbers_of(source: Source, numbers: Numbers) -> Numbers:
    """The same with the codes of a W8A8 folder, which stand for its float weights."""
    codes = [n for n in source.packed.schemes if n in numbers.floats]
    packed = {name: partial(source.weight, name) for name in codes}
    floats = {n: read for n, read in numbers.floats.items() if n not in packed}
    asked = numbers.requantized - packed.keys()
    return Numbers(packed, floats, numbers.others, numbers.places, numbers.dtype, asked)


def _floats(reader: CheckpointReader, names: Iterable[str]) -> Reads:
    """Tensors that have floats → how to read one."""
    return {
        name: partial(_float, reader, name)
        for name in names
        if reader.info(name).dtype.is_floating_point
    }


def _float(reader: CheckpointReader, name: str) -> Tensor:
    return reader.read(name).to(torch.float32)


def _dequantized(source: Source, name: str) -> Tensor:
    return source.weight(name).dequantize(torch.float32)
