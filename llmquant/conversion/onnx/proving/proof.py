"""The proof of an export: what the written graph holds, read back, against the folder, bit for bit.

Every linear of the folder must be in the graph, all its rows once: packed ones with their codes,
scales and zero-points (``MatMulNBits``), those of a W8A8 folder with their codes and scales
(``MatMulInteger``), float ones with their weights in the graph's dtype. What the tools rounded by
themselves is no failure but is named: a head that was asked to be quantized, a float weight that
the graph's dtype rounds, a tensor that the builder computes with (Gemma's norms).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmquant.conversion.onnx.proving.graph import Graph, Node, unpack_bits
from llmquant.conversion.onnx.proving.places import Places, Rows
from llmquant.errors import ProofError
from llmquant.weight import QuantizedWeight

_PACKED, _INTEGER, _FLOAT = "MatMulNBits", "MatMulInteger", "MatMul"


@dataclass(frozen=True)
class Numbers:
    """What a folder holds, as the proof asks for it.

    Attributes:
        packed: the packed linears → how to read one.
        floats: the float linears → how to read one, float32.
        others: every other tensor that has numbers → how to read one.
        places: where the linears are in a graph.
        dtype: of the graph's floats.
        requantized: linears that were given to a tool to round.
    """

    packed: Mapping[str, Callable[[], QuantizedWeight]]
    floats: Mapping[str, Callable[[], Tensor]]
    others: Mapping[str, Callable[[], Tensor]]
    places: Places
    dtype: torch.dtype
    requantized: frozenset[str] = frozenset()


@dataclass(slots=True)
class Found:
    """What the proof found.

    Attributes:
        nodes: linear → the node that holds it.
        requantized: node → what a tool made of a float weight.
        altered: tensor of the folder → in what it is otherwise in the graph.
        unchanged: other tensors that are in the graph as they are in the folder.
    """

    nodes: dict[str, str] = field(default_factory=dict)
    requantized: dict[str, str] = field(default_factory=dict)
    altered: dict[str, str] = field(default_factory=dict)
    unchanged: int = 0


def prove(graph: Graph, numbers: Numbers, on_progress: Callable[[str, int, int], None]) -> Found:
    """Compare a graph with the folder it was made of.

    Raises:
        ProofError: naming the node and the linear that differ, or a linear that is not there.
    """
    found, seen = Found(), dict[str, list[tuple[int, int]]]()
    linears = [n for n in graph.nodes if n.op in (_PACKED, _INTEGER, _FLOAT)]
    used: set[str] = set()
    for done, node in enumerate(linears):
        on_progress("proving", done, len(linears))
        rows = numbers.places.rows_of(node.name)
        constant = [i for i in node.inputs if i in graph.initializers]
        if not constant:
            continue  # two activations are multiplied
        if not rows:
            _stranger(graph, node, found, numbers)
            continue
        used.update(constant)
        for r in rows:
            seen.setdefault(r.module, []).append((r.start, r.stop))
            found.nodes[r.module] = node.name
        if {r.module for r in rows} <= numbers.packed.keys():
            _same_codes(graph, node, rows, numbers)
        else:
            _same_floats(graph, node, rows, numbers, found)
    _all_rows(numbers, seen)
    _others(graph, numbers, used, found)
    return found


def _stranger(graph: Graph, node: Node, found: Found, numbers: Numbers) -> None:
    """A node of no linear: the head that shares the embeddings, or something that cannot be."""
    if not node.name.startswith("/lm_head/"):
        raise ProofError(f"{graph.folder}: {node.name} multiplies by weights that the folder lacks")
    if node.op != _FLOAT:
        found.requantized[node.name] = _rounded(node)


def _rounded(node: Node) -> str:
    if node.op == _INTEGER:
        return "int8, a scale for each output"
    return f"int{node.ints.get('bits', 4)}, groups of {node.ints.get('block_size', 0)}"


def _same_codes(graph: Graph, node: Node, rows: Iterable[Rows], numbers: Numbers) -> None:
    parts = [(r, numbers.packed[r.module]()) for r in rows]
    names = ", ".join(dict.fromkeys(r.module for r, _ in parts))
    codes = torch.cat([w.codes[r.start : r.stop] for r, w in parts])
    scales = torch.cat([w.scales[r.start : r.stop] for r, w in parts])
    zeros = torch.cat([w.zeros[r.start : r.stop] for r, w in parts])
    if node.op == _PACKED:
        there = packed_numbers(graph, node, codes.shape, scales.shape[1])
    elif node.op == _INTEGER:
        there = integer_numbers(graph, node)
    else:
        raise ProofError(f"{graph.folder}: {node.name} holds floats and not the codes of {names}")
    for what, is_, be in zip(
        ("codes", "scales", "zero-points"), there, (codes, scales, zeros), strict=True
    ):
        if is_.shape != be.shape or not torch.equal(is_, be):
            count = int((is_ != be).sum()) if is_.shape == be.shape else be.numel()
            raise ProofError(
                f"{graph.folder}: {node.name} does not hold the {what} of {names}: "
                f"{count} of {be.numel()} differ"
            )


def packed_numbers(
    graph: Graph, node: Node, shape: tuple[int, ...], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]``, scales ``[N, groups]`` (float32) and zero-points of a MatMulNBits node.

    Raises:
        ProofError: its attributes or inputs are not those of such a weight.
    """
    bits, block = node.ints.get("bits", 4), node.ints.get("block_size", 0)
    rows, columns = node.ints.get("N", 0), node.ints.get("K", 0)
    if (rows, columns) != tuple(shape) or block * groups != columns:
        raise ProofError(
            f"{graph.folder}: {node.name} is [{rows}, {columns}] in groups of {block}, "
            f"the folder has {list(shape)} in {groups} groups"
        )
    if len(node.inputs) > 4 and node.inputs[4]:
        raise ProofError(f"{graph.folder}: {node.name} reorders its columns (g_idx)")
    codes = unpack_bits(graph.tensor(node.inputs[1]).view(rows, -1), bits, columns)
    scales = graph.tensor(node.inputs[2]).view(rows, -1).to(torch.float32)
    if len(node.inputs) < 4 or not node.inputs[3]:
        return codes, scales, torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
    zeros = unpack_bits(graph.tensor(node.inputs[3]).view(rows, -1), bits, groups)
    return codes, scales, zeros


def integer_inputs(graph: Graph, node: Node) -> tuple[str, str, str]:
    """Names of the int8 weight ``[in, out]`` of a MatMulInteger node, its scales and its
    zero-points, as quantize_dynamic names them."""
    weight = node.inputs[1]
    base = weight.removesuffix("_quantized")
    return weight, f"{base}_scale", node.inputs[3] if len(node.inputs) > 3 else ""


def integer_numbers(graph: Graph, node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]`` around 128, scales ``[N, 1]`` and zero-points of a MatMulInteger node."""
    weight, scale, zero = integer_inputs(graph, node)
    codes = (graph.tensor(weight).T.to(torch.int16) + 128).to(torch.uint8).contiguous()
    scales = graph.tensor(scale).to(torch.float32).view(-1, 1)
    points = graph.tensor(zero) if zero else torch.zeros(1, dtype=torch.int8)
    shifted = (points.to(torch.int16).view(-1, 1) + 128).to(torch.uint8)
    return codes, scales, shifted.expand(scales.shape).contiguous()


def _same_floats(
    graph: Graph, node: Node, rows: Iterable[Rows], numbers: Numbers, found: Found
) -> None:
    names = list(dict.fromkeys(r.module for r in rows))
    if node.op != _FLOAT:
        strangers = set(names) - numbers.requantized
        if strangers:
            raise ProofError(f"{graph.folder}: {node.name} rounds {', '.join(strangers)} unasked")
        found.requantized[node.name] = _rounded(node)
        return
    weight = next(i for i in node.inputs if i in graph.initializers)
    wanted = torch.cat([_float(numbers, r.module)[r.start : r.stop] for r in rows])
    cast = wanted.to(numbers.dtype)
    if not torch.equal(graph.tensor(weight), cast.T):
        raise ProofError(
            f"{graph.folder}: {node.name} does not hold the weights of {', '.join(names)}"
        )
    if not torch.equal(cast.to(torch.float32), wanted):
        for name in names:
            found.altered[name] = f"rounded to {_name(numbers.dtype)}"


def _float(numbers: Numbers, module: str) -> Tensor:
    if module in numbers.floats:
        return numbers.floats[module]()
    return numbers.packed[module]().dequantize(torch.float32)


def _all_rows(numbers: Numbers, seen: Mapping[str, list[tuple[int, int]]]) -> None:
    """Every row of every linear stands in the graph once."""
    for name in (*numbers.packed, *numbers.floats):
        position = 0
        for start, stop in sorted(seen.get(name, [])):
            if start != position:
                break
            position = stop
        if position != numbers.places.rows[name] or len(seen[name]) != len(set(seen[name])):
            raise ProofError(f"the graph does not hold {name}, or not once")


def _others(graph: Graph, numbers: Numbers, used: set[str], found: Found) -> None:
    """Norms, biases and embeddings, found by their bytes, whatever the builder calls them."""
    there: set[bytes] = set()
    for name, place in graph.initializers.items():
        if place.is_float and name not in used:
            there |= set(_hashes(graph.tensor(name)))
    biases: dict[str, dict[str, Tensor]] = {}
    for name, read in numbers.others.items():
        wanted = read().to(torch.float32)
        cast = wanted.to(numbers.dtype)
        layer, _, role = name.removesuffix(".bias").rpartition(".")
        if name.endswith(".bias") and role in ("q_proj", "k_proj", "v_proj"):
            biases.setdefault(layer, {})[role] = cast
        elif not there & set(_hashes(cast)):
            found.altered[name] = _absent(name, numbers)
            continue
        if torch.equal(cast.to(torch.float32), wanted):
            found.unchanged += 1
        else:
            found.altered[name] = f"rounded to {_name(numbers.dtype)}"
    for layer, parts in biases.items():
        whole = torch.cat([parts[r] for r in ("q_proj", "k_proj", "v_proj") if r in parts])
        each = [set(_hashes(p)) for p in parts.values()]
        if not there & set(_hashes(whole)) and not all(there & e for e in each):
            raise ProofError(f"{graph.folder}: the biases of {layer} are not in the graph")


def _absent(name: str, numbers: Numbers) -> str:
    shared = name.removesuffix(".weight") in numbers.requantized
    return "rounded with the head" if shared else "not in the graph as it is in the folder"


def _hashes(tensor: Tensor) -> Iterator[bytes]:
    """Of the bytes of a tensor, and of its transpose."""
    for way in (tensor, tensor.T) if tensor.ndim == 2 else (tensor,):
        raw = way.contiguous().reshape(-1).view(torch.uint8).numpy()
        yield hashlib.sha256(raw.data).digest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
