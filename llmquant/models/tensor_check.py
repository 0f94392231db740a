"""Does a folder fit the model that its config describes? What is refused, and in which words.

A checkpoint with a tensor too few gives a model that transformers fills with random numbers. It is
refused before work starts. One with a tensor too many has the model and something beside it: see
:mod:`llmquant.models.reading.leftovers`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from transformers import PreTrainedModel

from llmquant.checkpoint.reader import SIDE_FILES, CheckpointReader, read_json
from llmquant.checkpoint.weights.json_files import lost
from llmquant.errors import CheckpointError
from llmquant.models.reading.leftovers import computed
from llmquant.runtime.finite import some

log = logging.getLogger(__name__)

# LoRA's tensors, and what peft calls the weights that an adapter of any kind stands around.
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|original_module)(\.|$)")


def check_side_files(path: Path, but: Collection[str] = ()) -> None:
    """Raises CheckpointError if a tokenizer or generation file, which would be carried along, is no
    JSON (but those named may be anything) or a link to nothing."""
    for side in map(path.joinpath, SIDE_FILES):
        if (gone := lost(side)) is not None:
            raise CheckpointError(gone)
        if side.name.endswith(".json") and side.name not in but and side.is_file():
            read_json(side)


def refuse_mismatch(
    reader: CheckpointReader,
    model: PreTrainedModel,
    missing: Iterable[str],
    unexpected: Iterable[str],
) -> None:
    """Refuse tensors that the model wants and the folder has not, and adapters, without which it
    is another model.

    Raises:
        CheckpointError: naming some of them, and what is there instead.
    """
    lacking, left = sorted(missing), sorted(unexpected)
    adapters = [n for n in left if _ADAPTER.search(n)]
    if adapters:
        raise CheckpointError(
            f"{reader.path} holds an adapter (such as LoRA) that is not merged: {some(adapters)}. Without it this is another "
            "model; merge it first (peft: merge_and_unload, then save_pretrained)"
        )
    ignored, extra = [n for n in left if computed(n)], [n for n in left if not computed(n)]
    if ignored:
        log.info("%s: %s are computed by the model, not read", reader.path, some(ignored))
    if not lacking:
        return
    named = [n for n in lacking if n in reader.weight_map]
    if named:
        raise CheckpointError(
            f"{reader.path} lacks {some(lacking)}: the index says that {reader.weight_map[named[0]]} holds {named[0]}, "
            "and it does not; fetch the folder again"
        )
    wrapper = _before_all(reader, lacking)
    if wrapper is not None:
        raise CheckpointError(
            f"{reader.path}: {wrapper!r} stands before the name of every tensor: the model was saved inside a wrapper "
            "(such as torch.compile or DataParallel), and transformers does not read it so; save the model itself, or "
            "rename the tensors"
        )
    if extra:
        raise CheckpointError(
            f"{reader.path} lacks {some(lacking)}, and config.json gives no place to {some(extra)}: an incomplete folder, another "
            "config's weights, or a model type whose checkpoints name tensors otherwise than transformers does in memory, "
            "which cannot be quantized yet"
        )
    head = model.get_output_embeddings()
    if any(m is head for n, m in model.named_modules() if lacking == [f"{n}.weight"]):
        raise CheckpointError(
            f"{reader.path} lacks {lacking[0]}, the output head, which config.json does not tie to the embeddings: an "
            "embedding model, or an incomplete folder; set tie_word_embeddings to true only if the model was trained so"
        )
    raise CheckpointError(
        f"{reader.path} lacks {some(lacking)}; the folder is incomplete, fetch or quantize it again"
    )


def _before_all(reader: CheckpointReader, lacking: list[str]) -> str | None:
    """What stands before the name of every tensor, where wanted names follow it."""
    stored = list(reader.tensors)
    found = next((n.removesuffix(w) for w in lacking for n in stored if n.endswith(f".{w}")), None)
    return found if found and all(n.startswith(found) for n in stored) else None
