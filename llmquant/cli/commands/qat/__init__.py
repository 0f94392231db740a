"""Training: the command, and its many options."""
