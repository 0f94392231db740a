"""``humming``: 2, 3, 4 and 8 bits on an NVIDIA GPU, bfloat16 and float16, by humming-kernels.

The package writes a kernel for each shape and range of row counts, compiles it when it is first
needed and keeps it on disk. Its products use tensor cores whatever the number of rows, so no weight
is dequantized for many rows.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from llmquant.kernels.base import Prepared
from llmquant.kernels.cpu import eager
from llmquant.kernels.gpu import humming_layout
from llmquant.kernels.gpu.device import Gpu
from llmquant.kernels.gpu.library import Library, LibraryKernel, group_of
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

# config.py and kernel/humming.py of humming: an MMA of 16-bit activations spans 256 / 16 columns,
# and groups are whole MMAs; tiles are powers of two, of 64 rows and 32 columns at least.
_ROWS, _COLUMNS, _LEAST_GROUP = 64, 32, 16
_LEAST_CAPABILITY = {torch.bfloat16: (8, 0), torch.float16: (7, 5)}
# int32 counters by which blocks of one product wait for each other, zero between products: as many
# as HummingLayer has.
_LOCKS = 2048


class Humming(LibraryKernel):
    """Buffers: those of :mod:`~llmquant.kernels.gpu.humming_layout`, and ``locks`` int32."""

    name = "humming"
    library = Library("humming-kernels", "0.1.19")

    def _why_not_shape(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        group = group_of(spec, shape[1])
        if shape[0] % _ROWS or shape[1] % _COLUMNS:
            return f"{list(shape)} is not a multiple of {_ROWS} rows and {_COLUMNS} columns"
        if group is not None and (group < _LEAST_GROUP or group & (group - 1)):
            return f"groups of {group} columns are not a power of two from {_LEAST_GROUP} on"
        return None

    def _why_not_gpu(self, gpu: Gpu, dtype: torch.dtype) -> str | None:
        if gpu.amd:
            return "it runs on NVIDIA GPUs, and this one is AMD's"
        least = _LEAST_CAPABILITY[dtype]
        if gpu.capability < least:
            return f"the GPU has {gpu}, and {dtype} needs {least[0]}.{least[1]}"
        return None

    def _why_not_here(
        self, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        from humming.tune import get_heuristics_config

        get_heuristics_config(_config(spec, shape, dtype, device), device=device)
        return None

    def _pack(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        return humming_layout.pack(weight, dtype)

    def _unpack(
        self, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> QuantizedWeight:
        return humming_layout.unpack(prepared, spec, shape)

    def _theirs(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        from humming import ops
        from humming.transform import transform_humming_tensors

        bits = weight.spec.bits
        tensors = {
            "weight": ops.pack_weight(weight.codes.to(torch.int32), bits),
            "weight_scale": weight.scales.to(dtype),
        }
        if not weight.spec.symmetric:
            columns = weight.zeros.T.contiguous().to(torch.int32)
            tensors["zero_point"] = ops.pack_weight(columns, bits).T.contiguous()
        config = _config(weight.spec, weight.shape, dtype, weight.codes.device)
        made = transform_humming_tensors(config, tensors)
        names = {"weight": "packed", "weight_scale": "scales", "zero_point": "zeros"}
        return {names[n]: t for n, t in made.items()}

    def _take(
        self, prepared: Prepared, ids: Tensor, spec: QuantSpec
    ) -> tuple[dict[str, Tensor], int, Tensor]:
        rows = humming_layout.ROWS
        tiles, which = torch.unique(ids // rows, return_inverse=True)
        taken = humming_layout.take(prepared, tiles, spec)
        return taken, len(tiles) * rows, which * rows + ids % rows

    def prepare(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
        locks = torch.zeros(_LOCKS, dtype=torch.int32, device=weight.codes.device)
        return self._pack(weight, dtype) | {"locks": locks}

    def _multiply(
        self, x: Tensor, prepared: Prepared, spec: QuantSpec, shape: tuple[int, int]
    ) -> Tensor:
        packed, scales, locks = (prepared[n] for n in ("packed", "scales", "locks"))
        assert packed is not None
        assert scales is not None
        assert locks is not None
        call = product if eager(x) else _OPERATOR
        group = group_of(spec, shape[1]) or 0
        y: Tensor = call(
            x, packed, scales, prepared.get("zeros"), locks, spec.bits, group, shape[0]
        )
        return y


def product(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, locks: Tensor,
    bits: int, group: int, out: int,
) -> Tensor:  # fmt: skip
    """``[M, in]`` → ``[M, out]`` by the package; ``group`` is 0 for whole rows."""
    from humming.forward import humming_forward

    spec = QuantSpec(bits, group or None, zeros is None)
    config = _config(spec, (out, x.shape[1]), x.dtype, x.device)
    y: Tensor = humming_forward(
        config, x, weight=packed, weight_scale=scales, zero_point=zeros, locks=locks
    )
    return y


def _operator() -> CustomOpDef:
    """The product as one node of ``torch.compile``. ``locks`` is zero before and after, so nothing
    that is seen is changed."""
    made = torch.library.custom_op("llmquant::humming_linear", product, mutates_args=())
    made.register_fake(lambda x, *rest: x.new_empty((x.shape[0], rest[-1])))
    return made


_OPERATOR = _operator()


@functools.cache
def _config(
    spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> object:
    """humming's ``LayerConfig``: what a kernel is written from."""
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    schema = HummingWeightSchema(
        b_dtype=f"uint{spec.bits}",
        weight_scale_group_size=group_of(spec, shape[1]) or 0,
        has_zero_point=not spec.symmetric,
    )
    return prepare_layer_config(*shape, weight_schema=schema, torch_dtype=dtype, device=device)
