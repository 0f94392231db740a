"""Which width and group size each linear gets: ``llmquant allocate``, ``quantize --target-bpw``."""
