"""Which rows of which linears of a folder the builder put into a node of its graph.

It names nodes by layer and role, fuses q, k and v where it can, and takes apart what a folder keeps
fused (Phi-3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NODE = re.compile(r"/model/layers\.(\d+)/(?:attn|mlp)/(\w+)/MatMul")
_HEAD = re.compile(r"/lm_head/MatMul")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\..*\.(\w+)$")
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True, slots=True)
class Rows:
    """Output rows ``start`` to ``stop`` of a linear."""

    module: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Places:
    """A folder's linears by layer and role.

    Attributes:
        by_role: (layer, last part of the name) → full name.
        rows: full name → output rows.
        head: name of the output head, or None.
        attention: rows of q, and of k and v each.
    """

    by_role: Mapping[tuple[int, str], str]
    rows: Mapping[str, int]
    head: str | None
    attention: tuple[int, int]

    @classmethod
    def of(cls, rows: Mapping[str, int], head: str | None, config: Mapping[str, Any]) -> Places:
        """From the linears' names and their numbers of rows."""
        by_role = {
            (int(found[1]), found[2]): name for name in rows if (found := _LAYER.search(name))
        }
        heads = int(config["num_attention_heads"])
        size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        keys = int(config.get("num_key_value_heads") or heads)
        return cls(by_role, rows, head, (heads * size, keys * size))

    def rows_of(self, node: str) -> tuple[Rows, ...]:
        """What a node called so holds, in order; empty if it is no linear of the folder."""
        if _HEAD.match(node) and self.head in self.rows:
            return (self._whole(self.head),)
        found = _NODE.match(node)
        return () if found is None else self._role(int(found[1]), found[2])

    def _role(self, layer: int, role: str) -> tuple[Rows, ...]:
        name = self.by_role.get((layer, role))
        if name is not None:
            return (self._whole(name),)
        if role in _FUSED:
            parts = [self._role(layer, part) for part in _FUSED[role]]
            return tuple(r for part in parts for r in part) if all(parts) else ()
        for fused, parts_of in _FUSED.items():
            whole = self.by_role.get((layer, fused))
            if role in parts_of and whole is not None:
                return (self._part(whole, fused, parts_of.index(role)),)
        return ()

    def _whole(self, name: str | None) -> Rows:
        assert name is not None  # it was looked up
        return Rows(name, 0, self.rows[name])

    def _part(self, whole: str, fused: str, index: int) -> Rows:
        q, kv = self.attention
        half = self.rows[whole] // 2
        ends = (0, q, q + kv, q + 2 * kv) if fused == "qkv_proj" else (0, half, 2 * half)
        return Rows(whole, ends[index], ends[index + 1])
