"""Everything beside the graph of an export: tokenizer, config, record and card."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoint.atomic import disk, fsync_path, remove
from llmquant.checkpoint.card import exported_card, front_matter
from llmquant.checkpoint.detect import without_quantization
from llmquant.checkpoint.manifest import MANIFEST, Conversion, Manifest, file_hashes, versions
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.files import foreign_manifest
from llmquant.conversion.onnx.options import INT8, PACKED, OnnxOptions
from llmquant.conversion.onnx.proving.graph import Graph, Node
from llmquant.conversion.onnx.proving.proof import Found, Numbers
from llmquant.conversion.source import Source
from llmquant.records import GraphCheck, OnnxRecord

_RECIPE = "recipe.yaml"
_FORMAT = "onnx"


@dataclass(frozen=True, slots=True)
class Export:
    """A graph that was built and proved, in ``graph.folder``."""

    graph: Graph
    numbers: Numbers
    found: Found
    check: GraphCheck | None
    kind: str
    tools: Mapping[str, str]


def write_beside(
    export: Export,
    reader: CheckpointReader,
    source: Source | None,
    options: OnnxOptions,
    writer: CheckpointWriter,
) -> OnnxRecord:
    """Move the graph to its place and write everything else; what was temporary is removed."""
    record, bits = _record(export, source, options), _bits(export, _linears(export))
    built = export.graph.folder
    writer.copy_side_files(reader.path)
    with disk(writer.partial):
        for path in sorted(built.iterdir()):
            if not (writer.partial / path.name).exists():
                shutil.move(path, writer.partial / path.name)
                fsync_path(writer.partial / path.name)
        for path in [p for p in writer.partial.iterdir() if p.name in ("built", "source", "cache")]:
            remove(path)
    config = without_quantization(reader.config)
    writer.write_json("config.json", config)
    recipe = reader.path / _RECIPE
    if recipe.is_file():
        writer.write_text(_RECIPE, recipe.read_text(encoding="utf-8"))
    inherited = front_matter(reader.path / "README.md")
    manifest = _manifest(record, reader, source, bits, writer.partial)
    writer.write_text(MANIFEST, manifest.to_json())
    name = (manifest.base_model or reader.path.resolve().name).rstrip("/").rpartition("/")[2]
    writer.write_text("README.md", exported_card(manifest, name, inherited))
    return record


def _record(export: Export, source: Source | None, options: OnnxOptions) -> OnnxRecord:
    packed = export.kind == PACKED
    return OnnxRecord(
        provider=options.provider,
        scheme=_scheme(export, source),
        parameters=_parameters(export),
        quantized=_quantized(export),
        weights=export.kind,
        dtype=str(export.numbers.dtype).removeprefix("torch."),
        accuracy_level=options.accuracy_level if packed else None,
        head=options.head,
        tools=dict(export.tools),
        nodes=dict(sorted(export.found.nodes.items())),
        requantized=dict(sorted(export.found.requantized.items())),
        altered=dict(sorted(export.found.altered.items())),
        unchanged=export.found.unchanged,
        check=export.check,
    )


def _scheme(export: Export, source: Source | None) -> str:
    if source is not None and export.numbers.packed:
        kinds = Counter(str(source.packed.schemes[n]) for n in export.numbers.packed)
        return ", ".join(k for k, _ in kinds.most_common())
    return "W8 row sym A8 dynamic" if export.kind == INT8 else export.kind


def _parameters(export: Export) -> int:
    count = sum(math.prod(read().shape) for read in export.numbers.packed.values())
    floats = (*export.numbers.floats.values(), *export.numbers.others.values())
    return count + sum(read().numel() for read in floats)


def _linears(export: Export) -> list[tuple[Node, list[str]]]:
    """The nodes of the folder's linears, and their constant inputs."""
    graph, nodes = export.graph, set(export.found.nodes.values())
    constant = {n.name: [i for i in n.inputs if i in graph.initializers] for n in graph.nodes}
    return [(n, constant[n.name]) for n in graph.nodes if n.name in nodes]


def _weights(graph: Graph, node: Node, constant: list[str]) -> int:
    """How many weights a node multiplies by."""
    shape = graph.initializers[constant[0]].shape
    return node.ints["N"] * node.ints["K"] if "N" in node.ints else math.prod(shape)


def _bits(export: Export, linears: list[tuple[Node, list[str]]]) -> float:
    """Stored bits for each weight of the linears."""
    graph = export.graph
    nbytes = sum(len(graph.raw(i)) for _, constant in linears for i in constant)
    return nbytes * 8 / sum(_weights(graph, node, constant) for node, constant in linears)


def _quantized(export: Export) -> int:
    linears = [(n, c) for n, c in _linears(export) if n.op != "MatMul"]
    return sum(_weights(export.graph, node, constant) for node, constant in linears)


def _manifest(
    record: OnnxRecord, reader: CheckpointReader, source: Source | None, bits: float, folder: Path
) -> Manifest:
    before = None if source is None else source.manifest
    step = Conversion(
        source_format="dense" if source is None else source.packed.layout.name,
        format=_FORMAT,
        source_weights_sha256=reader.digest(),
        versions=versions(),
    )
    carried = {
        "bits_per_weight": bits,
        "conversions": (*(before.conversions if before else ()), step),
        "onnx": record,
        "files": file_hashes(folder),
    }
    if before is not None:
        return before.model_copy(update=carried)
    named = front_matter(reader.path / "README.md").get("base_model")
    return foreign_manifest(
        named if isinstance(named, str) else None,
        torch.float32,
        step,
        {"modules": {}, "skipped": dict(source.skipped) if source else {}, **carried},
    )
