"""Linears whose quantized numbers are trained, and norms beside them."""
