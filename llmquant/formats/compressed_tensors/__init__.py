"""The layouts of compressed-tensors, which vLLM and transformers read."""
