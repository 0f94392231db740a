"""load: a model folder → a transformers model in eval mode, quantized linears still packed. Any
model, one door.

A quantized folder is built on the meta device, so nothing dense is ever allocated for a packed
linear: the tensors of one module are read from the mapped shard, turned into a QuantizedWeight and
from there into a kernel's buffers, one module at a time; everything else is assigned straight from
the mapped file, cast only if its dtype differs. transformers' own quantizers are not involved. An
unquantized folder goes through transformers' own loading, which knows every historical renaming.

``dtype="auto"`` means on a CPU the faster of bfloat16 and float32, for both kinds of folder, so
that two models compared are rounded alike; on other devices it is the checkpoint's own dtype
(:mod:`llmquant.runtime.devices`). A dtype that is given is obeyed.

What the model wants must be in the folder; a tensor that is missing or of another shape is an error
that names it. What the folder has beside it is left out, as transformers leaves it out, and named
in a warning. Code from a model folder is never run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.floats import as_floats
from llmquant.checkpoint.sources.label import named_dtypes
from llmquant.checkpoint.weights.exported import is_onnx
from llmquant.errors import CheckpointError, UsageError
from llmquant.kernels import AUTO, check_name
from llmquant.kernels.embedding.packed_embedding import PackedEmbedding
from llmquant.kernels.gpu.attention import use_grouped_sdpa
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.decoding.speed_up import speed_up
from llmquant.models.from_folder import read_generation_config
from llmquant.models.naming.names import put_head
from llmquant.models.precision import dtype_of, stored_buffers
from llmquant.models.reading.dense import load_dense
from llmquant.models.reading.embeddings import scale_of, shape_of
from llmquant.models.reading.fit import fitted, matrix_at
from llmquant.runtime.devices import AUTO as AUTO_DTYPE
from llmquant.runtime.devices import ChosenDtype, make_current, parse_device, parse_dtype
from llmquant.runtime.finite import some
from llmquant.weight import QuantizedWeight

log = logging.getLogger(__name__)


def load(
    model: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = AUTO_DTYPE,
    device: str | torch.device | None = "cpu",
    kernel: str = AUTO,
) -> PreTrainedModel:
    """A causal language model in eval mode without gradients, packed if the folder is.

    Args:
        model: a folder, or a hub name.
        dtype: of activations and unquantized tensors: ``auto``, ``bfloat16``, ``float16`` or
            ``float32``; :func:`compute_dtype` tells what ``auto`` is here, and why.
        device: ``auto`` (cuda where there is one, else cpu), ``cpu``, ``cuda``, ``cuda:0`` …
        kernel: ``auto``, or the name of one that every quantized linear must take.

    Raises:
        UsageError: no such dtype, device or kernel, or the kernel refuses a weight.
        CheckpointError: a folder that is missing, damaged, or does not fit the model its config
            describes.
        FormatError: quantized tensors that cannot be read.
        ArchitectureError: a model type that transformers does not know.
    """
    check_name(
        kernel
    )  # an unquantized model takes none, but a misspelt one should not pass there either
    reader = as_floats(CheckpointReader(resolve(model)))
    where = parse_device(device)
    make_current(where)
    use_grouped_sdpa(where)
    torch_dtype = parse_dtype(dtype, where, stored=next(named_dtypes(reader.config), None)).dtype
    quantization = quantization_of(reader)
    if quantization:
        loaded = _load_packed(reader, quantization, torch_dtype, where, kernel)
    else:
        loaded, notes = load_dense(reader, torch_dtype, where)
        for note in notes:
            log.warning("%s: %s", reader.path, note)
    loaded.train(False)
    loaded.requires_grad_(False)
    speed_up(loaded)
    return loaded


def compute_dtype(
    model: str | os.PathLike[str],
    dtype: str | torch.dtype | None = AUTO_DTYPE,
    device: str | torch.device | None = "cpu",
) -> ChosenDtype:
    """The dtype in which :func:`load` would run a model, with the reason where it is chosen
    automatically.

    Raises:
        UsageError: no such dtype or device.
        CheckpointError: no such model.
    """
    path = resolve(model)
    if is_onnx(path):  # its graph has a dtype of its own
        return parse_dtype(dtype, device, stored="float32")
    return parse_dtype(
        dtype, device, stored=next(named_dtypes(CheckpointReader(path).config), None)
    )


def _load_packed(
    reader: CheckpointReader,
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    kernel: str,
) -> PreTrainedModel:
    packed = PackedCheckpoint(reader, quantization)
    packed.require_modules()
    packed.refuse_shifted_zeros()
    fit = fitted(packed, dtype)
    assert fit.packed is not None  # it was given
    model, packed = fit.model, fit.packed
    for note in fit.notes:
        log.warning("%s: %s", reader.path, note)
    generation = read_generation_config(reader.path)
    if generation is not None:
        model.generation_config = generation
    for name in packed.schemes:
        _replace(model, name, packed, PackedOptions(dtype, device, kernel))
    share_embedding(model, tied=model.config.get_text_config().tie_word_embeddings)
    _assign(model, packed, dtype, device)
    keep_a_parameter(model, dtype, device)
    refuse_saving(model, reader.path)
    return model


@dataclass(frozen=True, slots=True)
class PackedOptions:
    """How packed linears are made: dtype of activations, device, kernel."""

    dtype: torch.dtype
    device: torch.device
    kernel: str


def _replace(
    model: PreTrainedModel, name: str, packed: PackedCheckpoint, options: PackedOptions
) -> None:
    """Put packed weights where the model has the linear, or the embeddings, ``name``."""
    reader = packed.reader
    module = matrix_at(model, name, reader)
    weight = packed.weight(name)
    check_shape(weight, shape_of(module), f"{reader.path}: {name}")
    has_bias = getattr(module, "bias", None)
    bias = None if has_bias is None else _checked(reader, f"{name}.bias", has_bias)
    try:
        replacement = PackedLinear(
            weight,
            bias,
            dtype=options.dtype,
            device=options.device,
            kernel=options.kernel,
            activations=packed.schemes[name].activations,
        )
    except UsageError as e:
        raise UsageError(f"{name}: {e}") from e
    put_packed(model, name, replacement, module)


def put_packed(model: nn.Module, name: str, packed: PackedLinear, before: nn.Module) -> None:
    """Replace the linear ``before`` by packed weights, or embeddings by a look-up in them."""
    if isinstance(before, nn.Embedding):
        scale = scale_of(before)
        assert scale is not None, "refused where the folder was looked at"
        put_module(model, name, PackedEmbedding(packed, scale))
    else:
        put_module(model, name, packed)


def share_embedding(model: PreTrainedModel, *, tied: bool) -> None:
    """Make a head that is tied to packed embeddings a product with the same packed weights; nothing
    is left that transformers could tie."""
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding):
        share_table(model, embedding.table, tied=tied)


def share_table(model: PreTrainedModel, table: nn.Module, *, tied: bool) -> None:
    """The same for a model whose embeddings have been replaced by a look-up in ``table``."""
    if tied:
        put_head(model, table)
    untie(model)


def untie(model: PreTrainedModel) -> None:
    """Tell transformers that the head shares no parameter with the embeddings."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def check_shape(weight: QuantizedWeight, shape: tuple[int, int], where: str) -> None:
    """Raises CheckpointError, beginning with ``where``, for a weight of another shape than the
    config wants."""
    if weight.shape != shape:
        raise CheckpointError(f"{where} is {list(weight.shape)}, the config wants {list(shape)}")


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule by its full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _checked(reader: CheckpointReader, name: str, like: Tensor) -> Tensor:
    """Read a tensor that must have the shape of ``like``."""
    if name not in reader:
        raise CheckpointError(f"{reader.path}: tensor {name} is missing")
    shape = reader.info(name).shape
    if shape != tuple(like.shape):
        raise CheckpointError(
            f"{reader.path}: {name} is {list(shape)}, the config wants {list(like.shape)}"
        )
    return reader.read(name)


def _assign(
    model: PreTrainedModel, packed: PackedCheckpoint, dtype: torch.dtype, device: torch.device
) -> None:
    """Give every remaining parameter and buffer its tensor, tie what is tied, move computed
    buffers."""
    reader = packed.reader
    wanted: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    wanted |= {n: b for n, b in stored_buffers(model) if n in reader}
    tied: dict[str, str] = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    for name, like in wanted.items():
        if name not in reader or name in tied or name.rpartition(".")[0] in packed.schemes:
            continue
        tensor = _checked(reader, name, like)
        floating = like.is_floating_point()
        value = tensor.to(device, dtype_of(model, name, dtype) if floating else like.dtype)
        _set(
            model,
            name,
            nn.Parameter(value, requires_grad=False) if isinstance(like, nn.Parameter) else value,
        )
    model.tie_weights()
    for module in model.modules():
        if not isinstance(module, PackedLinear):
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    stuck = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if stuck:
        raise CheckpointError(
            f"{reader.path} leaves {some(stuck)} of {type(model).__name__} without values"
        )


def keep_a_parameter(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give an empty parameter to a model that has none left (OLMo and nanochat, whose norms have no
    weights, with packed embeddings): transformers asks the first one for device and dtype."""
    if next(model.parameters(), None) is None:
        empty = torch.empty(0, dtype=dtype, device=device)
        model.register_parameter("no_weights", nn.Parameter(empty, requires_grad=False))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


def refuse_saving(model: nn.Module, path: Path) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` of a packed model, and of the models inside it,
    raise UsageError."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for method in ("save_pretrained", "push_to_hub"):
                setattr(module, method, partial(_refuse, path))


def _refuse(path: Path, *args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        f"this model's linears are packed in memory for a kernel, which is not what files hold; copy {path} instead, "
        "or write another layout, or a dense checkpoint, with llmquant convert"
    )
