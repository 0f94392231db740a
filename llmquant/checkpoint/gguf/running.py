"""Whether a model that a file's metadata makes runs at all: a config can be built that computes
nothing (a window of 0 tokens, heads that do not share keys evenly), and nothing that compares
tensors sees it.

The first blocks, one of every kind that the config has, get a few tokens and then one more behind
them, with the keys and values of the first kept, as in generation. Parameters are zeros that take
no memory: whether a model runs does not depend on its numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.errors import LayoutError

_TOKENS = 4


def refuse_idle(path: Path, model: Any) -> None:
    """Raises LayoutError, naming the file, for a model that :func:`run_once` cannot run."""
    try:
        run_once(model)
    except CONFUSED as e:
        raise LayoutError(
            f"{path}: its metadata makes a {model.config.model_type} model that does not run: {first_line(e)}"
        ) from e


def run_once(model: Any) -> None:
    """Run the first blocks of a causal model without weights; nothing of it is changed.

    Args:
        model: its parameters on the meta device, its buffers not.

    Raises:
        whatever the model raises; ArithmeticError where it gives numbers that are not finite.
    """
    base = model.base_model
    name, blocks = next(
        (n, m)
        for n, m in base.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers
    )
    kinds = list(getattr(model.config, "layer_types", None) or ["one"])
    needed = max(kinds.index(kind) for kind in set(kinds)) + 1
    training, experts = base.training, base.get_experts_implementation()
    setattr(base, name, blocks[:needed])
    try:
        base.eval()
        base.set_experts_implementation("eager")  # the others want strides
        _two_steps(base, int(model.config.hidden_size))
    finally:
        setattr(base, name, blocks)
        base.train(training)
        base.set_experts_implementation(experts)


def _two_steps(base: nn.Module, hidden: int) -> None:
    zeros = {n: torch.zeros(()).expand(p.shape) for n, p in base.named_parameters()}
    cache = None
    for tokens in (_TOKENS, 1):
        given = {"inputs_embeds": torch.ones(1, tokens, hidden), "past_key_values": cache}
        with torch.no_grad():
            out: Any = functional_call(base, zeros, (), {**given, "use_cache": True})
        cache, states = out.past_key_values, out.last_hidden_state
        assert isinstance(states, Tensor)
        if not bool(torch.isfinite(states).all()):
            raise ArithmeticError("its blocks give numbers that are not finite")
