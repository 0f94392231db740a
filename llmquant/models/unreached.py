"""Blocks that only run beside an image, as Llama 3.2's vision models have them between the others.

Text passes them by, so text shows nothing of what they compute. A module that hands on what it is
given stands in each one's place; their tensors are carried over as they are read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Unreached(nn.Module):
    """A block that text passes by."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return hidden_states


def pass_by(model: nn.Module) -> None:
    """Take the blocks that text does not reach out of a model of transformers' class. The numbers
    it gives for text stay as they are."""
    for module in list(model.modules()):
        places = getattr(module, "cross_attention_layers", None)
        layers = getattr(module, "layers", None)
        if not places or not isinstance(layers, nn.ModuleList):
            continue
        for place in places:
            if place < len(layers):
                layers[place] = Unreached()
        # The model's code asks it which blocks to leave out; these are called like the others.
        module.cross_attention_layers = []  # type: ignore[assignment]


def unreached(model: nn.Module) -> tuple[str, ...]:
    """Names of the blocks that text passes by."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, Unreached))
