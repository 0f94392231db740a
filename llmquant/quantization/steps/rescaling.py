"""A checkpoint seen with powers of two moved between its layers, where scales would otherwise leave
what fp16 holds.

Rows of ``up`` divided by 4096 and columns of ``down`` multiplied by it are the same model, and so
are all its like. Rounding does not see a power of two either, but fp16 does: below 2**-14 it has
fewer bits for a scale, and below 2**-24 none. So before a block is read, the size of its linears'
rows is looked at. Where the scales that they will get are out of range, a power of two is moved as
:mod:`llmquant.quantization.steps.exchanges` allows: out of a norm's weight, until that is near 1;
between two linears, until their sizes are equal; and for single rows, until they are to their
columns what the others are to theirs.

Every product is exact in the checkpoint's dtype, or the move is not made: what is read is the same
function, bit for bit, and whoever reads through :class:`RescaledReader` (calibration, rounding,
copying, proof) sees one model. Where nothing is out of range or far off nothing is touched.
"""

from __future__ import annotations

from torch import Tensor

from llmquant.checkpoint.reader import CheckpointReader, ReaderView
from llmquant.models.architectures import Architecture
from llmquant.quantization.steps.exchanges import block_of, exchanges_of, last_norm, norms_of
from llmquant.quantization.steps.moves import Moved, Moves
from llmquant.recipe import Recipe
from llmquant.records import PairReport


class RescaledReader(ReaderView):
    """A :class:`CheckpointReader` whose tensors give scales that fp16 holds, where powers of two
    can be moved to get there.

    Args:
        reader: the checkpoint, rotated or not.
        architecture: the model's.
        recipe: says which linears are quantized, and to how many codes.

    Attributes:
        inner: the reader given.
    """

    def __init__(
        self, reader: CheckpointReader, architecture: Architecture, recipe: Recipe
    ) -> None:
        super().__init__(reader)
        self._kind = str(self.config.get("model_type"))
        self._architecture, self._recipe = architecture, recipe
        self._blocks: dict[str, Moved] = {}

    def read(self, name: str) -> Tensor:
        """One tensor, multiplied by the powers of two that were moved into it."""
        tensor = self.inner.read(name)
        power = self._block(self._place(name)).powers.get(name)
        return tensor if power is None else power.of(tensor)

    def moved(self, block: str | None) -> tuple[PairReport, ...]:
        """What was moved in a block, by its full name, or (None) between the last norm and the
        head."""
        return tuple(self._block(block or "").reports)

    def _place(self, name: str) -> str | None:
        """The block of a tensor, "" for what is behind the last, None elsewhere."""
        inside = block_of(name, self._architecture)
        if inside is not None:
            return inside[0]
        behind = (f"{self._architecture.norm}.", f"{self._architecture.head}.")
        return "" if name.startswith(behind) else None

    def _block(self, prefix: str | None) -> Moved:
        if prefix is None:
            return Moved()
        if prefix not in self._blocks:
            self._blocks[prefix] = self._looked_at(prefix)
        return self._blocks[prefix]

    def _looked_at(self, prefix: str) -> Moved:
        moves = Moves(self.inner, prefix, self._codes)
        if not prefix:
            norm, head = last_norm(self._kind, self._architecture, self.tensors), self._head()
            if norm is not None and head is not None:
                moves.out_of_norm(norm, [head])
            return moves.made
        shapes = {
            n.removeprefix(f"{prefix}.").removesuffix(".weight"): info.shape
            for n, info in self.tensors.items()
            if n.startswith(f"{prefix}.") and n.endswith(".weight") and len(info.shape) == 2
        }
        if not any(self._codes(f"{prefix}.{n}") for n in shapes):
            return moves.made
        for norm, readers in norms_of(self._kind, self.config, shapes).items():
            moves.out_of_norm(norm, readers)
        for exchange in exchanges_of(self._kind, self._architecture, self.config, shapes):
            moves.between(exchange)
        return moves.made

    def _head(self) -> str | None:
        """The head, where it has a weight of its own."""
        head = self._architecture.head
        tied = self.config.get("tie_word_embeddings")
        return None if tied or f"{head}.weight" not in self.tensors else head

    def _codes(self, name: str) -> int:
        """The largest code of a linear's grid; 0 where it is not quantized."""
        recipe = self._recipe
        if name == self._architecture.head:
            weights = recipe.head_weights(name, "lm_head")
            return 0 if weights is None else weights.spec.max_code
        return recipe.weights_of(name).spec.max_code if recipe.selects(name) else 0
