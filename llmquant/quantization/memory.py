"""Whether the hidden states of a walk fit in memory beside everything else, and what would save
passes beside them.

It decides where they live and nothing that is computed. What the run needs is counted as a plan
counts it (:class:`Work`), with a margin for what such a count may be short of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from llmquant.checkpoint.reader import TensorInfo
from llmquant.models.architectures import Architecture
from llmquant.quantization.blocks.hidden_states import IN_MEMORY, Placement
from llmquant.quantization.blocks.widths import expert_widths, replayed_widths, widths_of
from llmquant.recipe import Recipe
from llmquant.runtime.host import available_bytes
from llmquant.runtime.memory import resident_bytes

if TYPE_CHECKING:
    from llmquant.quantization.plan import WalkPlan

_FLOAT32 = 4
# Float32 copies of a linear beside its mapping: rounding and its error without statistics, and with
# them.
_ROUNDING_COPIES, _GPTQ_COPIES = 4.25, 7.0
# Matrices the size of the Hessian while it is factorized: itself, the factor and LAPACK's copies.
_FACTOR_COPIES = 5.5
# Values per token that a pass leaves between linears: multiples of the widest input and of the
# hidden size.
_WIDE_VALUES, _HIDDEN_VALUES = 3.0, 4.0
# Of a tuned block: the original, the latent, its gradient, two moments, the rounded weight and the
# best one so far.
_TUNE_COPIES, _TUNE_ACTIVATIONS = 7.0, 3.0
_EMBEDDING_BYTES = 7.0  # of a number while it is packed, beside the stored one
_SHARE = 0.8  # of the memory that the machine has left, where no limit was given
_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class Work:
    """What the phases are made of, in elements unless said otherwise."""

    block: int  # the largest block
    outer: int  # everything outside the blocks and the head
    largest_copied: int  # bytes
    largest_linear: int
    embedding: int  # of packed token embeddings; 0 where they stay as they are
    widest: int  # input columns of the widest linear
    hidden: int
    batch_tokens: int
    tokens: int
    itemsize: int  # bytes
    source_itemsize: int  # bytes
    block_linears: int  # a block's quantized linears
    inputs: tuple[int, ...]  # widths of a block's distinct inputs
    replayed: int  # widths of the last inputs of its parts, summed
    experts: tuple[
        tuple[int, ...], ...
    ]  # widths of the inputs of all its experts, for each of their linears with one
    recipe: Recipe

    @classmethod
    def of(
        cls,
        source: Mapping[str, TensorInfo],
        linears: Mapping[str, tuple[int, int]],
        architecture: Architecture,
        hidden: int,
        recipe: Recipe,
        itemsize: int,
        embedding: str | None = None,
    ) -> Work:
        """Count.

        Args:
            source: the original's tensors, as quantization reads them.
            linears: what is quantized: full name → (out, in).
            architecture: where blocks and experts are.
            hidden: width of the hidden states.
            recipe: what is done; its calibration sizes count, its text does not.
            itemsize: bytes of the dtype in which blocks run.
            embedding: name of the token embeddings, if they are quantized.
        """
        blocks, outer = _blocks_and_outer(source, architecture)
        copied = [
            i.nbytes
            for n, i in source.items()
            if n.removesuffix(".weight") not in (*linears, embedding)
        ]
        prefix = f"{architecture.blocks}.{min(blocks, key=int, default='0')}."
        first = {
            n.removeprefix(prefix): shape for n, shape in linears.items() if n.startswith(prefix)
        } or linears
        text = recipe.calibration
        batch = min(
            text.batch_size if recipe.tune is None else recipe.tune.batch_size, text.nsamples
        )
        return cls(
            block=max(blocks.values(), default=0),
            outer=outer,
            largest_copied=max(copied, default=0),
            largest_linear=max((math.prod(shape) for shape in linears.values()), default=0),
            embedding=0 if embedding is None else math.prod(source[f"{embedding}.weight"].shape),
            widest=max((shape[1] for shape in linears.values()), default=0),
            hidden=hidden,
            batch_tokens=batch * text.seqlen,
            tokens=text.nsamples * text.seqlen,
            itemsize=itemsize,
            source_itemsize=max(i.dtype.itemsize for i in source.values()),
            block_linears=sum(math.prod(shape) for shape in first.values()),
            inputs=widths_of(first),
            replayed=replayed_widths(first, architecture),
            experts=expert_widths(first, architecture),
            recipe=recipe,
        )

    @property
    def states_of_one(self) -> int:
        """Of one stream of hidden states."""
        return self.tokens * self.hidden * self.itemsize

    @property
    def states(self) -> int:
        """Of all streams: where the original's are walked along, theirs in front of the block and
        behind it too."""
        tune = self.recipe.tune
        streams = 3 if tune is not None or self.recipe.asymmetric else 1
        return (
            self.states_of_one * (streams + (tune is not None and tune.target == "block"))
            if self.recipe.needs_text
            else 0
        )

    @property
    def replay(self) -> int:
        """Inputs of a block's last linears, kept from one pass to the next
        (:mod:`llmquant.quantization.blocks.replay`): of attention and, where there are no experts,
        of the MLP; of the original's pass too where that is watched."""
        if not (self.recipe.needs_text and self.recipe.gptq.true_sequential):
            return 0
        return self.tokens * self.replayed * self.itemsize * (2 if self.recipe.asymmetric else 1)

    @property
    def phases_with_replay(self) -> dict[str, int]:
        """Phases where there is memory for what saves passes; it is let go before a block is
        tuned."""
        more = self.replay
        return {
            n: nbytes + more * (n in ("pass", "statistics", "rounding"))
            for n, nbytes in self.phases.items()
        }

    @property
    def phases(self) -> dict[str, int]:
        """Phase → bytes at its worst moment, hidden states included, libraries not; what can be
        left out is left out."""
        beside = self.source_itemsize + _EMBEDDING_BYTES
        packing = {"packing": int(self.embedding * beside)} if self.embedding else {}
        if not self.recipe.needs_text:
            rounding = {"copying": self.largest_copied, "rounding": self._data_free_rounding}
            return rounding | packing
        held = self.block * self.itemsize + self.states
        return {
            "copying": self.largest_copied + self.states,
            **{name: nbytes + held for name, nbytes in self._calibrated().items()},
            "embedding": self.embedding_bytes + self.largest_copied + self.states_of_one,
            **packing,
        }

    @property
    def on_device(self) -> dict[str, int]:
        """Phase → bytes on an accelerator at its worst moment: what is not kept by the CPU, and the
        batch that is on its way."""
        if not self.recipe.needs_text:
            return {"rounding": self._data_free_rounding}
        ahead = self.batch_tokens * self.hidden * self.itemsize
        held = self.block * self.itemsize + ahead
        return {
            "embedding": self.outer * self.itemsize + ahead,
            **{name: nbytes + held for name, nbytes in self._calibrated().items()},
        }

    @property
    def embedding_bytes(self) -> int:
        """Of everything before the blocks, and of the packed embeddings' codes."""
        return self.outer * self.itemsize + self.embedding

    @property
    def _data_free_rounding(self) -> int:
        return int(self.largest_linear * (self.source_itemsize + _ROUNDING_COPIES * _FLOAT32))

    @property
    def _activations(self) -> int:
        """What one batch leaves between a block's linears."""
        values = _WIDE_VALUES * self.widest + _HIDDEN_VALUES * self.hidden
        return int(self.batch_tokens * values * self.itemsize)

    @property
    def _hessians(self) -> int:
        """Of the Hessians that one pass gathers: of all inputs, or of one, or of experts side by
        side."""
        if self.recipe.awq is not None or not self.recipe.gptq.true_sequential:
            return sum(n**2 for n in self.inputs)
        # As many experts as fit in the numbers of a block, and at least one; see
        # :func:`llmquant.models.experts.passes_of`.
        together = (
            max(min(sum(n**2 for n in widths), self.block), widths[0] ** 2)
            for widths in self.experts
        )
        return max(self.widest**2, *together, 0)

    def _calibrated(self) -> dict[str, int]:
        """Phases of a block, beside the block and the states."""
        recipe, gptq = self.recipe, self.recipe.method == "gptq"
        passes = 2 if recipe.asymmetric else 1
        hessian = self.widest**2 * _FLOAT32
        watched = self._hessians * _FLOAT32 * passes
        weights = int(
            self.largest_linear * _FLOAT32 * (_GPTQ_COPIES if gptq else _ROUNDING_COPIES + 2)
        )
        factor = int((_FACTOR_COPIES - 1) * hessian) if gptq else 0
        phases = {
            "pass": self._activations,
            "statistics": watched + self._activations * passes,
            "rounding": watched + max(factor, weights + (hessian if gptq else 0)),
        }
        if recipe.tune is not None:
            phases["tuning"] = int(
                self.block_linears * _FLOAT32 * _TUNE_COPIES + _TUNE_ACTIVATIONS * self._activations
            )
        return phases


def _blocks_and_outer(
    source: Mapping[str, TensorInfo], architecture: Architecture
) -> tuple[dict[str, int], int]:
    """Numbers in each block by its index, and in what is neither in a block nor the head."""
    blocks: dict[str, int] = {}
    outer = 0
    for name, info in source.items():
        place = name.removeprefix(f"{architecture.blocks}.")
        index = place.partition(".")[0]
        if place != name and index.isdigit():
            blocks[index] = blocks.get(index, 0) + math.prod(info.shape)
        elif not name.startswith(f"{architecture.head}."):
            outer += math.prod(info.shape)
    return blocks, outer


def placement(
    plan: WalkPlan, windows: Sequence[Tensor], limit: int | None, processes: int = 1
) -> Placement:
    """Where hidden states belong, and whether what passes leave for later ones can be kept.

    Args:
        plan: the walk.
        windows: this process's calibration windows.
        limit: bytes of RAM for the whole process; None: most of what the machine has left.
        processes: that share this machine.
    """
    if not windows:
        return IN_MEMORY
    now = resident_bytes()
    allowed = limit if limit is not None else now + int(available_bytes() * _SHARE / processes)
    work = _work(plan, windows)
    fits = [
        now + _MARGIN * max(phases.values()) <= allowed
        for phases in (work.phases, work.phases_with_replay)
    ]
    return Placement(spill=not fits[0], replays=fits[1])


def _work(plan: WalkPlan, windows: Sequence[Tensor]) -> Work:
    """The walk's, with the tokens that these windows really have."""
    shapes = {n: plan.reader.info(f"{n}.weight").shape for n in plan.specs if n != plan.embedding}
    linears = {n: (rows, columns) for n, (rows, columns) in shapes.items()}
    hidden = int(plan.model.config.get_text_config().hidden_size)
    work = Work.of(
        plan.reader.tensors,
        linears,
        plan.architecture,
        hidden,
        plan.recipe,
        plan.dtype.itemsize,
        plan.embedding,
    )
    return replace(work, tokens=sum(w.numel() for w in windows))
