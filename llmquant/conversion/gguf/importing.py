"""``llmquant import``: a GGUF file as a model folder, its linears dequantized or, with ``packed``,
kept as they are.

Packed, the codes and scales of Q4_0 and Q8_0 go into a layout that engines read, number by number:
Q4_0 is symmetric around 8 with an fp16 scale (of either sign) for 32 columns, Q8_0 the same around
128. Q4_1 goes in where its float minimum is a whole number of scales, as in files that llmquant
wrote; other quantizers' are on no integer grid. K-quants have scales of scales, which no layout
here has. Whatever does not fit is refused, module by module. The rows of q and k are put back in
transformers' order, which moves whole rows of codes and scales.

Embeddings, and a head that no layout could hold as it is, are stored in the folder's dtype, and a
note says what that rounds.

The proof is that of every conversion: the folder is read back as a stranger would, codes, scales
and zero-points equal the file's, their product equals what the ``gguf`` package reads, and the
folder loads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoint.atomic import check_destination, refuse_held
from llmquant.checkpoint.card import converted_card
from llmquant.checkpoint.gguf.folder import (
    FLOATS,
    FolderOptions,
    GgufSource,
    ImportResult,
    OnProgress,
    front_matter,
    import_result,
    open_gguf,
    write_beside,
    write_folder,
    write_weights,
)
from llmquant.checkpoint.manifest import (
    MANIFEST,
    Conversion,
    file_hashes,
    versions,
)
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, sha256_file
from llmquant.checkpoint.weights.proof import prove_weights
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.files import foreign_manifest
from llmquant.conversion.gguf.keeping import Kept, choose, dequantized, weight_of
from llmquant.errors import FormatError, LlmquantError, ProofError, UsageError
from llmquant.formats import Format, layout_of
from llmquant.models.reading.check import check_loading
from llmquant.models.rows.table import ARCHITECTURES
from llmquant.models.selection import unlike_fused
from llmquant.runtime.devices import ChosenDtype, parse_dtype
from llmquant.runtime.finite import some

_LAYOUTS = ("compressed-tensors", "gptq", "gptq_v2")


@dataclass(frozen=True, slots=True)
class ImportOptions(FolderOptions):
    """How to import.

    Attributes:
        packed: keep the linears' codes and scales.
        layout: in which packed layout; None is compressed-tensors.
    """

    packed: bool = False
    layout: str | None = None


def import_gguf(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ImportOptions | None = None,
    on_progress: OnProgress = lambda phase, done, total: None,
) -> ImportResult:
    """Write a GGUF file as a model folder.

    Args:
        source: the file, or any of its shards.
        output: folder to make; appears whole, after its proof, or not at all.
        on_progress: called with ``writing`` or ``proving``, tensors done, and all of them.

    Raises:
        UsageError: no such file, a destination that exists, options that contradict each other.
        LayoutError: an architecture, type or scaling that is not imported, or linears that cannot
            be kept, each with its reason.
        CheckpointError: a damaged or incomplete file.
        ProofError: what was written is not what was read.
    """
    options = options or ImportOptions()
    if options.packed:
        return _import_packed(source, output, options, on_progress)
    if options.layout is not None:
        raise UsageError("a layout is for packed linears; add --packed, or leave out --format")
    return write_folder(source, output, options, on_progress)


def _import_packed(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ImportOptions,
    on_progress: OnProgress,
) -> ImportResult:
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    target = layout_of(options.layout or _LAYOUTS[0])
    if target.name not in _LAYOUTS:
        raise UsageError(f"--packed writes {', '.join(_LAYOUTS)}, not {target.name}")
    opened = open_gguf(source)
    refuse_held(destination, f"the model {opened.file.path}", opened.file.files)
    auto = ChosenDtype(torch.float16, "the scales of GGUF are fp16")
    dtype = parse_dtype(options.dtype, auto=auto).dtype
    kept = choose(opened, target, dtype, on_progress)
    but = frozenset(place.tensor.name for place, _ in kept.places.values())
    with CheckpointWriter(
        destination, max_shard_size=options.max_shard_size, overwrite=options.overwrite
    ) as writer:
        rest = write_weights(opened, dtype, writer, on_progress, but)
        for module in kept.places:
            packed = target.pack(weight_of(opened, kept, module), dtype)
            writer.add_together({f"{module}.{suffix}": t for suffix, t in packed.items()})
        writer.finish_weights()
        notes = _write_beside(opened, kept, target, dtype, writer)
        _prove(opened, kept, target, rest.digests, CheckpointReader(writer.partial), on_progress)
        writer.publish()
    scheme = f"{target.name} {', '.join(sorted({str(s) for s in kept.schemes.values()}))}"
    notes = (*opened.notes, *notes, *_rounded(opened, but, dtype), *_unlike(opened, kept))
    return import_result(opened, Path(output), dtype, writer, notes, rest.rounding, scheme)


def _write_beside(
    opened: GgufSource, kept: Kept, target: Format, dtype: torch.dtype, writer: CheckpointWriter
) -> tuple[str, ...]:
    quantization = target.config(dict(sorted(kept.schemes.items())), kept.skipped)
    notes = write_beside(opened, dtype, writer, quantization)
    for name, text in target.side_files(quantization).items():
        writer.write_text(name, text)
    files = "".join(f"{f.name}:{sha256_file(f)}\n" for f in opened.file.files)
    step = Conversion(
        source_format="gguf",
        format=target.name,
        source_weights_sha256=hashlib.sha256(files.encode()).hexdigest(),
        versions=versions(),
    )
    elements = sum(r.shape[0] * r.shape[1] for r in kept.records.values())
    carried = {
        "bits_per_weight": kept.nbytes * 8 / elements,
        "modules": kept.records,
        "skipped": kept.skipped,
        "conversions": (step,),
        "files": file_hashes(writer.partial),
    }
    manifest = foreign_manifest(None, dtype, step, carried)
    writer.write_text(MANIFEST, manifest.to_json())
    name = str(opened.file.metadata.get("general.name") or opened.file.path.stem)
    scheme = ", ".join(sorted({str(s) for s in kept.schemes.values()}))
    others = f"Every other tensor is stored in {str(dtype).removeprefix('torch.')}."
    writer.write_text(
        "README.md",
        converted_card(manifest, scheme, name, None, None, front_matter(opened), others),
    )
    return notes


def _prove(
    opened: GgufSource,
    kept: Kept,
    target: Format,
    digests: Mapping[str, str],
    written: CheckpointReader,
    on_progress: OnProgress,
) -> None:
    """The folder as a stranger reads it, against the file.

    Raises:
        ProofError: naming what differs.
    """
    packed = PackedCheckpoint(written)
    if packed.schemes != kept.schemes:
        raise ProofError(f"{written.path} does not announce the modules that were written")
    for done, module in enumerate(kept.schemes):
        on_progress("proving", done, len(kept.schemes))
        try:
            after = packed.weight(module)
        except FormatError as e:
            raise ProofError(f"what was written cannot be read back: {e}") from e
        same = after.digest() == kept.records[module].digest
        if not same or not torch.equal(after.dequantize(), dequantized(opened, kept, module)):
            raise ProofError(
                f"{written.path}: {module} does not hold the numbers of {opened.file.path}"
            )
    inside = {f"{m}.{s}" for m in kept.schemes for s in target.tensor_suffixes()}
    prove_weights(written, digests, on_progress, frozenset(inside))
    try:
        check_loading(written.path)
    except LlmquantError as e:
        raise ProofError(f"what was written cannot be loaded: {e}") from e


def _rounded(opened: GgufSource, kept: frozenset[str], dtype: torch.dtype) -> tuple[str, ...]:
    """A note on quantized matrices that were not kept."""
    if dtype == torch.float32:
        return ()
    names = [
        f"{t.name} ({t.kind})"
        for t in opened.file.tensors.values()
        if t.kind not in FLOATS and t.name not in kept
    ]
    if not names:
        return ()
    return (
        f"{some(names)}: no linear of a kind that is kept, stored in {str(dtype).removeprefix('torch.')}, which "
        "rounds it; --dtype float32 holds it exactly",
    )


def _unlike(opened: GgufSource, kept: Kept) -> tuple[str, ...]:
    """A note on linears that engines fuse and that the file has in several types."""
    row = ARCHITECTURES.get(opened.placed.model_type)
    unlike = [] if row is None else list(unlike_fused(kept.schemes, kept.skipped, row))
    if not unlike:
        return ()
    more = f" ({len(unlike)} such sets in all)" if len(unlike) > 1 else ""
    return (
        f"engines that fuse linears, such as vLLM, want one scheme for them, and the file gives {unlike[0]}{more}; "
        "llmquant takes them as they are",
    )
