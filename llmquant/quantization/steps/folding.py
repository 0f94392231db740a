"""Folding: multiplying channels between two modules by ``s`` and ``1/s`` so that a block computes
what it did.

A pair is a producer of channels (a norm, or a linear whose output reaches the readers channel by
channel) and the linears that read them. The producer's channels are divided by ``s``, the readers'
columns multiplied by it.

A norm's weight is stored in the checkpoint's dtype, so it is rounded to that *first* and ``s`` is
then taken as old over new: what the readers get is exact up to float32. A linear that is itself to
be quantized stays float32 until it is rounded. Biases of a producer are rounded to their stored
dtype, which is the one inexact step.

Norm pairs are observed: the tensor that the readers read *is* what the norm returned. Whether
folding is allowed is not assumed either: every pair is first folded with random factors, and
refused when one batch then leaves the block changed (another reader of the channels, other
arithmetic between the two). The same trial tells norms that multiply by ``w`` from those that
multiply by ``1 + w``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmquant.models.block_inputs import BlockInput, run_with

_OFFSETS = (0.0, 1.0)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_TOLERANCE_HALF = 0.05


@dataclass(frozen=True, slots=True)
class Pair:
    """Modules named from the block.

    Attributes:
        producer: a norm, or a linear.
        readers: linears.
        channel: int64 ``[in]``, the producer's channel that each input of the readers is; None: the
            same index.
        offset: a norm multiplies by ``offset + weight``.
        linear: whether the producer is a linear.
    """

    producer: str
    readers: tuple[str, ...]
    channel: Tensor | None = None
    offset: float = 0.0
    linear: bool = False


def fold(
    pair: Pair, scale: Tensor, tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """The pair's parameters after folding, by name from the block.

    Args:
        pair: what to fold.
        scale: ``[channels]`` positive factors of the readers' columns.
        tensors: the pair's present parameters.
        stored: the dtype in which a norm's tensors and biases will be written.
    """
    weight_name, bias_name = f"{pair.producer}.weight", f"{pair.producer}.bias"
    weight = tensors[weight_name]
    if pair.linear:
        changed = {weight_name: weight / scale.unsqueeze(1)}
    else:
        old = weight + pair.offset
        new = (old / scale - pair.offset).to(stored[weight_name]).to(weight.dtype)
        scale = old / (new + pair.offset)
        usable = torch.isfinite(scale) & (scale > 0)
        scale = torch.where(usable, scale, 1.0)
        changed = {weight_name: torch.where(usable, new, weight)}
    if bias_name in tensors:
        bias = tensors[bias_name]
        changed[bias_name] = (bias / scale).to(stored[bias_name]).to(bias.dtype)
    columns = scale if pair.channel is None else scale[pair.channel]
    return changed | {
        f"{reader}.weight": tensors[f"{reader}.weight"] * columns for reader in pair.readers
    }


def names_of(pair: Pair, block: nn.Module) -> list[str]:
    """The parameters that folding the pair touches."""
    present = {name for name, _ in block.named_parameters()}
    wanted = (
        f"{pair.producer}.weight",
        f"{pair.producer}.bias",
        *(f"{r}.weight" for r in pair.readers),
    )
    return [name for name in wanted if name in present]


def norm_pairs(block: nn.Module, sets: Sequence[tuple[str, ...]], inputs: BlockInput) -> list[Pair]:
    """A pair for every set of linears whose common input is the output of a module with a
    one-dimensional weight."""
    outputs: list[tuple[str, Tensor]] = []
    read: dict[str, Tensor] = {}

    def produced(name: str) -> Callable[..., None]:
        return lambda _m, _args, out: outputs.append((name, out))

    def reads(name: str) -> Callable[..., None]:
        return lambda _m, args: read.update({name: args[0]})

    handles = [
        m.register_forward_hook(produced(n))
        for n, m in block.named_modules()
        if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() == 1 and n
    ]
    handles += [block.get_submodule(s[0]).register_forward_pre_hook(reads(s[0])) for s in sets]
    try:
        with torch.no_grad():
            run_with(block, {}, inputs)
    finally:
        for handle in handles:
            handle.remove()
    pairs = []
    for members in sets:
        # Experts that this batch's tokens were not sent to have read nothing.
        name = next((n for n, out in outputs if out is read.get(members[0])), None)
        if name is not None:
            pairs.append(Pair(name, members))
    return pairs


def head_channels(outputs: int, inputs: int, kv_heads: int) -> Tensor | None:
    """For ``v -> o``: which row of v each column of o reads, when ``inputs / outputs`` query heads
    share a key-value head.

    None where the sizes do not fit.
    """
    if inputs % outputs or outputs % kv_heads:
        return None
    width = outputs // kv_heads
    rows = torch.arange(outputs).reshape(kv_heads, 1, width)
    return rows.expand(kv_heads, inputs // outputs, width).reshape(-1).contiguous()


def checked(block: nn.Module, pair: Pair, inputs: BlockInput) -> Pair | None:
    """The pair as it may be folded, or None when folding it changes the block's output."""
    parameters = {name: block.get_parameter(name).detach() for name in names_of(pair, block)}
    dtype = inputs.hidden.dtype
    stored = {
        name: torch.float64 if t.dtype == torch.float64 else torch.float32
        for name, t in parameters.items()
    }
    wide = {name: t.to(stored[name]) for name, t in parameters.items()}
    channels = wide[f"{pair.producer}.weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(channels, generator=generator) * 2 - 1)
    with torch.no_grad():
        before = run_with(block, {}, inputs).double()
        size = float((before - inputs.hidden.double()).norm())
        for offset in (0.0,) if pair.linear else _OFFSETS:
            attempt = replace(pair, offset=offset)
            changed = fold(
                attempt,
                scale.to(inputs.hidden.device, stored[f"{pair.producer}.weight"]),
                wide,
                stored,
            )
            after = run_with(
                block, {n: t.to(parameters[n].dtype) for n, t in changed.items()}, inputs
            ).double()
            if float((after - before).norm()) <= _TOLERANCE.get(dtype, _TOLERANCE_HALF) * size:
                return attempt
    return None
