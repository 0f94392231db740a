"""convert: the same numbers in another byte layout, or a refusal that names every module that does not fit and why.

Lossless means: codes, scales, zero-points and groups of every module are equal after the result was read back from disk,
hence its dequantized weights too; every other tensor is the same bytes. ``dense`` gives an ordinary checkpoint of the weights
that an engine would multiply by at its dtype.

Two passes over the source, one module in memory at a time. The first packs everything and keeps nothing: whether a scale is exact
in the target's dtype, or a zero-point is the 0 that GPTQ v1 cannot store, only the numbers tell, and all refusals should be
known before anything is written. The second writes. The folder gets its name after it has been compared with the source.

Shards stay divided as the source's are (but for ``dense``, which is several times larger), so that there and back again gives
the same files, byte for byte.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmquant.card import converted_card, front_matter, measured
from llmquant.checkpoint import CheckpointReader, CheckpointWriter, check_destination, sha256_tensor
from llmquant.conversion_source import Source, model_dtype, open_source
from llmquant.detect import without_quantization
from llmquant.devices import parse_dtype
from llmquant.engines import refusals
from llmquant.errors import FormatError, ProofError, QuantizationError, UsageError
from llmquant.formats import FORMATS, Format, Scheme
from llmquant.formats.base import Activations
from llmquant.formats.dense import Dense
from llmquant.manifest import (
    MANIFEST,
    Conversion,
    Manifest,
    ModuleEntry,
    file_hashes,
    packed_bytes,
    read_module,
    stored_schemes,
    versions,
)
from llmquant.weight import QuantizedWeight, without_trivial_order

DENSE = Dense()
TARGETS: tuple[str, ...] = (*FORMATS, DENSE.name)
_RECIPE = "recipe.yaml"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """How to convert.

    Attributes:
        dtype: of the linears of a dense result; ``auto`` is the model's own.
        scale_dtype: in which scales are stored, where the layout leaves that open; None is the model's own.
        base: the unquantized model, to decide zero-points whose label is in doubt; otherwise magnitudes decide.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per file of a dense result.
    """

    dtype: str = "auto"
    scale_dtype: str | None = None
    base: str | os.PathLike[str] | None = None
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What came out."""

    path: Path
    source_format: str
    format: str
    scheme: str
    modules: int
    bits_per_weight: float
    source_bytes: int
    bytes_written: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Checked:
    """What the first pass found: everything about the result but its bytes."""

    schemes: Mapping[str, Scheme]
    digests: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / sum(o * i for o, i in self.shapes.values())


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
        on_progress: called with ``checking``, ``writing`` or ``proving``, modules done, and all of them.

    Raises:
        UsageError: no such layout, an option that does not apply, a destination that exists, a source that is not quantized.
        FormatError: the layout cannot hold the model; lists every module that refuses, with the reason.
        CheckpointError, ArchitectureError: the source cannot be read.
        ProofError: the source is not what its manifest says, or what was written is not the source.
    """
    options = options or ConvertOptions()
    destination = Path(os.path.abspath(output))
    check_destination(destination, options.overwrite)
    target = _target(to)
    source = open_source(model, options.base)
    if destination.resolve() == source.reader.path.resolve():
        raise UsageError(f"-o {output} is the source itself; choose another folder")
    dtype = _dtype(source, target, options)
    checked = _check(source, target, dtype, options.scale_dtype is not None, on_progress)
    size = options.max_shard_size if target is DENSE else sys.maxsize
    with CheckpointWriter(destination, max_shard_size=size, overwrite=options.overwrite) as writer:
        _write_weights(source, target, checked, dtype, writer, on_progress)
        _write_files(source, target, checked, dtype, writer)
        _prove(source, target, checked, dtype, CheckpointReader(writer.partial), on_progress)
        writer.publish()
    return ConvertResult(
        path=Path(output),
        source_format=source.layout.name,
        format=target.name,
        scheme=_scheme(checked),
        modules=len(checked.schemes),
        bits_per_weight=checked.bits_per_weight,
        source_bytes=sum(i.nbytes for i in source.reader.tensors.values()),
        bytes_written=writer.total_bytes,
        warnings=_warnings(target, checked),
    )


def _target(name: str) -> Format:
    if name not in TARGETS:
        raise UsageError(f"format {name!r} does not exist; choose one of {', '.join(TARGETS)}")
    return DENSE if name == DENSE.name else FORMATS[name]


def _dtype(source: Source, target: Format, options: ConvertOptions) -> torch.dtype:
    """The dtype of a dense result's linears, or of the scales."""
    if target is DENSE and options.scale_dtype is not None:
        raise UsageError("a scale dtype means nothing for a dense result, which has no scales; use dtype")
    if target is not DENSE and options.dtype != "auto":
        raise UsageError(f"dtype is for dense results; {target.name} stores codes and scales (see scale dtype)")
    asked = options.dtype if target is DENSE else options.scale_dtype
    return parse_dtype(asked or "auto", auto=model_dtype(source.reader))


def _check(source: Source, target: Format, dtype: torch.dtype, asked: bool, on_progress: OnProgress) -> _Checked:
    """The first pass.

    Args:
        asked: the dtype is the user's wish for the scales, not a default.

    Raises:
        FormatError: listing every refusal.
        UsageError: the layout has a scale dtype of its own.
    """
    refused: dict[str, str] = {}
    schemes, digests, shapes, nbytes = dict(source.schemes), {}, {}, 0
    for done, (name, announced) in enumerate(source.schemes.items()):
        on_progress("checking", done, len(schemes))
        # Whether an announced g_idx says anything is known only from its numbers.
        reason = target.why_not(replace(announced, g_idx=False), source.shape(name))
        if reason is None:
            weight = source.weight(name)
            schemes[name] = Scheme(weight.spec, weight.g_idx is not None, announced.activations)
            digests[name], shapes[name] = weight.digest(), weight.shape
            reason = target.why_not(schemes[name], weight.shape)
        if reason is None:
            packed, reason = _pack(target, weight, dtype, announced.activations)
            nbytes += packed_bytes(packed)
            if asked and packed and dtype not in {t.dtype for t in packed.values()}:
                raise UsageError(f"{target.name} stores scales in a dtype of its own; leave out the scale dtype")
        if reason is not None:
            refused[name] = reason
    together = target.why_not_together(schemes, source.skipped)
    if refused or together:
        told = _told(refused, together, len(schemes))
        raise FormatError(f"{source.reader.path} cannot become {target.name} without loss:{told}")
    return _Checked(schemes, digests, shapes, nbytes)


def _told(refused: Mapping[str, str], together: str | None, total: int) -> str:
    """One indented line per reason, after the modules that it is given for."""
    modules: dict[str, list[str]] = {}
    for name, reason in refused.items():
        modules.setdefault(reason, []).append(name)
    lines = [f"{f'all {total} linears' if len(n) == total > 1 else ', '.join(n)}: {reason}" for reason, n in modules.items()]
    if together:
        lines.append(f"taken together: {together}")
    return "".join(f"\n  {line}" for line in lines)


def _pack(
    target: Format, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The packed tensors, or none and the reason, with the dtypes that would do where it lies in the dtype."""
    try:
        return target.pack(weight, dtype, activations), None
    except FormatError as e:
        reason = str(e)
    fitting = []
    for other in _DTYPES:
        try:
            target.pack(weight, other, activations)
        except FormatError:
            continue
        fitting.append(str(other).removeprefix("torch."))
    option = "--dtype" if target is DENSE else "--scale-dtype"
    return {}, f"{reason}; {option} {' or '.join(fitting)} would hold it" if fitting else reason


def _write_weights(
    source: Source, target: Format, checked: _Checked, dtype: torch.dtype, writer: CheckpointWriter, on_progress: OnProgress
) -> None:
    """The second pass: shard by shard of the source, each module where the first of its tensors stood."""
    written: set[str] = set()
    for names in source.shards():
        for name in names:
            module = source.module_of(name)
            if module is None:
                writer.add(name, source.reader.read(name))
            elif module not in written:
                on_progress("writing", len(written), len(checked.schemes))
                packed = target.pack(source.weight(module), dtype, checked.schemes[module].activations)
                writer.add_together({f"{module}.{suffix}": tensor for suffix, tensor in packed.items()})
                written.add(module)
        if target is not DENSE:
            writer.next_shard()
    writer.finish_weights()


def _write_files(source: Source, target: Format, checked: _Checked, dtype: torch.dtype, writer: CheckpointWriter) -> None:
    """Everything beside the weights."""
    folder = source.reader.path
    writer.copy_side_files(folder)
    quantization = target.config(dict(sorted(checked.schemes.items())), source.skipped)
    writer.write_json("config.json", _config(source, target, dtype, quantization))
    for name, text in target.side_files(quantization).items():
        writer.write_text(name, text)
    recipe = (folder / _RECIPE).read_text(encoding="utf-8") if (folder / _RECIPE).is_file() else None
    if recipe is not None:
        writer.write_text(_RECIPE, recipe)
    inherited = front_matter(folder / "README.md")
    manifest = _manifest(source, target, checked, dtype, inherited, file_hashes(writer.partial))
    writer.write_text(MANIFEST, manifest.to_json())
    name = (manifest.base_model or folder.resolve().name).rstrip("/").rpartition("/")[2]
    card = converted_card(manifest, _scheme(checked), name, recipe, measured(folder / "README.md"), inherited)
    writer.write_text("README.md", card)


def _config(source: Source, target: Format, dtype: torch.dtype, quantization: Mapping[str, Any]) -> dict[str, Any]:
    config = without_quantization(source.reader.config)
    if quantization:
        return {**config, "quantization_config": quantization}
    for key in [k for k in ("dtype", "torch_dtype") if config.get(k)] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    if source.head in source.schemes:
        config["tie_word_embeddings"] = False  # the head has a weight of its own
    return config


def _manifest(
    source: Source,
    target: Format,
    checked: _Checked,
    dtype: torch.dtype,
    inherited: Mapping[str, Any],
    files: Mapping[str, str],
) -> Manifest:
    """The source's record with this step added; what another tool did not record stays null."""
    before = source.manifest
    step = Conversion(
        source_format=source.layout.name,
        format=target.name,
        source_weights_sha256=source.reader.digest(),
        versions=versions(),
    )
    modules: dict[str, ModuleEntry] = {}
    if target is not DENSE:
        modules = {
            n: before.modules[n] if before else ModuleEntry(spec=str(s.spec), shape=checked.shapes[n], digest=checked.digests[n])
            for n, s in checked.schemes.items()
        }
    told = {
        "bits_per_weight": checked.bits_per_weight,
        "modules": modules,
        "skipped": dict(source.skipped),
        "conversions": (*(before.conversions if before else ()), step),
        "files": dict(files),
    }
    if before:
        return before.model_copy(update=told)
    unknown = {"base_weights_sha256": None, "recipe_sha256": None, "calibration": None, "seed": None}
    here = {"device": "cpu", "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    named = inherited.get("base_model")
    base = named if isinstance(named, str) else None
    return Manifest.model_validate({"base_model": base, **unknown, **here, "versions": step.versions, **told})


def _prove(
    source: Source,
    target: Format,
    checked: _Checked,
    dtype: torch.dtype,
    written: CheckpointReader,
    on_progress: OnProgress,
) -> None:
    """Open the written folder as a stranger would and compare it with the source, tensor by tensor.

    Raises:
        ProofError: naming what differs.
    """
    layout, schemes = (target, checked.schemes) if target is DENSE else stored_schemes(written)
    if schemes.keys() != checked.schemes.keys():
        raise ProofError(f"{written.path} does not announce the modules that were written")
    for done, (name, scheme) in enumerate(checked.schemes.items()):
        on_progress("proving", done, len(schemes))
        before = source.weight(name)
        if target is DENSE:
            found = written.read(f"{name}.weight")
            same = found.dtype == dtype and torch.equal(found, before.dequantize(dtype))
        else:
            after = _read_back(written, layout, name, schemes[name])
            same = after.digest() == before.digest() and torch.equal(after.dequantize(), before.dequantize())
            same = same and schemes[name].activations == scheme.activations
        if not same:
            raise ProofError(f"{written.path}: {name} does not hold the numbers of {source.reader.path}")
    _prove_others(source, target, checked, written)


def _prove_others(source: Source, target: Format, checked: _Checked, written: CheckpointReader) -> None:
    """Tensors that belong to no quantized module are the source's bytes, and there are no further ones."""
    others = {n for n in source.reader.tensors if source.module_of(n) is None}
    packed = {f"{m}.{s}" for m in checked.schemes for s in target.tensor_suffixes()}
    extra = sorted(written.tensors.keys() - others - packed)
    if extra:
        raise ProofError(f"{written.path} has tensors that the source has not: {', '.join(extra[:3])}")
    for name in sorted(others):
        if name not in written or sha256_tensor(written.read(name)) != sha256_tensor(source.reader.read(name)):
            raise ProofError(f"{written.path}: tensor {name} is not the source's")


def _read_back(written: CheckpointReader, layout: Format, name: str, scheme: Scheme) -> QuantizedWeight:
    try:
        return without_trivial_order(read_module(written, layout, name, scheme))
    except (FormatError, QuantizationError) as e:
        raise ProofError(f"{written.path}: {name} cannot be read back: {e}") from e


def _scheme(checked: _Checked) -> str:
    return ", ".join(sorted({str(s) for s in checked.schemes.values()}))


def _warnings(target: Format, checked: _Checked) -> tuple[str, ...]:
    """What a user should know though nothing was lost: who will not take the result, and why."""
    if target is not DENSE:
        told = refusals(target.name, checked.schemes).items()
        return tuple(f"{engine} will not take it: {reason}" for engine, reasons in told for reason in reasons)
    if any(s.activations != "none" for s in checked.schemes.values()):
        return ("engines rounded the inputs of these linears to int8; those of a dense model they leave alone",)
    return ()
