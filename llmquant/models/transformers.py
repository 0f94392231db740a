"""register_with_transformers: after one explicit call, ``from_pretrained`` keeps quantized linears
packed, as ``load`` does.

transformers asks two tables: which config class a ``quant_method`` has, and which quantizer a
config object has. Here the first gets, for the methods that llmquant reads, a class that looks at
the config: what llmquant reads becomes a :class:`PackedConfig`, whose own method name ``llmquant``
leads to :class:`PackedQuantizer` through the public ``register_quantizer``; everything else (FP8
under compressed-tensors, say) goes on to whatever class stood there before.
``unregister_from_transformers`` puts the table back.

Loading goes transformers' way: each quantized linear is replaced, on the meta device, by a place
for its stored tensors exactly as the shard's header describes them; transformers fills it; then one
module after another becomes a PackedLinear. At no time does a dense weight exist. The result is
``llmquant.load`` of the same folder at the same dtype, bit for bit. transformers, however, decides
the dtype: unless it is given, that of config.json, also on a CPU.

A folder whose quantization stands only in ``quantize_config.json`` is not seen: transformers reads
config.json alone. For it there is ``llmquant.load``, or ``llmquant convert``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, CheckpointError, FormatError, UsageError
from llmquant.formats import for_config
from llmquant.kernels import AUTO, KERNELS
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.decoding.speed_up import speed_up
from llmquant.models.from_folder import causal_model
from llmquant.models.load import (
    check_shape,
    keep_a_parameter,
    put_module,
    put_packed,
    refuse_saving,
    share_embedding,
    untie,
)
from llmquant.models.naming.names import (
    as_in_checkpoint,
    places_in_memory,
    put_head,
    text_is_a_part,
)
from llmquant.models.reading.embeddings import Matrix, shape_of
from llmquant.models.reading.fit import matrix_at
from llmquant.models.tensor_check import refuse_mismatch

METHOD = "llmquant"
TAKEN_OVER = ("compressed-tensors", "gptq", "awq", "auto-round")


class PackedConfig(QuantizationConfigMixin):
    """A folder's ``quantization_config``, kept word for word.

    Args:
        stored_config: the mapping in config.json.
        kernel: for every quantized linear: ``auto`` or a kernel's name.
    """

    def __init__(self, stored_config: Mapping[str, Any] | None = None, kernel: str = AUTO) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration lists only its own
        self.stored_config = dict(stored_config or {})
        self.kernel = kernel

    def to_dict(self) -> dict[str, Any]:
        """What stood in config.json."""
        return copy.deepcopy(self.stored_config)


class _Stored(nn.Module):
    """Takes the stored tensors of one module from transformers' loader, until they are packed for a
    kernel."""

    def __init__(self, replaced: Matrix, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.shape = shape_of(replaced)
        self.__dict__["replaced"] = replaced  # no submodule: nobody has its weight
        self.suffixes = tuple(tensors)
        for suffix, tensor in tensors.items():
            self.register_parameter(suffix, nn.Parameter(tensor, requires_grad=False))
        self.bias = getattr(replaced, "bias", None)
        if "weight" not in tensors:
            # Code that initializes a weight by its path finds one that needs nothing.
            self.weight = torch.empty(self.shape, device="meta")
            self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def stored(self) -> dict[str, torch.Tensor]:
        return {s: self.get_parameter(s).data for s in self.suffixes}


class PackedQuantizer(HfQuantizer):
    """transformers' hooks around loading. One instance loads one model."""

    quantization_config: PackedConfig
    requires_calibration = True  # transformers' words for: cannot quantize on the fly

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # refuses what cannot be read, before anything is loaded
        for_config(quantization_config.stored_config)
        self._kernel = quantization_config.kernel
        self._packed: PackedCheckpoint | None = None
        self._places: dict[str, str] = {}  # packed module, as stored -> where the model has it
        self._dtype = torch.bfloat16
        self._tied = False  # whether the head is to be the packed embeddings

    def validate_environment(self, *args: Any, device_map: object = None, **kwargs: Any) -> None:
        """Refuse what needs hooks on modules that will be replaced."""
        if isinstance(device_map, dict) and len(set(map(str, device_map.values()))) > 1:
            raise UsageError(
                "a packed model must be on one device; give device_map as one device's name"
            )

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Keep what transformers decided on: it is the dtype of the activations."""
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise UsageError(
                "a packed model is loaded from a folder; from_pretrained(None, state_dict=...) has none"
            )
        reader = CheckpointReader(Path(checkpoint_files[0]).parent)
        given, found = {Path(f).name for f in checkpoint_files}, {f.name for f in reader.files()}
        if given != found:
            raise CheckpointError(
                f"{reader.path}: transformers would load {sorted(given)}, the index names {sorted(found)}"
            )
        self._packed = packed = PackedCheckpoint(reader, self.quantization_config.stored_config)
        packed.require_modules()
        shapes = {n: i.shape for n, i in reader.tensors.items()}
        as_in_checkpoint(model, str(reader.config.get("model_type")), stored=shapes)
        self._places = places_in_memory(model, packed.tensors, reader.path)
        try:
            self._untie(model)
        except NotImplementedError as e:  # of Qwen's omni models, which have several embeddings
            raise ArchitectureError(
                f"{type(model).__name__} is more than one language model; llmquant.load loads the text part of {reader.path}"
            ) from e
        embeddings = model.get_input_embeddings()
        if type(embeddings) is not nn.Embedding and embeddings in self._packed_modules(model):
            # Computed buffers are without numbers here, and a scale of the rows is one.
            with torch.device("cpu"):
                like = causal_model(reader, self._dtype).get_input_embeddings()
            model.set_input_embeddings(like)
        self._refuse_lacking(model, reader)
        for name, tensors in packed.tensors.items():
            headers = {suffix: reader.info(full) for suffix, full in tensors.items()}
            empty = {
                s: torch.empty(i.shape, dtype=i.dtype, device="meta") for s, i in headers.items()
            }
            place = self._places[name]
            put_module(model, place, _Stored(matrix_at(model, place, reader), empty))

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel
    ) -> list[Any]:
        """None: the model's modules have the checkpoint's names, and experts stay apart. Of a model
        that also sees, transformers' own."""
        return weight_conversions if text_is_a_part(model) else []

    def _refuse_lacking(self, model: PreTrainedModel, reader: CheckpointReader) -> None:
        """Refuse a parameter that the folder has not: transformers would fill it with random
        numbers and go on. Of a model that also sees, it names tensors otherwise on disk; a head
        that classifies is new."""
        if text_is_a_part(model) or not model.can_generate():
            return
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        packed = {f"{place}.weight" for place in self._places.values()}
        wanted = (n for n, _ in model.named_parameters(remove_duplicate=False))
        missing = [n for n in wanted if n not in reader and n not in tied and n not in packed]
        refuse_mismatch(reader, model, missing, ())

    def _untie(self, model: PreTrainedModel) -> None:
        """Neither a packed head nor packed embeddings have a weight to share. A head that is tied
        to these waits without one."""
        head, found = model.get_output_embeddings(), self._packed_modules(model)
        shared = {name.removesuffix(".weight") for name in model.all_tied_weights_keys}
        self._tied = model.get_input_embeddings() in found and any(
            m is head for n, m in model.named_modules() if n in shared
        )
        if self._tied:
            put_head(model, nn.Identity())
        if self._tied or head in found:
            untie(model)

    def _packed_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """Those of the model that the folder has packed."""
        places = set(self._places.values())
        return [m for n, m in model.named_modules() if n in places]

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        packed = self._packed
        assert packed is not None  # set before loading
        path = packed.reader.path
        if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
            raise UsageError(
                "a packed model must be on one device; give device_map as one device's name"
            )
        # Not earlier: before loading, transformers makes every new tensor a meta tensor, also those
        # of this check.
        packed.refuse_shifted_zeros()
        for name, scheme in packed.schemes.items():
            place = model.get_submodule(self._places[name])
            assert isinstance(place, _Stored)
            weight = packed.unpack(name, place.stored())
            check_shape(weight, place.shape, f"{path}: {name}")
            try:
                linear = PackedLinear(
                    weight,
                    place.bias,
                    dtype=self._dtype,
                    device=weight.codes.device,
                    kernel=self._kernel,
                    activations=scheme.activations,
                )
            except UsageError as e:
                raise UsageError(f"{name}: {e}") from e
            put_packed(model, self._places[name], linear, place.__dict__["replaced"])
        share_embedding(model, tied=self._tied)
        keep_a_parameter(model, self._dtype, weight.codes.device)
        model.requires_grad_(False)
        speed_up(model)
        refuse_saving(model, path)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def register_with_transformers(kernel: str = AUTO) -> None:
    """Let ``from_pretrained`` load folders in llmquant's formats as packed models, for the rest of
    this process.

    Takes over the quantization methods in ``TAKEN_OVER``, where llmquant can read the config.
    Calling it again only changes the kernel; :func:`unregister_from_transformers` undoes it.

    Args:
        kernel: ``auto``, or the name of one that every quantized linear must take.

    Raises:
        UsageError: no such kernel.
    """
    if kernel != AUTO and kernel not in KERNELS:
        raise UsageError(f"kernel {kernel!r} does not exist; choose auto, {', '.join(KERNELS)}")
    unregister_from_transformers()
    register_quantizer(METHOD)(PackedQuantizer)
    for method in TAKEN_OVER:
        # transformers has no public call that replaces a name, only this table.
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = _dispatcher(
            AUTO_QUANTIZATION_CONFIG_MAPPING[method], kernel
        )


def unregister_from_transformers() -> None:
    """Undo :func:`register_with_transformers`; models already loaded stay as they are."""
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    for method in TAKEN_OVER:
        current = AUTO_QUANTIZATION_CONFIG_MAPPING[method]
        AUTO_QUANTIZATION_CONFIG_MAPPING[method] = getattr(current, "before", current)


def _dispatcher(
    previous: type[QuantizationConfigMixin], kernel: str
) -> type[QuantizationConfigMixin]:
    """A config class that makes a PackedConfig of what llmquant reads and leaves the rest to
    ``previous``."""

    class Dispatcher(previous):  # type: ignore[misc, valid-type]
        before = previous

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if _readable(config_dict):
                return PackedConfig(config_dict, kernel)
            return previous.from_dict(config_dict, *args, **kwargs)

    return Dispatcher


def _readable(config: Mapping[str, Any]) -> bool:
    try:
        for_config(config).schemes(config, ())
    except FormatError:
        return False
    return True
