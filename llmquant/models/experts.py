"""ExpertList: a block's experts as linears of their own, one module per matrix, where transformers
keeps stacked tensors.

transformers 5 holds ``gate_up_proj [experts, 2*inner, hidden]`` and ``down_proj [experts, hidden,
inner]``, or their like (:class:`llmquant.models.rows.architecture.Stacked`). The packed formats
hold a matrix per expert and projection, and so do most checkpoints, so here each is an
``nn.Linear`` that can be observed, quantized and replaced like any other. The call is that of
transformers' experts modules, and so is the sum: every token's ``k`` weighted outputs are added in
the router's order, as its ``grouped_mm`` does (in floating point another order would differ).

An expert that no token is sent to is not called. While its inputs are observed it must be: inside
:func:`watched` every expert is called in every pass, with no rows if need be, so that linears and
their order are found from any batch. There all experts can also be *shown* every token, of which
only the routed ones count for the output; their statistics then cover each expert alike, but are
not those of the tokens that it really gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.models.rows.architecture import Stacked

GATED, UNGATED = ("gate_up_proj", "down_proj"), ("up_proj", "down_proj")
"""Tensors of transformers' modules of experts."""
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
    """One expert; its linears have the checkpoint's names.

    Args:
        weights: of its gate, if it has one, up and down by their names.
        biases: of the same; empty where they have none.
        combine: of the outputs of all but down, what down reads.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        combine: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self._names = tuple(weights)
        self._combine = combine
        for name, weight in weights.items():
            self.add_module(name, _linear(weight, biases.get(name)))

    def forward(self, x: Tensor) -> Tensor:
        *first, down = (self.get_submodule(name) for name in self._names)
        result: Tensor = down(self._combine(*(linear(x) for linear in first)))
        return result


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear over these numbers, made without the random ones of its own, which take half of the
    time where there are tens of thousands of experts."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter(
        "bias", None if bias is None else nn.Parameter(bias, requires_grad=False)
    )
    return linear


class ExpertList(nn.ModuleList):
    """A block's experts.

    Args:
        stacked: transformers' module of them.
        names: of an expert's gate, if it has one, up and down linear.
        layout: how that module keeps its tensors.
        weighs_inputs: a token's weight multiplies what its expert reads, not what it gives.

    Attributes:
        names: as given.
        watch: how the experts are called at present, if not only for the output.
    """

    def __init__(
        self,
        stacked: nn.Module,
        names: tuple[str, ...],
        layout: Stacked,
        weighs_inputs: bool = False,
    ) -> None:
        weights = zip(*_apart(stacked, "", layout), strict=True)
        biases = zip(*_apart(stacked, "_bias", layout), strict=True) if layout.biased else None
        combine = _combining(stacked, layout.interleaved)
        super().__init__(
            Expert(
                dict(zip(names, three, strict=True)),
                dict(zip(names, next(biases), strict=True)) if biases is not None else {},
                combine,
            )
            for three in weights
        )
        self.names = names
        self.watch: Watch | None = None
        self._weighs_inputs = weighs_inputs

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
            given = hidden_states
            if self._weighs_inputs:  # by 1 where an expert is shown what it was not sent
                weight = torch.ones_like(given[:, :1])
                weight[token] = top_k_weights.reshape(-1)[slots].unsqueeze(-1)
                given = given * weight
            if self.watch is not None and self.watch.everything:
                parts.append(expert(given)[token])
            elif self.watch is not None or slots.numel():
                parts.append(expert(given[token]))
        weighted = torch.cat(parts)
        if not self._weighs_inputs:
            weighted = weighted * top_k_weights.reshape(-1)[by_expert].unsqueeze(-1)
        in_order = weighted[by_expert.argsort()]
        return in_order.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _apart(stacked: nn.Module, suffix: str, layout: Stacked) -> tuple[tuple[Tensor, ...], ...]:
    """Gates, ups and downs, a tensor for each expert; the rows of all are its linear's rows."""
    if not is_gated(stacked):
        return tuple(tuple(stacked.get_parameter(n).detach()) for n in UNGATED)
    gate_up, down = (stacked.get_parameter(f"{n}{suffix}").detach() for n in GATED)
    if layout.transposed and not suffix:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    gates, ups = (
        (gate_up[:, ::2], gate_up[:, 1::2]) if layout.interleaved else gate_up.chunk(2, dim=1)
    )
    return tuple(gates), tuple(ups), tuple(down)


def is_gated(stacked: nn.Module) -> bool:
    """Whether transformers' module of experts has gates."""
    return bool(getattr(stacked, "has_gate", True))


def _combining(stacked: nn.Module, interleaved: bool) -> Callable[..., Tensor]:
    """What the model does between an expert's linears: its own function, where it brings one."""
    if not is_gated(stacked):
        plain: Callable[[Tensor], Tensor] = stacked.act_fn  # type: ignore[assignment]
        return plain
    own = getattr(type(stacked), "_apply_gate", None)
    if own is None or own.__module__ != type(stacked).__module__:
        act: Any = stacked.act_fn
        return lambda gate, up: act(gate) * up

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        both = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        result: Tensor = own(stacked, both)
        return result

    return combine


class WeighsInputs(nn.Module):
    """Llama 4's mixture, which multiplies what an expert reads by the router's score: transformers'
    module with its experts called for the tokens that they get."""

    top_k: int
    hidden_dim: int
    router: Callable[[Tensor], tuple[Tensor, Tensor]]
    experts: ExpertList
    shared_expert: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        return self.shared_expert(hidden) + self.experts(hidden, chosen, weights), logits


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
