"""The student: a quantized folder as a model whose packed linears are trained.

It is loaded as any folder is, then every packed linear becomes a
:class:`llmquant.training.layers.linear.TrainedLinear` (or one that trains codes), and norms get
factors where they are trained. Everything else stands still. Blocks can be run under gradient
checkpointing: what is between them is kept, what is inside is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llmquant.activations import Activations
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.source import Source
from llmquant.errors import CheckpointError, QuantizationError
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.from_folder import read_config
from llmquant.models.load import load, put_module
from llmquant.recipe_sections import QAT
from llmquant.runtime.devices import device_memory
from llmquant.runtime.host import available_bytes
from llmquant.training.layers.latent import AdapterLinear, LatentLinear
from llmquant.training.layers.linear import TrainedLinear
from llmquant.training.layers.norms import Gain, norms_of, train_norm
from llmquant.weight import QuantizedWeight

_INSIDE_A_BLOCK = 34  # numbers per token and hidden channel that a block keeps for its gradients


@dataclass(slots=True)
class Student:
    """A model in training.

    Attributes:
        model: transformers' own, in eval mode.
        layers: trained linears by their names in the folder.
        norms: trained gains by the names of their tensors in the folder.
    """

    model: PreTrainedModel
    layers: dict[str, TrainedLinear]
    norms: dict[str, Gain] = field(default_factory=dict)

    def groups(self, options: QAT) -> list[dict[str, Any]]:
        """Parameters by learning rate, for an optimizer. Only latents and adapters decay."""
        factors = [layer.factor for layer in self.layers.values()]
        factors += [gain.factor for gain in self.norms.values()]
        rest = [p for layer in self.layers.values() for p in layer.trained()[1:]]
        rate = options.lora_lr if options.size == "lora" else options.codes_lr
        groups: list[dict[str, Any]] = [{"params": factors, "lr": options.lr, "weight_decay": 0.0}]
        if rest:
            decay = options.weight_decay if options.size == "lora" else 0.0
            groups.append({"params": rest, "lr": rate, "weight_decay": decay})
        return groups

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by a name that stays."""
        found = {
            f"{name}.{kind}": parameter
            for name, layer in self.layers.items()
            for kind, parameter in layer.named_parameters(recurse=False)
        }
        return found | {name: gain.factor for name, gain in self.norms.items()}

    def state(self) -> dict[str, Tensor]:
        """A copy of what is trained."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    @torch.no_grad()
    def put(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        for name, parameter in self.parameters().items():
            parameter.copy_(state[name])

    def weights(self) -> Iterator[tuple[str, QuantizedWeight]]:
        """The linears as they would be stored."""
        for name, layer in self.layers.items():
            yield name, layer.quantized().to("cpu")

    def changed(self, reader: CheckpointReader) -> dict[str, Tensor]:
        """The norms as they would be stored, in the dtype they have in the folder."""
        return {
            name: gain.stored().to("cpu", reader.info(name).dtype)
            for name, gain in self.norms.items()
        }


def make_student(
    source: Source,
    options: QAT,
    device: torch.device,
    *,
    original: CheckpointReader | None,
    seed: int,
    checkpointing: bool,
) -> Student:
    """Load a quantized folder for training.

    Args:
        source: the folder.
        options: what is trained.
        device: that it is trained on.
        original: the unquantized model, where codes are trained.
        seed: draws adapters.
        checkpointing: run blocks under gradient checkpointing.

    Raises:
        what :func:`llmquant.load` raises.
        CheckpointError: the folder has no linear to train.
        QuantizationError: a linear's numbers cannot be trained from where they are.
    """
    model = load(source.reader.path, dtype=torch.float32, device=device, kernel="reference")
    make = _maker(options, original, seed)
    layers: dict[str, TrainedLinear] = {}
    for name in source.packed.schemes:
        before = model.get_submodule(name)
        if not isinstance(before, PackedLinear):
            continue  # packed embeddings stay as they are
        weight = source.weight(name).to(device)
        layers[name] = make(name, weight, before.bias, before.activations)
        if not torch.equal(layers[name].weight(), weight.dequantize()):
            raise QuantizationError(
                f"{source.reader.path}: training of {name} would not begin with its own weights; its scales are of a "
                f"size that --size {options.size} cannot train, so quantize the model anew"
            )
        put_module(model, name, layers[name])
    if not layers:
        raise CheckpointError(f"{source.reader.path} has no packed linear that could be trained")
    student = Student(model, layers)
    if _trains_norms(options, layers):
        for name, module in list(norms_of(model)):
            tensor = f"{name}.weight"
            if tensor in source.reader:
                student.norms[tensor] = train_norm(module, source.reader.info(tensor).dtype)
    if checkpointing:
        _checkpointed(model)
    return student


def wants_checkpointing(source: Source, options: QAT, device: torch.device) -> bool:
    """Whether what blocks keep for their gradients would take more than a quarter of the device's
    free memory."""
    config = read_config(source.reader.path).get_text_config()
    tokens = options.micro_batch * options.seqlen
    layers = int(getattr(config, "num_hidden_layers", 1))
    inside = 4 * tokens * int(getattr(config, "hidden_size", 1)) * _INSIDE_A_BLOCK * layers
    free = device_memory(device)
    return inside > (available_bytes() if free is None else free) // 4


def _maker(
    options: QAT, original: CheckpointReader | None, seed: int
) -> Callable[..., TrainedLinear]:
    """Makes a trained linear from its name and what it starts with."""

    def make(
        name: str, weight: QuantizedWeight, bias: Tensor | None, activations: Activations
    ) -> TrainedLinear:
        if options.size == "scales":
            return TrainedLinear(weight, bias, activations)
        first = None
        if original is not None and f"{name}.weight" in original:
            first = original.read(f"{name}.weight").to(weight.codes.device)
            first = first if tuple(first.shape) == weight.shape else None
        if options.size == "codes":
            return LatentLinear(weight, bias, activations, first)
        drawn = seed + sum(name.encode())
        return AdapterLinear(weight, bias, activations, first, rank=options.rank, seed=drawn)

    return make


def _trains_norms(options: QAT, layers: Mapping[str, TrainedLinear]) -> bool:
    if options.norms == "auto":
        return any(not layer.spec.symmetric for layer in layers.values())
    return options.norms == "on"


def _checkpointed(model: nn.Module) -> None:
    """Run the blocks of a model under gradient checkpointing: the elements of outermost lists with
    trained linears inside."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if any(isinstance(m, TrainedLinear) for m in block.modules()):
                    block.forward = partial(_again, block.forward)
        else:
            _checkpointed(module)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
