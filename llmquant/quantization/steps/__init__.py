"""What is done to a block: channels scaled, weights rounded and tuned."""
