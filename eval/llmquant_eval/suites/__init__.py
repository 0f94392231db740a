"""Many models on the same texts."""
