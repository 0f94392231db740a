"""ExpertList: a block's experts as linears of their own, one module per matrix, where transformers
keeps stacked tensors.

transformers 5 holds ``gate_up_proj [experts, 2*inner, hidden]`` and ``down_proj [experts, hidden,
inner]``. Checkpoints hold a matrix per expert and projection, and so do the packed formats, so here
each is an ``nn.Linear`` that can be observed, quantized and replaced like any other. The call is
that of transformers' experts modules, and so is the sum: every token's ``k`` weighted outputs are
added in the router's order, as its ``grouped_mm`` does (in floating point another order would
differ).

An expert that no token is sent to is not called. While its inputs are observed it must be: inside
:func:`watched` every expert is called in every pass, with no rows if need be, so that linears and
their order are found from any batch. There all experts can also be *shown* every token, of which
only the routed ones count for the output; their statistics then cover each expert alike, but are
not those of the tokens that it really gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

UNSEEN = "no calibration token was sent to this expert"


@dataclass(frozen=True, slots=True)
class Place:
    """Which expert a linear is part of, and its name there."""

    expert: int
    linear: str


@dataclass(slots=True)
class Watch:
    """How experts are called while they are watched.

    Attributes:
        everything: every expert is shown every token.
        routes: the router's choice and weights at each list of experts, in calling order; filled by
            the pass.
        replay: choices of another pass, used in place of this one's own, so that both passes show
            an expert the same tokens.
    """

    everything: bool = False
    routes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    replay: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def route(self, chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts' call goes by."""
        if self.replay:
            chosen, weights = self.replay[len(self.routes)]
        self.routes.append((chosen, weights))
        return chosen, weights


class Expert(nn.Module):
    """One gated expert; its linears have the checkpoint's names."""

    def __init__(self, weights: Mapping[str, Tensor], act: nn.Module) -> None:
        super().__init__()
        self._names = tuple(weights)
        self.act_fn = act
        for name, weight in weights.items():
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (self.get_submodule(name) for name in self._names)
        result: Tensor = down(self.act_fn(gate(x)) * up(x))
        return result


class ExpertList(nn.ModuleList):
    """A block's experts.

    Args:
        names: of an expert's gate, up and down linear.
        gate_up: ``[experts, 2*inner, hidden]``, the gate's rows first.
        down: ``[experts, hidden, inner]``.
        act: the gate's activation.
    """

    def __init__(
        self, names: tuple[str, str, str], gate_up: Tensor, down: Tensor, act: nn.Module
    ) -> None:
        gates, ups = gate_up.detach().chunk(2, dim=1)
        super().__init__(
            Expert(dict(zip(names, weights, strict=True)), act)
            for weights in zip(gates, ups, down.detach(), strict=True)
        )
        self.watch: Watch | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[tokens, hidden]``, each with its ``k`` experts and their weights ``[tokens,
        k]`` → ``[tokens, hidden]``."""
        if self.watch is not None:
            top_k_index, top_k_weights = self.watch.route(top_k_index, top_k_weights)
        tokens, k = top_k_index.shape
        chosen = top_k_index.reshape(-1)
        by_expert = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self)).tolist()
        parts = []
        for expert, slots in zip(self, by_expert.split(counts), strict=True):
            token = torch.div(slots, k, rounding_mode="floor")
            if self.watch is not None and self.watch.everything:
                parts.append(expert(hidden_states)[token])
            elif self.watch is not None or slots.numel():
                parts.append(expert(hidden_states[token]))
        weighted = torch.cat(parts) * top_k_weights.reshape(-1)[by_expert].unsqueeze(-1)
        in_order = weighted[by_expert.argsort()]
        return in_order.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


@contextmanager
def watched(module: nn.Module, watch: Watch) -> Iterator[None]:
    """All lists of experts inside the module are called as ``watch`` says."""
    lists = [m for m in module.modules() if isinstance(m, ExpertList)]
    try:
        for experts in lists:
            experts.watch = watch
        yield
    finally:
        for experts in lists:
            experts.watch = None


def place_of(module: nn.Module, name: str) -> Place | None:
    """Where among the experts the linear ``name`` (from the module) is; None where it is in
    none."""
    path, _, linear = name.rpartition(".")
    parent, _, expert = path.rpartition(".")
    inside = expert.isdecimal() and isinstance(module.get_submodule(parent), ExpertList)
    return Place(int(expert), linear) if inside else None


def passes_of(
    block: nn.Module, sets: Sequence[tuple[str, ...]], limit: int
) -> list[list[tuple[str, ...]]]:
    """Sets to observe together: each by itself, but those of a block's experts, which do not read
    one another, side by side.

    As many experts at a time as have Hessians of no more than ``limit`` numbers together, and at
    least one.
    """
    places = {members: place_of(block, members[0]) for members in sets}
    widths = [
        block.get_parameter(f"{s[0]}.weight").shape[1] for s, place in places.items() if place
    ]
    together = max(1, limit // max(widths, default=1) ** 2)
    passes: dict[object, list[tuple[str, ...]]] = {}
    for members, place in places.items():
        key = members if place is None else (place.expert // together, place.linear)
        passes.setdefault(key, []).append(members)
    return list(passes.values())
