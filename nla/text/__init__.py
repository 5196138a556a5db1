"""Text to tokens, chat prompts, claims and fingerprints."""
