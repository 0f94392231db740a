"""A model on the user's own prompts: what it answers, scored item by item."""
