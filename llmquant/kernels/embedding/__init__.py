"""Token embeddings looked up in packed rows."""
