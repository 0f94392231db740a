"""ShardWriter's twin is safetensors itself: the same tensors must give the same bytes, in whatever
order they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.shards import DTYPE_NAMES, ShardWriter, Stored, header


def every_dtype() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i, dtype in enumerate(DTYPE_NAMES):
        tensors[f"é{i}.a"] = (
            torch.rand(3, i + 1, generator=torch.Generator().manual_seed(i)) * 2
        ).to(dtype)
        tensors[f"b{i}.scalar"] = torch.ones((), dtype=dtype)
        tensors[f"z{i}.empty"] = torch.zeros(0, 3, dtype=dtype)
    return tensors


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_the_bytes_are_those_of_save_file(tmp_path: Path, backwards: bool) -> None:
    tensors = every_dtype()
    save_file(tensors, tmp_path / "twin.safetensors", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path / "ours.safetensors")
    for name in sorted(tensors, reverse=backwards):
        writer.add(name, tensors[name])
    writer.finish()
    assert (tmp_path / "ours.safetensors").read_bytes() == (
        tmp_path / "twin.safetensors"
    ).read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ours.safetensors", "twin.safetensors"]


def test_transposed_and_sliced_tensors_are_stored_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.int32).view(4, 6)
    writer = ShardWriter(tmp_path / "s.safetensors")
    writer.add("t", base.T)
    writer.add("s", base[1:3, ::2])
    writer.finish()
    read = load_file(tmp_path / "s.safetensors")
    assert torch.equal(read["t"], base.T)
    assert torch.equal(read["s"], base[1:3, ::2])


def test_the_header_is_known_without_tensors(tmp_path: Path) -> None:
    tensors = every_dtype()
    stored = {n: Stored(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
    save_file(tensors, tmp_path / "twin.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "twin.safetensors").read_bytes().startswith(header(stored))
