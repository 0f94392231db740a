"""The checks that are run on a GPU, run on kernels of the CPU; and that they notice faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_checks import check_kernel
from torch import Tensor

from llmquant.kernels import KERNELS
from llmquant.kernels.reference import Reference
from llmquant.spec import QuantSpec

CPU = torch.device("cpu")
SHAPE = (128, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_right_kernels_pass(kernel: str, symmetric: bool, dtype: torch.dtype) -> None:
    check_kernel(KERNELS[kernel], QuantSpec(4, 64, symmetric), SHAPE, dtype, CPU)


class OtherWeight(Reference):
    def weight(self, *arguments: Any) -> Tensor:
        return super().weight(*arguments) * 1.01


class OtherRows(Reference):
    def rows(self, prepared: Any, ids: Tensor, *arguments: Any) -> Tensor:
        return super().rows(prepared, ids.flip(0), *arguments)


class OtherProduct(Reference):
    """Wrong where there are many rows."""

    def linear(self, x: Tensor, *arguments: Any) -> Tensor:
        y = super().linear(x, *arguments)
        return y if x.shape[0] < 80 else y.roll(1, dims=1)


class Refusing(Reference):
    def why_not(self, *arguments: Any) -> str | None:
        return "it rains"


@pytest.mark.parametrize(
    ("kernel", "told"),
    [
        (OtherWeight(), "not the weight"),
        (OtherRows(), "not its rows"),
        (OtherProduct(), "80 rows are off"),
        (Refusing(), "refuses: it rains"),
    ],
    ids=["weight", "rows", "product", "refusal"],
)
def test_faults_are_noticed(kernel: Reference, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_kernel(kernel, QuantSpec(4, 64, False), SHAPE, torch.bfloat16, CPU)
