"""Recompute every `expected.safetensors` here from the raw bytes, with numpy alone, and compare bit
for bit.

Run it as `python tests/golden/check.py`.
"""

import json
import re
import struct
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
DTYPES = {"F16": np.float16, "I8": np.int8, "I32": np.int32, "I64": np.int64}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def load(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, but for the bf16 ones, which numpy cannot hold and no
    packed weight uses."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    tensors = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if entry.get("dtype") in DTYPES:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(
                entry["shape"]
            )
    return tensors


def dense(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`[n, words]` int32 -> `[n, count]`: value i is the bits [i·b, (i+1)·b) of the row, lowest bit
    first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def padded(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The same, but a word holds 32 // b whole values and its leftover high bits are waste."""
    shifts = np.arange(32 // bits) * bits
    values = (words.astype(np.int64)[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.reshape(len(words), -1)[:, :count]


def compressed_tensors(config: dict, state: dict, module: str) -> np.ndarray:
    scheme = next(
        entry["weights"]
        for entry in config["config_groups"].values()
        if any(t == "Linear" or re.match(t.removeprefix("re:"), module) for t in entry["targets"])
    )
    scale = state["weight_scale"]
    if "weight" in state:
        return state["weight"].astype(scale.dtype) * scale
    bits = scheme["num_bits"]
    unpack = dense if tuple(map(int, config["version"].split(".")[:2])) >= (0, 18) else padded
    rows, columns = state["weight_shape"]
    codes = unpack(state["weight_packed"], bits, columns)
    zeros = np.full(scale.shape, 1 << (bits - 1))
    if not scheme["symmetric"]:
        zeros = unpack(state["weight_zero_point"].T, bits, rows).T
    group = state.get("weight_g_idx", np.arange(columns) // (columns // scale.shape[1]))
    return (codes - zeros[:, group]).astype(scale.dtype) * scale[:, group]


def gptq(config: dict, state: dict) -> np.ndarray:
    bits, scale = config["bits"], state["scales"]
    groups, rows = scale.shape
    columns = state["qweight"].shape[0] * 32 // bits
    codes = dense(state["qweight"].T, bits, columns)
    group = state.get("g_idx", np.arange(columns) // (columns // groups))
    return (codes - gptq_zeros(config, state["qzeros"], rows).T[:, group]).astype(
        scale.dtype
    ) * scale.T[:, group]


def gptq_zeros(config: dict, words: np.ndarray, rows: int) -> np.ndarray:
    """What the writer itself reads, `[groups, rows]`. The two tools differ on a v1 zero point of 0
    (README.md)."""
    bits = config["bits"]
    if config.get("packing_format") == "auto_round" or config.get("checkpoint_format") == "gptq_v2":
        return dense(words, bits, rows)
    if "autoround_version" in config:
        return dense(words, bits, rows) + 1
    if bits == 3:
        return (dense(words, bits, rows) + 1) % 8
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return dense((words.view(np.uint32) + np.uint32(ones)).view(np.int32), bits, rows)


def awq(state: dict) -> np.ndarray:
    scale = state["scales"]

    def natural(words: np.ndarray) -> np.ndarray:
        """`[n, words]` -> `[n, out]`: nibble i of a word belongs to its column AWQ_ORDER[i]."""
        nibbles = dense(words, 4, 8 * words.shape[1]).reshape(len(words), -1, 8)
        return nibbles[:, :, np.argsort(AWQ_ORDER)].reshape(len(words), -1)

    codes, zeros = natural(state["qweight"]), natural(state["qzeros"])
    group = np.arange(len(codes)) // (len(codes) // len(scale))
    return ((codes - zeros[group]).astype(scale.dtype) * scale[group]).T


def dequantize(config: dict, tensors: dict, module: str) -> np.ndarray:
    state = {
        name.removeprefix(f"{module}."): t
        for name, t in tensors.items()
        if name.startswith(f"{module}.")
    }
    if config["quant_method"] == "compressed-tensors":
        return compressed_tensors(config, state, module)
    return (
        awq(state)
        if config.get("packing_format", config["quant_method"]).endswith("awq")
        else gptq(config, state)
    )


def main() -> int:
    failures = 0
    for path in sorted(HERE.glob("*/expected.safetensors")):
        config = json.loads((path.parent / "config.json").read_text())["quantization_config"]
        tensors, expected = load(path.parent / "model.safetensors"), load(path)
        for name, weight in expected.items():
            ours = dequantize(config, tensors, name.removesuffix(".weight"))
            if ours.dtype != weight.dtype or not np.array_equal(ours, weight):
                failures += 1
                print(
                    f"{path.parent.name}: {name} differs in {(ours != weight).sum()} of {weight.size} weights"
                )
        print(f"{path.parent.name}: {len(expected)} weights compared")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
