"""Whether a folder loads, without reading its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.floats import as_floats
from llmquant.models.reading.dense import check_dense
from llmquant.models.reading.fit import fitted


def check_loading(path: Path) -> Sequence[str]:
    """What :func:`llmquant.load` would say of a folder.

    Raises:
        what :func:`llmquant.load` raises, but for damage that only the weights show.
    """
    reader = as_floats(CheckpointReader(path))
    config = quantization_of(reader)
    if config is None:
        return check_dense(reader)
    packed = PackedCheckpoint(reader, config)
    packed.require_modules()
    packed.refuse_shifted_zeros()
    return fitted(packed).notes
