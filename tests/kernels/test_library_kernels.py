"""Kernels of other packages, the packages on the CPU: what is asked of the machine and in which
order, what is trusted, and the numbers."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from library_kit import pretend_gemlite, pretend_humming
from packing import random_weight, shuffled_groups
from torch import Tensor

from llmquant.errors import UsageError
from llmquant.kernels import KERNELS, choose
from llmquant.kernels.gpu import device as gpu_device
from llmquant.kernels.gpu import humming_layout, library
from llmquant.kernels.gpu.device import Gpu
from llmquant.kernels.gpu.gemlite import Gemlite
from llmquant.kernels.gpu.humming import Humming
from llmquant.kernels.gpu.library import Library, LibraryKernel, prove
from llmquant.kernels.int4 import cuda_layout
from llmquant.spec import QuantSpec

BF16, FP16 = torch.bfloat16, torch.float16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H100 = Gpu(False, (9, 0))
PRETEND: dict[str, tuple[LibraryKernel, Callable[..., None]]] = {
    "humming": (Humming(), pretend_humming),
    "gemlite": (Gemlite(), pretend_gemlite),
}
either = pytest.mark.parametrize("name", ["humming", "gemlite"])


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test proves anew, and the packages say a version."""
    prove.cache_clear()
    monkeypatch.setattr(Library, "__str__", lambda self: f"{self.package} 1.2")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine: its GPU, what is missing and what is found wanting."""

    def make(
        gpu: Gpu | None = H100, missing: tuple[str, ...] = (), wrong: tuple[str, ...] = (),
        int4: bool = True,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(gpu_device, "find", lambda _: gpu)
        monkeypatch.setattr(cuda_layout, "agrees", lambda _: int4)
        monkeypatch.setattr(
            Library, "why_missing", lambda self: "missing" if self.package in missing else None
        )
        monkeypatch.setattr(library, "prove", lambda k, *_: "wrong" if k.name in wrong else None)
        monkeypatch.setattr(LibraryKernel, "_asked", lambda *_: None)

    return make


@pytest.mark.parametrize(
    ("bits", "dtype", "machine", "taken", "refused"),
    [
        (4, BF16, {}, "humming", {}),
        (3, FP16, {}, "humming", {}),
        (4, BF16, {"missing": ("humming-kernels",)}, "gemlite", {"humming": "missing"}),
        (4, BF16, {"wrong": ("humming",)}, "gemlite", {"humming": "wrong"}),
        (4, BF16, {"gpu": Gpu(True, (9, 4))}, "gemlite", {"humming": "it runs on NVIDIA GPUs, and this one is AMD's"}),
        (4, BF16, {"missing": ("humming-kernels", "gemlite")}, "cuda_int4", {"humming": "missing", "gemlite": "missing"}),
        (4, FP16, {"gpu": Gpu(False, (7, 5))}, "humming", {}),
        (4, BF16, {"gpu": Gpu(False, (7, 5))}, "reference", {
            "humming": "the GPU has compute capability 7.5, and torch.bfloat16 needs 8.0",
            "gemlite": "the GPU has compute capability 7.5, and Triton needs 8.0",
            "cuda_int4": "the GPU has compute capability 7.5, and it needs 8.0",
        }),
        (3, BF16, {"wrong": ("humming",)}, "reference", {
            "humming": "wrong", "gemlite": "it takes 2, 4 and 8 bits, not 3", "cuda_int4": "it takes 4 bits, not 3",
        }),
        (4, BF16, {"gpu": None}, "reference", dict.fromkeys(("humming", "gemlite", "cuda_int4"), "torch finds no GPU")),
    ],
    ids=[
        "H100", "3 bits fp16", "no humming", "humming is wrong", "AMD", "neither package", "T4 fp16", "T4 bf16",
        "3 bits without humming", "no GPU",
    ],
)  # fmt: skip
def test_the_first_kernel_without_an_objection_is_taken(
    bits: int, dtype: torch.dtype, machine: dict[str, Any], taken: str, refused: dict[str, str],
    here: Callable[..., None],
) -> None:  # fmt: skip
    here(**machine)
    kernel, objections = choose(QuantSpec(bits, 128), (256, 256), CUDA, dtype)
    assert kernel.name == taken
    assert list(objections) == list(KERNELS)[: list(KERNELS).index(taken)]
    assert {n: why for n, why in objections.items() if n not in ("cpu", "cpu_int4")} == refused


@pytest.mark.parametrize(
    ("name", "spec", "shape", "device", "dtype", "g_idx", "reason"),
    [
        ("humming", QuantSpec(4, 128), (256, 256), CPU, BF16, False, "it runs on a GPU, not on cpu"),
        ("gemlite", QuantSpec(4, 128), (256, 256), CPU, BF16, False, "it runs on a GPU, not on cpu"),
        ("humming", QuantSpec(4, 128), (256, 256), CUDA, torch.float32, False, "float16 activations, not torch.float32"),
        ("humming", QuantSpec(4, 128), (256, 256), CUDA, BF16, True, "g_idx"),
        ("gemlite", QuantSpec(4, 128), (256, 256), CUDA, BF16, True, "g_idx"),
        ("humming", QuantSpec(4, 32), (96, 256), CUDA, BF16, False, "[96, 256] is not a multiple of 64 rows and 32 columns"),
        ("humming", QuantSpec(4, 16), (64, 48), CUDA, BF16, False, "[64, 48] is not a multiple of 64 rows and 32 columns"),
        ("humming", QuantSpec(4, 8), (64, 64), CUDA, BF16, False, "groups of 8 columns are not a power of two from 16 on"),
        ("humming", QuantSpec(4, 96), (64, 192), CUDA, BF16, False, "groups of 96 columns"),
        ("humming", QuantSpec(4, 96), (64, 96), CUDA, BF16, False, None),
        ("gemlite", QuantSpec(4, 16), (64, 64), CUDA, BF16, False, "groups of 16 columns are not a power of two from 32 on"),
        ("gemlite", QuantSpec(4, 32), (48, 64), CUDA, BF16, False, "[48, 64] is not a multiple of 32 in both"),
        ("gemlite", QuantSpec(4, 96), (64, 96), CUDA, BF16, False, None),
    ],
    ids=str,
)  # fmt: skip
def test_limits_are_said(
    name: str, spec: QuantSpec, shape: tuple[int, int], device: torch.device, dtype: torch.dtype,
    g_idx: bool, reason: str | None, here: Callable[..., None],
) -> None:  # fmt: skip
    here()
    found = KERNELS[name].why_not(spec, shape, device, dtype, g_idx)
    assert found is None if reason is None else reason in (found or "")


@either
def test_the_extra_begins_at_the_version_that_was_read(name: str) -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    wanted = tomllib.loads(text)["project"]["optional-dependencies"]["gpu"]
    read = PRETEND[name][0].library
    assert any(line.startswith(f"{read.package}>={read.read},<") for line in wanted)


@either
def test_without_the_package_it_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_device, "find", lambda _: H100)
    absent = Library("a-package-that-nobody-has", "1")
    monkeypatch.setattr(type(KERNELS[name]), "library", absent)
    with pytest.raises(
        UsageError, match=r"a-package-that-nobody-has is not installed: pip install"
    ):
        choose(QuantSpec(4, 128), (256, 256), CUDA, BF16, prefer=name)


def test_no_package_is_imported_without_a_gpu() -> None:
    code = (
        "import sys, torch\n"
        "import llmquant.kernels as k\n"
        "from llmquant.spec import QuantSpec\n"
        "for device in ('cpu', 'cuda'):\n"
        "    k.choose(QuantSpec(4, 128), (256, 256), torch.device(device), torch.bfloat16)\n"
        "print(sorted({n.partition('.')[0] for n in sys.modules} & {'humming', 'gemlite', 'triton'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@either
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 512, None], ids=["g32", "g512", "row"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_package_that_does_as_it_says_is_trusted(
    name: str, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kernel, pretend = PRETEND[name]
    pretend(monkeypatch)
    assert prove(kernel, QuantSpec(bits, group, symmetric), dtype, CPU) is None


def swapped(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    spec = QuantSpec(config.bits, config.group or None)
    weight = library._probe((config.n, config.k), spec)
    made = humming_layout.pack(weight, config.dtype)
    return {"weight": made["packed"].flip(0), "weight_scale": made["scales"]}


def fails(*args: Any, **named: Any) -> Any:
    raise RuntimeError("nvcc was not found\nand much more")


def full(*args: Any, **named: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


def zero(x: Tensor, *args: Any) -> Tensor:
    return x.new_zeros(x.shape[0], 128)


@pytest.mark.parametrize(
    ("name", "faults", "reason"),
    [
        ("humming", {"transform_humming_tensors": swapped}, "humming-kernels 1.2 lays out packed in another way than the 0.1.19 that was read"),
        ("humming", {"transform_humming_tensors": fails}, "humming-kernels 1.2 does not run here: nvcc was not found"),
        ("humming", {"humming_forward": lambda c, x, **_: zero(x)}, "humming-kernels 1.2 multiplies 1 rows wrongly"),
        ("gemlite", {"forward_functional": lambda x, *_: zero(x)}, "gemlite 1.2 multiplies 1 rows wrongly"),
        ("gemlite", {"GemLiteLinear": fails}, "gemlite 1.2 does not run here: nvcc was not found"),
    ],
    ids=["another layout", "no compiler", "wrong products", "wrong products of gemlite", "gemlite fails"],
)  # fmt: skip
def test_a_package_that_does_otherwise_is_a_reason(
    name: str, faults: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, pretend = PRETEND[name]
    pretend(monkeypatch, **faults)
    assert reason in (prove(kernel, QuantSpec(4, 128), BF16, CPU) or "")


def test_a_wrong_product_of_many_rows_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gemlite(monkeypatch)
    right = sys.modules["gemlite"].forward_functional
    wrong = lambda x, *a: right(x, *a) if x.shape[0] < 80 else zero(x)  # noqa: E731
    pretend_gemlite(monkeypatch, forward_functional=wrong)
    assert "80 rows" in (prove(Gemlite(), QuantSpec(4, 128), BF16, CPU) or "")


def test_memory_that_runs_out_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_humming(monkeypatch, humming_forward=full)
    with pytest.raises(torch.OutOfMemoryError):
        prove(Humming(), QuantSpec(4, 128), BF16, CPU)


def test_a_shape_that_humming_has_no_tiles_for_is_a_reason(
    here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(config: Any, device: torch.device) -> None:
        assert config.n > 64, "block_shape_n"

    pretend_humming(monkeypatch, get_heuristics_config=refuses)
    asked = Humming()._asked
    assert asked(QuantSpec(4, 32), (128, 64), CPU, BF16) is None
    assert "refuses [64, 64]: block_shape_n" in (asked(QuantSpec(4, 32), (64, 64), CPU, BF16) or "")


def test_columns_in_an_order_of_their_own_go_to_torchs_operator(here: Callable[..., None]) -> None:
    here()
    weight = random_weight(64, 256, QuantSpec(4, 128), g_idx=shuffled_groups(256, 2))
    kernel, refused = choose(weight.spec, weight.shape, CUDA, BF16, True, weight=weight)
    assert kernel.name == "cuda_int4"
    assert "g_idx" in refused["humming"]
    assert "g_idx" in refused["gemlite"]
