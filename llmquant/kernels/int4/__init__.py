"""torch's int4 operators as kernels: what the CPU's and CUDA's have in common, and CUDA's."""
