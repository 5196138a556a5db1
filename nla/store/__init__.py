"""Activations of a corpus on disk, memory-mapped."""
