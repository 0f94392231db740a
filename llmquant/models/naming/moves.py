"""Modules and tensors of a model under other names, still found by the old ones.

A model's own code uses the names that transformers gave; reader, walk, formats and engines use the
checkpoint's. What is moved is registered under the new name alone, and the old one is a property
that looks it up each time, since modules are replaced by packed ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

_ELSEWHERE = "_elsewhere"


def rename(model: nn.Module, path: str, name: str) -> None:
    """Give a module the name ``name``; if that has parts (``router.layer``), modules that do
    nothing are between."""
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    first, *inner = name.split(".")
    holder = owner._modules.get(first) if first != leaf else None
    modules = [
        (first, _within(m, inner, holder)) if n == leaf else (n, m)
        for n, m in owner._modules.items()
    ]
    owner._modules.clear()
    owner._modules.update(modules)
    kind: Any = type(owner)  # typeshed does not count a module's class as hashable
    owner.__class__ = _reachable(kind, leaf, name)
    if inner and first == leaf:  # the old name is also the first part of the new one
        found = owner.get_submodule(leaf)
        own: Any = type(found)
        found.__class__ = _itself(own, tuple(inner))
    _reach(owner, name)


def _reach(owner: nn.Module, name: str) -> None:
    """Make a module that was moved reachable by attributes, where the first of them is an old name
    that leads elsewhere."""
    *path, last = name.split(".")
    holder = seen = owner
    for part in path:
        child, seen = holder._modules[part], getattr(seen, part)
        assert child is not None  # rename() has put it there
        holder = child
    if seen is not holder and not hasattr(seen, last):
        _point(seen, last, holder, last)


@cache
def _itself(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """The class with names for the module itself: ``router.layer`` is found from ``router``, as
    which the model's own code gets the module at the path's end."""
    own = dict.fromkeys(names, property(lambda self: self))
    return type(kind.__name__, (kind,), {**own, "__module__": kind.__module__})


def _within(
    module: nn.Module | None, names: list[str], holder: nn.Module | None = None
) -> nn.Module | None:
    """The module at the end of a path of modules that do nothing, or that are there."""
    if not names:
        return module
    holder = holder or nn.Module()
    first, *rest = names
    holder.add_module(first, _within(module, rest, holder._modules.get(first) if rest else None))
    return holder


@cache
def _reachable(kind: Any, old: str, new: str) -> type[nn.Module]:
    """The class with one more name for a submodule, looked up each time, since modules are replaced
    by packed ones."""

    def found(self: nn.Module) -> nn.Module | None:
        module: nn.Module | None = self
        for part in new.split("."):
            if module is not None:
                # By its attribute where it was moved a second time.
                there = part in module._modules
                module = module._modules[part] if there else getattr(module, part)
        return module

    return type(kind.__name__, (kind,), {old: property(found), "__module__": kind.__module__})


def rename_ties(model: PreTrainedModel, pairs: tuple[tuple[str, str], ...]) -> None:
    ties: Any = getattr(model, "_tied_weights_keys", None)
    renamed = {
        f"{old}.": f"{old.removesuffix(old.split('.')[-1])}{new}."
        for old, new in pairs
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


def relocate(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Move modules, and tensors of modules that stay, so that every tensor has its new name.

    Nothing is moved where a new name is taken, as where two are exchanged, or where a list would
    lose a module, since models walk through their lists.

    Args:
        names: of tensors of the model: old → new. Others go with the modules that hold them.

    Returns:
        the highest modules that moved, and tensors that moved by themselves: old → new.
    """
    modules = {n for n, _ in model.named_modules()}
    moves = dict(_highest(model, "", names, modules))
    taken = modules | names.keys()
    if any(new in taken for new in moves.values()):
        return {}
    owners = {old: model.get_submodule(old.rpartition(".")[0]) for old in moves}
    if any(isinstance(owner, (nn.ModuleList, nn.Sequential)) for owner in owners.values()):
        return {}
    beside = {o: n for o, n in moves.items() if o.rpartition(".")[0] == n.rpartition(".")[0]}
    for old, new in beside.items():
        if old not in names:
            rename(model, old, new.rpartition(".")[2])
    for old, new in moves.items():
        if old in names or old not in beside:
            _move(model, owners[old], old.rpartition(".")[2], new)
    return moves


def _highest(
    module: nn.Module, path: str, names: Mapping[str, str], taken: Collection[str]
) -> Iterable[tuple[str, str]]:
    """The moves that give the tensors inside a module their new names. What goes to the place of a
    module that holds it goes there in parts."""
    inside = len(path) and len(path) + 1
    wholes = {
        new.removesuffix(f".{old[inside:]}") if new.endswith(f".{old[inside:]}") else ""
        for old, new in names.items()
    }
    into = any(path.startswith(f"{new}.") for new in wholes & set(taken))
    if path and len(wholes) == 1 and "" not in wholes and not into:
        return [(path, new) for new in wholes if new != path]
    children: dict[str, dict[str, str]] = {}
    moves = []
    for old, new in names.items():
        child, _, rest = old[inside:].partition(".")
        if rest:
            children.setdefault(child, {})[old] = new
        elif old != new:
            moves.append((old, new))
    for child, within in children.items():
        name = f"{path}.{child}".lstrip(".")
        moves += _highest(module.get_submodule(child), name, within, taken)
    return moves


def _move(model: nn.Module, owner: nn.Module, leaf: str, new: str) -> None:
    """Move a module or a tensor to a place that need not be there yet."""
    parent, _, last = new.rpartition(".")
    holder = model
    for part in parent.split(".") if parent else ():
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    if leaf in owner._modules:
        holder.add_module(last, owner._modules.pop(leaf))
    elif leaf in owner._parameters:
        holder.register_parameter(last, owner._parameters.pop(leaf))
    else:
        holder.register_buffer(last, owner._buffers.pop(leaf))
    _point(owner, leaf, holder, last)


def _point(owner: nn.Module, leaf: str, holder: nn.Module, last: str) -> None:
    """Give a module an attribute for what another one holds."""
    owner.__dict__.setdefault(_ELSEWHERE, {})[leaf] = (holder, last)
    kind: Any = type(owner)
    owner.__class__ = _elsewhere(kind, leaf)


@cache
def _elsewhere(kind: Any, leaf: str) -> type[nn.Module]:
    """The class with a name for what another module holds now."""

    def found(self: nn.Module) -> nn.Module | Tensor:
        holder, name = self.__dict__[_ELSEWHERE][leaf]
        result: nn.Module | Tensor = getattr(holder, name)
        return result

    return type(kind.__name__, (kind,), {leaf: property(found), "__module__": kind.__module__})
