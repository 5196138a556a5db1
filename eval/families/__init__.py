"""One file a phenomenon: the causal ground truth, and whether explanations name it."""
