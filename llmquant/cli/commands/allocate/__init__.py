"""A size in, a recipe out: the command, and what it shows and writes."""
