"""Whether weights that were written are on the disk as they were to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmquant.checkpoint.reader import CheckpointReader, sha256_tensor
from llmquant.errors import ProofError


def prove_weights(
    written: CheckpointReader,
    digests: Mapping[str, str],
    on_progress: Callable[[str, int, int], None],
    but: frozenset[str] = frozenset(),
) -> None:
    """Compare what lies on disk with what was to be written, tensor by tensor.

    Raises:
        ProofError: naming what differs.
    """
    names = written.tensors.keys() - but
    if names != digests.keys():
        odd = sorted(names ^ digests.keys())
        raise ProofError(f"{written.path} holds other tensors than were written: {odd[0]}")
    for done, (name, digest) in enumerate(digests.items()):
        on_progress("proving", done, len(digests))
        if sha256_tensor(written.read(name)) != digest:
            raise ProofError(f"{written.path}: tensor {name} is not what was written")
