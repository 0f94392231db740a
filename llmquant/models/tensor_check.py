"""Does a folder fit the model that its config describes? Compared tensor by tensor, from names,
shapes and dtypes alone.

A checkpoint with a tensor too few gives a model that lacks it, one with a tensor too many a model
that silently leaves it out (a layer count that was cut, say). Both are refused before work starts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmquant.checkpoint.reader import SIDE_FILES, CheckpointReader, read_json
from llmquant.errors import CheckpointError
from llmquant.runtime.finite import some

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
    )  # a plan looks at headers only, and does not wait for it

log = logging.getLogger(__name__)

# Tables that old checkpoints carry and models compute for themselves.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")


def check_fit(reader: CheckpointReader, model: PreTrainedModel) -> None:
    """Compare an unquantized folder with the (meta) model of its config.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or not floating-point, a
            tied one differs, or a tokenizer or generation file, which would be carried along, is no
            JSON.
    """
    for side in SIDE_FILES:
        if side.endswith(".json") and (reader.path / side).is_file():
            read_json(reader.path / side)
    wanted = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[str, str] = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    places = wanted.keys() | model.state_dict().keys()
    refuse_mismatch(
        reader.path,
        missing=[n for n in wanted if n not in reader and n not in tied],
        unexpected=[n for n in reader.tensors if n not in places],
    )
    for name, like in wanted.items():
        if name not in reader:
            continue
        info = reader.info(name)
        if info.shape != tuple(like.shape):
            raise CheckpointError(
                f"{reader.path}: {name} is {list(info.shape)} in the checkpoint, config.json makes it {list(like.shape)}"
            )
        if not info.dtype.is_floating_point:
            raise CheckpointError(
                f"{reader.path}: {name} is {info.dtype}; an unquantized model's weights are floating-point"
            )
        if name in tied:
            check_tied(reader, name, tied[name])


def check_tied(reader: CheckpointReader, name: str, source: str) -> None:
    """A stored copy of a tied tensor must equal what it is tied to, if that is stored too.

    Raises:
        CheckpointError: it does not.
    """
    if source in reader and not torch.equal(reader.read(name), reader.read(source)):
        raise CheckpointError(
            f"{reader.path}: config.json ties {name} to {source}, but the two differ; set tie_word_embeddings to false"
        )


def refuse_mismatch(path: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse tensors that the model wants and the folder has not, or the other way round; tables it
    computes may stay.

    Raises:
        CheckpointError: naming some of them.
    """
    lacking, left = sorted(missing), sorted(unexpected)
    ignored = [n for n in left if _COMPUTED.search(n)]
    extra = [n for n in left if not _COMPUTED.search(n)]
    if ignored:
        log.info("%s: %s are computed by the model, not read", path, some(ignored))
    if lacking and extra:
        raise CheckpointError(
            f"{path} lacks {some(lacking)} and has {some(extra)} instead: another config's weights, or a model type whose "
            "checkpoints name tensors otherwise than transformers does in memory, which cannot be quantized yet"
        )
    if lacking:
        raise CheckpointError(
            f"{path} lacks {some(lacking)}; the folder is incomplete, fetch or quantize it again"
        )
    if extra:
        raise CheckpointError(
            f"{path} has tensors that its config.json gives no place for: {some(extra)}"
        )
