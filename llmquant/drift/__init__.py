"""Drift: what a model's prompts and answers were like when it was measured, and whether they still
are."""
