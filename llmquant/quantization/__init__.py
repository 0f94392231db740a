"""A quantization run: prepared, walked block by block, written, proved, resumed."""
