"""What files call a model's modules and tensors, and a model made to call them so."""
