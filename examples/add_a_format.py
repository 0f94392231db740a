"""What a byte layout is: a pair `pack` and `unpack` that are exact inverses, and a `why_not`.

    python examples/add_a_format.py

llmquant's formats are a closed list: reading a folder must not depend on what was imported before.
So this is the first part of the way, outside the library and with public names alone. A toy layout
with two 4-bit codes a byte stores every linear of the example model in a safetensors file, reads
the file back and compares digests. `docs/architecture.md` says which files to touch to make it one
of the library's. Took 7 seconds on two cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmquant

MODEL = Path(__file__).resolve().parent / "tiny-llama"
SPEC = llmquant.QuantSpec(bits=4, group_size=64, symmetric=False)


class Nibbles:
    """The toy layout of a weight ``[out, in]`` with ``G`` groups a row.

    ``nibbles`` uint8 ``[out, in / 2]``: column 2i in the low, 2i + 1 in the high half of byte i;
    ``scales`` fp16 ``[out, G]``; ``zeros`` uint8 ``[out, G]``.
    """

    name = "nibbles"

    def why_not(self, spec: llmquant.QuantSpec, shape: tuple[int, int]) -> str | None:
        """Why a weight cannot be stored, or None. Asked before anything is computed."""
        if spec.bits != 4:
            return f"it holds 4 bits, not {spec.bits}"
        if shape[1] % 2:
            return f"{shape[1]} columns do not fill whole bytes"
        return None

    def pack(self, weight: llmquant.QuantizedWeight) -> dict[str, Tensor]:
        """Tensors to store. What the layout cannot hold is an error, never an approximation."""
        reason = self.why_not(weight.spec, weight.shape)
        if reason is None and weight.g_idx is not None:
            reason = "it has no place for a g_idx"
        stored = weight.scales.to(torch.float16)
        if reason is None and not torch.equal(stored.float(), weight.scales):
            reason = "a scale is not exact in fp16"
        if reason is not None:
            raise ValueError(f"{self.name}: {reason}")
        low, high = weight.codes[:, ::2], weight.codes[:, 1::2]
        return {"nibbles": low | (high << 4), "scales": stored, "zeros": weight.zeros}

    def unpack(
        self, tensors: Mapping[str, Tensor], spec: llmquant.QuantSpec
    ) -> llmquant.QuantizedWeight:
        """The exact inverse of :meth:`pack`."""
        nibbles = tensors["nibbles"]
        codes = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).reshape(nibbles.shape[0], -1)
        return llmquant.QuantizedWeight(codes, tensors["scales"].float(), tensors["zeros"], spec)


def rounded(weight: Tensor) -> llmquant.QuantizedWeight:
    """Round to nearest by the smallest and largest weight of each group.

    The library searches better scales; a format does not care. Scales are rounded to fp16 *before*
    codes are chosen, so that what is stored is what was computed.
    """
    groups = weight.float().reshape(weight.shape[0], -1, SPEC.width(weight.shape[1]))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / SPEC.max_code).clamp(min=2.0**-14).to(torch.float16).float()
    zeros = (-low / scales).round().clamp(0, SPEC.max_code)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, SPEC.max_code)
    return llmquant.QuantizedWeight(
        codes.reshape(weight.shape).to(torch.uint8), scales, zeros.to(torch.uint8), SPEC
    )


def main() -> None:
    """Pack every linear, write, read back, compare."""
    layout = Nibbles()
    original = load_file(MODEL / "model.safetensors")
    linears = {n.removesuffix(".weight"): w for n, w in original.items() if "_proj." in n}
    weights = {name: rounded(weight) for name, weight in linears.items()}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.safetensors"
        tensors = {f"{n}.{s}": t for n, w in weights.items() for s, t in layout.pack(w).items()}
        save_file(tensors, path)
        print(f"{len(weights)} linears, {path.stat().st_size / 1e6:.2f} MB")
        stored = load_file(path)
    for name, weight in weights.items():
        mine = {s: stored[f"{name}.{s}"] for s in ("nibbles", "scales", "zeros")}
        assert layout.unpack(mine, SPEC).digest() == weight.digest(), name
    print("every linear came back with the same digest: codes, scales, zero-points, groups")

    eight = llmquant.QuantSpec(bits=8, group_size=64)
    print(f"8 bits: {layout.why_not(eight, (256, 256))}")


if __name__ == "__main__":
    main()
