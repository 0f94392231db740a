"""The tokens of a GGUF file, and a folder's tokenizer made of them."""
