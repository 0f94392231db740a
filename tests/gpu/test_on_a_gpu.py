"""On an NVIDIA GPU with the extra ``gpu`` (``make gpu``): what is claimed of kernels without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gpu_checks import check_kernel
from packing import pack_folder, random_weight

import llmquant
from llmquant.kernels import KERNELS, choose
from llmquant.kernels.int4.cuda import GEMM_ROWS
from llmquant.spec import QuantSpec

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16
# That of the proof: each shape costs seconds of compiling, and the whole may take three minutes.
SHAPE = (128, 256)
# Every width, groups and whole rows, zero-points and none, both dtypes.
KINDS = [
    ("humming", QuantSpec(4, 32, False), BF16), ("humming", QuantSpec(8, 32, False), BF16),
    ("humming", QuantSpec(3, None), BF16), ("humming", QuantSpec(4, 128), FP16),
    ("humming", QuantSpec(8, None), BF16), ("humming", QuantSpec(2, 32, False), FP16),
    ("gemlite", QuantSpec(4, 32, False), BF16), ("gemlite", QuantSpec(8, None), FP16),
    ("gemlite", QuantSpec(2, 64), BF16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spec", "dtype"), KINDS, ids=str)
def test_kernels_of_packages(name: str, spec: QuantSpec, dtype: torch.dtype) -> None:
    check_kernel(KERNELS[name], spec, SHAPE, dtype, GPU)


def test_a_shape_that_humming_cannot_take_is_a_reason_and_no_failure() -> None:
    """Its package asserts, on an H100 for this one."""
    kernel, refused = choose(QuantSpec(4, 32, False), (192, 384), GPU, BF16)
    assert kernel.name != "humming"
    assert "refuses [192, 384]" in refused["humming"]


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 128, None], ids=["g32", "g128", "row"])
def test_torchs_operator(group: int | None, symmetric: bool) -> None:
    counts = (1, 2, 5, 16, 17, 63, 64, GEMM_ROWS - 1, GEMM_ROWS)
    check_kernel(
        KERNELS["cuda_int4"], QuantSpec(4, group, symmetric), (200, 512), BF16, GPU, counts
    )


def test_humming_is_what_auto_takes() -> None:
    kernel, refused = choose(QuantSpec(4, 128), (4096, 4096), GPU, BF16)
    assert kernel.name == "humming", refused


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed Llama whose shapes every kernel takes."""
    made = make_model(hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    path = tmp_path_factory.mktemp("packed") / "model"
    pack_folder(made, path, QuantSpec(4, 32, False))
    return path


@pytest.mark.parametrize("name", ["auto", "cuda_int4", "reference", "gemlite"])
def test_a_model_gives_what_the_cpu_gives(name: str, folder: Path) -> None:
    """Eager, and compiled as one graph."""
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.no_grad():
        expected = llmquant.load(folder, dtype="float32")(ids).logits
        packed = llmquant.load(folder, dtype="bfloat16", device=GPU, kernel=name)
        found = packed(ids.to(GPU), use_cache=False).logits.float().cpu()
        assert (found - expected).norm() <= 0.05 * expected.norm()
        compiled = torch.compile(
            lambda i: packed(i, use_cache=False).logits, backend="aot_eager", fullgraph=True
        )
        assert (compiled(ids.to(GPU)).float().cpu() - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["humming", "gemlite", "cuda_int4"])
def test_a_product_is_captured_in_a_graph(name: str) -> None:
    """Nothing in it waits for the device or asks it something."""
    spec, shape, kernel = QuantSpec(4, 32, False), SHAPE, KERNELS[name]
    weight = random_weight(*shape, spec).to(GPU)
    prepared = kernel.prepare(weight, BF16)
    x = torch.randn(5, shape[1], device=GPU, dtype=BF16)
    expected = kernel.linear(x, prepared, spec, shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.linear(x, prepared, spec, shape)
    graph.replay()
    torch.cuda.synchronize()
    assert (y - expected).norm() <= 0.01 * expected.norm()
