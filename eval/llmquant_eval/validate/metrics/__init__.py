"""What is scored of an answer: right or wrong, structure, behaviour, the user's own."""
