"""A checkpoint that keeps matrices ``[in, out]``, as GPT-2's Conv1D layers do, read the usual way
round, ``[out, in]``.

A Conv1D computes what a Linear of the transposed matrix does, so the model has Linears in their
place (:mod:`llmquant.models.names`) and every reader of weights sees them the usual way round.
Packed weights are always the Linear's: layouts hold nothing else, and vLLM transposes only plain
weights of these types. What stays unquantized goes back the way it came
(:func:`as_kept`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.derived import DerivedReader, Made
from llmquant.models.rows.architecture import Architecture


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
