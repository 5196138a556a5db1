"""Conversations from files, as the target's exact tokens."""
