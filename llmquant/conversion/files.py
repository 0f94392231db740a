"""Everything beside the weights of a converted folder: config, side files, recipe, record and
card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmquant.checkpoint.card import converted_card, front_matter, measured
from llmquant.checkpoint.detect import without_quantization
from llmquant.checkpoint.manifest import (
    MANIFEST,
    Conversion,
    Manifest,
    file_hashes,
    versions,
)
from llmquant.checkpoint.weights.rounded import rounding
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.conversion.check import DENSE, Checked
from llmquant.conversion.source import Source
from llmquant.formats import Format
from llmquant.formats.compressed_tensors.beyond import KV_CACHE
from llmquant.records import ModuleRecord

_RECIPE = "recipe.yaml"


def write_files(
    source: Source, target: Format, checked: Checked, dtype: torch.dtype, writer: CheckpointWriter
) -> None:
    """Everything beside the weights."""
    folder = source.reader.path
    write_config(source, target, checked, dtype, writer)
    recipe = (
        (folder / _RECIPE).read_text(encoding="utf-8") if (folder / _RECIPE).is_file() else None
    )
    if recipe is not None:
        writer.write_text(_RECIPE, recipe)
    inherited = front_matter(folder / "README.md")
    manifest = _manifest(source, target, checked, dtype, inherited, file_hashes(writer.partial))
    writer.write_text(MANIFEST, manifest.to_json())
    name = (manifest.base_model or folder.resolve().name).rstrip("/").rpartition("/")[2]
    card = converted_card(
        *(manifest, checked.scheme, name, recipe, measured(folder / "README.md"), inherited),
        rounding=rounding(checked.rounded, checked.weights, dtype),
    )
    writer.write_text("README.md", card)


def write_config(
    source: Source, target: Format, checked: Checked, dtype: torch.dtype, writer: CheckpointWriter
) -> None:
    """What lies beside the weights, config.json with the quantization in it, and the files that the
    layout wants."""
    writer.copy_side_files(source.reader.path)
    quantization = source.names.config(
        target, dict(sorted(checked.schemes.items())), source.skipped
    )
    if source.packed.config.get(KV_CACHE):  # the layout can say it, or the source was refused
        quantization = {**quantization, KV_CACHE: source.packed.config[KV_CACHE]}
    writer.write_json("config.json", _config(source, target, dtype, quantization))
    for name, text in target.side_files(quantization).items():
        writer.write_text(name, text)


def _config(
    source: Source, target: Format, dtype: torch.dtype, quantization: Mapping[str, Any]
) -> dict[str, Any]:
    config = without_quantization(source.reader.config)
    if quantization:
        return {**config, "quantization_config": quantization}
    for key in [k for k in ("dtype", "torch_dtype") if config.get(k)] or ["dtype"]:
        config[key] = str(dtype).removeprefix("torch.")
    if source.head in source.packed.schemes:
        config["tie_word_embeddings"] = False  # the head has a weight of its own
    return config


def _manifest(
    source: Source,
    target: Format,
    checked: Checked,
    dtype: torch.dtype,
    inherited: Mapping[str, Any],
    files: Mapping[str, str],
) -> Manifest:
    """The source's record with this step added; what another tool did not record stays null."""
    before = source.manifest
    step = Conversion(
        source_format=source.packed.layout.name,
        format=target.name,
        source_weights_sha256=source.reader.digest(),
        versions=versions(),
    )
    modules: dict[str, ModuleRecord] = {}
    if target is not DENSE:
        modules = {
            n: before.modules[n]
            if before
            else ModuleRecord(spec=str(s.spec), shape=checked.shapes[n], digest=checked.digests[n])
            for n, s in checked.schemes.items()
        }
    carried = {
        "bits_per_weight": checked.bits_per_weight,
        "modules": modules,
        "skipped": dict(source.skipped),
        "conversions": (*(before.conversions if before else ()), step),
        "files": dict(files),
    }
    if before:
        return before.model_copy(update=carried)
    named = inherited.get("base_model")
    return foreign_manifest(named if isinstance(named, str) else None, dtype, step, carried)


def foreign_manifest(
    base_model: str | None, dtype: torch.dtype, step: Conversion, carried: Mapping[str, Any]
) -> Manifest:
    """The record of numbers that another tool made: how it made them is unknown.

    Args:
        carried: what is known, ``conversions`` among it.
    """
    unknown = {
        "base_weights_sha256": None,
        "recipe_sha256": None,
        "calibration": None,
        "seed": None,
    }
    here = {
        "device": "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    return Manifest.model_validate(
        {"base_model": base_model, **unknown, **here, "versions": step.versions, **carried}
    )
