"""The first pass: everything that a target refuses, known before anything is written.

Whether a scale is exact in the target's dtype, or a zero-point is the 0 that GPTQ v1 cannot store,
only the numbers tell. So every module is packed, and the result thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from llmquant.activations import Activations
from llmquant.checkpoint.manifest import packed_bytes
from llmquant.conversion.source import Source
from llmquant.errors import FormatError, LayoutError, UsageError
from llmquant.formats import FORMATS, Format, Scheme
from llmquant.formats.dense import Dense
from llmquant.weight import QuantizedWeight

DENSE = Dense()
TARGETS: tuple[str, ...] = (*FORMATS, DENSE.name)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Checked:
    """What the first pass found: everything about the result but its bytes. ``rounded``: weights of
    a dense result that its dtype does not hold as they are."""

    schemes: Mapping[str, Scheme]
    digests: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    nbytes: int
    rounded: int = 0

    @property
    def weights(self) -> int:
        """How many numbers the modules have."""
        return sum(o * i for o, i in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.weights

    @property
    def scheme(self) -> str:
        """For people: all schemes that occur."""
        return ", ".join(sorted({str(s) for s in self.schemes.values()}))


def check(
    source: Source, target: Format, dtype: torch.dtype, asked: bool, on_progress: OnProgress
) -> Checked:
    """The first pass.

    Args:
        asked: the dtype is the user's wish for the scales, not a default.

    Raises:
        FormatError: listing every refusal.
        UsageError: the layout has a scale dtype of its own.
    """
    refused: dict[str, str] = {}
    schemes, digests, shapes = dict(source.packed.schemes), {}, {}
    nbytes = rounded = 0
    for done, (name, announced) in enumerate(source.packed.schemes.items()):
        on_progress("checking", done, len(schemes))
        # Whether an announced g_idx says anything is known only from its numbers.
        reason = target.why_not(replace(announced, g_idx=False), source.packed.shape(name))
        if reason is None:
            weight = source.weight(name)
            schemes[name] = Scheme(weight.spec, weight.g_idx is not None, announced.activations)
            digests[name], shapes[name] = weight.digest(), weight.shape
            reason = target.why_not(schemes[name], weight.shape)
        if reason is None:
            packed, reason = _pack(target, weight, dtype, announced.activations)
            nbytes += packed_bytes(packed)
            if target is DENSE and packed:
                rounded += int((packed["weight"].float() != weight.dequantize()).sum())
            if asked and packed and dtype not in {t.dtype for t in packed.values()}:
                raise UsageError(
                    f"{target.name} stores scales in a dtype of its own; leave out the scale dtype"
                )
        if reason is not None:
            refused[name] = reason
    together = target.why_not_together(schemes, source.skipped)
    if refused or together:
        reasons = _reasons(refused, together, len(schemes))
        raise LayoutError(
            f"{source.reader.path} cannot become {target.name} without loss:{reasons}"
        )
    return Checked(schemes, digests, shapes, nbytes, rounded)


def _reasons(refused: Mapping[str, str], together: str | None, total: int) -> str:
    """One indented line per reason, after the modules that it is given for."""
    modules: dict[str, list[str]] = {}
    for name, reason in refused.items():
        modules.setdefault(reason, []).append(name)
    lines = [
        f"{f'all {total} linears' if len(n) == total > 1 else ', '.join(n)}: {reason}"
        for reason, n in modules.items()
    ]
    if together:
        lines.append(f"taken together: {together}")
    return "".join(f"\n  {line}" for line in lines)


def _pack(
    target: Format, weight: QuantizedWeight, dtype: torch.dtype, activations: Activations
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The packed tensors, or none and the reason, with the dtypes that would do where it lies in
    the dtype."""
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
