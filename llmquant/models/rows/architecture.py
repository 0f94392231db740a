"""What a row of the table of architectures holds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stacked:
    """Experts of a block in one tensor for gates and ups and one for downs.

    Attributes:
        gate_up, down: the checkpoint's tensors, named from the module that holds the experts:
            ``[experts, 2*inner, hidden]``, the gates' rows first, and ``[experts, hidden, inner]``.
        transposed: ``[experts, hidden, 2*inner]`` and ``[experts, inner, hidden]``.
        either_way: transposed or not, as which side is ``hidden`` tells; transformers turns those
            that are as it reads them.
        interleaved: gates and ups take turns.
        biased: with a bias for each row, in tensors of these names and ``_bias``.
    """

    gate_up: str
    down: str
    transposed: bool = False
    either_way: bool = False
    interleaved: bool = False
    biased: bool = False


@dataclass(frozen=True, slots=True)
class Experts:
    """A block's experts: ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))``, for the tokens
    that the router sends to each.

    Attributes:
        inside: path (relative to a block) of the module that holds the router and the list of
            experts.
        gate, up, down: an expert's linears; no gate: "".
        experts: that module's list of them.
        stacked: how the checkpoint keeps them, where it has no matrix for each; the names above are
            then those that engines read packed experts by.
        weighs_inputs: a token's weight multiplies what its experts read, not what they give.
    """

    inside: str
    gate: str
    up: str
    down: str
    experts: str = "experts"
    stacked: Stacked | None = None
    weighs_inputs: bool = False

    def linears(self) -> tuple[str, ...]:
        """Patterns (relative to a block) of all the experts' linears."""
        return tuple(
            f"{self.inside}.{self.experts}.*.{linear}"
            for linear in (self.gate, self.up, self.down)
            if linear
        )

    def scaled(self) -> tuple[str, str]:
        """An expert's up and down."""
        *_, up, down = self.linears()
        return up, down


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names, relative to the model.

    Attributes:
        blocks: path of the ``ModuleList`` of decoder blocks.
        norm: path of the norm between the last block and the head.
        fused: sets of linears (relative to a block, ``*`` for any expert) that engines merge.
        scaled: pairs of linears (relative to a block, ``*`` for an expert): scaling an output of
            the first scales inputs of the second.
        renamed: paths in transformers' model (``*`` for any block), and what the checkpoint calls
            their last part.
        experts: of the blocks that have some.
        head: the linear after the last norm.
        outside: linears that some models have between the embeddings or the head and the blocks;
            left alone.
        linears: classes of the model's own that compute what a plain Linear does.
        conv1d: modules (relative to a block) that are transformers' Conv1D, a Linear of the
            transposed matrix.
    """

    blocks: str
    norm: str
    fused: tuple[tuple[str, ...], ...]
    scaled: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    experts: Experts | None = None
    head: str = "lm_head"
    outside: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    conv1d: tuple[str, ...] = ()

    def conv1d_weights(self) -> tuple[str, ...]:
        """Patterns for the weights of the modules ``conv1d``."""
        return tuple(f"{self.blocks}.*.{name}.weight" for name in self.conv1d)

    def in_memory(self, names: Iterable[str]) -> list[str]:
        """What transformers calls modules of these names, where that is another name."""
        found = []
        for name in names:
            old = name
            for pattern, last in reversed(self.renamed):
                parent, _, leaf = pattern.rpartition(".")
                wanted = re.escape(f"{parent}.{last}".lstrip(".")).replace(r"\*", r"\d+")
                place = re.match(rf"{wanted}(?=\.|$)", old)
                if place:
                    before = place[0].removesuffix(last)
                    old = f"{before}{leaf}{old[place.end() :]}"
            if old != name:
                found.append(old)
        return found

    def fused_with(self, leaf: str) -> tuple[str, ...] | None:
        """The set that the linear ``leaf`` (relative to a block) is in."""
        return next(
            (s for s in self.fused if any(fnmatch.fnmatchcase(leaf, pattern) for pattern in s)),
            None,
        )

    def scaled_in(self, linears: Iterable[str]) -> list[tuple[str, str]]:
        """The pairs that a block with these linears has."""
        there = set(linears)
        found = [pair for pair in self.scaled if there.issuperset(pair)]
        for first, second in (pair for pair in self.scaled if "*" in pair[0]):
            before, after = first.split("*")
            experts = (
                n.removeprefix(before).removesuffix(after)
                for n in linears
                if fnmatch.fnmatchcase(n, first)
            )
            found += [(first.replace("*", e), second.replace("*", e)) for e in experts]
        return found
