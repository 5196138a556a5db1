"""Documents to activations."""
