"""What a model has that can be quantized: its linears, head and embeddings, and what is none of
these."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from llmquant.models.architectures import has_matrix
from llmquant.models.experts import ExpertList
from llmquant.models.reading.embeddings import embedding_of, shape_of, tied_to, why_not_packed
from llmquant.models.rows.table import LEFT_ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Linears:
    """A model's linears.

    Attributes:
        shapes: full name → (out, in).
        head: its name, if it has one.
        tied: whether the head shares the embeddings' weights.
        routers: what chooses experts; never quantized, since a wrong choice costs more than these
            few weights.
        left: linears that are left alone → why.
        strange: modules with a matrix that is no plain Linear's → their class.
        placeless: modules of the folder that the model has no place for.
        embedding: the token embeddings' name and shape ``(tokens, width)``.
        unpackable: why they cannot be packed, or None.
        shared: modules that are tied to them.
    """

    shapes: Mapping[str, tuple[int, int]]
    head: str | None
    tied: bool
    routers: tuple[str, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)
    strange: Mapping[str, str] = field(default_factory=dict)
    placeless: tuple[str, ...] = ()
    embedding: tuple[str, tuple[int, int]] | None = None
    unpackable: str | None = None
    shared: frozenset[str] = frozenset()

    def shape(self, module: str) -> tuple[int, int]:
        """``(out, in)`` of a linear or of the embeddings."""
        if self.embedding is not None and module == self.embedding[0]:
            return self.embedding[1]
        return self.shapes[module]

    def names(self, linear: str) -> tuple[str, ...]:
        """What patterns may call a linear: a head is also ``lm_head``, whatever the checkpoint
        calls it."""
        return (linear,) if linear != self.head else tuple(dict.fromkeys((linear, HEAD)))


def linears_of(model: PreTrainedModel, placeless: tuple[str, ...] = ()) -> Linears:
    """The linears of a (meta) model.

    Only plain ones: whoever reads a packed folder puts a packed layer in the place of an
    ``nn.Linear``, and leaves its subclasses, which may compute something else, as they are.
    """
    found = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    head = next((n for n, m in found.items() if m is model.get_output_embeddings()), None)
    shapes = {n: (m.out_features, m.in_features) for n, m in found.items()}
    routers = tuple(_routers(model))
    left = {n: why for p, why in LEFT_ALONE.items() for n in fnmatch.filter(shapes, p)}
    shapes = {n: shape for n, shape in shapes.items() if n not in routers and n not in left}
    strange = {n: type(m).__name__ for n, m in model.named_modules() if has_matrix(m)}
    strange = {n: kind for n, kind in strange.items() if n not in (*found, *routers)}
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    table = embedding_of(model)
    return Linears(
        shapes,
        head,
        tied,
        routers,
        left,
        strange,
        placeless,
        None if table is None else (table[0], shape_of(table[1])),
        None if table is None else why_not_packed(*table),
        frozenset() if table is None else tied_to(model, table[0]),
    )


def _routers(model: nn.Module) -> Iterator[str]:
    """What stands beside a list of experts and has a row for each, or one that weighs an expert for
    all tokens."""
    for name, module in model.named_modules():
        lists = [m for m in module.children() if isinstance(m, ExpertList)]
        for child, beside in module.named_children() if lists else ():
            if beside in lists:
                continue
            for inner, m in beside.named_modules(prefix=f"{name}.{child}".lstrip(".")):
                matrices = [p for p in m.parameters(recurse=False) if p.ndim == 2]
                if any(p.shape[0] in (1, len(lists[0])) for p in matrices):
                    yield inner
