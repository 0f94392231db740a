"""Modules filled from the checkpoint for as long as they are worked on; the rest of the model stays
on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmquant.errors import CheckpointError, QuantizationError
from llmquant.quantization.plan import WalkPlan
from llmquant.runtime.finite import all_finite


def outer_names(plan: WalkPlan) -> list[str]:
    """Tensors outside the blocks and the head: embeddings and norms, what the forward pass needs
    before block 0."""
    head = plan.model.get_output_embeddings()
    inside = [f"{n}." for n, m in plan.model.named_modules() if m is head and m is not None]
    inside.append(f"{plan.architecture.blocks}.")
    return [name for name, _ in plan.model.named_parameters() if not name.startswith(tuple(inside))]


@contextmanager
def materialized(
    plan: WalkPlan,
    module: nn.Module,
    prefix: str,
    only: Sequence[str] | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Fill a module's meta parameters from the checkpoint; put them back on meta afterwards,
    whatever happens.

    Args:
        prefix: of the module's names.
        only: parameters to fill.
        given: used in place of the checkpoint's, by full name.
    """
    names = list(only) if only is not None else [n for n, _ in module.named_parameters()]
    meta: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            parameter = owner.get_parameter(leaf)
            full = f"{prefix}{name}"
            value = (
                given[full]
                if given and full in given
                else _read_parameter(plan, full, parameter.shape)
            )
            meta.append((owner, leaf, parameter))
            setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for owner, leaf, parameter in meta:
            setattr(owner, leaf, parameter)


def _read_parameter(plan: WalkPlan, name: str, shape: torch.Size) -> Tensor:
    if name not in plan.reader:
        raise CheckpointError(
            f"{plan.reader.path}: tensor {name} of the model is not in the checkpoint"
        )
    tensor = plan.reader.read(name)
    if tensor.shape != shape:
        raise CheckpointError(
            f"{name} is {list(tensor.shape)} in the checkpoint, config.json makes it {list(shape)}"
        )
    if not all_finite(tensor):
        raise QuantizationError(
            f"{plan.reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?"
        )
    # A copy even when no cast is needed: quantized weights are written into it, never into the
    # mapped file.
    return tensor.to(plan.device, plan.dtype, copy=True)
