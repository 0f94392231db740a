"""Texts cut into windows, and every token of them scored."""
