"""Faster decoding of packed models on a CPU."""
