"""Modules filled from the checkpoint for as long as they are worked on; the rest of the model stays
on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from llmquant.errors import CheckpointError, QuantizationError
from llmquant.models.precision import dtype_of, stored_buffers
from llmquant.quantization.plan import WalkPlan
from llmquant.runtime.finite import all_finite


def buffer_names(plan: WalkPlan, module: nn.Module, prefix: str) -> list[str]:
    """A module's buffers that the checkpoint has. A router's correction bias is one in some models,
    and a parameter in others.

    Args:
        prefix: of the module's names.
    """
    return [n for n, _ in stored_buffers(module) if f"{prefix}{n}" in plan.reader]


def tensor_names(plan: WalkPlan, module: nn.Module, prefix: str) -> list[str]:
    """A module's parameters, and those of its buffers that the checkpoint has."""
    return [n for n, _ in module.named_parameters()] + buffer_names(plan, module, prefix)


def outer_names(plan: WalkPlan) -> list[str]:
    """Tensors outside the blocks and the head: embeddings and norms, what the forward pass needs
    before block 0."""
    head = plan.model.get_output_embeddings()
    inside = [f"{n}." for n, m in plan.model.named_modules() if m is head and m is not None]
    inside.append(f"{plan.architecture.blocks}.")
    names = tensor_names(plan, plan.model, "")
    return [name for name in names if not name.startswith(tuple(inside))]


@contextmanager
def materialized(
    plan: WalkPlan,
    module: nn.Module,
    prefix: str,
    only: Sequence[str] | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Fill a module's meta parameters, and its buffers that the checkpoint has; put back what was
    there afterwards, whatever happens.

    Args:
        prefix: of the module's names.
        only: parameters and buffers to fill.
        given: used in place of the checkpoint's, by full name.
    """
    names = tensor_names(plan, module, prefix) if only is None else list(only)
    before: list[tuple[nn.Module, str, Tensor]] = []
    try:
        for name in names:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            was: Tensor = getattr(owner, leaf)
            full = f"{prefix}{name}"
            value = given[full] if given and full in given else _read(plan, full, was)
            before.append((owner, leaf, was))
            if isinstance(was, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            setattr(owner, leaf, value)
        yield
    finally:
        for owner, leaf, was in before:
            setattr(owner, leaf, was)


def _read(plan: WalkPlan, name: str, like: Tensor) -> Tensor:
    if name not in plan.reader:
        raise CheckpointError(
            f"{plan.reader.path}: tensor {name} of the model is not in the checkpoint"
        )
    tensor = plan.reader.read(name)
    if tensor.shape != like.shape:
        raise CheckpointError(
            f"{name} is {list(tensor.shape)} in the checkpoint, config.json makes it {list(like.shape)}"
        )
    if not like.is_floating_point():
        return tensor.to(plan.device, like.dtype, copy=True)
    if not all_finite(tensor):
        raise QuantizationError(
            f"{plan.reader.path}: tensor {name} holds NaN or Inf; is the checkpoint damaged?"
        )
    # A copy even when no cast is needed: quantized weights are written into it, never into the
    # mapped file.
    return tensor.to(plan.device, dtype_of(plan.model, name, plan.dtype), copy=True)
