"""A folder's tensors and the places of the model that its config describes, brought together."""
