"""What a run will need: memory, disk and, from one block that was timed, time. From headers alone,
except for the timing.

Memory is counted phase by phase, as the run goes through them; the largest one is the peak. Each
phase's copies were counted in the code and checked against the kernel's count of real runs
(``tests/test_forecast.py``, ``bench/memory.py``):

- *embedding*: the tensors outside the blocks in the dtype of the run, beside the largest of them as
  it is stored;
- *pass*: a block in the dtype of the run, all hidden states, and what one batch leaves between a
  block's linears;
- *statistics* of the widest input, or of several experts: a Hessian each (two where the original's
  inputs are watched too) while a batch is added to it;
- *packing*: the token embeddings, where they are quantized: as they are stored, as codes, and as
  the words that these are packed into;
- *rounding*: that Hessian, its factor, and what making the factor takes; then some float32 copies
  of one linear;
- *tuning*: latents, gradients and Adam's two moments for every linear of a block, and activations
  kept for the backward pass;
- *copying* a tensor that is not quantized: one mapping of it.

A recipe that trains does so after that, and what training takes is not in these phases but for its
latents (:func:`training_bytes`): the rest goes by text and windows.

``LIBRARIES`` is what the process has before it reads a weight.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.errors import ArchitectureError
from llmquant.kernels.cpu import Cpu
from llmquant.models.from_folder import causal_of, context_length, read_config
from llmquant.models.reading.tower import text_part
from llmquant.planning.preview import Plan
from llmquant.quantization.memory import Work
from llmquant.recipe import Recipe

LIBRARIES = 480_000_000
"""Bytes resident once torch and transformers are loaded and a block has run; measured on Linux,
torch 2.13 for CPUs."""
# Latents or adapters, gradients, two moments and the best state.
_BYTES_OF_TRAINING = {"scales": 0, "codes": 20, "lora": 2}
_ANY = torch.bfloat16  # mixtures of experts run without weights in this dtype only


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of a run.

    Attributes:
        phases: phase → bytes that the process has in RAM at its worst moment, libraries included.
        states: of them, hidden states, which ``--max-memory`` can keep in files instead.
        replay: of them, what is kept only where there is room for it, and saves passes through a
            block.
        output: of weight files.
        scratch: on the output's disk beside the result while the run lasts: a shard's side file,
            saved hidden states.
        on_device: phase → bytes on the device at its worst moment, if the run is on one. Hidden
            states are on the CPU, but for the batch that is worked on and the one on its way.
    """

    phases: Mapping[str, int]
    states: int
    replay: int
    output: int
    scratch: int
    on_device: Mapping[str, int]

    @property
    def device_peak(self) -> int:
        return max(self.on_device.values())

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def disk(self) -> int:
        return self.output + self.scratch


def forecast(
    plan: Plan, recipe: Recipe, itemsize: int = 4, max_shard_size: int = 5_000_000_000
) -> Forecast:
    """Forecast a run of ``recipe``.

    Args:
        plan: of the same recipe.
        recipe: its calibration sizes count, its text does not.
        itemsize: bytes of the dtype in which blocks run.
        max_shard_size: as the run would get it.
    """
    linears = {m.name: m.shape for m in plan.linears}
    work = Work.of(
        plan.source, linears, plan.architecture, plan.hidden, recipe, itemsize, plan.embedding
    )
    shard = min(max_shard_size, plan.tensor_bytes)
    return Forecast(
        phases={name: nbytes + LIBRARIES for name, nbytes in work.phases_with_replay.items()},
        states=work.states,
        replay=work.replay,
        output=plan.bytes_on_disk,
        scratch=shard + 2 * work.states,
        on_device=work.on_device,
    )


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """Whether a run fits on a device.

    Attributes:
        memory: of the device, in bytes.
        fits: as it is.
        change: the first one that makes it fit; None: none is needed, or none does.
    """

    memory: int
    fits: bool
    change: str | None = None


def device_fit(plan: Plan, recipe: Recipe, itemsize: int, memory: int) -> DeviceFit:
    """Whether a run fits on a device, or the first change that makes it fit.

    Args:
        plan: of the same recipe.
        recipe: what is done.
        itemsize: bytes of the dtype in which blocks run.
        memory: of the device, in bytes.
    """
    key = "calibration.batch_size" if recipe.tune is None else "tune.batch_size"
    half, one = "--dtype bfloat16", f"{key} 1 in the recipe"
    ways: list[tuple[str | None, dict[str, Any], int]] = [(None, {}, itemsize)]
    if recipe.needs_text:
        ways += [(half, {}, 2), (one, {key: 1}, itemsize), (f"{half} and {one}", {key: 1}, 2)]
    for change, changes, size in ways:
        changed = recipe.updated(changes) if changes else recipe
        if forecast(plan, changed, size).device_peak <= memory:
            return DeviceFit(memory, change is None, change)
    return DeviceFit(memory, fits=False)


def training_bytes(plan: Plan, recipe: Recipe) -> int | None:
    """Bytes that training keeps for every weight of the quantized linears, beside the model and the
    activations of a batch; None where the recipe does not train."""
    if recipe.qat is None:
        return None
    weights = sum(math.prod(m.shape) for m in plan.linears)
    return _BYTES_OF_TRAINING[recipe.qat.size] * weights


def loaded_bytes(plan: Plan, dtype: torch.dtype) -> int:
    """Bytes of the result's weights in the memory of who computes with them in ``dtype``.

    Packed ones stay as they are stored, and what is not packed becomes ``dtype``: a float32 copy of
    16-bit embeddings is twice their file. Only a head beside the compiled kernel keeps its 16 bits
    (:mod:`llmquant.models.decoding.half_head`), and the embeddings with it where they are tied.
    """
    packed = {m.name for m in plan.modules}
    kept = plan.head if dtype is torch.float32 and Cpu.name in plan.kernels else None
    return sum(
        t.nbytes
        if name == kept or name.rpartition(".")[0] in packed
        else math.prod(t.shape) * dtype.itemsize
        for name, t in plan.tensors.items()
    )


def running_bytes(
    model: str | os.PathLike[str],
    weights: int,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> int:
    """Bytes of RAM that a model needs to answer one request: libraries, its weights, and keys and
    values of a whole context.

    Args:
        model: folder or hub name, for its shape.
        weights: bytes of its weights in memory, as by :func:`loaded_bytes`.
        tokens: of the context; default: as long as the config allows.
        dtype: that it computes in.
    """
    config = read_config(model)
    length = tokens or context_length(config) or 0
    cache = cache_bytes(config, length, 1, dtype) if length else 0
    return LIBRARIES + weights + cache


def cache_bytes(config: PreTrainedConfig, context: int, batch_size: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values, or states, of ``batch_size`` contexts of so many tokens.

    The model itself is run without weights (on the meta device) and the cache it filled is
    counted, so sliding windows, shared keys and compressed attention count as they are. A model
    that cannot run so is counted as one whose every layer keeps every key and value.

    Args:
        dtype: that the model computes in.

    Raises:
        ArchitectureError: transformers has no causal language model for the config.
    """
    config = copy.deepcopy(config)
    text = text_part(config, config.name_or_path or "the model")
    text_config = config if text is None else text.config
    causal = None if text is None else text.causal
    try:
        with torch.device("meta"):
            model = causal_of(text_config, causal, dtype=_ANY, attn_implementation="eager")
    except CONFUSED as e:
        raise ArchitectureError(
            f"model type {config.model_type!r} is not a causal language model that can be built: {first_line(e)}"
        ) from e
    ids = torch.zeros(batch_size, context, dtype=torch.int64, device="meta")
    # Without a mask some models look for padding among the ids, and with one others look at that;
    # there are no values here.
    for mask in (torch.ones_like(ids), None):
        try:
            held = _held(model, ids, mask)
        except CONFUSED:
            continue
        return held * dtype.itemsize
    return _at_most(text_config) * batch_size * context * dtype.itemsize


def _held(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> int:
    """Numbers in the cache after these ids."""
    cache = DynamicCache(config=model.config)
    with torch.device("meta"), torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
    tensors = (t for layer in cache.layers for t in vars(layer).values())
    return sum(t.numel() for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point())


def _at_most(config: Any) -> int:
    """Numbers that a token's keys and values take, as far as the config's usual names tell."""
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * getattr(config, "num_hidden_layers", 0) * kept * width)
