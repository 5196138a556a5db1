"""Warm start and joint training."""
