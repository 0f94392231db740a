"""Checkpoints whose tensors are read as what they mean, which is not what is stored."""
