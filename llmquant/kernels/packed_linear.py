"""PackedLinear: an ``nn.Linear`` whose weight is whatever buffers a kernel wants. Moves like a
module, is never cast.

The buffers are numbers, not approximations of numbers: ``.half()`` on a bf16 scale would change the
model. So a cast of the module changes only the activation dtype and the bias, and only where the
kernel's buffers serve any dtype (``reference``); a kernel prepared for one dtype or device refuses
and says how to load for the other.

Where the config says that engines quantize a linear's inputs (W8A8), so does this module, in plain
arithmetic: per token, to the same integers as an int8 engine. It is not faster for that; it is what
makes an evaluation here one of the served model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llmquant.activations import Activations, int8_per_token
from llmquant.errors import UsageError
from llmquant.kernels import AUTO, choose
from llmquant.kernels.undecoded import UndecodedWeight
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, without_trivial_order


class PackedLinear(nn.Module):
    """``y = x @ dequantize(weight).T + bias`` over packed buffers.

    Args:
        weight: the quantized matrix ``[out, in]``.
        bias: ``[out]`` or None; cast to ``dtype``.
        dtype: of the activations.
        device: where the buffers go.
        kernel: ``auto`` or a kernel's name.
        activations: ``int8-dynamic`` rounds the input as a W8A8 engine does.

    Attributes:
        refusals: kernels that were asked first, and why each declined.

    Raises:
        UsageError: the named kernel does not exist or refuses.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        kernel: str = AUTO,
        activations: Activations = "none",
    ) -> None:
        super().__init__()
        weight = without_trivial_order(weight.to(device))
        self.spec: QuantSpec = weight.spec
        self.shape = weight.shape
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.activations = activations
        self.ordered = weight.g_idx is not None
        self.kernel, self.refusals = choose(
            self.spec, self.shape, weight.codes.device, dtype, self.ordered, kernel, weight
        )
        if activations != "none" and self.kernel.rounds_inputs:
            raise UsageError(
                f"this layer's inputs are int8 per token already ({activations}); kernel {self.kernel.name} would round them "
                f"a second time, with other scales; use --kernel auto"
            )
        for name, tensor in self.kernel.prepare(weight, dtype).items():
            self.register_buffer(name, tensor)
        self.bias = (
            None if bias is None else nn.Parameter(bias.to(device, dtype), requires_grad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` → ``[..., out]``."""
        if self.activations != "none":
            x = int8_per_token(x)
        y = self.kernel.linear(x, self._buffers, self.spec, self.shape)
        return y if self.bias is None else y + self.bias

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight ``[out, in]``, rounded once from float32."""
        return self.kernel.weight(self._buffers, self.spec, self.shape, dtype)

    @property
    def weight(self) -> Tensor:
        """``[out, in]`` in the dtype of the activations, decoded once a number of it is used: for
        models whose own code asks for it (the heads of Mamba and xLSTM)."""
        decode = partial(self.dequantize, self.dtype)
        return UndecodedWeight(self.shape, self.dtype, self._device, decode)

    @property
    def _device(self) -> torch.device:
        return next(b.device for b in self._buffers.values() if b is not None)

    def rows(self, ids: Tensor) -> Tensor:
        """int64 ``[n]`` → ``[n, in]``: rows of the weight in the dtype of the activations."""
        return self.kernel.rows(self._buffers, ids, self.spec, self.shape).to(self.dtype)

    def packed_bytes(self) -> int:
        """Bytes that the weight occupies in memory, without the bias."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move the buffers, never cast them.

        Raises:
            UsageError: the kernel's buffers do not serve the new dtype or device.
        """
        held, here = dict(self._buffers), self._device
        probe = fn(torch.empty(0, dtype=self.dtype, device=here))
        if (probe.dtype, probe.device) != (self.dtype, here):
            self._check_move(probe.dtype, probe.device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = probe.dtype
        for name, before in held.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _check_move(self, dtype: torch.dtype, device: torch.device) -> None:
        reason = self.kernel.why_not(self.spec, self.shape, device, dtype, self.ordered)
        if reason is None and dtype != self.dtype and not self.kernel.any_dtype:
            reason = "its buffers hold numbers rounded to the dtype it was loaded for"
        if reason is not None:
            raise UsageError(
                f"a packed linear with kernel {self.kernel.name} cannot become {dtype} on {device}: {reason}; "
                f"load the model with that dtype and device instead"
            )

    def extra_repr(self) -> str:
        bits = 8 * self.packed_bytes() / (self.in_features * self.out_features)
        inputs = "" if self.activations == "none" else f", activations={self.activations}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.spec}{inputs}, kernel={self.kernel.name}, {bits:.3f} bits per weight in memory"
        )


@dataclass(frozen=True, slots=True)
class Description:
    """What a loaded model holds.

    Attributes:
        kernels: number of packed linears per kernel.
        refusals: number of packed linears per "kernel: reason" that was declined on the way.
        packed_weights: elements of all packed matrices.
        packed_bytes: what they occupy in memory.
        other_bytes: every other distinct parameter and buffer.
    """

    kernels: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    packed_weights: int = 0
    packed_bytes: int = 0
    other_bytes: int = 0

    @property
    def packed_bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / self.packed_weights if self.packed_weights else 0.0


def describe(model: nn.Module) -> Description:
    """Count kernels and bytes of a model; tied tensors count once."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    inside = {id(b) for m in packed for b in m.buffers(recurse=False)}
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside}
    return Description(
        kernels=dict(Counter(m.kernel.name for m in packed)),
        refusals=dict(
            Counter(f"{k}: {reason}" for m in packed for k, reason in m.refusals.items())
        ),
        packed_weights=sum(m.in_features * m.out_features for m in packed),
        packed_bytes=sum(m.packed_bytes() for m in packed),
        other_bytes=sum(t.numel() * t.element_size() for t in others.values()),
    )


__all__ = ["Description", "PackedLinear", "describe", "int8_per_token"]
