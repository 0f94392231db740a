"""``convert`` itself: refuse, write, prove, publish."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoint.atomic import check_destination
from llmquant.checkpoint.companions.code import own_code
from llmquant.checkpoint.companions.files import companions, left_behind
from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.weights.rounded import rounding
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.check import DENSE, TARGETS, Checked, OnProgress, check
from llmquant.conversion.files import write_files
from llmquant.conversion.proof import prove
from llmquant.conversion.source import (
    Source,
    model_dtype,
    open_source,
    refuse_beyond_weights,
    refuse_stacked,
)
from llmquant.errors import UsageError
from llmquant.formats import FORMATS, Format
from llmquant.formats.engines import VLLM_AVX512, VLLM_NO_AVX512, refusals, vllm_here
from llmquant.formats.rules import Beside
from llmquant.runtime.devices import AUTO, ChosenDtype, parse_dtype


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        dtype: of the linears of a dense result; ``auto`` is the model's own.
        scale_dtype: in which scales are stored, where the layout leaves that open; None is the
            model's own.
        base: the unquantized model, to decide zero-points whose label is in doubt; otherwise
            magnitudes decide.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per file of a dense result.
    """

    dtype: str | None = AUTO
    scale_dtype: str | None = None
    base: str | os.PathLike[str] | None = None
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What came out. ``warnings`` are about the result, ``notes`` about the source and what
    became of the files beside its weights. ``rounding``: where a dense result's dtype does not
    hold every number of the source, which ones it rounded, and to what."""

    path: Path
    source_format: str
    format: str
    scheme: str
    modules: int
    bits_per_weight: float
    source_bytes: int
    bytes_written: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    rounding: str | None = None


def convert(
    model: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    options: ConvertOptions | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> ConvertResult:
    """Convert a quantized folder into another layout.

    Args:
        model: folder or hub name, quantized in any layout that llmquant reads, by whatever tool.
        to: a name of ``TARGETS``.
        output: folder to make; appears whole, after its proof, or not at all.
        on_progress: called with ``checking``, ``writing`` or ``proving``, modules done, and all of
            them.

    Raises:
        UsageError: no such layout, an option that does not apply, a destination that exists, a
            source that is not quantized.
        FormatError: the layout cannot hold the model; lists every module that refuses, with the
            reason.
        CheckpointError, ArchitectureError: the source cannot be read.
        ProofError: the source is not what its manifest says, or what was written is not the source.
    """
    options = options or ConvertOptions()
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    target = _target(to)
    source = open_source(model, options.base)
    refuse_beyond_weights(source, target.name)
    if target is DENSE:
        refuse_stacked(source)
    refuse_source(destination, model, source.reader.path)
    if options.base is not None:
        refuse_source(destination, options.base)
    dtype = _dtype(source, target, options)
    checked = check(source, target, dtype, options.scale_dtype is not None, on_progress)
    size = options.max_shard_size if target is DENSE else sys.maxsize
    with CheckpointWriter(destination, max_shard_size=size, overwrite=options.overwrite) as writer:
        write_weights(source, target, checked, dtype, writer, on_progress)
        write_files(source, target, checked, dtype, writer)
        prove(source, target, checked, dtype, CheckpointReader(writer.partial), on_progress)
        writer.publish()
    folder = source.reader.path
    found = companions(folder, source.reader.files())
    return ConvertResult(
        path=Path(output),
        source_format=source.packed.layout.name,
        format=target.name,
        scheme=checked.scheme,
        modules=len(checked.schemes),
        bits_per_weight=checked.bits_per_weight,
        source_bytes=sum(i.nbytes for i in source.reader.tensors.values()),
        bytes_written=writer.total_bytes,
        warnings=_warnings(target, checked, Beside.of(source.reader.config, source.skipped)),
        notes=(*source.notes, *left_behind(found), *own_code(folder, found)),
        rounding=rounding(checked.rounded, checked.weights, dtype),
    )


def _target(name: str) -> Format:
    if name == "gguf":
        raise UsageError(
            "gguf is a file and no folder; llmquant convert --to gguf, or llmquant export --to gguf, writes it"
        )
    if name not in TARGETS:
        raise UsageError(f"format {name!r} does not exist; choose one of {', '.join(TARGETS)}")
    return DENSE if name == DENSE.name else FORMATS[name]


def _dtype(source: Source, target: Format, options: ConvertOptions) -> torch.dtype:
    """The dtype of a dense result's linears, or of the scales."""
    if target is DENSE and options.scale_dtype is not None:
        raise UsageError(
            "a scale dtype means nothing for a dense result, which has no scales; use dtype"
        )
    if target is not DENSE and options.dtype not in (None, AUTO):
        raise UsageError(
            f"dtype is for dense results; {target.name} stores codes and scales (see scale dtype)"
        )
    asked = options.dtype if target is DENSE else options.scale_dtype
    stored = ChosenDtype(model_dtype(source.reader), "it is the model's own")
    return parse_dtype(asked, auto=stored).dtype


def write_weights(
    source: Source,
    target: Format,
    checked: Checked,
    dtype: torch.dtype,
    writer: CheckpointWriter,
    on_progress: OnProgress,
) -> None:
    """The second pass: shard by shard of the source, each module where the first of its tensors
    stood."""
    written: set[str] = set()
    for names in source.shards():
        for name in names:
            module = source.packed.module_of(name)
            if module is None:
                writer.add(name, source.as_kept(name, source.reader.read(name)))
            elif module not in written:
                on_progress("writing", len(written), len(checked.schemes))
                packed = target.pack(
                    source.weight(module), dtype, checked.schemes[module].activations
                )
                named = {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
                if target is DENSE:
                    named = {n: source.as_kept(n, tensor) for n, tensor in named.items()}
                writer.add_together(named)
                written.add(module)
        if target is not DENSE:
            writer.next_shard()
    writer.finish_weights()


def _warnings(target: Format, checked: Checked, beside: Beside) -> tuple[str, ...]:
    """What a user should know though nothing was lost: who will not take the result, and why."""
    if target is not DENSE:
        refused = refusals(target.name, checked.schemes, beside)
        everywhere, without = refused.pop(VLLM_AVX512), refused.pop(VLLM_NO_AVX512)
        here = [r for r in without if r not in everywhere] if vllm_here() == VLLM_NO_AVX512 else []
        named = {"vllm (CPU)": everywhere, VLLM_NO_AVX512: here, **refused}
        return tuple(
            f"{engine} will not take it: {reason}"
            for engine, reasons in named.items()
            for reason in reasons
        )
    if any(s.activations != "none" for s in checked.schemes.values()):
        return (
            "engines rounded the inputs of these linears to int8; those of a dense model they leave alone",
        )
    return ()
