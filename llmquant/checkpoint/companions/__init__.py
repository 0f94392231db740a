"""The files of a model folder beside its weights."""
