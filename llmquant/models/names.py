"""The checkpoint's names for a model's modules, so that reader, walk, formats and engines all mean
the same by one name.

transformers renames some modules between file and memory (GPT-NeoX: ``embed_out`` and ``lm_head``)
and stacks experts. Here a model is changed to what the file says: a renamed module is registered
under the file's name and stays reachable by the old one, which the model's own code uses; stacked
experts become an :class:`llmquant.models.experts.ExpertList` over the same numbers.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmquant.errors import ArchitectureError
from llmquant.models.architectures import ARCHITECTURES, Architecture, Experts
from llmquant.models.experts import ExpertList


def as_in_checkpoint(model: PreTrainedModel, model_type: str) -> None:
    """Change the model; does nothing for types whose names are equal, or that the table lacks.

    Raises:
        ArchitectureError: the experts are not stacked as the table's types stack them.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        return
    for pattern, name in architecture.renamed:
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for path in [n for n, _ in model.named_modules() if wanted.fullmatch(n)]:
            _rename(model, path, name)
    _rename_ties(model, architecture)
    if architecture.experts is not None:
        for name, module in list(model.named_modules()):
            if name.startswith(f"{architecture.blocks}.") and name.endswith(
                f".{architecture.experts.inside}"
            ):
                _unstack(module, name, architecture.experts)


def _rename(model: nn.Module, path: str, name: str) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    modules = [(name if n == leaf else n, m) for n, m in owner._modules.items()]
    owner._modules.clear()
    owner._modules.update(modules)
    kind: Any = type(owner)  # typeshed does not count a module's class as hashable
    owner.__class__ = _reachable(kind, leaf, name)


@cache
def _reachable(kind: Any, old: str, new: str) -> type[nn.Module]:
    """The class with one more name for a submodule, looked up anew each time, since modules are
    replaced by packed ones."""
    return type(
        kind.__name__,
        (kind,),
        {old: property(lambda self: self._modules[new]), "__module__": kind.__module__},
    )


def _rename_ties(model: PreTrainedModel, architecture: Architecture) -> None:
    ties: Any = getattr(model, "_tied_weights_keys", None)
    renamed = {
        f"{old}.": f"{old.removesuffix(old.split('.')[-1])}{new}."
        for old, new in architecture.renamed
        if "*" not in old
    }
    if not renamed or not isinstance(ties, dict):
        return

    def in_memory(name: str) -> str:
        return next(
            (new + name.removeprefix(old) for old, new in renamed.items() if name.startswith(old)),
            name,
        )

    model._tied_weights_keys = {in_memory(n): in_memory(s) for n, s in ties.items()}
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _unstack(module: nn.Module, name: str, experts: Experts) -> None:
    stacked: Any = getattr(module, experts.experts, None)
    if stacked is None or isinstance(stacked, ExpertList):
        return  # a block without experts, as some types mix them in, or one that was seen before
    plain = (
        {n for n, _ in stacked.named_parameters()} == {"gate_up_proj", "down_proj"}
        and not getattr(stacked, "is_transposed", False)
        and getattr(stacked, "is_concatenated", True)
    )
    if not plain:
        raise ArchitectureError(
            f"{name}.{experts.experts} is not stacked as gate_up_proj and down_proj; is transformers newer?"
        )
    names = (experts.gate, experts.up, experts.down)
    setattr(
        module,
        experts.experts,
        ExpertList(names, stacked.gate_up_proj, stacked.down_proj, stacked.act_fn),
    )
