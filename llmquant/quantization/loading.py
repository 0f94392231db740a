"""The last part of a run's proof: the folder loads, and what loads computes what was quantized.

That every tensor is on the disk says nothing of a reader that has no place for it. So the folder is
opened as ``load`` opens it, and the first block that has packed linears is run twice on a few
tokens: with packed layers, and with plain ones that hold the dequantized weights. What comes out
must be the same. Every linear goes through one kernel, ``reference``, whose arithmetic is that of
the plain layer; engines' rounding of activations is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import LlmquantError, ProofError
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.architectures import blocks_of
from llmquant.models.block_inputs import BlockInput, first_inputs, run_block
from llmquant.models.load import put_module, share_table
from llmquant.models.reading.embeddings import embedding_of
from llmquant.models.reading.fit import Fitted, fitted, linear_at
from llmquant.quantization.blocks.materialize import materialized, outer_names, tensor_names
from llmquant.quantization.blocks.whole_model import set_parameter
from llmquant.quantization.plan import WalkPlan
from llmquant.runtime.devices import ChosenDtype
from llmquant.runtime.finite import some
from llmquant.weight import QuantizedWeight

_TOKENS = 4
_DTYPE = torch.float32


def prove_loading(written: CheckpointReader, plan: WalkPlan) -> None:
    """Load the folder's first block of packed linears and run it.

    Raises:
        ProofError: the folder does not load, or the block computes something else.
    """
    try:
        fit = fitted(PackedCheckpoint(written), _DTYPE)
    except LlmquantError as e:
        raise ProofError(f"what was written cannot be loaded: {e}") from e
    assert fit.packed is not None  # a packed folder was given
    _prove_block(written, fit, fit.packed, plan)
    _prove_full(written, fit.model, fit.packed)


def _prove_block(
    written: CheckpointReader, fit: Fitted, stored: PackedCheckpoint, plan: WalkPlan
) -> None:
    """The first block of packed linears computes what was quantized."""
    here = replace(
        plan,
        source=replace(plan.source, model=fit.model, reader=fit.reader),
        precision=ChosenDtype(_DTYPE),
        device=torch.device("cpu"),
    )
    blocks = blocks_of(here.model, plan.architecture)
    names = {
        i: [n for n in stored.schemes if n.startswith(f"{plan.architecture.blocks}.{i}.")]
        for i in range(len(blocks))
    }
    index = next((i for i, inside in names.items() if inside), None)
    if index is None:
        return  # the head alone is quantized
    prefix = f"{plan.architecture.blocks}.{index}."
    weights = {n.removeprefix(prefix): stored.weight(n) for n in names[index]}
    inputs = _inputs(here, blocks, index)
    plain, packed = (_run(here, blocks[index], prefix, weights, inputs, k) for k in (False, True))
    if not torch.allclose(plain, packed, rtol=1e-4, atol=1e-5 * float(plain.abs().max())):
        raise ProofError(f"{written.path}: block {index} does not compute what was quantized")


def _prove_full(
    written: CheckpointReader, model: PreTrainedModel, packed: PackedCheckpoint
) -> None:
    """With every packed module in place, and the head that shares packed embeddings, the folder has
    a tensor for whatever is left. The model is not one that runs behind this.

    Raises:
        ProofError: naming what would have no values.
    """
    own, tied = embedding_of(model), bool(model.config.get_text_config().tie_word_embeddings)
    for name in packed.schemes:
        put_module(model, name, nn.Identity())
    if own is not None and own[0] in packed.schemes:
        share_table(model, nn.Identity(), tied=tied)
    shared = model.get_expanded_tied_weights_keys(all_submodels=True)
    every = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    empty = [n for n in every if n not in packed.reader and n not in shared]
    if empty:
        raise ProofError(
            f"{written.path} leaves {some(empty)} of {type(model).__name__} without values"
        )


def _inputs(plan: WalkPlan, blocks: nn.ModuleList, index: int) -> BlockInput:
    """What the block is called with for a few tokens, with random hidden states."""
    vocabulary = int(plan.model.config.get_text_config().vocab_size)
    ids = torch.arange(min(_TOKENS, vocabulary)).unsqueeze(0)
    parameters = {n for n, _ in plan.model.named_parameters()}
    with _blank(plan.model, [n for n in outer_names(plan) if n in parameters]):
        (first,) = first_inputs(plan.model, blocks, [ids], walk=False)
    hidden = torch.randn(first.hidden.shape, generator=torch.Generator().manual_seed(0))
    return BlockInput(hidden, first.calls[index:])


@contextmanager
def _blank(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Parameters as zeros that take no memory: how blocks are called does not depend on them, and
    the embeddings of a large vocabulary would be the largest part of a run."""
    meta = {name: model.get_parameter(name) for name in names}
    try:
        for name, parameter in meta.items():
            zeros = torch.zeros((), dtype=_DTYPE).expand(parameter.shape)
            set_parameter(model, name, nn.Parameter(zeros, requires_grad=False))
        yield
    finally:
        for name, parameter in meta.items():
            set_parameter(model, name, parameter)


def _run(
    plan: WalkPlan,
    block: nn.Module,
    prefix: str,
    weights: dict[str, QuantizedWeight],
    inputs: BlockInput,
    packed: bool,
) -> Tensor:
    """The block's output with its quantized linears packed or plain."""
    linears = {name: linear_at(block, name, plan.reader) for name in weights}
    names = tensor_names(plan, block, prefix)
    rest = [n for n in names if n.removesuffix(".weight") not in linears]
    with materialized(plan, block, prefix, rest):
        try:
            for name, weight in weights.items():
                put_module(block, name, _layer(weight, linears[name].bias, packed))
            return run_block(block, inputs)
        finally:
            for name, linear in linears.items():
                put_module(block, name, linear)


def _layer(weight: QuantizedWeight, bias: Tensor | None, packed: bool) -> nn.Module:
    if packed:
        return PackedLinear(weight, bias, dtype=_DTYPE, kernel="reference")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.dequantize(_DTYPE), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
