"""Scripts for the Python of the ONNX environment. Nothing here is imported, and nothing of llmquant
is imported here."""
