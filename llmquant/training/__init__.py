"""Training with quantized weights: scales, codes or adapters, towards the unquantized original."""
