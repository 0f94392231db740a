"""Before a run: what it would do and need, and which bits each linear should get."""
