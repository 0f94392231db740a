"""Proving what quantization cost: perplexity, divergence from the original, bytes and speed, with
their uncertainty.

The package stands on llmquant's public names only. Importing it does nothing and loads no torch:
modules are imported by what needs them, so that ``llmquant --help`` stays quick.
"""
