"""A model's token embeddings, as far as they can be packed: where they are, what they do beside
looking a row up, and which head shares them.

An embedding is replaced by a look-up in packed rows. That is the same function only if the module
does nothing else, or multiplies its rows by one number, as Gemma 3's does. Which of them is
observed: the module is called with one row of numbers, and must give that row times a constant.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llmquant.formats.base import is_embedding

Matrix = nn.Linear | nn.Embedding
"""What packed weights can stand for."""


def embedding_of(model: PreTrainedModel) -> tuple[str, nn.Embedding] | None:
    """The token embeddings of a model and their full name; None where it has none of its own."""
    module = model.get_input_embeddings()
    name = next((n for n, m in model.named_modules() if m is module), None)
    return (name, module) if name is not None and isinstance(module, nn.Embedding) else None


def shape_of(module: Matrix) -> tuple[int, int]:
    """``(out, in)``: an embedding has a row for each token."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.num_embeddings, module.embedding_dim


def scale_of(module: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by; None where it does something else to them.

    Args:
        module: may be without weights, but not without computed buffers.
    """
    if type(module) is nn.Embedding:
        return 1.0 if module.max_norm is None else None
    random = torch.Generator().manual_seed(0)
    row = torch.randn(1, module.embedding_dim, generator=random, device="cpu")
    ids = torch.zeros(1, dtype=torch.int64, device="cpu")
    # torch wants the padding token among the rows: one row, seen as that many, takes no memory.
    rows = 1 + (module.padding_idx or 0)
    one, drawn = (
        torch.func.functional_call(module, {"weight": weight.expand(rows, -1)}, (ids,))
        for weight in (torch.ones_like(row), row)
    )
    scale = one.reshape(-1)[:1]
    plain = one.shape == row.shape and torch.equal(one, scale.expand_as(row))
    return float(scale) if plain and torch.equal(drawn, row * scale) else None


def why_not_packed(name: str, module: nn.Embedding) -> str | None:
    """Why packed rows cannot take an embedding's place, or None."""
    if scale_of(module) is None:
        return f"{name} is a {type(module).__name__}, which does more than look up rows"
    if not is_embedding(name):
        return f"engines know no embeddings called {name}"
    return None


def tied_to(model: PreTrainedModel, name: str) -> frozenset[str]:
    """The modules whose weight is that of the embeddings ``name``: a tied head."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return frozenset(
        target.removesuffix(".weight")
        for target, source in tied.items()
        if source == f"{name}.weight"
    )
