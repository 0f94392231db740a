"""Tasks of lm-eval with our models."""
