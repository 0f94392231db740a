"""A stand-in for the Python of the ONNX environment, so that the export can be tested without it.

It reads the GPTQ folder as onnxruntime-genai's builder does (codes of words, a zero-point more by
one in its own bits), writes the initializers that MatMulNBits takes, and gives the graph back as
``inside/graph.py`` does. ``FAKE_ONNX`` in the environment says what is to go wrong. It imports
neither torch nor onnx.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

MODE = os.environ.get("FAKE_ONNX", "")
Array = np.ndarray[Any, Any]
TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "uint8": "UINT8", "int8": "INT8"}


def fields(words: Array, bits: int) -> Array:
    """int32 ``[rows, words]`` → uint8 ``[rows, values]``, lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    every = (words.astype(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)
    return every.reshape(words.shape[0], -1).astype(np.uint8)


def packed(values: Array, bits: int) -> Array:
    """uint8 ``[rows, values]`` → uint8 ``[rows, bytes]``, a row padded to whole bytes."""
    per = 8 // bits
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % per)))
    parts = padded.reshape(values.shape[0], -1, per).astype(np.uint16)
    return (parts << np.arange(0, 8, bits, dtype=np.uint16)).sum(-1).astype(np.uint8)


class Graph:
    """Initializers in a data file, and nodes."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.nodes: list[dict[str, Any]] = []
        self.initializers: dict[str, Any] = {}

    def add(self, name: str, value: Array) -> str:
        raw = np.ascontiguousarray(value).tobytes()
        self.initializers[name] = {
            "dtype": TYPES[str(value.dtype)],
            "shape": list(value.shape),
            "file": "model.onnx.data",
            "offset": len(self.data),
            "length": len(raw),
        }
        self.data += raw
        return name

    def node(self, name: str, op: str, inputs: list[str], **ints: int) -> None:
        self.nodes.append({"name": name, "op": op, "inputs": ["x", *inputs], "ints": ints})

    def save(self, folder: Path) -> None:
        (folder / "model.onnx.data").write_bytes(bytes(self.data))
        facts = {"nodes": self.nodes, "initializers": self.initializers}
        (folder / "model.onnx").write_text(json.dumps(facts))


def linear(graph: Graph, node: str, parts: list[dict[str, Array]], bits: int) -> None:
    """One MatMulNBits of fused GPTQ linears."""
    codes = np.concatenate([fields(p["qweight"].T, bits) for p in parts])
    scales = np.concatenate([p["scales"].T for p in parts])
    zeros = np.concatenate([fields(p["qzeros"], bits).T for p in parts])
    zeros = (zeros + 1) & ((1 << bits) - 1)
    if node.startswith("/model/layers.1/mlp/down_proj"):
        if MODE == "flip-code":
            codes[3, 5] ^= 1
        elif MODE == "flip-scale":
            scales = scales.copy()
            scales[0, 0] *= 2
        elif MODE == "flip-zero":
            zeros[1, 1] ^= 1
    base = node[1:].replace("/", ".")
    groups = scales.shape[1]
    blocks = packed(codes, bits).reshape(len(codes), groups, -1)
    names = [graph.add(f"{base}.qweight", blocks), graph.add(f"{base}.scales", scales.reshape(-1))]
    names.append(graph.add(f"{base}.qzeros", packed(zeros, bits).reshape(-1)))
    rows, columns = codes.shape
    block = columns // groups
    graph.node(node, "MatMulNBits", names, bits=bits, block_size=block, K=columns, N=rows)


def build(source: Path, target: Path, options: dict[str, str]) -> None:
    if MODE == "crash":
        print("Reading layer 0")
        raise NotImplementedError("the builder does not like this")
    if MODE == "full":
        raise OSError(28, "No space left on device")
    if MODE == "kill":
        os.kill(os.getpid(), 9)
    target.mkdir(parents=True)
    tensors = load_file(source / "model.safetensors")
    label = json.loads((source / "config.json").read_text())["quantization_config"]
    modules: dict[str, dict[str, Array]] = {}
    graph = Graph()
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("qweight", "qzeros", "scales", "g_idx"):
            modules.setdefault(module, {})[leaf] = value
        elif module != "lm_head":
            graph.add(name, value.astype(np.float32))
    layers = sorted({int(m.split(".")[2]) for m in modules if ".layers." in m})
    for i in layers:
        parts = {m.rpartition(".")[2]: v for m, v in modules.items() if f".layers.{i}." in m}
        qkv = [parts.pop(n) for n in ("q_proj", "k_proj", "v_proj")]
        linear(graph, f"/model/layers.{i}/attn/qkv_proj/MatMulNBits", qkv, label["bits"])
        for role, part in parts.items():
            if MODE == "lose" and role == "up_proj":
                continue
            where = "attn" if role == "o_proj" else "mlp"
            linear(graph, f"/model/layers.{i}/{where}/{role}/MatMulNBits", [part], label["bits"])
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).astype(np.float32)
    if "/lm_head/MatMul" in options.get("nodes_to_exclude", ""):
        graph.node("/lm_head/MatMul", "MatMul", [graph.add("lm_head.MatMul.weight", head.T)])
    else:
        codes = graph.add("lm_head.MatMul.weight_Q8", np.zeros((len(head), 2, 32), np.uint8))
        scales = graph.add("lm_head.MatMul.weight_scales", np.ones(2 * len(head), np.float32))
        ints = {"bits": 8, "block_size": 32, "K": head.shape[1], "N": len(head)}
        graph.node("/lm_head/MatMul_Q8", "MatMulNBits", [codes, scales], **ints)
    graph.save(target)
    (target / "genai_config.json").write_text('{"model": {"decoder": {"session_options": {}}}}')


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        if MODE == "lacking":
            raise ModuleNotFoundError("No package metadata was found for onnxruntime-genai")
        print(*["1.0"] * len(arguments[2:]))
    elif arguments[0] == "-m":
        given = dict(itertools.pairwise(arguments))
        extra = arguments[arguments.index("--extra_options") + 1 :]
        build(Path(given["-i"]), Path(given["-o"]), dict(e.split("=", 1) for e in extra))
    elif arguments[0].endswith("graph.py"):
        print(Path(arguments[1]).read_text())
    elif arguments[0].endswith("worker.py"):
        sys.exit("this machine has no libonnxruntime")
    else:
        sys.exit(f"not faked: {arguments}")


if __name__ == "__main__":
    assert sys.argv[1] == "-I", "the environment's Python must not see ours"
    assert not any(re.match("PYTHONPATH|VIRTUAL_ENV", name) for name in os.environ)
    main(sys.argv[2:])
