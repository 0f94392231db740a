"""Several sequences through one transformers model: together, or in turn."""
