"""A whole model in memory, run from the middle with other weights: what measuring one linear's
effect on the output takes.

Blocks that need not run again are replaced by stand-ins that give what the last of them gave, so
the model's own forward pass does the rest (masks, final norm, head, whatever it does to its logits)
and no per-model code is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmquant.quantization.blocks.materialize import buffer_names, materialized
from llmquant.quantization.plan import WalkPlan
from llmquant.weight import QuantizedWeight


class _AlreadyRun(nn.Module):
    """Stands in for a block that need not run again: gives what the last such block gave."""

    def __init__(self, block: nn.Module, given: Any) -> None:
        super().__init__()
        self.__dict__["_block"], self.__dict__["_given"] = block, given

    def __getattr__(self, name: str) -> Any:
        return getattr(
            self.__dict__["_block"], name
        )  # models read attributes such as attention_type off the block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_given"]


@contextmanager
def already_run(blocks: nn.ModuleList, index: int, given: Any) -> Iterator[None]:
    """The blocks before ``index`` give ``given``, in the form in which the last of them gave it,
    instead of running."""
    originals = list(blocks)
    try:
        for i in range(index):
            blocks[i] = _AlreadyRun(originals[i], given)
        yield
    finally:
        for i in range(index):
            blocks[i] = originals[i]


@contextmanager
def swapped(
    linears: Mapping[str, nn.Linear], rounded: Mapping[str, QuantizedWeight], dtype: torch.dtype
) -> Iterator[None]:
    """The linears hold other weights, by name."""
    originals = {n: m.weight for n, m in linears.items()}
    try:
        for name, module in linears.items():
            module.weight = nn.Parameter(rounded[name].dequantize(dtype), requires_grad=False)
        yield
    finally:
        for name, module in linears.items():
            module.weight = originals[name]


@contextmanager
def whole(plan: WalkPlan) -> Iterator[None]:
    """The whole model in memory; tied parameters share again what they are tied to."""
    model = plan.model
    tied: dict[str, str] = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in tied]
    names += buffer_names(plan, model, "")
    meta = {n: model.get_parameter(n) for n in tied}
    with materialized(plan, model, "", names):
        try:
            for name, source in tied.items():
                set_parameter(model, name, model.get_parameter(source))
            yield
        finally:
            for name, parameter in meta.items():
                set_parameter(model, name, parameter)


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one called ``name``."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, parameter)


__all__ = ["already_run", "set_parameter", "swapped", "whole"]
