"""manifest.json: the record that lets anyone check a folder against its run, and the check itself.

It holds hashes of what went in (model, recipe, calibration ids) and of every file that came out,
versions, seed and, per module, its grid, error, damping and the digest of its numbers. It holds no
time and no path, so the same run gives the same bytes. README.md is not hashed: measured tables are
added to it later.

A conversion carries the record over and adds to ``conversions`` which folder it read; of a folder
that came without a record (another tool's) it can only say what it saw, and what it cannot know is
null.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from torch import Tensor

from llmquant.checkpoint.atomic import utf8
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import SIDE_FILES, CheckpointReader, read_json, sha256_file
from llmquant.errors import CheckpointError, FormatError, ProofError, UnfitModelError
from llmquant.records import (
    GroupSizeRecord,
    ModuleRecord,
    OnnxRecord,
    PairRecord,
    QatRecord,
    Record,
    RotationRecord,
    TuneRecord,
)
from llmquant.runtime.finite import all_finite, some

MANIFEST = "manifest.json"
UNHASHED = frozenset({MANIFEST, "README.md"})


class Conversion(Record):
    """One step from layout to layout: what was read, and by which versions."""

    source_format: str
    format: str
    source_weights_sha256: str
    versions: dict[str, str]


class Manifest(Record):
    """The whole record."""

    schema_version: Literal[1] = 1
    base_model: str | None
    base_weights_sha256: str | None
    recipe_sha256: str | None
    calibration: dict[str, Any] | None
    seed: int | None
    device: str
    dtype: str
    store_dtype: str | None = None
    threads: int
    processes: int = 1
    versions: dict[str, str]
    bits_per_weight: float
    rotation: RotationRecord | None = None
    modules: dict[str, ModuleRecord]
    tuned: dict[str, TuneRecord] = Field(default_factory=dict)
    scaled: dict[str, tuple[PairRecord, ...]] = Field(default_factory=dict)
    qat: QatRecord | None = None
    skipped: dict[str, str]
    regrouped: tuple[GroupSizeRecord, ...] = ()
    conversions: tuple[Conversion, ...] = ()
    onnx: OnnxRecord | None = None
    files: dict[str, str]

    def to_json(self) -> str:
        whole = self.model_dump(mode="json")
        if self.store_dtype is None:  # the model's own; earlier versions do not know the key
            del whole["store_dtype"]
        if self.qat is None:
            del whole["qat"]
        if not self.regrouped:
            del whole["regrouped"]
        if self.onnx is None:
            del whole["onnx"]
        return utf8(json.dumps(whole, indent=1, ensure_ascii=False) + "\n").decode()


def versions() -> dict[str, str]:
    """Versions that can change a result's bytes."""
    packages = ("llmquant", "torch", "transformers", "tokenizers", "safetensors", "datasets")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file that the manifest answers for, by its name in the folder."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {n: sha256_file(p) for n, p in sorted(found.items()) if n not in UNHASHED}


def check_file(path: Path, sha256: str) -> None:
    """Raises ProofError for a file with another hash than a manifest records."""
    if sha256_file(path) != sha256:
        raise ProofError(
            f"{path} is not the file that was written: its sha256 differs from the manifest's; fetch it again, or delete "
            f"{MANIFEST} if the change was meant"
        )


def check_weight_files(reader: CheckpointReader, manifest: Manifest) -> None:
    """Raises ProofError for a weight file that is not the one that was written. One that the
    manifest does not name, as where another tool sharded the folder again, is not looked at."""
    for path in reader.files():
        expected = manifest.files.get(path.relative_to(reader.path).as_posix())
        if expected is not None:
            check_file(path, expected)


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a module's stored tensors, less the two numbers that only repeat its shape."""
    return sum(
        t.numel() * t.element_size() for name, t in tensors.items() if name != "weight_shape"
    )


def fallback_notes(fallbacks: Mapping[str, str | None]) -> list[str]:
    """Module → why it was rounded to nearest without calibration: a sentence for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in fallbacks.items():
        if reason is not None:
            by_reason.setdefault(reason, []).append(name)
    return [
        f"{some(names)}: {reason}; rounded to nearest by the weights alone"
        for reason, names in by_reason.items()
    ]


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError when the file is missing or not a manifest."""
    if not (folder / MANIFEST).is_file():
        raise UnfitModelError(
            f"{folder} has no {MANIFEST}, so it cannot be checked; folders that quantize, qat or convert wrote have one"
        )
    try:
        return Manifest.model_validate(read_json(folder / MANIFEST))
    except ValidationError as e:
        raise CheckpointError(
            f"{folder / MANIFEST} is not a manifest of this version: {e.errors()[0]['msg']}"
        ) from e


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder, or None where there is none; raises as :func:`read_manifest`."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def prove_modules(reader: CheckpointReader, digests: Mapping[str, str]) -> None:
    """Re-read every quantized module through its format and compare its numbers with the digests.

    Raises:
        ProofError: a module is missing, extra, damaged, or holds other numbers.
    """
    packed = PackedCheckpoint(reader)
    missing = sorted(digests.keys() - packed.schemes.keys())
    extra = sorted(packed.schemes.keys() - digests.keys())
    if missing or extra:
        raise ProofError(
            f"{reader.path}: quantized modules missing on disk: {missing or 'none'}; unexpected: {extra or 'none'}"
        )
    for name, expected in digests.items():
        try:
            weight = packed.weight(name)
        except FormatError as e:
            raise ProofError(f"what was written cannot be read back: {e}") from e
        if not all_finite(weight.dequantize()):
            raise ProofError(f"{reader.path}: {name} dequantizes to NaN or Inf")
        if weight.digest() != expected:
            raise ProofError(
                f"{reader.path}: {name} does not hold the numbers the algorithm returned"
            )


_LOADED = (
    *(".safetensors", ".safetensors.index.json", ".py", ".jinja", ".model", ".tiktoken"),
    *("vocab.txt", "tekken.json", "processor_config.json"),
)


def _loaded(name: str) -> bool:
    """Whether engines load a file of this name as part of a model."""
    return name.endswith(_LOADED) or name in SIDE_FILES


def verify(
    folder: str | os.PathLike[str], on_file: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Check every file's hash and every module's numbers against the manifest.

    Raises:
        ProofError: naming the file or module that differs.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        on_file(name)
        if not (folder / name).is_file():
            raise ProofError(f"{folder / name} is in the manifest but not in the folder")
        check_file(folder / name, expected)
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    extra = sorted(n for n in names if n not in manifest.files and _loaded(n))
    if extra:
        raise ProofError(
            f"{folder} holds files that engines load and that are not in the manifest: {', '.join(extra)}"
        )
    # A dense copy has no modules, and the numbers of a graph are those of its files.
    if manifest.modules and manifest.onnx is None:
        prove_modules(CheckpointReader(folder), {n: m.digest for n, m in manifest.modules.items()})
    return manifest
