"""A rung: made, measured and kept on disk."""
