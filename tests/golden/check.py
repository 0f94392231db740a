"""Recompute every `expected.safetensors` here from the raw bytes, with numpy alone and no shortcut, and compare bit for bit.

    python tests/golden/check.py
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent


def dense(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`[n, words]` int32 -> `[n, count]`: value i is the bits [i·b, (i+1)·b) of the row read as one little-endian number."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same, but a word holds 32 // b whole values and its leftover high bits are waste."""
    shifts = np.arange(32 // bits) * bits
    values = (words.astype(np.int64)[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(len(words), -1)[:, :count]


def compressed_tensors(config: dict, tensors: dict, module: str) -> np.ndarray:
    scheme = next(
        entry["weights"]
        for entry in config["config_groups"].values()
        if any(t == "Linear" or re.match(t.removeprefix("re:"), module) for t in entry["targets"])
    )
    scale = tensors[f"{module}.weight_scale"]
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"].astype(scale.dtype) * scale
    bits = scheme["num_bits"]
    unpack = dense if tuple(map(int, config["version"].split(".")[:2])) >= (0, 18) else padded
    rows, columns = tensors[f"{module}.weight_shape"]
    codes = unpack(tensors[f"{module}.weight_packed"], bits, columns)
    zeros = np.full(scale.shape, 1 << (bits - 1))
    if not scheme["symmetric"]:
        zeros = unpack(tensors[f"{module}.weight_zero_point"].T, bits, rows).T
    group = tensors.get(f"{module}.weight_g_idx", np.arange(columns) // (columns // scale.shape[1]))
    return (codes - zeros[:, group]).astype(scale.dtype) * scale[:, group]


def main() -> None:
    for expected in sorted(HERE.glob("*/expected.safetensors")):
        config = json.loads((expected.parent / "config.json").read_text())["quantization_config"]
        tensors = load_file(expected.parent / "model.safetensors")
        for name, weight in load_file(expected).items():
            ours = compressed_tensors(config, tensors, name.removesuffix(".weight"))
            if ours.dtype != weight.dtype or not np.array_equal(ours, weight):
                print(f"{expected.parent.name}: {name} differs by {np.abs(ours - weight).max()}")
        print(f"{expected.parent.name}: checked")


if __name__ == "__main__":
    main()
