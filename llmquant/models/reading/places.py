"""Which place of a model a stored tensor belongs to, as transformers decides it.

Its own name where the model has such a place; else its name without the base model's prefix
(``model.model.norm.weight``), or with it (``norm.weight``, as checkpoints of embedding models are
written); else the name that transformers uses in memory where the checkpoint's is another
(``lm_head`` for GPT-NeoX's ``embed_out``). Of two tied tensors either may be the stored one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import CheckpointError
from llmquant.models.architectures import ARCHITECTURES


@dataclass(frozen=True, slots=True)
class Naming:
    """Stored names against places.

    Attributes:
        names: stored name → name of its place; those that are equal are left out.
        leftovers: stored names without a place.
        swapped: tied places whose tensor is stored under the other's name: place → stored name.
        untied: places that the config ties to others, and that have other numbers.
    """

    names: Mapping[str, str]
    leftovers: tuple[str, ...]
    swapped: Mapping[str, str]
    untied: tuple[str, ...]


def naming(
    reader: CheckpointReader, model: PreTrainedModel, modules: Mapping[str, Collection[str]]
) -> Naming:
    """Find every stored tensor's place.

    Args:
        reader: of the folder.
        model: of its config, without weights, under the checkpoint's names.
        modules: packed module, as stored → its tensors. They belong to the module as a whole.

    Raises:
        CheckpointError: two stored tensors of different numbers for one place.
    """
    places = {n for n, _ in model.named_parameters(remove_duplicate=False)} | set(
        model.state_dict()
    )
    inside = {tensor: module for module, tensors in modules.items() for tensor in tensors}
    owner: dict[str, str] = {}  # place → stored name
    names: dict[str, str] = {}
    leftovers: list[str] = []
    for stored in sorted(reader.tensors, key=lambda n: (n not in places, n)):
        module = inside.get(stored)
        place = _place(stored if module is None else f"{module}.weight", model, places)
        if place is not None and module is not None:
            place = f"{place.removesuffix('.weight')}{stored.removeprefix(module)}"
        if place is None and module is None:
            leftovers.append(stored)
            continue
        place = place or stored  # a packed module that the model lacks is refused by its name
        if place in owner:
            _refuse_two(reader, place, owner[place], stored)
            leftovers.append(stored)
            continue
        owner[place] = stored
        if place != stored:
            names[stored] = place
    swapped, untied = _tied(reader, model, owner)
    names |= {owner[other]: place for place, other in swapped.items()}
    return Naming(names, tuple(leftovers), swapped, untied)


def _place(name: str, model: PreTrainedModel, places: Collection[str]) -> str | None:
    return next((n for n in _candidates(name, model) if n in places), None)


def _candidates(name: str, model: PreTrainedModel) -> Iterator[str]:
    prefix = model.base_model_prefix
    for form in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        yield form
        architecture = ARCHITECTURES.get(str(model.config.model_type))
        for path, last in architecture.renamed if architecture is not None else ():
            pattern = re.escape(path).replace(r"\*", r"\d+")
            found = re.match(rf"{pattern}(?=\.)", form)
            if found:
                yield f"{found[0].rpartition('.')[0]}.{last}".lstrip(".") + form[found.end() :]


def _refuse_two(reader: CheckpointReader, place: str, first: str, second: str) -> None:
    if not same(reader, first, second):
        raise CheckpointError(
            f"{reader.path}: {first} and {second} are both the model's {place}, and they differ; remove one"
        )


def _tied(
    reader: CheckpointReader, model: PreTrainedModel, owner: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What is stored under the other's name (place → the other place), and what is not tied though
    the config says so."""
    swapped: dict[str, str] = {}
    untied = []
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if target in owner and source not in owner and source not in swapped:
            swapped[source] = target
        elif {target, source} <= owner.keys() and not same(reader, owner[target], owner[source]):
            untied.append(target)
    return swapped, tuple(untied)


def same(reader: CheckpointReader, first: str, second: str) -> bool:
    """Whether two tensors hold the same numbers; their dtypes may differ."""
    if reader.info(first).shape != reader.info(second).shape:
        return False
    a, b = reader.read(first), reader.read(second)
    return torch.equal(a, b) if a.dtype == b.dtype else torch.equal(a.double(), b.double())
