"""Where a model uses a latent: patches, gates, traces and graphs."""
