"""What a written graph holds, as JSON on stdout: nodes, and where each initializer's bytes lie.

``python graph.py MODEL.onnx``. The bytes themselves are read by llmquant, from the file. Tensors
that lie in the graph file itself are given as base64.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import onnx


def tensor(stored: Any) -> dict[str, Any]:
    """One initializer: its dtype by name, its shape, and its place."""
    facts: dict[str, Any] = {
        "dtype": onnx.TensorProto.DataType.Name(stored.data_type),
        "shape": list(stored.dims),
    }
    place = {entry.key: entry.value for entry in stored.external_data}
    if stored.data_location == onnx.TensorProto.EXTERNAL:
        facts["file"] = place["location"]
        facts["offset"], facts["length"] = int(place.get("offset", 0)), int(place["length"])
    else:
        raw = onnx.numpy_helper.to_array(stored).tobytes()
        facts["bytes"] = base64.b64encode(raw).decode()
    return facts


def main(path: str) -> None:
    graph = onnx.load(path, load_external_data=False).graph
    nodes = [
        {
            "name": node.name,
            "op": node.op_type,
            "inputs": list(node.input),
            "ints": {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT},
        }
        for node in graph.node
    ]
    initializers = {stored.name: tensor(stored) for stored in graph.initializer}
    json.dump({"nodes": nodes, "initializers": initializers}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
