"""From what the walk hands out to tensors in a writer: linears packed, everything beside them
carried over byte for byte."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from llmquant.checkpoint.manifest import packed_bytes
from llmquant.checkpoint.reader import CheckpointReader, sha256_tensor
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import FormatError, QuantizationError
from llmquant.formats import Activations, Format, Scheme
from llmquant.models.selection import Selection
from llmquant.quantization.plan import BlockResult
from llmquant.quantization.reports import Outcome
from llmquant.quantization.steps.rescaling import RescaledReader
from llmquant.runtime.finite import all_finite
from llmquant.weight import QuantizedWeight


def store_block(
    block: BlockResult,
    prefix: str,
    reader: RescaledReader,
    writer: CheckpointWriter,
    layout: Format,
    selection: Selection,
) -> Outcome:
    """Pack a block's linears and carry its other tensors over.

    Args:
        block: of the walk; the head's holds nothing to carry.
        prefix: the block's path in the checkpoint.
        reader: of the original.
        writer: that gets the tensors.
        layout: how linears are stored.
        selection: which scheme each has.

    Raises:
        FormatError: the layout cannot hold a linear's numbers; names it.
    """
    outcome = Outcome()
    for name, (weight, report) in block.weights.items():
        activations = selection.schemes[name].activations
        outcome.packed_bytes += packed_bytes(
            store(name, weight, activations, reader, writer, layout)
        )
        outcome.modules[name] = report
        outcome.shapes[name] = weight.shape
        outcome.schemes[name] = Scheme(weight.spec, weight.g_idx is not None, activations)
    if block.tuned is not None:
        outcome.tuned[prefix] = block.tuned
    moved = reader.moved(None if block.index is None else prefix)
    if moved or block.scaled:
        place = prefix if block.index is not None else next(iter(block.weights))
        outcome.scaled[place] = (*moved, *block.scaled)
    if block.index is not None:
        packed = {f"{name}.weight" for name in block.weights}
        names = (n for n in reader.tensors if n.startswith(f"{prefix}.") and n not in packed)
        outcome.copied = carry(names, reader, writer, block.changed)
    return outcome


def store(
    name: str,
    weight: QuantizedWeight,
    activations: Activations,
    reader: CheckpointReader,
    writer: CheckpointWriter,
    layout: Format,
) -> dict[str, Tensor]:
    """Pack one linear; returns its tensors by suffix.

    Raises:
        FormatError: the layout cannot hold its numbers; names the linear.
    """
    try:
        packed = layout.pack(weight, reader.info(f"{name}.weight").dtype, activations)
    except FormatError as e:
        raise FormatError(f"{name}: {e}") from e
    writer.add_together({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
    return packed


def carry(
    names: Iterable[str],
    reader: CheckpointReader,
    writer: CheckpointWriter,
    changed: Mapping[str, Tensor] | None = None,
) -> dict[str, str]:
    """Write tensors as they are, or as ``changed`` has them; returns the digest of each.

    Raises:
        QuantizationError: NaN or Inf in one.
    """
    digests = {}
    for name in names:
        tensor = changed[name] if changed and name in changed else reader.read(name)
        if not all_finite(tensor):
            raise QuantizationError(
                f"{reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?"
            )
        writer.add(name, tensor)
        digests[name] = sha256_tensor(tensor)
    return digests
