"""LibraryKernel: a kernel whose product is another package's, imported when it is first asked for.

The package is trusted after a proof. On the GPU at hand a small weight of the same kind is packed
by the package and by us, which must give the same bytes, and multiplied, which must be right within
a few roundings. What fails, or cannot be imported or compiled, is a reason against the kernel and
not an error: the next one is asked.
"""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels.base import Prepared
from llmquant.kernels.gpu import device as gpu_device
from llmquant.kernels.gpu.device import Gpu
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight, portable

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Dtypes of activations, with their unit roundoff."""

# What a package may raise where it is broken, does not know the GPU or finds no compiler.
_BROKEN = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError, subprocess.SubprocessError,
)  # fmt: skip
# Weight, result, and partial sums that are added in the dtype of the result.
_ROUNDINGS = 8
_PROBE = (128, 256)


@dataclass(frozen=True, slots=True)
class Library:
    """A package of the extra ``gpu``.

    Attributes:
        package: what is installed.
        read: the version whose sources were read.
    """

    package: str
    read: str

    def why_missing(self) -> str | None:
        """Why it cannot be asked, or None. Imports nothing."""
        try:
            importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.package} is not installed: pip install 'llmquant[gpu]'"
        return None

    def __str__(self) -> str:
        return f"{self.package} {importlib.metadata.version(self.package)}"


class LibraryKernel(ABC):
    """``packed``, ``scales``, ``zeros`` in the package's layout, for one dtype of activations."""

    name: str
    library: Library
    any_dtype = False
    rounds_inputs = False

    @abstractmethod
    def _why_not_shape(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """Limits of width, group and shape."""

    @abstractmethod
    def _why_not_gpu(self, gpu: Gpu, dtype: torch.dtype) -> str | None:
        """Limits of the GPU."""

    @abstractmethod
    def _pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The package's layout, by our own function."""

    @abstractmethod
    def _unpack(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> QuantizedWeight:
        """The inverse of :meth:`_pack`."""

    @abstractmethod
    def _theirs(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        """The package's layout, by the package."""

    @abstractmethod
    def _take(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec
    ) -> tuple[dict[str, Tensor], int, Tensor]:
        """Buffers with the rows ``ids`` in them, how many rows they have, and which of them
        those are."""

    @abstractmethod
    def _multiply(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """``[M, in]`` → ``[M, out]``, M at least 1."""

    def _why_not_here(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What the package itself says against a shape on this GPU; may raise."""
        return None

    def why_not(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        g_idx: bool = False,
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on a GPU, not on {device}"
        if dtype not in DTYPES:
            return f"it takes bfloat16 and float16 activations, not {dtype}"
        if g_idx:
            return "it takes no columns in an order of their own (g_idx)"
        if reason := self._why_not_shape(spec, shape):
            return reason
        gpu = gpu_device.find(device)
        if gpu is None:
            return "torch finds no GPU"
        if reason := self._why_not_gpu(gpu, dtype) or self.library.why_missing():
            return reason
        kind = QuantSpec(spec.bits, group_of(spec, shape[1]), spec.symmetric)
        return prove(self, kind, dtype, device) or self._asked(kind, shape, device, dtype)

    def why_not_weight(self, weight: QuantizedWeight, dtype: torch.dtype) -> str | None:
        if torch.equal(weight.scales.to(dtype).to(torch.float32), weight.scales):
            return None
        return f"a scale is not exact in {dtype}"

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        return self._pack(weight, dtype)

    def linear(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        """The product; differentiable in x.

        Raises:
            UsageError: activations of another dtype than the one prepared for.
        """
        scales = prepared["scales"]
        assert scales is not None
        if x.dtype is not scales.dtype:
            raise UsageError(
                f"kernel {self.name} was loaded for {scales.dtype} activations but got {x.dtype}; load with that dtype"
            )
        if x.requires_grad and torch.is_grad_enabled():
            return torch.nn.functional.linear(x, self.weight(prepared, spec, shape, x.dtype))
        rows = x.reshape(-1, shape[1]).contiguous()
        y = (
            self._multiply(rows, prepared, spec, shape)
            if rows.shape[0]
            else rows.new_empty(0, shape[0])
        )
        return y.view(*x.shape[:-1], shape[0])

    def weight(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        return self._unpack(prepared, spec, shape).dequantize(dtype)

    def rows(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        if not len(ids):
            return torch.empty(0, shape[1], device=ids.device)
        taken, count, which = self._take(prepared, ids, spec)
        return self.weight(taken, spec, (count, shape[1]), torch.float32)[which]

    def _asked(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        try:
            return self._why_not_here(spec, shape, device, dtype)
        except torch.OutOfMemoryError:
            raise
        except _BROKEN as e:
            return f"{self.library} refuses {list(shape)}: {_said(e)}"


def group_of(spec: QuantSpec, in_features: int) -> int | None:
    """Columns of a group, None for whole rows however the spec says it."""
    width = spec.width(in_features)
    return None if width == in_features else width


@functools.cache
def prove(
    kernel: LibraryKernel, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the package cannot be trusted with such weights on this GPU, or None; asked once."""
    try:
        return _disproof(kernel, spec, dtype, device)
    except torch.OutOfMemoryError:
        raise
    except _BROKEN as e:
        return f"{kernel.library} does not run here: {_said(e)}"


def _disproof(
    kernel: LibraryKernel, spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> str | None:
    out_features, in_features = _PROBE[0], max(_PROBE[1], 2 * (spec.group_size or 0))
    weight = _probe((out_features, in_features), spec).to(device)
    ours, theirs = kernel.prepare(weight, dtype), kernel._theirs(weight, dtype)
    for name, expected in theirs.items():
        found = ours[name]
        if found.dtype != expected.dtype or not torch.equal(found, expected):
            return f"{kernel.library} lays out {name} in another way than the {kernel.library.read} that was read"
    exact = weight.dequantize(torch.float64)
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 5, 80):
        x = torch.randn(rows, in_features, generator=generator, device="cpu").to(device, dtype)
        with torch.no_grad():
            y = kernel.linear(x, ours, spec, weight.shape).to(torch.float64)
        bound = _ROUNDINGS * DTYPES[dtype] * (x.to(torch.float64).abs() @ exact.abs().T)
        if not bool(((y - x.to(torch.float64) @ exact.T).abs() <= bound).all()):
            return f"{kernel.library} multiplies {rows} rows wrongly on this GPU"
    return None


def _probe(shape: tuple[int, int], spec: QuantSpec) -> QuantizedWeight:
    """Drawn codes, zero-points and scales."""
    generator = torch.Generator().manual_seed(0)
    groups = (shape[0], spec.groups(shape[1]))
    zeros = torch.randint(0, spec.levels, groups, generator=generator, device="cpu").to(torch.uint8)
    return QuantizedWeight(
        torch.randint(0, spec.levels, shape, generator=generator, device="cpu").to(torch.uint8),
        portable(torch.rand(groups, generator=generator, device="cpu") * 0.01 + 0.001),
        torch.full_like(zeros, spec.middle) if spec.symmetric else zeros,
        spec,
    )


def _said(error: BaseException) -> str:
    """The first line of an error, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
