"""The smallest quantized model whose measured loss is within a bound: tried from cheap to dear."""
