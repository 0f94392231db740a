"""Where a power of two can move from one tensor of a block to another without changing what the
block computes: a table by model type, as in :mod:`llmquant.models.rotation.roles`.

Three kinds. A norm that multiplies by its weight, and all that reads its output: weight and bias
down, readers up. Queries and keys, whose product is all that counts: one up, the other down; not
where a norm follows them. And a linear whose output reaches the columns of another one channel by
channel (values and attention's output, up and down of an MLP): its rows up, those columns down.

Types that are not here are left as they are.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmquant.models.architectures import Architecture
from llmquant.models.rotation.roles import ROLES
from llmquant.quantization.steps.folding import head_channels

_QUERY, _KEY, _VALUE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
_FUSED = "self_attn.qkv_proj"
_NEOX = "attention.query_key_value"
# No norm on queries and keys, which are linears of their own.
_PLAIN_ATTENTION = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "gemma2", "opt", "starcoder2"}
)
_NORMS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "gpt_neox": {
        "input_layernorm": (_NEOX,),
        "post_attention_layernorm": ("mlp.dense_h_to_4h",),
    }
}
_OUTPUT = {
    "opt": "self_attn.out_proj",
    "gpt_neox": "attention.dense",
    "phi3": "self_attn.o_proj",
    "starcoder2": "self_attn.o_proj",
}


@dataclass(frozen=True, slots=True)
class Rows:
    """A linear, named from its block, or some of its output channels (int64, ascending)."""

    module: str
    rows: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        """Its part of one value per output channel."""
        return values if self.rows is None else values[self.rows]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rows that may be multiplied by a power of two, and what then has to be divided by it.

    Attributes:
        producer: these rows, and their biases.
        reader: a linear's columns, or with ``channel`` None the rows of another one.
        channel: int64 ``[in]``, which of the producer's rows each column of the reader reads.
    """

    producer: Rows
    reader: Rows
    channel: Tensor | None


def norms_of(
    kind: str, config: Mapping[str, Any], linears: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Norm → everything in the block (of these matrices) that reads its output, by name from the
    block."""
    roles = ROLES.get(kind)
    if roles is not None and any(config.get(k, v) != v for k, v in roles.needs):
        return {}
    table = _NORMS.get(kind) or (roles.norms if roles is not None else {})
    found = {}
    for norm, patterns in table.items():
        readers = (n for n in linears if any(fnmatch.fnmatchcase(n, p) for p in patterns))
        found[norm] = tuple(readers)
    return found


def last_norm(kind: str, architecture: Architecture, tensors: Collection[str]) -> str | None:
    """The norm that the head alone reads, or None where that, or that it multiplies by its weight,
    is not known."""
    roles = ROLES.get(kind)
    known = kind in _NORMS or (roles is not None and bool(roles.norms))
    between = any(n.startswith(module) for n in tensors for module in architecture.outside)
    return architecture.norm if known and not between else None


def exchanges_of(
    kind: str,
    architecture: Architecture,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Exchange]:
    """The exchanges between the linears of a block.

    Args:
        kind: the model type.
        architecture: its entry.
        config: the model's.
        shapes: of the block's matrices, by module named from the block.
    """
    found: list[Exchange | None] = []
    parts = _attention(kind, config, shapes)
    if parts is not None:
        query, key, value = parts
        if query is not None:
            found.append(Exchange(query, key, None))
        found.append(_across(value, _OUTPUT.get(kind, ""), config, shapes))
    for producer, reader in architecture.scaled_in(shapes):
        found.append(_across(Rows(producer), reader, config, shapes))
    if kind == "phi3" and "mlp.gate_up_proj" in shapes:
        half = shapes["mlp.gate_up_proj"][0] // 2
        up = Rows("mlp.gate_up_proj", torch.arange(half, 2 * half))
        found.append(Exchange(up, Rows("mlp.down_proj"), torch.arange(half)))
    if kind == "opt" and config.get("activation_function", "relu") == "relu":
        found.append(_across(Rows("fc1"), "fc2", config, shapes))
    return [e for e in found if e is not None and e.reader.module in shapes]


def _attention(
    kind: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Rows | None, Rows, Rows] | None:
    """Queries (None where a norm follows them), keys and values."""
    if kind == "gpt_neox" and _NEOX in shapes:
        heads = int(config["num_attention_heads"])
        rows = torch.arange(shapes[_NEOX][0]).reshape(heads, 3, -1)
        query, key, value = (Rows(_NEOX, rows[:, i].reshape(-1)) for i in range(3))
        return query, key, value
    if kind == "phi3" and _FUSED in shapes:
        heads = int(config["num_attention_heads"])
        total, shared = shapes[_FUSED][0], _kv_heads(config)
        width = total // (heads + 2 * shared)
        sizes = [heads * width, shared * width, shared * width]
        query, key, value = (Rows(_FUSED, r) for r in torch.arange(total).split(sizes))
        return query, key, value
    if kind in _PLAIN_ATTENTION and {_QUERY, _KEY, _VALUE} <= shapes.keys():
        return Rows(_QUERY), Rows(_KEY), Rows(_VALUE)
    return None


def _across(
    producer: Rows, reader: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Exchange | None:
    """From the rows of one linear to the columns of another; None where the sizes do not fit."""
    if reader not in shapes or producer.module not in shapes:
        return None
    rows = shapes[producer.module][0] if producer.rows is None else producer.rows.numel()
    columns = shapes[reader][1]
    channel = (
        torch.arange(columns)
        if rows == columns
        else head_channels(rows, columns, _kv_heads(config))
    )
    return None if channel is None else Exchange(producer, Rows(reader), channel)


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config.get("num_attention_heads") or 1)


def block_of(name: str, architecture: Architecture) -> tuple[str, str] | None:
    """A tensor's block and its name from there; None outside the blocks."""
    place = re.match(rf"({re.escape(architecture.blocks)}\.\d+)\.(.+)", name)
    return None if place is None else (place[1], place[2])
