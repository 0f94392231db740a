"""A checkpoint read as one matrix ``[out, in]`` for each linear, whatever it keeps: what is
observed, quantized and written.

**Stacked experts.** Packed formats hold matrices, and engines find packed experts under a name for
each. So a stacked tensor ends here; the tensors made of it have the names that the table gives.

**Conv1D**, as in GPT-2, keeps ``[in, out]`` and computes what a Linear of the transposed matrix
does, so the model has Linears in its place (:mod:`llmquant.models.naming.names`). Packed weights
are always the Linear's, since layouts hold nothing else. By its source vLLM 0.32 turns what is
called ``.weight`` in a GPT-2 and nothing packed; no packed GPT-2 was loaded there. What stays
unquantized goes back the way it came (:func:`as_kept`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.derived import DerivedReader, Made
from llmquant.models.rows.architecture import Architecture, Experts, Stacked


def unstacked(
    reader: CheckpointReader, architecture: Architecture | None, hidden: int | None
) -> CheckpointReader:
    """The checkpoint with a matrix for each expert; the same reader where it has nothing else.

    Args:
        reader: of the checkpoint.
        architecture: the model's row of the table.
        hidden: width of the model's hidden states, if its config has one.
    """
    if architecture is None or architecture.experts is None or architecture.experts.stacked is None:
        return reader
    made: dict[str, Made] = {}
    gone: set[str] = set()
    for name in reader.tensors:
        found = dict(_matrices(reader, name, architecture, architecture.experts, hidden))
        made |= found
        gone |= {name} if found else set()
    return DerivedReader(reader, made, gone) if made else reader


def _matrices(
    reader: CheckpointReader,
    name: str,
    architecture: Architecture,
    experts: Experts,
    hidden: int | None,
) -> Iterator[tuple[str, Made]]:
    """The matrices, or biases, in the stacked tensor ``name``; none where it is something else."""
    layout = experts.stacked
    assert layout is not None  # the caller has seen to it
    inside = _inside(architecture, experts)
    leaves = {layout.gate_up: (experts.gate, experts.up), layout.down: (experts.down,)}
    for leaf, linears in leaves.items():
        for suffix in ("", "_bias"):
            place = re.fullmatch(rf"({inside})\.{re.escape(leaf + suffix)}", name)
            shape = reader.info(name).shape
            if place is None or len(shape) != (2 if suffix else 3):
                continue
            transposed = not suffix and _turned(layout, leaf, shape, hidden)
            path = f"{place[1]}.{experts.experts}"
            for i in range(shape[0]):
                for half, linear in enumerate(linears):
                    tensor = f"{path}.{i}.{linear}.{'bias' if suffix else 'weight'}"
                    part = half if len(linears) == 2 else None
                    make = partial(_rows, transposed, layout.interleaved, part)
                    rows = shape[:0:-1] if transposed else shape[1:]
                    rows = rows if part is None else (rows[0] // 2, *rows[1:])
                    yield tensor, Made((name,), make, rows, reader.info(name).dtype, i)


def _inside(architecture: Architecture, experts: Experts) -> str:
    """A regular expression for what holds a block's experts."""
    return rf"{re.escape(architecture.blocks)}\.\d+\.{re.escape(experts.inside)}"


def _turned(layout: Stacked, leaf: str, shape: tuple[int, ...], hidden: int | None) -> bool:
    """Whether a stacked tensor of three dimensions has its matrices transposed."""
    if not layout.either_way:
        return layout.transposed
    return shape[1 if leaf == layout.down else 2] != hidden


def as_in_memory(
    tensors: Mapping[str, Tensor], architecture: Architecture | None, hidden: int | None
) -> dict[str, Tensor]:
    """A checkpoint's tensors, stacked experts turned as transformers has them where it would read
    them either way."""
    experts = architecture.experts if architecture is not None else None
    layout = experts.stacked if experts is not None else None
    if architecture is None or experts is None or layout is None or not layout.either_way:
        return dict(tensors)
    inside = _inside(architecture, experts)
    leaves = rf"{re.escape(layout.gate_up)}|{re.escape(layout.down)}"
    found = dict(tensors)
    for name, tensor in tensors.items():
        place = re.fullmatch(rf"{inside}\.({leaves})", name)
        if place and tensor.ndim == 3 and _turned(layout, place[1], tuple(tensor.shape), hidden):
            found[name] = tensor.transpose(1, 2).contiguous()
    return found


def _rows(transposed: bool, interleaved: bool, half: int | None, stacked: Tensor) -> Tensor:
    """The rows of one linear, of one expert's part of the stacked tensor."""
    rows = stacked.t() if transposed else stacked
    if half is not None:
        rows = rows[half::2] if interleaved else rows.chunk(2, dim=0)[half]
    return rows.contiguous()


def turned(
    reader: CheckpointReader, architecture: Architecture | None, names: Iterable[str]
) -> CheckpointReader:
    """The checkpoint with those of the tensors ``names`` transposed that it keeps the other way
    round; the same reader where there are none."""
    infos = {n: reader.info(n) for n in names if _is_transposed(n, architecture)}
    made = {
        n: Made((n,), _transpose, i.shape[::-1], i.dtype)
        for n, i in infos.items()
        if len(i.shape) == 2
    }
    return DerivedReader(reader, made) if made else reader


def as_kept(name: str, tensor: Tensor, architecture: Architecture | None) -> Tensor:
    """An unquantized tensor as checkpoints keep it, of one that was read by :func:`turned`."""
    return _transpose(tensor) if _is_transposed(name, architecture) else tensor


def _is_transposed(name: str, architecture: Architecture | None) -> bool:
    patterns = architecture.conv1d_weights() if architecture is not None else ()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _transpose(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()
