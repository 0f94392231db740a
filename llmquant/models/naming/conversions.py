"""The checkpoint's names for a model that the table of architectures lacks: those that transformers
saves it by, or reads it by where the checkpoint has others.

transformers' table of conversions says of each model type which tensors it renames when it reads a
file, which experts it stacks and which tensors it joins. Turned round, it is asked here what a file
calls each tensor, and the model is changed to that; what it does to numbers is seen in numbers that
go through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from llmquant.checkpoint.companions.confusion import CONFUSED
from llmquant.models.experts import GATED, UNGATED, ExpertList, is_gated
from llmquant.models.naming.joined import take_apart
from llmquant.models.naming.moves import relocate, rename_ties
from llmquant.models.rows.architecture import Stacked

Shapes = Mapping[str, tuple[int, ...]]

_MOVED = "_in_memory"
_PLAIN = Stacked("gate_up_proj", "down_proj")
# Of transformers' modules of experts that do what ExpertList does.
_PLAIN_TRAITS = {"has_bias": False, "is_transposed": False, "is_concatenated": True}


def follow_conversions(model: PreTrainedModel, stored: Shapes) -> None:
    """Change a model, under transformers' names, to what files call its modules and tensors; does
    nothing where the two are equal.

    Args:
        model: on the meta device or with numbers.
        stored: a folder's tensors and their shapes, as far as they are known. They tell how wide
            the parts of a joined tensor are, and which of several names is meant.
    """
    if not get_model_conversion_mapping(model, add_legacy=False):
        return
    _split(model, stored)
    known: dict[object, tuple[str, ...] | None] = {}  # modules that are alike are asked about once
    for path, module in list(model.named_modules()):
        kind = (type(module), *(p.shape for p in module.parameters(recurse=False)))
        if _is_plain(module) and kind not in known:
            known[kind] = _stored_linears(model, path, module)
        linears = known.get(kind) if _is_plain(module) else None
        if linears is not None:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ExpertList(module, linears, _PLAIN))
    moves = relocate(model, _as_stored(model, _saved_names(model), stored))
    model.__dict__[_MOVED] = moves
    rename_ties(model, tuple((old, new.rpartition(".")[2]) for old, new in moves.items()))


def moved_modules(model: nn.Module) -> Mapping[str, str]:
    """What :func:`follow_conversions` has moved: transformers' name → the file's."""
    moves: Mapping[str, str] = model.__dict__.get(_MOVED, {})
    return moves


def in_memory(names: Iterable[str], moved: Mapping[str, str]) -> list[str]:
    """What transformers calls modules of these names, where they are inside moved ones."""
    return [
        f"{old}{name.removeprefix(new)}"
        for name in names
        for old, new in moved.items()
        if name == new or name.startswith(f"{new}.")
    ]


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Tensors in memory → their names in a file. What is stored otherwise than as it is in memory
    has no one name; of experts the first one in each list does, since what is moved is the list.
    """
    lists = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ExpertList))
    firsts = tuple(f"{name}0." for name in lists)
    marks = {
        name: torch.empty(tensor.shape, device="meta")
        for name, tensor in model.state_dict().items()
        if not name.startswith(lists) or name.startswith(firsts)
    }
    saved = revert_weight_conversion(model, dict(marks))
    names = {id(mark): name for name, mark in saved.items()}
    return {name: names[id(mark)] for name, mark in marks.items() if id(mark) in names}


def _as_stored(model: PreTrainedModel, saved: dict[str, str], stored: Shapes) -> dict[str, str]:
    """Tensors in memory → their names in a folder, which may have another one than transformers
    saves: by its table Kimi Linear's first block has an ``mlp``, and it is saved with a
    ``block_sparse_moe``."""
    modules = {name.rpartition(".")[0] for name in stored}

    def there(name: str) -> bool:
        return name in stored or name.rpartition(".")[0] in modules  # the second where it is packed

    missing = {n for n, file in saved.items() if not there(file)}
    if not stored or not missing:
        return saved
    found = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [
        c for c in found if isinstance(c, WeightRenaming) and not isinstance(c, PrefixChange)
    ]
    named = dict(saved)
    for name in sorted({*stored, *(f"{module}.weight" for module in modules)}):
        place, _ = rename_source_key(name, renamings, [])
        if place in missing:
            named[place] = name
    return named


def _split(model: PreTrainedModel, stored: Shapes) -> None:
    """Take apart modules whose tensors a file has in parts."""
    named = _saved_names(model)
    for path, module in list(model.named_modules()):
        own = dict(module.named_parameters(recurse=False))
        if (
            not own
            or module._modules
            or any(f"{path}.{leaf}" in named for leaf in own)
            or _is_plain(module)
        ):
            continue
        parts = [_parts_of(model, f"{path}.{leaf}", tensor, stored) for leaf, tensor in own.items()]
        if parts[0] and all(p == parts[0] for p in parts):
            take_apart(model, path, parts[0])


def _parts_of(
    model: PreTrainedModel, name: str, tensor: Tensor, stored: Shapes
) -> dict[str, int] | None:
    """Modules in whose tensors a file has the rows of a tensor, one part after the other, and how
    many rows each has; None where a file has anything else."""
    with torch.device("cpu"):
        rows = torch.arange(float(len(tensor))).view(-1, *[1] * (tensor.ndim - 1))
        rows = rows.expand(-1, *[2] * (tensor.ndim - 1)).contiguous()
    try:
        found = revert_weight_conversion(model, {name: rows})
    except CONFUSED:  # something that these numbers are too few for
        return None
    if len(found) < 2 or not torch.equal(torch.cat(list(found.values())), rows):
        return None
    widths = [stored[n][0] if stored.get(n) else len(part) for n, part in found.items()]
    places = [n.split(".")[-2:] for n in found]
    if sum(widths) != len(tensor) or any(leaf != name.split(".")[-1] for _, leaf in places):
        return None
    return {module: width for (module, _), width in zip(places, widths, strict=True)}


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is stacked experts that do what
    :class:`~llmquant.models.experts.ExpertList` does."""
    own = {n for n, _ in module.named_parameters()}
    return (
        own == set(GATED if is_gated(module) else UNGATED)
        and all(getattr(module, name, None) is value for name, value in _PLAIN_TRAITS.items())
        # Newer than the others, so that an earlier transformers has none.
        and not getattr(module, "has_post_expert_norm", False)
    )


def _stored_linears(model: PreTrainedModel, path: str, module: nn.Module) -> tuple[str, ...] | None:
    """What files call gate (if there is one), up and down of plain stacked experts, if they hold a
    matrix for each."""
    first, second = GATED if is_gated(module) else UNGATED
    count, halves = module.get_parameter(second).shape[0], 2 if first == GATED[0] else 1
    # Two rows for each linear: transformers 5.17 drops dimensions of one.
    # On the CPU, also where new tensors are made without numbers (inside ``from_pretrained``).
    with torch.device("cpu"):
        numbers = torch.arange(count * halves * 6.0).view(count, halves * 2, 3)
    ups = _reverted(model, f"{path}.{first}", numbers, halves)
    downs = _reverted(model, f"{path}.{second}", numbers[:, :2], 1)
    if ups is None or downs is None:
        return None
    found = [*ups.values(), *downs.values()]
    right = all(map(torch.equal, found, (*numbers.split(2, dim=1), numbers[:, :2])))
    return (*ups, *downs) if right else None


def _reverted(
    model: PreTrainedModel, name: str, stacked: Tensor, linears: int
) -> dict[str, Tensor] | None:
    """Names of an expert's linears in a file → what a stacked tensor gives each, stacked; None
    where a file has anything but a matrix for each."""
    found: dict[str, list[Tensor]] = {}
    for stored, tensor in revert_weight_conversion(model, {name: stacked}).items():
        place = re.fullmatch(r".+\.(\d+)\.(\w+)\.weight", stored)
        if place is None or int(place[1]) != len(found.setdefault(place[2], [])):
            return None
        found[place[2]].append(tensor)
    if [len(tensors) for tensors in found.values()] != [len(stacked)] * linears:
        return None
    return {linear: torch.stack(tensors) for linear, tensors in found.items()}
