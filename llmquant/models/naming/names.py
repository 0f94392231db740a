"""The checkpoint's names for a model's modules, so that reader, walk, formats and engines all mean
the same by one name.

transformers renames some modules between file and memory (GPT-NeoX: ``embed_out`` and ``lm_head``)
and stacks experts. Here a model is changed to what the file says: a renamed module is registered
under the file's name and stays reachable by the old one, which the model's own code uses; stacked
experts become an :class:`llmquant.models.experts.ExpertList` over the same numbers.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from llmquant.errors import ArchitectureError
from llmquant.models.architectures import ARCHITECTURES, Architecture, Experts, Stacked
from llmquant.models.experts import ExpertList, WeighsInputs
from llmquant.models.naming.conversions import follow_conversions, moved_modules
from llmquant.models.naming.moves import rename, rename_ties


def as_in_checkpoint(
    model: PreTrainedModel,
    model_type: str,
    moved: tuple[tuple[str, str], ...] = (),
    placed: Callable[[Architecture], Architecture] = lambda a: a,
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Change the model; does nothing for types whose names are equal.

    Args:
        model: under transformers' names.
        model_type: of it.
        moved: its modules that the checkpoint keeps elsewhere, and where.
        placed: gives a row of the table the checkpoint's names.
        stored: the checkpoint's tensors, as the text model calls them, and their shapes.

    Raises:
        ArchitectureError: the experts are not stacked as the table's types stack them.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None and not text_is_a_part(model):
        follow_conversions(model, stored or {})
    already = moved_modules(model)
    for old, new in moved:
        rename(model, already.get(old, old), new)
    architecture = None if architecture is None else placed(architecture)
    renamed = architecture.renamed if architecture is not None else ()
    for pattern, name in renamed:
        wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        for path in [n for n, _ in model.named_modules() if wanted.fullmatch(n)]:
            rename(model, path, name)
    rename_ties(model, (*moved, *renamed))
    if architecture is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).__name__ in architecture.linears:
            module.__class__ = nn.Linear
    for pattern in architecture.conv1d_weights():
        _as_linears(model, pattern.removesuffix(".weight"))
    if architecture.experts is not None:
        for name, module in list(model.named_modules()):
            if name.startswith(f"{architecture.blocks}.") and name.endswith(
                f".{architecture.experts.inside}"
            ):
                _unstack(module, name, architecture.experts)


def text_is_a_part(model: PreTrainedModel) -> bool:
    """Whether a text model is only part of this one, which also sees or hears."""
    return model.config.get_text_config() is not model.config


def places_in_memory(model: PreTrainedModel, stored: Iterable[str], path: Path) -> dict[str, str]:
    """Where transformers' own model has the modules of a checkpoint: stored name → name in memory.
    They differ in models that also see, whose tensors transformers' loader renames.

    Args:
        model: of transformers' class; a text model after ``as_in_checkpoint``.
        stored: names of packed modules.
        path: of the folder.

    Raises:
        ArchitectureError: a model that also sees lacks one.
    """
    if not text_is_a_part(model):
        return {name: name for name in stored}
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    modules = {n for n, _ in model.named_modules()}
    places = {}
    for name in stored:
        place = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
        if place not in modules:
            raise ArchitectureError(
                f"{path} has packed weights for {name}, and {type(model).__name__} has no such linear "
                "(experts are stacked there); llmquant.load loads its text part"
            )
        places[name] = place
    return places


def put_head(model: PreTrainedModel, module: nn.Module) -> None:
    """Replace the output head under its own name. transformers' ``set_output_embeddings`` makes
    another module called ``lm_head`` of it, also where the checkpoint's name is another."""
    head = model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is head and n), None)
    if name is None:
        model.set_output_embeddings(module)
        return
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _as_linears(model: nn.Module, pattern: str) -> None:
    """Put Linears in the place of Conv1D modules, over the same numbers."""
    found = {n: m for n, m in model.named_modules() if fnmatch.fnmatchcase(n, pattern)}
    for path, module in found.items():
        if not isinstance(module, Conv1D):
            continue  # one that was seen before
        linear = nn.Linear(module.nx, module.nf, device="meta")
        for name, tensor in (("weight", module.weight.t()), ("bias", module.bias)):
            setattr(linear, name, nn.Parameter(tensor, requires_grad=module.weight.requires_grad))
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)


def _unstack(module: nn.Module, name: str, experts: Experts) -> None:
    stacked: Any = getattr(module, experts.experts, None)
    if stacked is None or isinstance(stacked, ExpertList):
        return  # a block without experts, as some types mix them in, or one that was seen before
    layout = experts.stacked or Stacked("gate_up_proj", "down_proj")
    wanted = {"gate_up_proj", "down_proj"}
    wanted |= {f"{n}_bias" for n in wanted} if layout.biased else set()
    plain = (
        {n for n, _ in stacked.named_parameters()} == wanted
        and bool(getattr(stacked, "is_transposed", layout.transposed)) == layout.transposed
        and bool(getattr(stacked, "is_concatenated", True)) != layout.interleaved
    )
    if not plain:
        raise ArchitectureError(
            f"{name}.{experts.experts} is not stacked as gate_up_proj and down_proj; is transformers newer?"
        )
    names = (experts.gate, experts.up, experts.down)
    if experts.weighs_inputs:
        kind: Any = type(module)
        module.__class__ = _weighing(kind)
    setattr(module, experts.experts, ExpertList(stacked, names, layout, experts.weighs_inputs))


@cache
def _weighing(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (WeighsInputs, kind), {"__module__": kind.__module__})
