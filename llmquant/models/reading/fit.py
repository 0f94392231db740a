"""A folder as a run reads it: every tensor under the name of its place in the model, what has no
place set apart, and everything refused that no reader could make sense of.

``fitted`` is the one answer for plan, quantize, load (of packed folders), convert, inspect and the
proof of a run, so that none accepts what another refuses. transformers' own reading of a folder is
the measure: what it loads fits, what it would fill with random numbers does not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, CheckpointError
from llmquant.models.architectures import ARCHITECTURES, Architecture
from llmquant.models.from_folder import empty_model, read_config
from llmquant.models.reading.embeddings import Matrix, embedding_of, shape_of, why_not_packed
from llmquant.models.reading.leftovers import leftover_notes
from llmquant.models.reading.matrices import turned, unstacked
from llmquant.models.reading.places import Naming, naming
from llmquant.models.reading.tower import Tower, parts_beside, tower_of
from llmquant.models.tensor_check import refuse_mismatch
from llmquant.models.unreached import unreached
from llmquant.runtime.finite import some

_CODES = frozenset({"qweight", "weight_packed"})  # beside which a plain weight has no meaning


@dataclass(frozen=True, slots=True)
class Fitted:
    """A folder and its model.

    Attributes:
        reader: the folder's tensors by the names of their places; leftovers by their own.
        model: on the meta device, its modules named as in the folder.
        packed: the same folder's packed modules; None for an unquantized one.
        leftovers: tensors without a place.
        outside: those of them that are not the text part's, if the model is more than that.
        notes: what people should know of it.
        tower: where the checkpoint keeps the model, if it is part of one that also sees or hears.
    """

    reader: CheckpointReader
    model: PreTrainedModel
    packed: PackedCheckpoint | None
    leftovers: tuple[str, ...]
    outside: tuple[str, ...]
    notes: tuple[str, ...]
    tower: Tower | None = None


def fitted(
    source: CheckpointReader | PackedCheckpoint, dtype: torch.dtype = torch.float32
) -> Fitted:
    """Bring a folder and the model of its config together, from names, shapes and dtypes; of the
    weights only tied tensors that are stored twice are read.

    Raises:
        CheckpointError: a tensor is missing, of another shape or not floating-point; two
            contradict each other; packed weights for what the model lacks.
        ArchitectureError: not a causal language model that transformers knows, or packed weights
            for something other than a plain Linear or the token embeddings.
        FormatError: packed tensors that are not of their layout.
    """
    packed = source if isinstance(source, PackedCheckpoint) else None
    reader = source.reader if isinstance(source, PackedCheckpoint) else source
    config = read_config(reader.path)
    tower = tower_of(reader, config)
    row = _row(reader, tower)
    if packed is None:
        text = config if tower is None else tower.config
        reader = unstacked(reader, row, getattr(text, "hidden_size", None))
    model = empty_model(reader, dtype)
    found = naming(
        reader, model, {} if packed is None else {m: t.values() for m, t in packed.tensors.items()}
    )
    packed = None if packed is None else packed.renamed(found.names)
    reader = reader.renamed(found.names) if packed is None else packed.reader
    if packed is None:
        reader = turned(reader, row, reader.tensors)
    else:
        packed = packed.seen_as(turned(reader, row, packed.others))
        reader = packed.reader
    if found.untied:
        reader.config = {**reader.config, "tie_word_embeddings": False}
        model = empty_model(reader, dtype)
    elif packed is not None and _packed_head(model, packed):
        model.config.tie_word_embeddings = False  # a packed head has no weight to share
    places = _packed_places(model, packed) if packed is not None else {}
    _check_tensors(reader, model, found, places)
    outside = () if tower is None else _outside(tower, model, found.leftovers)
    inside = [n for n in found.leftovers if n not in outside]
    notes = (*reader.notes, *_naming_notes(found), *leftover_notes(reader, model, inside))
    if tower is not None:
        notes = (*notes, _note_on_the_rest(reader, outside), *_notes_on_unreached(model))
    return Fitted(reader, model, packed, found.leftovers, outside, notes, tower)


def _row(reader: CheckpointReader, tower: Tower | None) -> Architecture | None:
    """The model's row of the table, under the checkpoint's names."""
    if tower is None:
        return ARCHITECTURES.get(str(reader.config.get("model_type")))
    row = ARCHITECTURES.get(tower.kind)
    return None if row is None else tower.placed(row)


def placeless(fit: Fitted) -> tuple[str, ...]:
    """Modules of matrices that the model has no place for: engines that do read them must know that
    they are not quantized."""
    shapes = {n: fit.reader.info(n).shape for n in fit.leftovers if n.endswith(".weight")}
    return tuple(n.removesuffix(".weight") for n, shape in shapes.items() if len(shape) == 2)


def linear_at(model: nn.Module, name: str, reader: CheckpointReader) -> nn.Linear:
    """The linear that a folder has packed weights for; raises what :func:`matrix_at` does."""
    linear = matrix_at(model, name, reader)
    assert isinstance(linear, nn.Linear), "asked for inside a block, which has no embeddings"
    return linear


def matrix_at(model: nn.Module, name: str, reader: CheckpointReader) -> Matrix:
    """The linear, or the token embeddings, that a folder has packed weights for.

    Raises:
        CheckpointError: the model has no such module.
        ArchitectureError: it is something other than a plain Linear or the token embeddings, or
            embeddings that do more than a look-up.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError as e:
        raise CheckpointError(
            f"{reader.path} has packed weights for {name}, which {type(model).__name__} does not have"
        ) from e
    if isinstance(module, nn.Embedding) and isinstance(model, PreTrainedModel):
        own = embedding_of(model)
        if own is not None and own[1] is module:
            reason = why_not_packed(name, module)
            if reason is None:
                return module
            raise ArchitectureError(f"packed weights cannot be its rows: {reason}")
    if type(module) is not nn.Linear:
        raise ArchitectureError(
            f"{name} is packed but is a {type(module).__name__}, not a plain Linear"
        )
    return module


def _packed_head(model: PreTrainedModel, packed: PackedCheckpoint) -> bool:
    head = model.get_output_embeddings()
    return any(m is head for n, m in model.named_modules() if n in packed.schemes)


def _packed_places(model: PreTrainedModel, packed: PackedCheckpoint) -> dict[str, Matrix]:
    """The places of packed modules, each of the shape that the config wants."""
    found = {}
    for name in packed.schemes:
        module = found[name] = matrix_at(model, name, packed.reader)
        wanted = shape_of(module)
        # Headers tell a width only to the next full word, so the numbers have the last say.
        if packed.shape(name) != wanted and packed.weight(name).shape != wanted:
            raise CheckpointError(
                f"{packed.reader.path}: {name} is {list(packed.weight(name).shape)}, the config wants {list(wanted)}"
            )
        if f"{name}.weight" in packed.reader and packed.tensors[name].keys() & _CODES:
            raise CheckpointError(
                f"{packed.reader.path}: {name} is packed and has an unquantized weight too; remove one"
            )
    return found


def _check_tensors(
    reader: CheckpointReader,
    model: PreTrainedModel,
    found: Naming,
    packed: dict[str, Matrix],
) -> None:
    """Everything that the model reads, but packed weights, is there, of its shape and dtype."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {**model.state_dict(), **parameters}
    wanted = {n: t for n, t in wanted.items() if n.removesuffix(".weight") not in packed}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    missing = [n for n in wanted if n not in reader and n not in tied]
    refuse_mismatch(reader, model, missing, found.leftovers)
    for name, like in wanted.items():
        if name not in reader:
            continue
        info = reader.info(name)
        if info.shape != tuple(like.shape):
            wants = ", the config wants" if packed else " in the checkpoint, config.json makes it"
            raise CheckpointError(
                f"{reader.path}: {name} is {list(info.shape)}{wants} {list(like.shape)}"
            )
        if name in parameters and not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{reader.path}: {name} is {info.dtype}; an unquantized model's weights are floating-point"
            )


def _outside(tower: Tower, model: nn.Module, leftovers: Iterable[str]) -> tuple[str, ...]:
    """Tensors that are in none of the text model's own modules; eyes may lie beside its layers.
    Blocks that text passes by are not its own."""
    own = {f"{tower.base}.{n}." for n, _ in model.get_submodule(tower.base).named_children()}
    places = (f"{tower.head}.", *own)
    passed = tuple(f"{n}." for n in unreached(model))
    return tuple(n for n in leftovers if not n.startswith(places) or n.startswith(passed))


def _note_on_the_rest(reader: CheckpointReader, outside: Collection[str]) -> str:
    """Of a model that also sees: what becomes of all but its text part."""
    if not outside:
        return (
            f"config.json has {some(parts_beside(read_config(reader.path)))}, and the folder has the text part alone: it is read here, but "
            "whoever loads the whole model has to make up the rest, or fails"
        )
    made = [n for n in outside if reader.info(n).made]
    how = f"byte for byte{f', but {some(made)} as the numbers that they mean' if made else ''}"
    return f"the text part is quantized; {len(outside)} tensors of the rest ({some(list(outside))}) are carried over {how}"


def _notes_on_unreached(model: PreTrainedModel) -> list[str]:
    passed = unreached(model)
    if not passed:
        return []
    return [
        f"text does not reach {len(passed)} of the blocks ({some(list(passed))}), which run only beside an image; they are carried "
        "over too"
    ]


def _naming_notes(found: Naming) -> list[str]:
    notes = []
    plain = sorted(s for s, p in found.names.items() if p not in found.swapped)
    if plain:
        notes.append(
            f"{some(plain)}: read as {some([found.names[n] for n in plain])}, as transformers does; the result has these names"
        )
    notes += [
        f"{other} is stored in place of {place}, to which config.json ties it; the result has it under that name"
        for place, other in found.swapped.items()
    ]
    if found.untied:
        notes.append(
            f"config.json ties {some(list(found.untied))} to the embeddings, but the two differ, so they are "
            "read as two, as transformers does"
        )
    return notes
