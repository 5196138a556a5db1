"""Every reader of the same activations, compared."""
