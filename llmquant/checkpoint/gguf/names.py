"""Which tensors of a folder a GGUF tensor becomes, and how.

The names come from the ``gguf`` package's table, applied to the parameters of transformers' model
(``get_gguf_hf_weights_map``); what llama.cpp's converter did to the numbers (rows of q and k in
another order, 1 added to Gemma's norms, transposed Conv1D) is undone by transformers' tensor
processors. The experts of a block are stacked in the file and apart in a folder, under the names
that checkpoints have.

Unlike transformers' loader, which leaves out what it cannot place and draws what is missing,
:func:`places` refuses both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmquant.checkpoint.gguf.cursor import GgufTensor
from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.checkpoint.gguf.rope import ROPE_FACTORS
from llmquant.errors import CheckpointError, LayoutError
from llmquant.runtime.finite import some

_STACKED = re.compile(r"blk\.(?P<block>\d+)\.ffn_(?P<part>gate|up|down)_exps\.weight")
_QWEN = "model.layers.{block}.mlp.experts.{expert}.{part}_proj.weight"
_EXPERTS = {
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "mixtral": "model.layers.{block}.block_sparse_moe.experts.{expert}.{part}.weight",
}
# Whose matrices transformers stores transposed (Conv1D).
TURNED = frozenset({"gpt2"})
_MIXTRAL_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_WRONG_WAY = "{}: {} is {} for a place of {}; fetch it again, or another conversion"
_BLOCK = re.compile(r"\.\d+\.")
_MIXTRAL_ROUTER = (".mlp.gate.", ".block_sparse_moe.gate.")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file and what it becomes.

    Attributes:
        names: in the folder; several are the parts of the first dimension, one after another.
        shape: of each.
    """

    tensor: GgufTensor
    names: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placed:
    """A whole model.

    Attributes:
        places: in the order of the file.
        model_type: transformers'.
        path: of the file.
    """

    path: Path
    places: tuple[Place, ...]
    model_type: str
    _processor: Any = field(repr=False)
    _mapping: Mapping[str, str] = field(repr=False)

    def read(self, place: Place) -> Iterator[tuple[str, np.ndarray]]:
        """Names in the folder and float32 values, one after another."""
        if len(place.names) > 1:
            for i, name in enumerate(place.names):
                yield name, place.tensor.values(i)
            return
        yield place.names[0], self.undone(place, place.tensor.values())

    def rows(self, place: Place) -> np.ndarray:
        """Indices of the file's rows in the folder's order, for a matrix that is only reordered."""
        order = np.arange(place.tensor.shape[-2])[:, None]
        if len(place.names) == 1:
            order = self._processor.process(weights=order, name=place.tensor.name).weights
        return np.asarray(order)[:, 0]

    def undone(self, place: Place, values: np.ndarray) -> np.ndarray:
        """Values in the folder's order and shape, for values in the file's."""
        parsed: dict[str, Any] = {"tensors": {}}
        result = self._processor.process(
            weights=values,
            name=place.tensor.name,
            tensor_key_mapping=self._mapping,
            parsed_parameters=parsed,
        )
        if result.name is None:  # GPT-2's processor keeps the head's itself
            (kept,) = parsed["tensors"].values()
            return self.shaped(place, np.asarray(kept.numpy()))
        return self.shaped(place, np.asarray(result.weights))

    def shaped(self, place: Place, values: np.ndarray) -> np.ndarray:
        """Values in the folder's shape, which may have other dimensions of 1 and no others: a
        reshape would scramble a matrix that lies the wrong way round.

        Raises:
            CheckpointError: another shape.
        """
        if not _alike(values.shape, place.shape):
            raise CheckpointError(_WRONG_WAY.format(self.path, place.tensor.name, list(values.shape), list(place.shape)))  # fmt: skip
        return values.reshape(place.shape)


def places(model: GgufFile, empty: Any) -> Placed:
    """Bring a file's tensors and transformers' model together.

    Args:
        empty: the model on the meta device.

    Raises:
        LayoutError: tensors that have no place in the model, or biases in some places only.
        CheckpointError: tensors that the file lacks, or of another size than the model's.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    kind = empty.config.model_type
    chosen: Any = TENSOR_PROCESSORS.get(model.architecture, TensorProcessor)
    processor = chosen(config=empty.config.to_dict())
    mapping = get_gguf_hf_weights_map(empty, processor, model_type=model.architecture)
    wanted = {n: tuple(p.shape) for n, p in empty.state_dict().items()}
    if empty.config.tie_word_embeddings:
        for name in empty.all_tied_weights_keys:
            wanted.pop(name, None)
    found: list[Place] = []
    strange: list[str] = []
    for tensor in model.tensors.values():
        stacked = _STACKED.fullmatch(tensor.name)
        if tensor.name == ROPE_FACTORS:
            continue  # said by the config
        if stacked and kind in _EXPERTS:
            found.append(_experts(tensor, stacked, kind, wanted, model))
        elif (target := mapping.get(tensor.name)) in wanted:
            shape = wanted.pop(str(target))
            found.append(Place(tensor, (_as_in_checkpoint(str(target), kind),), shape))
            _check_size(model, tensor, shape)
        else:
            strange.append(tensor.name)
    if strange:
        raise LayoutError(
            f"{model.path}: {some(strange)} {'has' if len(strange) == 1 else 'have'} no place in transformers' "
            f"{kind} model, which would be another model without"
        )
    # What is left of stacked experts is the second half of gate_up_proj.
    missing = [n for n in wanted if not (".experts." in n and _complete(n, found))]
    if _lacks_kinds_of_biases(missing, found):
        raise LayoutError(
            f"{model.path} has biases in some places only. transformers' {kind} model would need these, too: {some(missing)}; "
            "take another conversion of the model"
        )
    if missing:
        raise CheckpointError(
            f"{model.path} lacks tensors of a {kind} model: {some(missing)}; fetch it again, or another conversion"
        )
    return Placed(model.path, tuple(found), kind, processor, mapping)


def _lacks_kinds_of_biases(missing: Sequence[str], found: Sequence[Place]) -> bool:
    """Whether only biases are missing, of kinds that no block has, where other kinds are there: not
    damage, another model."""

    def kinds(names: Iterable[str]) -> set[str]:
        return {_BLOCK.sub(".", n) for n in names if n.endswith(".bias")}

    there, absent = kinds(p.names[0] for p in found), kinds(missing)
    only = all(n.endswith(".bias") for n in missing)
    return bool(there and absent) and only and there.isdisjoint(absent)


def _as_in_checkpoint(name: str, kind: str) -> str:
    return name.replace(*_MIXTRAL_ROUTER) if kind == "mixtral" else name


def _experts(
    tensor: GgufTensor,
    stacked: re.Match[str],
    kind: str,
    wanted: Mapping[str, tuple[int, ...]],
    model: GgufFile,
) -> Place:
    part = _MIXTRAL_PARTS[stacked["part"]] if kind == "mixtral" else stacked["part"]
    experts, rows, columns = tensor.shape if len(tensor.shape) == 3 else (0, 0, 0)
    down = stacked["part"] == "down"
    memory = (
        f"model.layers.{stacked['block']}.mlp.experts.{'down_proj' if down else 'gate_up_proj'}"
    )
    shape = wanted.get(memory)
    if shape != (experts, rows if down else 2 * rows, columns):
        raise CheckpointError(
            f"{model.path}: {tensor.name} is {list(tensor.shape)}, which does not fit {memory} {list(shape or ())}"
        )
    names = tuple(
        _EXPERTS[kind].format(block=stacked["block"], expert=i, part=part) for i in range(experts)
    )
    return Place(tensor, names, (rows, columns))


def _complete(memory: str, found: list[Place]) -> bool:
    """Whether a stacked parameter of the model has all its parts."""
    block = memory.split(".layers.")[1].split(".")[0]
    parts = ("down",) if memory.endswith("down_proj") else ("gate", "up")
    have = {p.tensor.name for p in found}
    return all(f"blk.{block}.ffn_{part}_exps.weight" in have for part in parts)


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return [n for n in one if n != 1] == [n for n in other if n != 1]


def _check_size(model: GgufFile, tensor: GgufTensor, shape: tuple[int, ...]) -> None:
    turned = model.architecture in TURNED and _alike(tensor.shape[::-1], shape)
    if not turned and not _alike(tensor.shape, shape):
        raise CheckpointError(
            f"{model.path}: {tensor.name} is {list(tensor.shape)}, the metadata makes it {list(shape)}; "
            "fetch it again, or another conversion"
        )
