"""A model rotated: which matrices write to the residual stream and which read it."""
