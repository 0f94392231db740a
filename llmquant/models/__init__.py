"""transformers models: their parts and names, built empty, loaded packed, registered with
transformers."""
