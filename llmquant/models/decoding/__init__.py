"""Decoding token by token: faster for packed models on a CPU, and what it must heed."""
