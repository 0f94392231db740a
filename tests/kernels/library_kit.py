"""humming and gemlite on the CPU: modules with the names and layouts of what the kernels import, as
the packages' own sources say them, a thread or a column at a time."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquant.kernels.gpu import gemlite_layout, humming_layout
from llmquant.spec import QuantSpec

BF16 = torch.bfloat16
# transform_humming_weight_scale of humming's transform.py.
GROUP_ORDER = [x + i for i in range(8) for x in (0, 8, 16, 24, 32, 40, 48, 56)]
ROW_ORDER = [x + 2 * i for i in range(4) for x in (0, 1, 8, 9, 16, 17, 24, 25)]


def as_int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def repacked(codes: Tensor, bits: int, zeros: Tensor | None, preprocess: bool) -> Tensor:
    """``weight_repack_nk`` of include/humming/kernel/process.cuh with ``kNumBitsA = 16``: uint8
    ``[n, k]`` → int32 ``[k / 16, n * bits / 2]``.

    ``preprocess`` is ``kShouldPreprocessForINT2FP``, with ``zeros`` uint8 ``[n, groups]`` if any.
    """
    n, k = codes.shape
    codes_, points = codes.tolist(), None if zeros is None else zeros.tolist()
    width = k if zeros is None else k // zeros.shape[1]
    out = [[0] * (n * bits // 2) for _ in range(k // 16)]
    for block_n in range(n // 64):
        for block_k in range(-(-k // 64)):
            for thread in range(32):
                tmp = [0] * 128
                for i in range(8):
                    row = block_n * 64 + i * 8 + thread // 4
                    for j in range(8):
                        for e in range(2):
                            column = block_k * 64 + j * 8 + thread % 4 * 2 + e
                            value = codes_[row][column] if column < k else 0
                            if preprocess and column < k:
                                zero = (
                                    1 << bits - 1
                                    if points is None
                                    else points[row][column // width]
                                )
                                top = (1 << bits) - 1
                                value = value - zero if value >= zero else top - value
                            i3 = i * 8 % 64 // 16
                            place = ((((j // 2) * 4 + i3) * 2 + i % 2) * 2 + j % 2) * 2 + e
                            tmp[place] = value
                for i, words in enumerate(packed_words(tmp, bits)):
                    if block_k * 64 + i * 16 >= k:
                        continue
                    for word, value in enumerate(words):
                        column = 16 * 64 * block_n * bits // 32 + thread * bits + word
                        out[block_k * 4 + i][column] = as_int32(value)
    return torch.tensor(out, dtype=torch.int32)  # fmt: skip


def packed_words(values: list[int], bits: int) -> list[list[int]]:
    """``humming_pack_weight``: 128 values → four times ``bits`` words."""
    room = {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    each, group = 32 // room, 32 // room // 2
    made = []
    for i in range(4):
        words = []
        for j in range(room):
            start = i * 32 + j * each
            places = [k % group * 2 + k // group for k in range(each)]
            words.append(sum(values[start + places[k]] << k * room for k in range(each)))
        if bits == 3:
            a, b, c, d = words
            words = [
                a & 0x77777777 | (b & 0x44444444) << 1,
                b & 0x33333333 | (c & 0x66666666) << 1,
                c & 0x11111111 | (d & 0x77777777) << 1,
            ]
        made.append(words)
    return made


def in_order(values: Tensor, order: list[int]) -> Tensor:
    """``[n, G]`` → ``[G, n]``, each run of ``len(order)`` rows reordered."""
    turned = values.T.contiguous()
    return turned.view(-1, len(order))[:, torch.tensor(order)].contiguous().view(turned.shape)


def zero_points(zeros: Tensor, bits: int) -> Tensor:
    """``transform_humming_zero_point``, from uint8 ``[n, G]``."""
    ordered = in_order(zeros.to(torch.int32), GROUP_ORDER).to(torch.uint8)
    if bits <= 4:
        ordered = ordered[..., 1::2] * 16 + ordered[..., ::2]
    return ordered.contiguous().view(torch.int32)


def stream(values: Tensor, bits: int) -> Tensor:
    """``pack_weight``: int32 ``[…, 32*i]`` → ``[…, bits*i]``, a stream of bits."""
    flat = [sum(v << bits * i for i, v in enumerate(row)) for row in values.view(-1, 32).tolist()]
    words = [[as_int32(row >> 32 * w & 0xFFFFFFFF) for w in range(bits)] for row in flat]
    return torch.tensor(words, dtype=torch.int32).view(*values.shape[:-1], -1)


def unstream(words: Tensor, bits: int) -> Tensor:
    flat = [
        sum((w & 0xFFFFFFFF) << 32 * i for i, w in enumerate(row))
        for row in words.reshape(-1, bits).tolist()
    ]
    values = [[row >> bits * i & (1 << bits) - 1 for i in range(32)] for row in flat]
    return torch.tensor(values, dtype=torch.uint8).view(*words.shape[:-1], -1)


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def pretend_humming(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """humming on the CPU; ``faults`` replace ``transform_humming_tensors``, ``humming_forward`` or
    ``get_heuristics_config``."""

    def schema(*, b_dtype: str, weight_scale_group_size: int, has_zero_point: bool) -> Any:
        return SimpleNamespace(
            bits=int(b_dtype.removeprefix("uint")),
            group=weight_scale_group_size,
            zeros=has_zero_point,
        )

    def config(n: int, k: int, *, weight_schema: Any, torch_dtype: torch.dtype, device: Any) -> Any:
        return SimpleNamespace(n=n, k=k, dtype=torch_dtype, **vars(weight_schema))

    def transform(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        codes, scales = unstream(tensors["weight"], config.bits), tensors["weight_scale"]
        assert codes.shape == (config.n, config.k)
        assert scales.dtype is config.dtype
        zeros = None
        if config.zeros:
            zeros = unstream(tensors["zero_point"].T.contiguous(), config.bits).T.contiguous()
        preprocess = config.dtype is BF16 and config.bits > (6 if config.zeros else 7)
        made = {
            "weight": repacked(codes, config.bits, zeros, preprocess),
            "weight_scale": in_order(scales, GROUP_ORDER if config.group else ROW_ORDER),
        }
        return made | ({} if zeros is None else {"zero_point": zero_points(zeros, config.bits)})

    def forward(config: Any, x: Tensor, **tensors: Any) -> Tensor:
        assert x.shape[1] == config.k
        assert not tensors["locks"].any()
        spec = QuantSpec(config.bits, config.group or None, not config.zeros)
        prepared = {"packed": tensors["weight"], "scales": tensors["weight_scale"],
                    "zeros": tensors["zero_point"]}  # fmt: skip
        weight = humming_layout.unpack(prepared, spec, (config.n, config.k))
        return (x.float() @ weight.dequantize().T).to(x.dtype)

    ops = module(monkeypatch, "humming.ops", pack_weight=stream)
    module(monkeypatch, "humming", ops=ops)
    module(monkeypatch, "humming.schema", HummingWeightSchema=schema)
    module(
        monkeypatch, "humming.transform", prepare_layer_config=config,
        transform_humming_tensors=faults.get("transform_humming_tensors", transform),
    )  # fmt: skip
    module(monkeypatch, "humming.forward", humming_forward=faults.get("humming_forward", forward))
    asked = faults.get("get_heuristics_config", lambda config, device: [])
    module(monkeypatch, "humming.tune", get_heuristics_config=asked)


class GemLiteLinear:
    """``GemLiteLinear`` of gemlite's core.py: what ``pack`` does with ``fma_mode=False``."""

    def __init__(self, bits: int, group: int, in_: int, out: int, dtype: int, _: int) -> None:
        self.bits, self.group, self.in_, self.out, self.dtype = bits, group, in_, out, dtype

    def pack(self, codes: Tensor, scales: Tensor, zeros: Any, *, fma_mode: bool) -> None:
        assert not fma_mode
        per = 32 // self.bits
        words = torch.zeros(self.out, self.in_ // per, dtype=torch.int32)
        for j in range(self.in_):
            words[:, j // per] |= codes[:, j].to(torch.int32) << j % per * self.bits
        self.packed, self.per = words.t().contiguous(), per
        self.scales = scales.view(self.out, -1).t().contiguous()
        self.row = self.scales.numel() == self.out
        tensor = isinstance(zeros, Tensor)
        self.zeros = zeros.view(self.out, -1).t().contiguous() if tensor else torch.tensor(zeros, dtype=torch.int32)  # fmt: skip

    def get_tensor_args(self) -> list[Tensor]:
        return [self.packed, self.scales, self.zeros, torch.tensor(0.0)]

    def get_meta_args(self) -> list[int]:
        return [
            0, self.bits, self.group, 2**self.bits - 1, self.per, self.dtype, self.dtype, 0,
            self.dtype, 1 if self.row else 0, 1 if self.row else 3, 1,
        ]  # fmt: skip


def pretend_gemlite(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """gemlite on the CPU; ``faults`` replace ``GemLiteLinear`` or ``forward_functional``."""

    def forward(x: Tensor, bias: None, tensors: list[Tensor], meta: list[int]) -> Tensor:
        packed, scales, zeros = tensors
        shape = (packed.shape[1], x.shape[1])
        spec = QuantSpec(meta[1], meta[2], zeros.ndim == 0)
        prepared = {"packed": packed, "scales": scales, "zeros": zeros}
        weight = gemlite_layout.unpack(prepared, spec, shape)
        return (x.float() @ weight.dequantize().T).to(x.dtype)

    module(
        monkeypatch, "gemlite", GemLiteLinear=faults.get("GemLiteLinear", GemLiteLinear),
        forward_functional=faults.get("forward_functional", forward),
    )  # fmt: skip
    numbers = {torch.float32: 0, torch.float16: 1, BF16: 2}
    module(monkeypatch, "gemlite.dtypes", TORCH_TO_DTYPE=numbers)
