"""What a training run writes: the start's folder with its linears, and norms where they were
trained, replaced by what the last forward pass multiplied by.

A trained folder is written as a conversion is, from a source whose numbers are the student's. The
proof opens it as a stranger would. It compares every packed module with the layer that was trained,
twice: the codes, scales and zeros that were to be stored, and the dense weight as the layer's own
forward pass computes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.card import front_matter, trained_card
from llmquant.checkpoint.manifest import MANIFEST, Conversion, Manifest, file_hashes, versions
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, ReaderView
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.check import Checked, check
from llmquant.conversion.files import foreign_manifest, write_config
from llmquant.conversion.proof import prove
from llmquant.conversion.run import write_weights
from llmquant.conversion.source import Source, model_dtype
from llmquant.errors import LayoutError, ProofError
from llmquant.formats import FORMATS, Format, layout_of
from llmquant.quantization.rerun import recorded_recipe
from llmquant.recipe import Recipe
from llmquant.recipe_sections import QAT
from llmquant.records import ModuleRecord, QatRecord
from llmquant.runtime.devices import DTYPES
from llmquant.training.student import Student
from llmquant.weight import QuantizedWeight, without_trivial_order

OnProgress = Callable[[str, int, int], None]


class _Changed(ReaderView):
    """A folder of which some tensors have other numbers."""

    def __init__(self, inner: CheckpointReader, changed: Mapping[str, Tensor]) -> None:
        super().__init__(inner)
        self._changed = changed

    def read(self, name: str) -> Tensor:
        return self._changed[name] if name in self._changed else self.inner.read(name)


@dataclass(frozen=True)
class TrainedSource(Source):
    """The start's folder with the student's numbers."""

    student: Student = field(kw_only=True)

    @classmethod
    def of(cls, start: Source, student: Student) -> TrainedSource:
        """The student must have its last state."""
        view = _Changed(start.reader, student.changed(start.reader))
        return cls(
            start.packed.seen_as(view), start.skipped, start.head, start.manifest, start.names,
            start.notes, student=student,
        )  # fmt: skip

    def weight(self, name: str) -> QuantizedWeight:
        layer = self.student.layers.get(name)
        if layer is None:
            return super().weight(name)
        return without_trivial_order(layer.quantized().to("cpu"))


def target_of(start: Source, asked: str | None) -> Format:
    """The layout of the result: the start's own, or the one that is asked for.

    Raises:
        LayoutError: the start's own is only read.
        UsageError: no such layout.
    """
    if asked is not None:
        return layout_of(asked)
    own = start.packed.layout
    if own.name not in FORMATS:
        raise LayoutError(
            f"{start.reader.path} has the layout {own.name}, which llmquant only reads; "
            f"give --format {' or '.join(FORMATS)}"
        )
    return FORMATS[own.name]


def trained_recipe(start: Source, section: QAT) -> Recipe | None:
    """The start's recipe with a section for training; None where the start's is unknown."""
    path, before = start.reader.path / "recipe.yaml", start.manifest
    if before is None or before.recipe_sha256 is None or not path.is_file():
        return None
    recipe = recorded_recipe(path.parent, before)
    if recipe.sha256() != before.recipe_sha256:
        return None
    return recipe.updated({"qat": section.model_dump(mode="json")})


def changed_codes(start: Source, student: Student) -> tuple[int, int]:
    """How many codes the trained linears have, and how many of them are not the start's."""
    total = changed = 0
    for name, layer in student.layers.items():
        total += layer.shape[0] * layer.shape[1]
        if len(layer.trained()) > 1:  # else nothing moves them
            changed += int((layer.codes().cpu() != start.weight(name).codes).sum())
    return total, changed


def scale_dtype(start: Source) -> torch.dtype:
    """That scales have in the start's files."""
    floats = set(DTYPES.values())
    for tensors in start.packed.tensors.values():
        for tensor in tensors.values():
            if start.reader.info(tensor).dtype in floats:
                return start.reader.info(tensor).dtype
    return model_dtype(start.reader)


def write_trained(
    start: Source,
    student: Student,
    target: Format,
    recipe: Recipe | None,
    record: QatRecord,
    output: Path,
    *,
    overwrite: bool,
    on_progress: OnProgress,
) -> tuple[Checked, int]:
    """Write, prove and publish; what the folder holds, and the bytes of its tensors.

    Args:
        start: the folder that training began with.
        student: in the state to be written.
        target: layout of the result.
        recipe: of the result; None where the start's is unknown.

    Raises:
        FormatError: the layout cannot hold it.
        ProofError: what was written is not what was trained.
    """
    source, scales = TrainedSource.of(start, student), scale_dtype(start)
    checked = check(source, target, scales, False, on_progress)
    with CheckpointWriter(output, max_shard_size=sys.maxsize, overwrite=overwrite) as writer:
        write_weights(source, target, checked, scales, writer, on_progress)
        write_config(source, target, checked, scales, writer)
        text = None if recipe is None else recipe.to_yaml()
        if text is not None:
            writer.write_text("recipe.yaml", text)
        inherited = front_matter(start.reader.path / "README.md")
        manifest = _manifest(start, target, checked, recipe, record, inherited)
        manifest = manifest.model_copy(update={"files": file_hashes(writer.partial)})
        writer.write_text(MANIFEST, manifest.to_json())
        name = record.reference.rstrip("/").rpartition("/")[2]
        card = trained_card(manifest, checked.scheme, target.name, name, text, inherited)
        writer.write_text("README.md", card)
        written = CheckpointReader(writer.partial)
        prove(source, target, checked, scales, written, on_progress)
        prove_trained(student, written)
        writer.publish()
    return checked, writer.total_bytes


def prove_trained(student: Student, written: CheckpointReader) -> None:
    """Compare every trained linear's dense weight with what the folder dequantizes to.

    Raises:
        ProofError: the layer that was trained multiplied by something else.
    """
    packed = PackedCheckpoint(written)
    for name, layer in student.layers.items():
        if not torch.equal(packed.weight(name).dequantize(), layer.weight().cpu()):
            raise ProofError(
                f"{written.path}: {name} does not dequantize to the weight that was trained"
            )


def _manifest(
    start: Source,
    target: Format,
    checked: Checked,
    recipe: Recipe | None,
    record: QatRecord,
    inherited: Mapping[str, object],
) -> Manifest:
    """The start's record with what training did; ``files`` are still to come."""
    before, trained = start.manifest, versions()
    modules = {
        n: ModuleRecord(spec=str(s.spec), shape=checked.shapes[n], digest=checked.digests[n])
        for n, s in checked.schemes.items()
    }
    step = Conversion(
        source_format=start.packed.layout.name,
        format=target.name,
        source_weights_sha256=record.start_weights_sha256,
        versions=trained,
    )
    moved = step.source_format != step.format
    carried = {
        "bits_per_weight": checked.bits_per_weight,
        "modules": modules,
        "qat": record,
        "skipped": dict(start.skipped),
        "conversions": (*(before.conversions if before else ()), *((step,) if moved else ())),
        "files": {},
    }
    if before is None:
        named = inherited.get("base_model")
        base = named if isinstance(named, str) else record.reference
        return foreign_manifest(base, torch.float32, step, carried)
    here = {
        "recipe_sha256": None if recipe is None else recipe.sha256(),
        "threads": torch.get_num_threads(),
        "versions": trained,
    }
    return before.model_copy(update=carried | here)
