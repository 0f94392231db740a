"""The proof of a conversion: the written folder, opened as a stranger would, against the source,
tensor by tensor."""

from __future__ import annotations

import torch

from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, sha256_tensor
from llmquant.conversion.check import DENSE, Checked, OnProgress
from llmquant.conversion.source import Source
from llmquant.errors import FormatError, LlmquantError, ProofError
from llmquant.formats import Format
from llmquant.models.reading.check import check_loading
from llmquant.weight import QuantizedWeight, without_trivial_order


def prove(
    source: Source,
    target: Format,
    checked: Checked,
    dtype: torch.dtype,
    written: CheckpointReader,
    on_progress: OnProgress,
) -> None:
    """Open the written folder as a stranger would and compare it with the source, tensor by tensor.

    Raises:
        ProofError: naming what differs.
    """
    packed = None if target is DENSE else PackedCheckpoint(written)
    schemes = checked.schemes if packed is None else packed.schemes
    if schemes.keys() != checked.schemes.keys():
        raise ProofError(f"{written.path} does not announce the modules that were written")
    for done, (name, scheme) in enumerate(checked.schemes.items()):
        on_progress("proving", done, len(schemes))
        before = source.weight(name)
        if packed is None:
            dense = written.read(f"{name}.weight")
            wanted = source.as_kept(f"{name}.weight", before.dequantize(dtype))
            same = dense.dtype == dtype and torch.equal(dense, wanted)
        else:
            after = _read_back(packed, name)
            same = after.digest() == before.digest() and torch.equal(
                after.dequantize(), before.dequantize()
            )
            same = same and schemes[name].activations == scheme.activations
        if not same:
            raise ProofError(
                f"{written.path}: {name} does not hold the numbers of {source.reader.path}"
            )
    _prove_others(source, target, checked, written)
    try:
        check_loading(written.path)
    except LlmquantError as e:
        raise ProofError(f"what was written cannot be loaded: {e}") from e


def _prove_others(
    source: Source, target: Format, checked: Checked, written: CheckpointReader
) -> None:
    """Tensors that belong to no quantized module are the source's bytes, and there are no further
    ones."""
    others = set(source.packed.others)
    packed = {f"{m}.{s}" for m in checked.schemes for s in target.tensor_suffixes()}
    extra = sorted(written.tensors.keys() - others - packed)
    if extra:
        raise ProofError(
            f"{written.path} has tensors that the source lacks: {', '.join(extra[:3])}"
        )
    for name in sorted(others):
        wanted = source.as_kept(name, source.reader.read(name))
        if name not in written or sha256_tensor(written.read(name)) != sha256_tensor(wanted):
            raise ProofError(f"{written.path}: tensor {name} is not the source's")


def _read_back(written: PackedCheckpoint, name: str) -> QuantizedWeight:
    try:
        return without_trivial_order(written.weight(name))
    except FormatError as e:
        raise ProofError(f"what was written cannot be read back: {e}") from e
