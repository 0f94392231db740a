"""``llmquant doctor`` and ``--kernel`` on machines that have a GPU, and that have none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from children import Run

from llmquant.cli.checkup import machine
from llmquant.cli.commands import doctor
from llmquant.kernels.gpu import device as gpu_device
from llmquant.kernels.gpu import library
from llmquant.kernels.gpu.device import Gpu
from llmquant.kernels.gpu.library import Library, LibraryKernel

CUDA = torch.device("cuda")


def row(bits: int) -> str:
    facts = machine._kernels(CUDA, torch.bfloat16)[f"W{bits} g128"]
    name, text = doctor._kernel(f"W{bits} g128", facts)
    assert name == f"kernel W{bits} g128"
    return text


@pytest.mark.parametrize(
    ("gpu", "missing", "bits", "told"),
    [
        (Gpu(False, (9, 0)), (), 4, "humming in bfloat16 (not cpu: it runs on the CPU, not on cuda; not cpu_int4: it runs on the CPU, not on cuda)"),
        (Gpu(False, (9, 0)), ("humming-kernels",), 8, "not humming: not there)"),
        (Gpu(True, (9, 4)), (), 3, "not gemlite: it takes 2, 4 and 8 bits, not 3; not cuda_int4: it takes 4 bits, not 3)"),
        (None, (), 2, "reference in bfloat16"),
    ],
    ids=["H100", "H100 without humming", "AMD", "none"],
)  # fmt: skip
def test_doctor_says_which_kernel_and_why_not_those_before(
    gpu: Gpu | None, missing: tuple[str, ...], bits: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_device, "find", lambda _: gpu)
    monkeypatch.setattr(
        Library, "why_missing", lambda self: "not there" if self.package in missing else None
    )
    monkeypatch.setattr(library, "prove", lambda *_: None)
    monkeypatch.setattr(LibraryKernel, "_asked", lambda *_: None)
    assert told in row(bits)


@pytest.mark.parametrize("name", ["humming", "gemlite", "cuda_int4"])
def test_a_kernel_that_cannot_be_had_here_is_refused_with_its_reason(
    name: str, quantized: Path, run: Run
) -> None:
    done = run("generate", str(quantized), "x", "--device", "cpu", "--kernel", name)
    assert done.code == 2
    assert f"kernel {name} cannot take a W4 g32 sym weight" in done.err
    assert "GPU, not on cpu; use --kernel auto" in done.err
