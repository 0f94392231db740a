"""What a run writes: linears packed, everything beside them carried over as it is read, the files
beside the weights, and the proof that the folder holds what was computed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmquant.checkpoint.card import front_matter, model_card
from llmquant.checkpoint.detect import without_quantization
from llmquant.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    file_hashes,
    packed_bytes,
    prove_modules,
    versions,
)
from llmquant.checkpoint.reader import CheckpointReader, sha256_file, sha256_tensor
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.data.calibration import Calibration
from llmquant.errors import FormatError, ProofError, QuantizationError
from llmquant.formats import Scheme
from llmquant.models.reading.matrices import as_kept
from llmquant.models.reading.stored_dtype import StoredReader
from llmquant.models.rotation.rotated import RotatedReader
from llmquant.quantization.loading import prove_loading
from llmquant.quantization.plan import BlockResult, WalkPlan
from llmquant.quantization.state.outcome import Outcome
from llmquant.runtime.finite import all_finite
from llmquant.weight import QuantizedWeight


def store_block(block: BlockResult, plan: WalkPlan, writer: CheckpointWriter) -> Outcome:
    """Pack a block's linears and carry its other tensors over.

    Args:
        block: of the walk; the head's and the embeddings' hold nothing to carry.
        plan: of the walk.
        writer: that gets the tensors.

    Raises:
        FormatError: the layout cannot hold a linear's numbers; names it.
    """
    outcome = Outcome()
    prefix = f"{plan.architecture.blocks}.{block.index}"
    for name, (weight, report) in block.weights.items():
        activations = plan.selection.schemes[name].activations
        outcome.packed_bytes += packed_bytes(store(name, weight, plan, writer))
        outcome.modules[name] = report
        outcome.schemes[name] = Scheme(weight.spec, weight.g_idx is not None, activations)
    if block.tuned is not None:
        outcome.tuned[prefix] = block.tuned
    if plan.embedding is not None and plan.embedding in block.weights:
        return outcome
    moved = plan.source.rescaled.moved(None if block.index is None else prefix)
    if moved or block.scaled:
        place = prefix if block.index is not None else next(iter(block.weights))
        outcome.scaled[place] = (*moved, *block.scaled)
    if block.index is not None:
        packed = {f"{name}.weight" for name in block.weights}
        names = (n for n in plan.reader.tensors if n.startswith(f"{prefix}.") and n not in packed)
        outcome.copied = carry(names, plan, writer, block.changed)
    return outcome


def store(
    name: str, weight: QuantizedWeight, plan: WalkPlan, writer: CheckpointWriter
) -> dict[str, Tensor]:
    """Pack one linear; returns its tensors by suffix.

    Raises:
        FormatError: the layout cannot hold its numbers; names the linear.
    """
    activations = plan.selection.schemes[name].activations
    try:
        packed = plan.layout.pack(weight, plan.reader.info(f"{name}.weight").dtype, activations)
    except FormatError as e:
        raise e.at(name) from e
    writer.add_together({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
    return packed


def carry(
    names: Iterable[str],
    plan: WalkPlan,
    writer: CheckpointWriter,
    changed: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write tensors as they are, or as ``changed`` has them; returns the digest of each.

    Raises:
        QuantizationError: NaN or Inf in one that the model has a place for.
    """
    digests, reader = {}, plan.reader
    for name in names:
        tensor = changed[name] if changed and name in changed else reader.read(name)
        if name not in plan.source.leftovers and not all_finite(tensor):
            raise QuantizationError(
                f"{reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?"
            )
        tensor = as_kept(name, tensor, plan.architecture)
        writer.add(name, tensor)
        digests[name] = sha256_tensor(tensor)
    return digests


def write_config(writer: CheckpointWriter, plan: WalkPlan, schemes: Mapping[str, Scheme]) -> None:
    """Write config.json with the quantization in it, and the files that the layout wants beside
    it."""
    # Sorted, so that the order in which a config is written says nothing of the run: a conversion
    # there and back is equal.
    quantization = plan.source.names.config(
        plan.layout, dict(sorted(schemes.items())), plan.selection.skipped
    )
    config = {**without_quantization(plan.reader.config), "quantization_config": quantization}
    writer.write_json("config.json", config)
    for name, text in plan.layout.side_files(quantization).items():
        writer.write_text(name, text)


def describe(
    writer: CheckpointWriter,
    plan: WalkPlan,
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
        outcome, calibration: what was done, and with which text.
        base_model: name for manifest and card.
        device: as the user named it.
    """
    reader, recipe, layout, selection = plan.reader, plan.recipe, plan.layout, plan.selection
    rotation = plan.source.rescaled.inner
    writer.copy_side_files(reader.path)
    write_config(writer, plan, outcome.schemes)
    writer.write_text("recipe.yaml", recipe.to_yaml())
    manifest = Manifest(
        base_model=base_model,
        base_weights_sha256=reader.digest(),
        recipe_sha256=recipe.sha256(),
        calibration=None if calibration is None else _calibration_entry(calibration),
        seed=recipe.seed,
        device=device,
        dtype=str(plan.dtype).removeprefix("torch."),
        store_dtype=str(reader.dtype).removeprefix("torch.")
        if isinstance(reader, StoredReader)
        else None,
        threads=torch.get_num_threads(),
        processes=plan.world.size,
        versions=versions(),
        bits_per_weight=outcome.bits_per_weight,
        rotation=rotation.report if isinstance(rotation, RotatedReader) else None,
        modules=outcome.modules,
        tuned=outcome.tuned,
        scaled=outcome.scaled,
        skipped=dict(selection.skipped),
        regrouped=selection.regrouped,
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
    """A hub name without its revision, of a folder of the hub's cache too; of another folder
    or a GGUF file only its own name, since a path means nothing on another machine."""
    folder = Path(model).expanduser()
    if folder.is_file():  # a GGUF file
        return folder.stem
    if not folder.is_dir():
        return model.partition("@")[0]
    # A snapshot's own name is a commit: …/models--ORG--NAME/snapshots/COMMIT
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        kind, _, name = (
            path.parents[1].name.partition("--") if len(path.parents) > 1 else ("", "", "")
        )
        if path.parent.name == "snapshots" and kind == "models" and name:
            return name.replace("--", "/")
    return folder.resolve().name


def _calibration_entry(calibration: Calibration) -> dict[str, object]:
    summary = calibration.summary.as_dict()
    if summary["overlap"] is not None:
        summary["overlap"]["evaluation"] = portable_source(summary["overlap"]["evaluation"])
    return {
        "source": portable_source(calibration.source),
        "source_sha256": calibration.source_sha256,
        "ids_sha256": calibration.sha256,
        **summary,
    }


def portable_source(source: str) -> str:
    """A text source without the folders of this machine: what identifies its content is the hash
    beside it."""
    kind, _, rest = source.partition(":")
    return (
        f"{kind}:{rest.rpartition('/')[2]}"
        if kind != "hf" or Path(rest.partition(":")[0]).is_dir()
        else source
    )


def prove(writer: CheckpointWriter, plan: WalkPlan, outcome: Outcome, manifest: Manifest) -> None:
    """Open the written folder as a stranger would, compare it with the run, tensor by tensor, and
    load it as far as one block.

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
        for n in plan.reader.tensors
        if n not in written
        and not plan.repeats(n)
        and not (n.endswith(".weight") and n.removesuffix(".weight") in outcome.modules)
    ]
    if lost:
        raise ProofError(
            f"{writer.partial}: tensors of the original are missing: {', '.join(lost[:3])}"
        )
    packed = {f"{m}.{s}" for m in outcome.modules for s in plan.layout.tensor_suffixes()}
    extra = sorted(written.tensors.keys() - outcome.copied.keys() - packed)
    if extra:
        raise ProofError(f"{writer.partial} has tensors that nobody wrote: {', '.join(extra[:3])}")
    for name, expected in manifest.files.items():
        if sha256_file(writer.partial / name) != expected:
            raise ProofError(f"{writer.partial / name} changed while it was being written")
    prove_loading(written, plan)
