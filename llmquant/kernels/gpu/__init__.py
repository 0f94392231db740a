"""Kernels of other packages on a GPU: their layouts as functions of ours, and the calls."""
