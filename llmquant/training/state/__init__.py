"""What an interrupted training leaves, and what of it the next one goes on from."""
