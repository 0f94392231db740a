"""Where a model keeps its decoder blocks, and which linears an engine fuses. A table, not branches.

Three facts cannot be found by running the model: the path of the block list, the sets of linears
that serving engines merge into one matrix (so they must share bits, group size and symmetry), and
linears whose outputs another one reads channel by channel. Which linears share an input, and in
what order they run, is observed in :mod:`llmquant.quantization.blocks.capture`.

All names are those of the *checkpoint*. Where transformers names a module otherwise in memory, or
keeps the experts of a block in stacked tensors, the table says so, and
:mod:`llmquant.models.naming.names` gives the model the checkpoint's names.

A model type that is not in the table is walked by its one list of equal blocks, if it has exactly
one, under the names that transformers saves it by (:mod:`llmquant.models.naming.conversions`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from llmquant.errors import ArchitectureError
from llmquant.models.experts import ExpertList
from llmquant.models.rows.architecture import Architecture, Experts, Stacked
from llmquant.models.rows.table import ARCHITECTURES, derived
from llmquant.models.rows.towers import SENSES


def find(
    model: nn.Module, model_type: str, placed: Callable[[Architecture], Architecture] = lambda a: a
) -> Architecture:
    """The table's entry, or one derived from the only list of two or more blocks: of one class, or
    of classes of one model's code.

    Args:
        model: without weights, under the checkpoint's names.
        model_type: of it.
        placed: gives a row the checkpoint's names, where the model is part of a larger one.

    Raises:
        ArchitectureError: the entry does not fit the model, there is no single such list, the model
            is more than a text decoder, or it holds experts that are not linears: the larger part
            of it would stay as it is.
    """
    if isinstance(config := getattr(model, "config", None), PreTrainedConfig):
        refuse_kind(config)
    _refuse_experts(model, model_type)
    known = ARCHITECTURES.get(model_type)
    if known is not None:
        known = placed(known)
        if not isinstance(_get(model, known.blocks), nn.ModuleList):
            raise ArchitectureError(
                f"{type(model).__name__} has no block list at {known.blocks}; is its config.json right?"
            )
        return known
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(map(_has_linears, module))
    }
    # A list inside another one (experts, branches) is part of a block, even where the outer list
    # does not qualify.
    outer = [
        name
        for name, blocks in lists.items()
        if not any(name.startswith(f"{o}.") for o in lists) and len(blocks) > 1
    ]
    equal = [name for name in outer if len({type(m) for m in lists[name]}) == 1]
    # Of two classes in a model with two kinds of layers, such as Jamba.
    outer = equal or [name for name in outer if _related(lists[name])]
    strange = sorted({type(m).__name__ for m in model.modules() if has_matrix(m)} - {"Linear"})
    if not outer and strange:
        raise ArchitectureError(
            f"the matrices of model type {model_type!r} are in {', '.join(strange)} modules; "
            "only models of plain Linear layers can be quantized"
        )
    if len(outer) != 1:
        raise ArchitectureError(
            f"model type {model_type!r} is not in llmquant's table ({', '.join(sorted(ARCHITECTURES))}) and has "
            f"{len(outer)} lists of equal blocks ({', '.join(outer) or 'none'}) where exactly one is needed"
        )
    parent = outer[0].rpartition(".")[0]
    norms = [n for n, _ in (_get(model, parent) or model).named_children() if "norm" in n]
    norm = f"{parent}.{norms[-1]}".lstrip(".") if norms else ""
    return derived(outer[0], norm, _experts_of(lists[outer[0]]), _outside(model, outer[0]))


def _related(blocks: nn.ModuleList) -> bool:
    """Whether modules are of classes of one model's code, all with linears inside."""
    return len({type(m).__module__ for m in blocks}) == 1 and all(map(_has_linears, blocks))


def _has_linears(block: nn.Module) -> bool:
    """Whether it is made of linears; a linear itself is not."""
    return any(isinstance(part, nn.Linear) for part in block.modules() if part is not block)


def _outside(model: nn.Module, blocks: str) -> tuple[str, ...]:
    """Linears beside the blocks that are not the head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return tuple(
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and not name.startswith(f"{blocks}.")
    )


def _experts_of(blocks: nn.Module) -> Experts | None:
    """Where blocks have experts that were taken apart."""
    for name, module in blocks.named_modules():
        if isinstance(module, ExpertList):
            inside, _, leaf = name.partition(".")[2].rpartition(".")
            gate, up, down = ("", *module.names)[-3:]
            return Experts(inside, gate, up, down, experts=leaf)
    return None


def has_matrix(module: nn.Module) -> bool:
    """Whether a module multiplies by a matrix of its own, as GPT-2's Conv1D and Falcon's linears
    do."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def refuse_kind(config: PreTrainedConfig) -> None:
    """Refuse what is no text decoder with plain linears, nor has one as a part of its own.

    Raises:
        ArchitectureError: it also reads images or sound.
    """
    parts = [part for part in SENSES if getattr(config, part, None)]
    if parts and config.get_text_config() is config:
        raise ArchitectureError(
            f"model type {config.model_type!r} is more than a text decoder (its config has {', '.join(parts)}), and calibration does "
            "not reach the rest; quantize a text-only checkpoint of the family"
        )


def _refuse_experts(model: nn.Module, model_type: str) -> None:
    stacked = [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    ]
    if stacked and not any("expert" in name for name in stacked):
        raise ArchitectureError(
            f"model type {model_type!r} keeps weights in {len(stacked)} three-dimensional tensors (such as {stacked[0]}), and "
            "layouts for quantized linears hold matrices; quantize a model with plain linears"
        )
    if stacked:
        raise ArchitectureError(
            f"model type {model_type!r} stacks its experts' weights in {len(stacked)} three-dimensional tensors (such as "
            f"{stacked[0]}); the mixture-of-experts models that llmquant supports are {', '.join(n for n, a in ARCHITECTURES.items() if a.experts)}"
        )


def _get(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
    return module


def blocks_of(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    blocks = _get(model, architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def norm_of(model: nn.Module, architecture: Architecture) -> nn.Module:
    """The norm before the head.

    Raises:
        ArchitectureError: this architecture's is not known.
    """
    norm = _get(model, architecture.norm) if architecture.norm else None
    if norm is None:
        raise ArchitectureError(
            f"cannot find the norm before the head of {type(model).__name__}; --ignore lm_head"
        )
    return norm


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Experts",
    "Stacked",
    "blocks_of",
    "find",
    "has_matrix",
    "norm_of",
    "refuse_kind",
]
