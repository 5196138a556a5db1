"""Language models: loaded, read, hooked and sampled."""
