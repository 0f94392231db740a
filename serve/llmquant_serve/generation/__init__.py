"""Text and chat turns to token ids and back."""
