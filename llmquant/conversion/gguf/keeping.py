"""Which linears of a GGUF file can be kept as they are, and their numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.gguf.folder import FLOATS, GgufSource, OnProgress, damaged
from llmquant.checkpoint.gguf.names import TURNED, Place
from llmquant.checkpoint.manifest import packed_bytes
from llmquant.errors import FormatError, LayoutError, QuantizationError
from llmquant.formats import Format, Scheme
from llmquant.formats import gguf as blocks
from llmquant.formats.base import HEADS
from llmquant.records import ModuleRecord
from llmquant.runtime.finite import some
from llmquant.weight import QuantizedWeight

_IN_BLOCK = re.compile(r"(model\.layers|transformer\.h)\.\d+\.")
_UNKEPT = {
    "Q4_1": "its minimum is a float and no whole number of scales",
    "Q5_0": "5-bit codes have no layout here",
    "Q5_1": "5-bit codes have no layout here",
}
_BEYOND = (
    "its scales are themselves quantized or its codes index a table, which no layout here says"
)


_TRANSPOSED = (
    "transformers stores it transposed (Conv1D), and groups of codes cannot be turned with it"
)


@dataclass(slots=True)
class Kept:
    """Linears that are kept: module → where it is in the file, and which part of it."""

    places: dict[str, tuple[Place, int | None]] = field(default_factory=dict)
    schemes: dict[str, Scheme] = field(default_factory=dict)
    records: dict[str, ModuleRecord] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    nbytes: int = 0


def choose(opened: GgufSource, target: Format, dtype: torch.dtype, on_progress: OnProgress) -> Kept:
    """Which linears are kept, or everything that refuses.

    Raises:
        LayoutError: naming the modules with the reason.
        CheckpointError: numbers that are not finite.
    """
    kept, refused = Kept(), dict[str, str]()
    for done, place in enumerate(opened.placed.places):
        on_progress("checking", done, len(opened.placed.places))
        kind = place.tensor.kind
        if len(place.shape) != 2 or not _is_linear(opened, place):
            continue
        for part, name in enumerate(place.names):
            module = name.removesuffix(".weight")
            if kind in FLOATS:
                kept.skipped[module] = "unquantized in the source"
                continue
            reason = _keep(opened, kept, target, dtype, (place, part), module)
            if reason and module in HEADS:
                kept.skipped[module] = reason
            elif reason:
                refused[module] = f"{kind}: {reason}"
    if not kept.places and not refused:
        raise LayoutError(
            f"{opened.file.path} has no quantized linears, so there is nothing to keep packed; leave out --packed"
        )
    together = target.why_not_together(kept.schemes, kept.skipped)
    if refused or together:
        reasons: dict[str, list[str]] = {}
        for module, reason in refused.items():
            reasons.setdefault(reason, []).append(module)
        lines = [f"{some(names)}: {reason}" for reason, names in reasons.items()]
        lines += [f"taken together: {together}"] if together else []
        raise LayoutError(
            f"{opened.file.path} cannot be kept packed without loss; leave out --packed to dequantize it:"
            + "".join(f"\n  {line}" for line in lines)
        )
    return kept


def _is_linear(opened: GgufSource, place: Place) -> bool:
    """Whether a matrix is a linear's (with a head that has weights of its own), not a look-up or a
    router."""
    name = place.names[0].removesuffix(".weight")
    if name in HEADS:
        return True
    router = name.endswith((".mlp.gate", ".block_sparse_moe.gate", ".shared_expert_gate"))
    return bool(_IN_BLOCK.match(name)) and not router


def _keep(
    opened: GgufSource,
    kept: Kept,
    target: Format,
    dtype: torch.dtype,
    where: tuple[Place, int],
    module: str,
) -> str | None:
    """Take one linear in, or say why not."""
    place, part = where
    if opened.file.architecture in TURNED and module not in HEADS:
        return _TRANSPOSED
    if place.tensor.kind not in blocks.BLOCK_BYTES:
        return _UNKEPT.get(place.tensor.kind, _BEYOND)
    kept.places[module] = (place, part if len(place.names) > 1 else None)
    try:
        weight = weight_of(opened, kept, module)
        scheme = Scheme(weight.spec)
        reason = target.why_not(scheme, weight.shape)
        if reason is None:
            kept.nbytes += packed_bytes(target.pack(weight, dtype))
    except FormatError as e:
        reason = str(e)
    if reason is not None:
        del kept.places[module]
        return reason
    kept.schemes[module] = scheme
    kept.records[module] = ModuleRecord(
        spec=str(weight.spec), shape=weight.shape, digest=weight.digest()
    )
    return None


def weight_of(opened: GgufSource, kept: Kept, module: str) -> QuantizedWeight:
    """A linear's numbers, rows in transformers' order.

    Raises:
        FormatError: they are on no integer grid.
        CheckpointError: they are not finite.
    """
    place, part = kept.places[module]
    data = place.tensor.data()
    stored = torch.from_numpy((data if part is None else data[part]).copy())
    kind: Any = place.tensor.kind  # one of the block types
    try:
        weight = blocks.unpack(stored, kind)
    except QuantizationError as e:
        raise damaged(opened.file.path, f"{module}.weight") from e
    order = torch.from_numpy(opened.placed.rows(place).copy())
    return QuantizedWeight(
        weight.codes[order], weight.scales[order], weight.zeros[order], weight.spec
    )


def dequantized(opened: GgufSource, kept: Kept, module: str) -> Tensor:
    """The same numbers by the ``gguf`` package's code and transformers' processors."""
    place, part = kept.places[module]
    if part is not None:
        return torch.from_numpy(place.tensor.values(part))
    return torch.from_numpy(opened.placed.undone(place, place.tensor.values()).copy())
