"""Kernels of other packages, the packages on the CPU: the numbers, and what torch.compile sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from library_kit import pretend_gemlite, pretend_humming
from packing import pack_folder, random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import llmquant
from llmquant.errors import UsageError
from llmquant.kernels import KERNELS, native
from llmquant.kernels.gpu.gemlite import Gemlite
from llmquant.kernels.gpu.humming import Humming
from llmquant.kernels.gpu.library import LibraryKernel
from llmquant.spec import QuantSpec

BF16, FP16 = torch.bfloat16, torch.float16
PRETEND: dict[str, tuple[LibraryKernel, Callable[..., None]]] = {
    "humming": (Humming(), pretend_humming),
    "gemlite": (Gemlite(), pretend_gemlite),
}
either = pytest.mark.parametrize("name", ["humming", "gemlite"])


@either
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, None], ids=["g32", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_rows_and_product(
    name: str, bits: int, group: int | None, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, pretend = PRETEND[name]
    pretend(monkeypatch)
    weight = random_weight(192, 96, QuantSpec(bits, group, symmetric))
    spec, shape = weight.spec, weight.shape
    prepared = kernel.prepare(weight, BF16)
    for dtype in (torch.float32, BF16, FP16):
        assert torch.equal(kernel.weight(prepared, spec, shape, dtype), weight.dequantize(dtype))
    ids = torch.tensor([191, 0, 63, 64, 0])
    assert torch.equal(kernel.rows(prepared, ids, spec, shape), weight.dequantize()[ids])
    assert kernel.rows(prepared, ids[:0], spec, shape).shape == (0, 96)
    for lead in ((), (1,), (2, 3), (0,)):
        x = torch.randn(*lead, 96).to(BF16)
        expected = (x.float() @ weight.dequantize().T).to(BF16)
        assert torch.equal(kernel.linear(x, prepared, spec, shape), expected)
    x = torch.randn(2, 96, dtype=BF16, requires_grad=True)
    y = kernel.linear(x, prepared, spec, shape)
    assert torch.equal(y, torch.nn.functional.linear(x, weight.dequantize(BF16)))
    assert y.requires_grad


@either
def test_activations_of_another_dtype_are_refused(name: str) -> None:
    kernel, _ = PRETEND[name]
    weight = random_weight(64, 64, QuantSpec(4, 32))
    with pytest.raises(UsageError, match=f"kernel {name} was loaded for torch.bfloat16"):
        kernel.linear(torch.ones(1, 64).half(), kernel.prepare(weight, BF16), weight.spec, (64, 64))


@either
def test_scales_must_be_exact_in_the_dtype(name: str) -> None:
    kernel, _ = PRETEND[name]
    weight = random_weight(64, 64, QuantSpec(4, 32), scale_dtype=FP16)
    assert kernel.why_not_weight(weight, FP16) is None
    assert kernel.why_not_weight(weight, BF16) == "a scale is not exact in torch.bfloat16"


def on_a_gpu(tensor: Tensor) -> Tensor:
    """A tensor of that shape and dtype, inside a FakeTensorMode."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_hummings_operator_has_a_shape_without_being_run(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_humming(monkeypatch)
    weight = random_weight(128, 64, QuantSpec(4, 32, symmetric))
    made = Humming().prepare(weight, BF16)
    buffers = [made.get(n) for n in ("packed", "scales", "zeros", "locks")]
    operator = torch.ops.llmquant.humming_linear.default
    x = torch.randn(3, 64).to(BF16)
    done = torch.library.opcheck(operator, (x, *buffers, 4, 32, 128))
    assert set(done.values()) == {"SUCCESS"}
    with FakeTensorMode():
        moved = [None if b is None else on_a_gpu(b) for b in buffers]
        y = operator(on_a_gpu(x), *moved, 4, 32, 128)
    assert (y.shape, y.dtype, y.device.type) == ((3, 128), BF16, "cuda")


def test_torchs_int4_operator_has_a_shape_without_being_run() -> None:
    weight = random_weight(24, 128, QuantSpec(4, 32, False))
    kernel = KERNELS["cuda_int4"]
    prepared = kernel.prepare(weight, BF16)
    with FakeTensorMode():
        moved = {n: on_a_gpu(b) for n, b in prepared.items()}
        x = torch.empty(2, 3, 128, dtype=BF16, device="cuda")
        y = kernel.linear(x, moved, weight.spec, weight.shape)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 24), BF16, "cuda")


def test_a_compiled_call_of_humming_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_humming(monkeypatch)
    weight = random_weight(128, 64, QuantSpec(4, 32))
    prepared = Humming().prepare(weight, BF16)

    def call(x: Tensor) -> Tensor:
        return Humming().linear(x, prepared, weight.spec, weight.shape)

    x = torch.randn(2, 3, 64).to(BF16)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), call(x))


def test_the_operator_of_16_bit_heads_has_a_shape_without_being_run() -> None:
    words = native.half_tiles(torch.randn(20, 64), BF16)
    operator = torch.ops.llmquant.half_linear.default
    done = torch.library.opcheck(operator, (torch.randn(2, 3, 64), words, 20, 64))
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_packed_model_compiles_as_one_graph(model: Path, tmp_path: Path, kernel: str) -> None:
    pack_folder(model, tmp_path / "packed", QuantSpec(4, 32, False))
    packed = llmquant.load(tmp_path / "packed", dtype="float32", kernel=kernel)
    ids = torch.arange(5, 21).unsqueeze(0)

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = packed(ids, use_cache=False).logits
        return found

    compiled = torch.compile(logits, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), logits(ids), rtol=1e-4, atol=1e-4)
