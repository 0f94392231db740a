"""A checkpoint whose weights are small floats with scales (FP8, MXFP4), read as the numbers that
they are. To quantize, it is a checkpoint like any other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources import float8, mxfp4
from llmquant.checkpoint.sources.derived import DerivedReader, Made
from llmquant.checkpoint.sources.label import labels, named_dtypes, without_label
from llmquant.errors import FormatError, UsageError
from llmquant.formats.compressed_tensors.beyond import kv_cache, refuse_computing

FP8, MXFP4 = "fp8", "mxfp4"
# Names of codes, which are packed under a layout of their own.
_CODES = (".weight_packed", ".qweight", ".weight")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def small_floats(reader: CheckpointReader) -> str | None:
    """Which kind of small floats the weights are in; None for any other checkpoint."""
    if float8.weights_of(reader):
        return FP8
    return MXFP4 if mxfp4.weights_of(reader) else None


def as_floats(reader: CheckpointReader) -> CheckpointReader:
    """The checkpoint with plain weights in the dtype that its config names; the same reader where
    it has no small floats. One tensor at a time is dequantized, when it is read.

    Raises:
        UsageError, CheckpointError: weights without scales, or with scales that do not fit; FP8
            beside packed integers.
        LayoutError: a label that says more than what the weights are.
    """
    kind = small_floats(reader)
    if kind is None:
        return reader
    refuse_mixture(reader)
    dtype = _dtype(reader)
    label = next((found for _, found in labels(reader.config) if isinstance(found, dict)), {})
    refuse_label(reader, label)
    found = [
        *(float8.made_of(reader, label, dtype) if kind == FP8 else ()),
        *mxfp4.made_of(reader, dtype),
    ]
    made: dict[str, Made] = {name: one for name, one, _ in found}
    floats = DerivedReader(reader, made, {n for _, _, used in found for n in used})
    floats.config = without_label(reader.config)
    name = str(dtype).removeprefix("torch.")
    floats.notes = (
        *reader.notes,
        f"{len(made)} weights are in {kind.upper()}; they are read as the {name} numbers that they and their scales mean",
        *_dropped(label),
    )
    return floats


def refuse_label(reader: CheckpointReader, label: Mapping[str, Any]) -> None:
    """Raises LayoutError, with the folder, for a label under which an engine does not multiply by
    the weights alone."""
    try:
        refuse_computing(label)
    except FormatError as e:
        raise e.at(str(reader.path)) from e


def _dropped(label: Mapping[str, Any]) -> Iterator[str]:
    """What a label says that goes with it and changes no weight."""
    key = kv_cache(label)
    if key is not None:
        yield (
            f"config.json's {key} is left out: llmquant keeps keys and values in 16 or 32 bits, and engines that "
            "round them answer a little differently"
        )


def refuse_mixture(reader: CheckpointReader) -> None:
    """Raises UsageError for FP8 weights beside packed integers: either is read, but not both in one
    checkpoint."""
    packed = next(
        (
            n
            for n, i in reader.tensors.items()
            if not i.dtype.is_floating_point and n.endswith(_CODES)
        ),
        None,
    )
    fp8 = float8.weights_of(reader)
    if packed is not None and fp8:
        raise UsageError(
            f"{reader.path} has FP8 weights ({fp8[0]}) beside packed integers ({packed}); a mixture of the two is not read; "
            "give the original FP16 or BF16 model"
        )


def _dtype(reader: CheckpointReader) -> torch.dtype:
    known = (_DTYPES[name] for name in named_dtypes(reader.config) if name in _DTYPES)
    return next(known, torch.bfloat16)
