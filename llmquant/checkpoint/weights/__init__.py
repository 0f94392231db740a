"""The weight files of a model folder: which of them count, and what their headers say."""
