"""``export --to onnx`` itself: refuse, build, prove, check, publish."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoint.atomic import check_destination
from llmquant.checkpoint.companions.files import companions, left_behind
from llmquant.checkpoint.companions.originals import refuse_source
from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.manifest import find_manifest
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.weights.exported import DATA, MODEL, is_onnx
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.onnx.build import build, builder_options
from llmquant.conversion.onnx.environment import OnnxEnvironment, find_onnx
from llmquant.conversion.onnx.files import Export, write_beside
from llmquant.conversion.onnx.options import INT8, PACKED, OnnxOptions, choose_weights, graph_dtype
from llmquant.conversion.onnx.proving.check import check_graph, demand_same
from llmquant.conversion.onnx.proving.graph import Graph, read_graph
from llmquant.conversion.onnx.proving.numbers import (
    float_numbers,
    float_source,
    integer_numbers_of,
    packed_numbers_of,
)
from llmquant.conversion.onnx.proving.proof import Numbers, integer_inputs, prove
from llmquant.conversion.onnx.source import check_architecture, one_scheme, plan, write_packed
from llmquant.conversion.source import Source, open_source, refuse_changed, refuse_gguf
from llmquant.errors import UsageError
from llmquant.records import OnnxRecord

OnProgress = Callable[[str, int, int], None]
_BUILT, _SOURCE = "built", "source"


@dataclass(frozen=True, slots=True)
class OnnxResult:
    """What came out: the folder, its record, bytes written, and what people should know."""

    path: Path
    record: OnnxRecord
    bytes_written: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def export_onnx(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: OnnxOptions | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> OnnxResult:
    """Export a model folder for ONNX Runtime.

    Args:
        model: folder or hub name, quantized in any layout that llmquant reads, or not.
        output: folder to make; appears whole, after its proof, or not at all.
        on_progress: called with a word for the phase, steps done, and all of them.

    Raises:
        UsageError: an option that does not apply, a destination that exists, no environment with
            ONNX Runtime.
        LayoutError: linears that ONNX Runtime or the builder cannot hold, each with the reason.
        ArchitectureError: a model that the builder lacks.
        LlmquantError: the builder failed; carries the end of what it printed.
        DiskError: the disk refused.
        ProofError: the graph does not hold the folder's numbers, or computes others.
    """
    options = options or OnnxOptions()
    refuse_gguf(model)
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    job = _open(resolve(model), options)
    refuse_source(destination, model, job.reader.path)
    with CheckpointWriter(destination, overwrite=options.overwrite) as writer:
        export = _build(job, options, writer.partial, on_progress)
        on_progress("writing", 0, 1)
        record = write_beside(export, job.reader, job.source, options, writer)
        writer.publish()
    size = sum((destination / n).stat().st_size for n in (MODEL, DATA))
    folder = job.reader.path
    notes = left_behind(companions(folder, job.reader.files()))
    return OnnxResult(Path(output), record, size, _warnings(record), tuple(notes))


@dataclass(frozen=True, slots=True)
class _Job:
    """A folder that was opened, and how it will be exported. ``source`` is None for one that is not
    quantized."""

    reader: CheckpointReader
    source: Source | None
    kind: str
    environment: OnnxEnvironment


def _open(path: Path, options: OnnxOptions) -> _Job:
    """Everything that is refused before anything is written."""
    if is_onnx(path):
        raise UsageError(f"{path} is an ONNX export already; export the folder it was made of")
    reader = CheckpointReader(path)
    source = None if quantization_of(reader) is None else open_source(path, None)
    if source is None:
        refuse_changed(reader, find_manifest(reader.path))
    rounds = source is not None and _rounds_inputs(source)
    kind = choose_weights(options, source is not None, rounds)
    check_architecture(reader.config, path)
    if kind == PACKED and source is not None:
        plan(source, graph_dtype(kind, options.provider))
    return _Job(reader, source, kind, find_onnx(options.python))


def _build(job: _Job, options: OnnxOptions, work: Path, on_progress: OnProgress) -> Export:
    """Write the graph into ``work / "built"``, and prove and check it there."""
    dtype = graph_dtype(job.kind, options.provider)
    built, temporary = work / _BUILT, work / _SOURCE
    on_progress("preparing", 0, 4)
    fuse = True
    if job.kind == PACKED and job.source is not None:
        chosen = plan(job.source, dtype)
        fuse = one_scheme(chosen.packed)
        write_packed(job.source, chosen, temporary)
        numbers, source = packed_numbers_of(job.source, chosen, dtype, options.head), temporary
    else:
        source = float_source(job.reader, job.source, temporary)
        numbers = float_numbers(source, dtype, job.kind, options.head)
    on_progress("building", 1, 4)
    extra = builder_options(
        job.kind, options.head, options.accuracy_level, numbers.places.head is None, fuse
    )
    build(job.environment, source, built, job.kind, options.provider, extra)
    if job.kind == INT8:
        on_progress("rounding", 2, 4)
        numbers = _to_int8(job, numbers, built, options.head)
    graph = read_graph(job.environment, built / MODEL)
    found = prove(graph, numbers, on_progress)
    on_progress("checking", 3, 4)
    check = None
    if options.check and options.provider == "cpu":
        python = job.environment.python
        check = check_graph(job.reader.path, built, job.reader, python)
        demand_same(check, found, job.kind, options.accuracy_level, built)
    return Export(graph, numbers, found, check, job.kind, job.environment.versions)


def _to_int8(job: _Job, numbers: Numbers, built: Path, head: str) -> Numbers:
    """Round the float graph's weights; of a W8A8 folder, put its own codes in their place."""
    kept = () if head == INT8 else ("/lm_head/MatMul",)
    graph = built / MODEL
    job.environment.script(
        "ONNX Runtime's dynamic quantization", "dynamic", built, str(graph), *kept
    )
    if job.source is not None and _rounds_inputs(job.source):
        numbers = integer_numbers_of(job.source, numbers)
        _put_codes(read_graph(job.environment, graph), numbers)
    return numbers


def _rounds_inputs(source: Source) -> bool:
    return any(s.activations != "none" for s in source.packed.schemes.values())


def _put_codes(graph: Graph, numbers: Numbers) -> None:
    for node in (n for n in graph.nodes if n.op == "MatMulInteger"):
        rows = [r for r in numbers.places.rows_of(node.name) if r.module in numbers.packed]
        if not rows:
            continue
        parts = [(r, numbers.packed[r.module]()) for r in rows]
        codes = torch.cat([w.codes[r.start : r.stop] for r, w in parts])
        scales = torch.cat([w.scales[r.start : r.stop] for r, w in parts])
        weight, scale, _ = integer_inputs(graph, node)
        graph.overwrite(weight, (codes.to(torch.int16) - 128).to(torch.int8).T)
        graph.overwrite(scale, scales.flatten())


def _warnings(record: OnnxRecord) -> tuple[str, ...]:
    """What a user should know though nothing failed."""
    said = []
    kinds = sorted(set(record.requantized.values()))
    if record.requantized:
        count = len(record.requantized)
        what = "the head" if set(record.requantized) == {"/lm_head/MatMul"} else f"{count} nodes"
        said.append(
            f"rounded by ONNX Runtime's tools and not by llmquant: {what} ({', '.join(kinds)})"
        )
    by_reason: dict[str, list[str]] = {}
    for name, why in record.altered.items():
        by_reason.setdefault(why, []).append(name)
    said += [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}"
        for why, names in by_reason.items()
    ]
    if record.check is None:
        why = "--no-check" if record.provider == "cpu" else f"the graph is for {record.provider}"
        said.append(f"its logits were not compared with the folder's: {why}")
    return tuple(said)
