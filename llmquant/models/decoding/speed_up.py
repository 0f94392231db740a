"""Faster decoding of loaded models on a CPU: blocks that run in compiled code, and a head kept in
16 bits (:mod:`llmquant.models.decoding.half_head`).

One new token of one sequence is replaced, and where a second trial agrees also prompts and several
sequences. Everything else (hidden states or attentions that somebody asks for, gradients) runs
transformers' own code. A block is tried before it is trusted: both ways get the same random input
and cache, and a block whose outputs differ by more than rounding keeps transformers' code, with a
line in the log. So no table of model types is needed, and a new one that computes something else is
left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.errors import ArchitectureError
from llmquant.kernels import native
from llmquant.kernels.block import LINEARS, BlockShape, Step
from llmquant.kernels.cpu import Cpu
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.block_inputs import first_inputs
from llmquant.models.decoding import token
from llmquant.models.decoding.half_head import halve_head
from llmquant.models.decoding.steps import BlockForward, Run

log = logging.getLogger(__name__)

_WHERE = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_POSITIONS = 5  # in the cache of a trial
_TRIAL = 2, 6  # sequences and tokens of a trial of many rows
# of a trial: some hundred roundings of float32, far below what a scale, a norm or a cap left out
# would change
_TOLERANCE = 2e-5


def speed_up(model: PreTrainedModel) -> None:
    """Replace what can be: see the module text. Changes nothing of a model that is not packed by
    kernel ``cpu``."""
    if native.why_missing() or not any(
        isinstance(m, PackedLinear) and m.kernel.name == Cpu.name for m in model.modules()
    ):
        return
    for name, layer in model.named_modules():
        if hasattr(layer, "self_attn") and hasattr(layer, "mlp"):
            reason = _install(layer, model)
            if reason:
                log.info("%s is stepped by transformers' code: %s", name, reason)
    run = _install_run(model)
    halve_head(model)
    if run is not None:
        reason = token.install(model, run)
        if reason is not None:
            log.info("single tokens go through transformers' code: %s", reason)


def _install_run(model: PreTrainedModel) -> Run | None:
    """Let the first block of a model step all of them, where every block has a compiled step and
    gets the same arguments; the log says why not."""
    stacks = [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and any(_stepped(layer) for layer in m)
    ]
    if not stacks:
        return None
    reason = _why_no_run(model, stacks)
    if reason is None:
        return Run(model.config.get_text_config(), list(stacks[0]))
    log.info("blocks are stepped one by one: %s", reason)
    return None


def _why_no_run(model: PreTrainedModel, stacks: Sequence[nn.ModuleList]) -> str | None:
    if len(stacks) > 1 or not all(map(_stepped, stacks[0])):
        return "some have no compiled step"
    # With a longer prompt blocks of different attention would get different masks.
    if len(set(getattr(model.config.get_text_config(), "layer_types", None) or ())) > 1:
        return "their attention is of several kinds"
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        (caught,) = first_inputs(model, stacks[0], [tokens])
    except (ArchitectureError, AttributeError, TypeError, ValueError) as e:
        return f"how they are called cannot be observed ({e})"
    first: tuple[Any, ...] | None = None
    for args, kwargs in caught.calls:
        given = kwargs.get("attention_mask"), *(kwargs.get("position_embeddings") or ())
        first = first or given
        if args or len(given) != 3 or any(a is not b for a, b in zip(given, first, strict=True)):
            return "they are not all called with the same mask and position embeddings"
    return None


def _stepped(layer: nn.Module) -> bool:
    return isinstance(layer.__dict__.get("forward"), BlockForward)


def _install(layer: Any, model: PreTrainedModel) -> str | None:
    """Put a compiled step into a block, or say why not."""
    try:
        step = _step_of(layer, model)
    except (AttributeError, TypeError, ValueError) as e:
        return f"it is not built as expected ({e})"
    if step is None:
        return "its linears are not all packed for kernel cpu, or its parts are others than a Llama block's"
    fast = BlockForward(step, layer.forward, layer.self_attn.layer_idx)
    if not _agree(fast, model, (1, 1), None):
        return "a trial gave other numbers"
    fast.many = _many_agree(fast, model)
    if not fast.many:
        log.info(
            "block %d reads prompts by transformers' code: a trial gave other numbers", fast.index
        )
    layer.forward = fast
    return None


def _step_of(layer: Any, model: PreTrainedModel) -> Step | None:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {name: layer.get_submodule(path) for name, path in _WHERE.items()}
    if not all(
        isinstance(m, PackedLinear) and m.kernel.name == Cpu.name and m.activations == "none"
        for m in linears.values()
    ):
        return None
    if any(linears[n].bias is not None for n in ("gate", "up", "down")) or attention.head_dim % 16:
        return None
    if not isinstance(mlp.act_fn, nn.SiLU) and type(mlp.act_fn).__name__ != "SiLUActivation":
        return None
    known = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    if {n for n, _ in layer.named_children()} != known or {n for n, _ in mlp.named_children()} - {
        "gate_proj", "up_proj", "down_proj", "act_fn",
    }:  # fmt: skip
        return None
    vectors: dict[str, Tensor | None] = {f"{n}_bias": linears[n].bias for n in ("q", "k", "v", "o")}
    for name in ("q_norm", "k_norm"):
        vectors[name] = getattr(getattr(attention, name, None), "weight", None)
    vectors |= {
        "input_norm": layer.input_layernorm.weight,
        "post_norm": layer.post_attention_layernorm.weight,
    }
    shape = BlockShape(
        linears["q"].out_features // attention.head_dim,
        linears["k"].out_features // attention.head_dim,
        attention.head_dim,
        layer.input_layernorm.variance_epsilon,
        attention.scaling,
    )
    return Step(
        {n: (linears[n]._buffers, linears[n].spec, linears[n].shape) for n in LINEARS},
        vectors,
        shape,
    )


def _many_agree(fast: BlockForward, model: PreTrainedModel) -> bool:
    """Whether both compute many rows alike: two prompts, and what follows two of which one is
    padded."""
    if model.config._attn_implementation != "sdpa":
        return False
    sequences, tokens = _TRIAL
    mask = torch.ones(sequences, 1, tokens, _POSITIONS + tokens, dtype=torch.bool)
    mask = mask.tril(_POSITIONS)
    mask[1, ..., :2] = False
    return _agree(fast, model, _TRIAL, None) and _agree(fast, model, _TRIAL, mask)


def _agree(
    fast: BlockForward, model: PreTrainedModel, size: tuple[int, int], mask: Tensor | None
) -> bool:
    """Whether both give the same output for random tokens, in float32 and up to its rounding; not
    where one of them fails, which the log says.

    Args:
        size: sequences and tokens of each.
        mask: given where they come behind a random cache; a single token always does.
    """
    try:
        exact, tried = _outputs(fast, model, size, mask)
    except CONFUSED as e:
        log.info("a trial of block %d failed: %s", fast.index, first_line(e))
        return False
    return bool((exact - tried).norm() <= _TOLERANCE * exact.norm())


def _outputs(
    fast: BlockForward, model: PreTrainedModel, size: tuple[int, int], mask: Tensor | None
) -> list[Tensor]:
    """What the plain block and the fast one make of the same random tokens and cache."""
    shape = fast.step.shape
    random = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    hidden = drawn(*size, model.config.get_text_config().hidden_size)
    angles = drawn(1, size[1], shape.head_dim // 2).repeat(1, 1, 2) * 6
    held = (size[0], shape.kv_heads, _POSITIONS, shape.head_dim)
    keys, values = drawn(*held), drawn(*held)
    outputs = []
    with torch.inference_mode():
        for forward in (fast.plain, fast):
            # Not one of the model's config: that keeps no more than a sliding window.
            cache = DynamicCache()
            if mask is not None or size == (1, 1):
                cache.update(keys.clone(), values.clone(), fast.index)
            outputs.append(
                forward(
                    hidden.clone(),
                    attention_mask=mask,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=(angles.cos(), angles.sin()),
                )
            )
    return outputs
