"""What a search tells: while it runs, and at its end."""
