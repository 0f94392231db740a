"""Weights of a float graph to INT8, a scale for each output; activations are rounded as the graph
runs (ONNX Runtime's dynamic quantization).

``python dynamic.py MODEL.onnx [NODE ...]``: in place, but for nodes that stay as they are. All
tensors go into ``MODEL.onnx.data``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic


def main(path: str, kept: list[str]) -> None:
    whole = Path(path)
    rounded = whole.with_name("rounded.onnx")
    quantize_dynamic(
        whole,
        rounded,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=kept,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={"MatMulConstBOnly": True},
    )
    model = onnx.load(rounded)
    for stored in model.graph.initializer:  # only raw bytes go into the data file
        stored.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored), stored.name)
        )
    data = f"{whole.name}.data"
    for old in (*whole.parent.glob(f"{rounded.name}*"), whole, whole.with_name(data)):
        old.unlink()
    onnx.save(model, whole, save_as_external_data=True, location=data, size_threshold=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
