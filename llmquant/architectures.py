"""Where a model keeps its decoder blocks, and which linears an engine fuses. A table, not branches.

Three facts cannot be found by running the model: the path of the block list, the sets of linears that serving engines merge into
one matrix (so they must share bits, group size and symmetry), and linears whose outputs another one reads channel by channel.
Which linears share an input, and in what order
they run, is observed in :mod:`llmquant.capture`.

A model type that is not in the table is walked by its one list of equal blocks, if it has exactly one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llmquant.errors import ArchitectureError

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED_MLP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True)
class Architecture:
    """Names, relative to the model.

    Attributes:
        blocks: path of the ``ModuleList`` of decoder blocks.
        norm: path of the norm between the last block and the head.
        fused: sets of linears (relative to a block) that engines merge.
        scaled: pairs of linears (relative to a block): scaling an output of the first scales inputs of the second.
    """

    blocks: str
    norm: str
    fused: tuple[tuple[str, ...], ...]
    scaled: tuple[tuple[str, str], ...] = ()


_SCALED = (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj"))
_LLAMA = Architecture("model.layers", "model.norm", (_ATTENTION, _GATED_MLP), _SCALED)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    # Already one matrix in the checkpoint: qkv_proj and gate_up_proj.
    "phi3": Architecture("model.layers", "model.norm", ()),
    "opt": Architecture("model.decoder.layers", "model.decoder.final_layer_norm", (_ATTENTION,)),
    "starcoder2": Architecture("model.layers", "model.norm", (_ATTENTION,)),
}


def find(model: nn.Module, model_type: str) -> Architecture:
    """The table's entry, or one derived from the only list of two or more equal blocks.

    Raises:
        ArchitectureError: the entry does not fit the model, there is no single such list, or the model holds experts, which
            are not linears: the larger part of it would stay as it is.
    """
    _refuse_experts(model, model_type)
    known = ARCHITECTURES.get(model_type)
    if known is not None:
        if not isinstance(_get(model, known.blocks), nn.ModuleList):
            raise ArchitectureError(f"{type(model).__name__} has no block list at {known.blocks}; is its config.json right?")
        return known
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(m, nn.Linear) for m in module.modules())
    }
    # A list inside another one (experts, branches) is part of a block, even where the outer list does not qualify.
    outer = [
        name
        for name, blocks in lists.items()
        if not any(name.startswith(f"{o}.") for o in lists) and len(blocks) > 1 and len({type(m) for m in blocks}) == 1
    ]
    if len(outer) != 1:
        raise ArchitectureError(
            f"model type {model_type!r} is not in llmquant's table ({', '.join(sorted(ARCHITECTURES))}) and has "
            f"{len(outer)} lists of equal blocks ({', '.join(outer) or 'none'}) where exactly one is needed"
        )
    parent = outer[0].rpartition(".")[0]
    norms = [n for n, _ in (_get(model, parent) or model).named_children() if "norm" in n]
    return Architecture(outer[0], f"{parent}.{norms[-1]}".lstrip(".") if norms else "", ())


def _refuse_experts(model: nn.Module, model_type: str) -> None:
    stacked = [
        f"{name}.{leaf}" if name else leaf
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and not isinstance(module, nn.Conv1d)
    ]
    if stacked:
        raise ArchitectureError(
            f"model type {model_type!r} stacks its experts' weights in {len(stacked)} three-dimensional tensors (such as "
            f"{stacked[0]}); mixture-of-experts models cannot be quantized yet"
        )


def _get(model: nn.Module, path: str) -> nn.Module | None:
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        module = getattr(module, part, None)
    return module


def blocks_of(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    blocks = _get(model, architecture.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def norm_of(model: nn.Module, architecture: Architecture) -> nn.Module:
    """The norm before the head.

    Raises:
        ArchitectureError: this architecture's is not known.
    """
    norm = _get(model, architecture.norm) if architecture.norm else None
    if norm is None:
        raise ArchitectureError(f"cannot find the norm before the head of {type(model).__name__}; --ignore lm_head")
    return norm
