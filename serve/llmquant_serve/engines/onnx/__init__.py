"""ONNX exports, run by onnxruntime-genai in a process of its own environment."""
