"""The end of a run: what stands in a folder beside its weights, and the proof that the folder holds
what was computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from llmquant.checkpoint.card import front_matter, model_card
from llmquant.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ModuleEntry,
    RotationEntry,
    ScaledEntry,
    TuneEntry,
    file_hashes,
    prove_modules,
    versions,
)
from llmquant.checkpoint.reader import CheckpointReader, sha256_file, sha256_tensor
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.data.calibration import Calibration
from llmquant.errors import ProofError
from llmquant.formats import Format, Scheme
from llmquant.models.rotated import RotatedReader
from llmquant.models.selection import Selection
from llmquant.quantization.plan import ModuleReport, WalkPlan
from llmquant.quantization.reports import Outcome
from llmquant.quantization.steps.channel_scaling import PairReport


def write_config(
    writer: CheckpointWriter,
    reader: CheckpointReader,
    layout: Format,
    schemes: Mapping[str, Scheme],
    selection: Selection,
) -> None:
    """Write config.json with the quantization in it, and the files that the layout wants beside
    it."""
    # Sorted, so that the order in which a config is written says nothing of the run: a conversion
    # there and back is equal.
    quantization = layout.config(dict(sorted(schemes.items())), selection.skipped)
    writer.write_json("config.json", {**reader.config, "quantization_config": quantization})
    for name, text in layout.side_files(quantization).items():
        writer.write_text(name, text)


def describe(
    writer: CheckpointWriter,
    plan: WalkPlan,
    layout: Format,
    selection: Selection,
    outcome: Outcome,
    calibration: Calibration | None,
    *,
    base_model: str,
    device: str,
) -> Manifest:
    """Write everything beside the weights: config, tokenizer, recipe, manifest, model card.

    Args:
        writer: that has all tensors.
        plan: of the walk.
        layout, selection, outcome, calibration: what was done, and with which text.
        base_model: name for manifest and card.
        device: as the user named it.
    """
    reader, recipe = plan.reader, plan.recipe
    writer.copy_side_files(reader.path)
    write_config(writer, reader, layout, outcome.schemes, selection)
    writer.write_text("recipe.yaml", recipe.to_yaml())
    weights = sum(o * i for o, i in outcome.shapes.values())
    manifest = Manifest(
        base_model=base_model,
        base_weights_sha256=reader.digest(),
        recipe_sha256=recipe.sha256(),
        calibration=None if calibration is None else _calibration_entry(calibration),
        seed=recipe.seed,
        device=device,
        dtype=str(plan.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        processes=plan.world.size,
        versions=versions(),
        bits_per_weight=outcome.packed_bytes * 8 / weights,
        rotation=RotationEntry(**asdict(reader.inner.report))
        if isinstance(reader.inner, RotatedReader)
        else None,
        modules={n: _module_entry(r, outcome.shapes[n]) for n, r in outcome.modules.items()},
        tuned={
            n: TuneEntry(before=t.before, after=t.after, step=t.step, steps=t.steps)
            for n, t in outcome.tuned.items()
        },
        scaled={block: tuple(map(_scaled_entry, pairs)) for block, pairs in outcome.scaled.items()},
        skipped=dict(selection.skipped),
        files=file_hashes(writer.partial),
    )
    writer.write_text(MANIFEST, manifest.to_json())
    scheme = ", ".join(sorted({str(s) for s in outcome.schemes.values()}))
    card = model_card(
        manifest, recipe.to_yaml(), scheme, layout.name, front_matter(reader.path / "README.md")
    )
    writer.write_text("README.md", card)
    return manifest


def base_name(model: str) -> str:
    """A hub name without its revision; of a folder only its own name, since a path means nothing on
    another machine."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model.partition("@")[0]


def _calibration_entry(calibration: Calibration) -> dict[str, object]:
    summary = calibration.summary.as_dict()
    if summary["overlap"] is not None:
        summary["overlap"]["evaluation"] = _portable_source(summary["overlap"]["evaluation"])
    return {
        "source": _portable_source(calibration.source),
        "source_sha256": calibration.source_sha256,
        "ids_sha256": calibration.sha256,
        **summary,
    }


def _portable_source(source: str) -> str:
    """A text source without the folders of this machine: what identifies its content is the hash
    beside it."""
    kind, _, rest = source.partition(":")
    return (
        f"{kind}:{rest.rpartition('/')[2]}"
        if kind != "hf" or Path(rest.partition(":")[0]).is_dir()
        else source
    )


def _scaled_entry(report: PairReport) -> ScaledEntry:
    fields = {name: getattr(report, name) for name in ScaledEntry.model_fields}
    return ScaledEntry(**fields)


def _module_entry(report: ModuleReport, shape: tuple[int, int]) -> ModuleEntry:
    return ModuleEntry(
        spec=str(report.spec),
        shape=shape,
        digest=report.digest,
        weight_error=report.weight_error,
        output_error=report.output_error,
        damping=report.damping,
        dead=report.dead,
        tokens=report.tokens,
        dropped=report.dropped,
        fallback=report.fallback,
    )


def prove(
    writer: CheckpointWriter,
    source: CheckpointReader,
    layout: Format,
    outcome: Outcome,
    manifest: Manifest,
) -> None:
    """Open the written folder as a stranger would and compare it with the run, tensor by tensor.

    Raises:
        ProofError: naming what differs.
    """
    written = CheckpointReader(writer.partial)
    prove_modules(written, {n: r.digest for n, r in outcome.modules.items()})
    for name, expected in outcome.copied.items():
        if name not in written or sha256_tensor(written.read(name)) != expected:
            raise ProofError(f"{writer.partial}: tensor {name} is not what was to be written")
    lost = [
        n
        for n in source.tensors
        if n not in written
        and not (n.endswith(".weight") and n.removesuffix(".weight") in outcome.modules)
    ]
    if lost:
        raise ProofError(
            f"{writer.partial}: tensors of the original are missing: {', '.join(lost[:3])}"
        )
    packed = {f"{m}.{s}" for m in outcome.modules for s in layout.tensor_suffixes()}
    extra = sorted(written.tensors.keys() - outcome.copied.keys() - packed)
    if extra:
        raise ProofError(f"{writer.partial} has tensors that nobody wrote: {', '.join(extra[:3])}")
    for name, expected in manifest.files.items():
        if sha256_file(writer.partial / name) != expected:
            raise ProofError(f"{writer.partial / name} changed while it was being written")
