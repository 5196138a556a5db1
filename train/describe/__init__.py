"""Who writes the warm-start texts."""
